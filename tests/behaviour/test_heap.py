"""Giving heap back: by the allocator that really serves the process, and to an effect."""

import ctypes
import glob
import os
import shutil
import subprocess
import sys
import time
import types
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelcache import Evicted, heap
from tests.support.fakes import DictSource
from tests.support.racing import small_cache
from tests.support.waiting import WAIT, Gate, Spawn, eventually

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="allocators are preloaded by LD_PRELOAD on Linux")
SAY = "from modelcache import heap; print(heap.allocator(), heap.give_back(), heap.give_back())"
MAKE = """
import os, psutil, sys, threading
from modelcache import heap
process = psutil.Process()
def resident(): return process.memory_info().rss >> 20
def fill(): return [bytearray(os.urandom(64 * 1024)) for _ in range(1600)]
"""
WATCHED = """
import ctypes
from modelcache import heap
calls, real = [], ctypes.CDLL
class Watched(real):
    def __getattr__(self, name):
        calls.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Watched
"""
FRAGMENTED = """
blocks = fill()
held = blocks[::40]
del blocks
before = resident()
assert heap.give_back()
print(before - resident())
"""
WHOLE = """
blocks = [bytearray(os.urandom(1)) * (8 << 20) for _ in range(16)]
del blocks
before = resident()
assert heap.give_back()
print(before - resident())
"""
OF_A_THREAD = """
blocks, filled, done = [], threading.Event(), threading.Event()
def work():
    blocks.extend(fill())
    filled.set()
    done.wait()
thread = threading.Thread(target=work)
thread.start()
filled.wait()
held = blocks[::40]
del blocks[:]
before = resident()
assert heap.give_back()
print(before - resident())
done.set()
"""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_found", {})


def _say(preload: str = "", script: str = SAY) -> str:
    package = Path(heap.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(package), "LD_PRELOAD": preload}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env, timeout=15)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _allocator(name: str) -> Path:
    found = sorted(glob.glob(f"/usr/lib/*/lib{name}*.so*"))  # noqa: PTH207 - two wild parts
    if not found:
        pytest.skip(f"lib{name} is not installed here")
    return Path(found[0])


def _glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("the C library here is not glibc")


@linux
def test_glibc_is_asked() -> None:
    """Under glibc's own allocator the heap is trimmed."""
    _glibc()
    assert heap.allocator() == "glibc"
    assert heap.give_back()


@linux
def test_fragmented_heap_comes_back() -> None:
    """Freed blocks between blocks that are still held leave the resident set."""
    _glibc()
    process = psutil.Process()
    blocks = [bytearray(os.urandom(64 * 1024)) for _ in range(1600)]
    held = blocks[::40]
    del blocks
    before = process.memory_info().rss
    assert heap.give_back()
    assert before - process.memory_info().rss > 50 * MIB
    assert len(held) == 40


@linux
@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc_minimal", "mimalloc"])
def test_preloaded_allocator_is_asked(name: str) -> None:
    """A preloaded allocator that we know how to ask is named, and asked."""
    assert _say(str(_allocator(name))) == f"{name.removesuffix('_minimal')} True True"


