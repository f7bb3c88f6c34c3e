"""Peaks of resident memory: measured by the kernel and by samples, for windows that nest and overlap.

What a peak is used for is in ``test_memory_tier``.
"""

import gc
import mmap
import os
import threading
from pathlib import Path

import pytest

from modelcache import peaks
from modelcache.peaks import PeakMeter
from tests.support.children import run
from tests.support.waiting import WAIT, Spawn, eventually

MIB = 1 << 20
NEAR = 8 * MIB
"""What the interpreter may take on its own meanwhile."""


@pytest.fixture(params=["kernel", "sampled"])
def meter(request: pytest.FixtureRequest) -> PeakMeter:
    """Give a meter that measures in either way."""
    meter = PeakMeter(sampled=request.param == "sampled")
    if meter.available != request.param:
        pytest.skip("this kernel does not keep a mark that can be set back")
    return meter


def take(size: int) -> mmap.mmap:
    """Return resident memory that goes back to the system when it is dropped, whatever the allocator would do."""
    memory = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    return memory


def hold(size: int) -> None:
    """Take memory, keep it until any sampler must have seen it, and drop it."""
    held = take(size)
    for window in list(peaks._registry._sampled):
        eventually(lambda window=window: window.highest >= window._base + size - NEAR)  # type: ignore[misc]
    del held


def near(size: int, expected: int) -> bool:
    """Whether a measured size is what is expected."""
    return expected - NEAR < size < expected + NEAR


def test_peak_that_has_passed(meter: PeakMeter) -> None:
    """Memory that was taken and dropped within a window is its peak."""
    window = meter.begin()
    hold(64 * MIB)
    assert near(window.end(), 64 * MIB)


def test_peak_that_stays(meter: PeakMeter) -> None:
    """Memory that is still held at the end counts as well, on top of what was there."""
    before = take(32 * MIB)
    window = meter.begin()
    held = take(48 * MIB)
    assert near(window.end(), 48 * MIB)
    assert len(before) + len(held) == 80 * MIB


def test_nothing_taken(meter: PeakMeter) -> None:
    """A window in which nothing was taken, or memory was dropped, has next to no peak, and none below 0."""
    assert 0 <= meter.begin().end() < NEAR
    held = take(64 * MIB)
    window = meter.begin()
    del held
    assert 0 <= window.end() < NEAR


def test_earlier_peak_does_not_count(meter: PeakMeter) -> None:
    """What was taken and dropped before a window began is not its own."""
    hold(96 * MIB)
    window = meter.begin()
    hold(32 * MIB)
    assert near(window.end(), 32 * MIB)


def test_nested(meter: PeakMeter) -> None:
    """Windows within a window have their own peaks, and the outer one the highest, whichever that was in."""
    outer = meter.begin()
    hold(64 * MIB)
    first = meter.begin()
    hold(24 * MIB)
    assert near(first.end(), 24 * MIB)
    second = meter.begin()
    hold(40 * MIB)
    assert near(second.end(), 40 * MIB)
    assert near(outer.end(), 64 * MIB)


def test_overlapping(meter: PeakMeter) -> None:
    """Of windows that overlap, each has the peak of its own span."""
    one = meter.begin()
    hold(64 * MIB)
    other = meter.begin()
    hold(24 * MIB)
    assert near(one.end(), 64 * MIB)
    third = meter.begin()
    hold(40 * MIB)
    assert near(third.end(), 40 * MIB)
    assert near(other.end(), 40 * MIB)


def test_across_threads(meter: PeakMeter, spawn: Spawn) -> None:
    """A window of one thread sees what another takes, and is not disturbed by the windows of others."""
    stop, begun = threading.Event(), threading.Event()

    def churn() -> int:
        count = 0
        while not stop.is_set():
            PeakMeter(sampled=bool(count % 2)).begin().end()
            count += 1
            begun.set()
        return count

    workers = [spawn(churn) for _ in range(2)]
    try:
        assert begun.wait(WAIT)
        for size in (24 * MIB, 64 * MIB, 40 * MIB):
            window = meter.begin()
            held = take(size)
            eventually(lambda window=window, size=size: window.highest > window._base + size - NEAR)  # type: ignore[misc]
            held.close()
            assert near(window.end(), size)
    finally:
        stop.set()
    assert all(worker.result(WAIT) for worker in workers)


def test_ended_on_another_thread_and_twice(meter: PeakMeter, spawn: Spawn) -> None:
    """Any thread may end a window; ended again it says the same, whatever happens later."""
    window = meter.begin()
    hold(32 * MIB)
    result = spawn(window.end).result(WAIT)
    assert near(result, 32 * MIB)
    assert not {*peaks._registry._marked, *peaks._registry._sampled}
    hold(64 * MIB)
    assert window.end() == result


def test_meters_share_the_mark(meter: PeakMeter) -> None:
    """Two meters, such as those of two caches, do not set each other's peaks back."""
    window = meter.begin()
    hold(48 * MIB)
    PeakMeter().begin().end()
    assert PeakMeter().available in ("kernel", "sampled")
    assert near(window.end(), 48 * MIB)


def samplers() -> list[threading.Thread]:
    """Return the threads that sample."""
    return [thread for thread in threading.enumerate() if thread.name == "modelcache-peaks"]