@linux
@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("jemalloc", FRAGMENTED),
        ("jemalloc", OF_A_THREAD),
        ("tcmalloc_minimal", FRAGMENTED),
        ("tcmalloc_minimal", OF_A_THREAD),
        ("mimalloc", WHOLE),  # keeps what lies between held blocks
    ],
)
def test_preloaded_allocator_gives_back(monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Under a preloaded allocator freed blocks leave the resident set."""
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:-1,muzzy_decay_ms:-1")  # so that jemalloc does nothing on its own
    assert int(_say(str(_allocator(name)), MAKE + script)) > 50


@linux
def test_mimalloc_gives_back_at_once_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told not to delay, mimalloc keeps next to nothing of what lies between held blocks."""
    monkeypatch.setenv("MIMALLOC_DECOMMIT_DELAY", "0")
    monkeypatch.setenv("MIMALLOC_PURGE_DELAY", "0")
    script = MAKE + "empty = resident(); blocks = fill(); held = blocks[::40]; del blocks; heap.give_back()"
    assert int(_say(str(_allocator("mimalloc")), script + "; print(resident() - empty)")) < 50


@linux
@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc_minimal", "mimalloc"])
def test_trim_of_another_allocator_is_never_called(name: str) -> None:
    """The malloc_trim of glibc, which is still there to be found, is not called beside another allocator."""
    assert _say(str(_allocator(name)), WATCHED + "print(heap.give_back(), 'malloc_trim' in calls)") == "True False"


@linux
@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc_minimal", "mimalloc"])
def test_allocator_under_another_name_is_known(name: str, tmp_path: Path) -> None:
    """An allocator whose file name tells nothing is known by the functions of the file that malloc lies in."""
    plain = shutil.copy(_allocator(name).resolve(), tmp_path / "plain.so")
    assert _say(str(plain)) == f"{name.removesuffix('_minimal')} True True"


@linux
def test_allocator_that_is_merely_loaded() -> None:
    """An allocator that an extension module brought for itself does not serve malloc, and is not asked."""
    _glibc()
    script = f"import ctypes; ctypes.CDLL({str(_allocator('mimalloc'))!r}); {SAY}"
    assert _say(script=script) == "glibc True True"


@linux
def test_stranger_is_left_alone(tmp_path: Path) -> None:
    """Under an allocator that has none of the functions we know nothing is done."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    source = tmp_path / "stranger.c"
    source.write_text(
        "extern void *__libc_malloc(unsigned long);\nvoid *malloc(unsigned long n) { return __libc_malloc(n); }\n"
    )
    library = tmp_path / "libstranger.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert _say(str(library)) == "unknown False False"


@linux
def test_no_preload() -> None:
    """A plain child process is trimmed, as this one."""
    _glibc()
    assert _say() == "glibc True True"


POOL = """
import os, psutil, sys, concurrent.futures, threading
from modelcache import heap
process = psutil.Process()
def resident(): return process.memory_info().rss >> 20
pool, barrier, models = concurrent.futures.ThreadPoolExecutor(4), threading.Barrier(4), {}
def begin():
    barrier.wait()
    if include: heap.include_thread()
[future.result() for future in [pool.submit(begin) for _ in range(4)]]
empty = resident()
def load(number):
    models[number] = bytearray(os.urandom(1)) * 30_000_000
    models.pop(number - 4, None)
for number in range(24):
    pool.submit(load, number).result()
models.clear()
"""


@linux
@pytest.mark.parametrize("ended", ["", "pool.shutdown(); "])
def test_memory_of_other_threads_comes_back(ended: str) -> None:
    """What threads have allocated that were included comes back on another one's call, also once they ended."""
    _glibc()
    said = _say(script=f"include = True{POOL}{ended}assert heap.give_back(); print(resident() - empty)")
    assert int(said) < 20


@linux
def test_caller_is_included() -> None:
    """Whoever has called give_back is included from then on."""
    _glibc()
    pool = POOL.replace("include: heap.include_thread()", "True: heap.give_back()")
    assert int(_say(script=f"{pool}assert heap.give_back(); print(resident() - empty)")) < 20


@linux
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "33554432"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=33554432")],
)
def test_thresholds_that_are_set_stay(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Where the user has tuned glibc, its thresholds are not touched, and malloc_trim has to do."""
    _glibc()
    monkeypatch.setenv(name, value)
    assert _say(script=WATCHED + "heap.include_thread(); print(heap.give_back(), 'mallopt' in calls)") == "True False"
    monkeypatch.delenv(name)
    assert _say(script=WATCHED + "heap.include_thread(); print(heap.give_back(), 'mallopt' in calls)") == "True True"


@linux
def test_many_threads_are_included() -> None:
    """Thousands of threads, one after the other, cost next to nothing."""
    _glibc()
    script = """
import threading
from modelcache import heap
for _ in range(1000):
    thread = threading.Thread(target=heap.include_thread)
    thread.start()
    thread.join()
assert heap.give_back()
tops = heap._look()._include.__self__
assert len(tops._blocks) == 256
print(resident() - empty)
"""
    assert int(_say(script=MAKE + "heap.give_back(); empty = resident()" + script)) < 8


class _Library:
    """A C library that lacks what is given, as musl and macOS do."""

    def __init__(self, real: ctypes.CDLL, lacking: str) -> None:
        self._real, self._lacking = real, lacking

    def __getattr__(self, name: str) -> Any:
        if name == self._lacking:
            raise AttributeError(name)
        return getattr(self._real, name)


@linux
@pytest.mark.parametrize("lacking", ["malloc_trim", "gnu_get_libc_version", "dladdr", "malloc"])
def test_library_without_a_symbol(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Where the C library lacks a function that is needed, nothing is done."""
    library = _Library(ctypes.CDLL(None), lacking)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert heap.allocator() == "unknown"
    assert not heap.give_back()


@linux
@pytest.mark.parametrize("lacking", ["mallopt", "realloc"])
def test_library_that_can_only_trim(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Where only the tops of arenas are out of reach, the rest is given back."""
    _glibc()
    library = _Library(ctypes.CDLL(None), lacking)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    heap.include_thread()
    assert heap.allocator() == "glibc"
    assert heap.give_back()


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_no_library_to_ask(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Where the process can't be asked for its functions, as on Windows, nothing is done."""

    def refuse(name: None) -> ctypes.CDLL:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not heap.give_back()


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_systems(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """On other systems nothing is done."""
    monkeypatch.setattr(sys, "platform", platform)
    assert heap.allocator() == "unknown"
    assert not heap.give_back()


@linux
def test_unreadable_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the list of mapped files can't be read, where malloc lies decides."""
    _glibc()
    monkeypatch.setattr(heap, "_MAPS", tmp_path / "nowhere")
    assert heap.allocator() == "glibc"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2", "jemalloc"),
        ("/opt/libtcmalloc_minimal.so.4.5.10", "tcmalloc"),
        ("/opt/my libs/libmimalloc.so.2.1 (deleted)", "mimalloc"),
        ("/srv/jemalloc/libother.so", "unknown"),
        ("/srv/models/tcmalloc-notes.txt", "unknown"),
    ],
)
def test_mapped_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, name: str) -> None:
    """An allocator is known by the name of its library, not by a folder or another file."""
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r-xp 00000000 08:01 1  /usr/bin/python3\n7f02-7f03 r-xp 0 08:01 2  {path}\n7f04-7f05 rw-p\n"
    )
    monkeypatch.setattr(heap, "_MAPS", maps)
    monkeypatch.setattr(sys, "platform", "other")
    assert heap.allocator() == name


def test_looks_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is looked at once, and again in a process with another pid."""
    looks: list[None] = []

    def look() -> tuple[str, None, None]:
        looks.append(None)
        return "unknown", None, None

    monkeypatch.setattr(heap, "_search", look)
    heap.give_back()
    heap.give_back()
    assert len(looks) == 1
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    heap.give_back()
    assert len(looks) == 2


def test_calls_that_wait_share_one(monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    """Calls that come while the allocator is being asked wait, and are served by one more asking."""
    gate, asked, looks = Gate(), [], []

    def ask() -> bool:
        asked.append(None)
        gate()
        return True

    def clock() -> int:
        looks.append(None)
        return time.monotonic_ns()

    monkeypatch.setattr(heap, "_search", lambda: ("ours", ask, None))
    monkeypatch.setattr(heap, "time", types.SimpleNamespace(monotonic_ns=clock))
    calls = [spawn(heap.give_back)]
    gate.wait()
    calls += [spawn(heap.give_back) for _ in range(4)]
    eventually(lambda: len(looks) == 2 + 4)  # the first came and began, the others came
    assert not any(call.done() for call in calls)
    gate.open()
    assert all(call.result(WAIT) for call in calls)
    assert len(asked) == 2


def test_models_are_not_freed_while_heap_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn
) -> None:
    """A model is freed once heap was given back: it would wait inside the allocator, and all threads with it."""
    gate, order = Gate(), []

    def ask() -> bool:
        gate()
        order.append("given back")
        return True

    with small_cache(tmp_path, DictSource().add("a")) as cache:
        weakref.finalize(cache.get("a"), order.append, "freed")
        monkeypatch.setattr(heap, "_found", {})
        monkeypatch.setattr(heap, "_search", lambda: ("ours", ask, None))
        cache.on(Evicted, lambda event: order.append("evicted"))
        turns = heap._look().turns
        wait = turns._guard.wait
        giving = spawn(heap.give_back)
        gate.wait()
        monkeypatch.setattr(turns._guard, "wait", lambda most: order.append("waits") or wait(most))
        evicting = spawn(setattr, cache.memory, "budget", 1)
        eventually(lambda: len(order) == 2)
        gate.open()
        assert giving.result(WAIT)
        evicting.result(WAIT)
    assert order == ["evicted", "waits", "given back", "freed"]


def test_a_finalizer_that_takes_long_holds_no_heap_up(monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    """Heap is given back all the same where freeing takes long, by another thread and from within a finalizer."""
    monkeypatch.setattr(heap, "_search", lambda: ("ours", lambda: True, None))
    with heap.freeing(), heap.freeing():
        assert spawn(heap.give_back).result(WAIT)
        assert heap.give_back()