def test_sampler_runs_only_while_it_is_needed() -> None:
    """One thread samples for all windows; it ends with the last of them, also where that is dropped unended."""
    meter = PeakMeter(sampled=True)
    assert meter.available == "sampled"
    assert not samplers()
    windows = [meter.begin() for _ in range(3)]
    assert len(samplers()) == 1
    windows.pop().end()
    assert len(samplers()) == 1
    windows.clear()
    gc.collect()
    eventually(lambda: not samplers())
    window = meter.begin()
    assert len(samplers()) == 1
    window.end()
    eventually(lambda: not samplers())


def test_kernel_needs_no_sampler(meter: PeakMeter) -> None:
    """Where the kernel keeps the mark no thread is started."""
    window = meter.begin()
    assert len(samplers()) == (meter.available == "sampled")
    window.end()


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, what is resident at the end counts."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    window = PeakMeter(sampled=True).begin()
    held = take(32 * MIB)
    assert near(window.end(), 32 * MIB)
    assert held


@pytest.mark.parametrize(
    ("status", "clear_refs"),
    [
        (None, None),
        ("Name: x\nVmHWM: 90000 kB\nVmRSS: 1000 kB\n", None),
        ("Name: x\nVmRSS: 1000 kB\n", ""),
        ("Name: x\nVmHWM: lots\nVmRSS: 1000 kB\n", ""),
        ("", ""),
        ("Name: x\nVmHWM: 90000 kB\nVmRSS: 1000 kB\n", ""),
    ],
    ids=["no /proc", "no clear_refs", "no mark", "garbled", "empty", "without effect"],
)
def test_kernel_that_does_not_do_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str | None, clear_refs: str | None
) -> None:
    """Where the mark is missing, can't be set back, or does not move when it is, samples are taken."""
    folder = tmp_path / "proc/self"
    folder.mkdir(parents=True)
    for name, text in (("status", status), ("clear_refs", clear_refs)):
        if text is not None:
            (folder / name).write_text(text)
    monkeypatch.setattr(peaks, "_ROOT", tmp_path)
    meter = PeakMeter()
    assert meter.available == "sampled"
    window = meter.begin()
    hold(32 * MIB)
    assert near(window.end(), 32 * MIB)


def test_kernel_that_stops_to_do_it(meter: PeakMeter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A window that was begun while the files were there keeps what was seen when they go."""
    window = meter.begin()
    held = take(32 * MIB)
    meter.begin().end()
    eventually(lambda: window.highest >= window._base + 24 * MIB or meter.available == "sampled")
    monkeypatch.setattr(peaks, "_ROOT", tmp_path)
    assert window.end() >= 0
    assert held


def test_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where resident memory can't be read in any way the peak is 0, and nothing raises."""

    def refuse() -> None:
        raise PermissionError(13, "hidden")

    monkeypatch.setattr(peaks, "_ROOT", tmp_path)
    monkeypatch.setattr("psutil.Process", refuse)
    window = PeakMeter().begin()
    held = take(32 * MIB)
    assert window.end() == 0
    assert held


def test_user_without_rights() -> None:
    """A plain user's process, which may write its own clear_refs but not read it, is measured by the kernel too."""
    if os.geteuid():
        pytest.skip("only root can become somebody else; the other tests show it for a plain user")
    assert (
        run(
            """
            from modelcache.peaks import PeakMeter
            if pid := os.fork():
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
            import ctypes
            ctypes.CDLL(None).prctl(4, 1)  # as after exec: dumpable, so that /proc/self is its own
            print(PeakMeter().available)
            """
        ).strip()
        == PeakMeter().available
    )


def test_fork() -> None:
    """A child begins without windows or sampler, whatever a thread of its parent was doing, and measures its own."""
    run(
        """
        from modelcache import peaks
        from modelcache.peaks import PeakMeter
        MIB = 2**20
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                PeakMeter().begin().end()
        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        outer, sampled = PeakMeter().begin(), PeakMeter(sampled=True).begin()
        for number in range(20):
            if pid := os.fork():
                assert os.waitpid(pid, 0)[1] == 0
                continue
            assert not peaks._registry._marked and not peaks._registry._sampled
            PeakMeter.reset_after_fork()
            for meter in PeakMeter(), PeakMeter(sampled=True):
                window = meter.begin()
                held = bytearray(b"1") * (16 * MIB)
                assert 12 * MIB < window.end() < 24 * MIB
                del held
            assert outer.end() >= 0 and sampled.end() >= 0
            os._exit(0)
        stop.set()
        for thread in threads:
            thread.join()
        held = bytearray(b"1") * (16 * MIB)
        assert outer.end() > 12 * MIB and sampled.end() > 12 * MIB
        """
    )


def test_fork_that_python_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork by other code than os.fork the windows are dropped on demand, without a lock."""
    inherited = peaks._registry
    PeakMeter.reset_after_fork()
    assert peaks._registry is inherited
    pid = os.getpid()
    with inherited._lock:
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        PeakMeter.reset_after_fork()
    assert peaks._registry is not inherited
    monkeypatch.undo()
    PeakMeter.reset_after_fork()
