"""How far this process's resident memory peaks while something runs, for several such spans at once.

What is done with a peak, and whose it is where two loads overlap, is decided by the memory tier.
"""

import contextlib
import os
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import attrs
import psutil  # type: ignore[import-untyped,unused-ignore]

from modelcache.gauges.process import Resident

SAMPLE_SECONDS = 0.005
"""Pause between two samples, where the kernel does not keep the peak for us."""

_ROOT = Path("/")
_MARKS = re.compile(rb"\nVm(HWM|RSS):\s+(\d{1,15}) kB")  # never in the first line
_STATUS_BYTES = 1 << 13
_SET_BACK = b"5"  # of clear_refs: the mark falls to what is resident now
_SLACK = 1 << 20  # the kernel counts pages per processor, and so never quite at one instant


class PeakMeter:
    """Measures how high resident memory rises while something runs.

    The kernel keeps the peak: ``VmHWM`` of ``/proc/self/status``, set back by writing to ``/proc/self/clear_refs``.
    There is one such mark in a process. All meters therefore share one set of open windows, and whoever sets the mark
    back first takes it over into all of them: windows may overlap and nest, on any threads, and each gets its own
    peak. Other code of the process that sets the mark back, or reads it (``ru_maxrss`` too), is disturbed. What
    other threads allocate meanwhile counts in every open window.

    Where the kernel can't (macOS, no ``/proc``, or one that is read-only), a daemon thread samples every 5 milliseconds
    while a window is open; a shorter peak is missed.

    Cost: 50 to 100 microseconds for a window; nothing in between, or some thousandths of a processor where it samples.

    Concurrency: any thread. A forked child begins without open windows.

    Args:
        sampled: sample, whatever the kernel can do.
    """

    def __init__(self, *, sampled: bool = False) -> None:
        self._sampled = sampled

    @property
    def available(self) -> Literal["kernel", "sampled"]:
        """How it measures now: by the kernel's own mark, or by samples."""
        return "sampled" if self._sampled or _registry.set_back() is None else "kernel"

    def begin(self) -> "Window":
        """Open a window; never raises."""
        return _registry.open(sampled=self._sampled)

    @staticmethod
    def reset_after_fork() -> None:
        """Drop the parent's windows; a child of ``os.fork`` has done so already. Takes no lock."""
        if _registry.pid != os.getpid():
            _reset()


class Window:
    """A span that was begun, to be ended once; one that is dropped instead leaves nothing behind.

    Concurrency: any thread may end it.

    Attributes:
        highest: bytes resident at most, as far as was seen; the registry's business.
    """

    def __init__(self, registry: "_Registry", base: int | None) -> None:
        self._registry = registry
        self._base = base
        self._result: int | None = None
        self.highest = base or 0

    def end(self) -> int:
        """Return the bytes by which resident memory peaked above what it was at ``begin``; 0 or more.

        Never raises; 0 where resident memory can't be read. Called again it returns the same. In a child that was
        forked meanwhile it tells what the parent had seen by then.
        """
        if self._result is None:
            if self._registry is _registry:
                self._registry.close(self)
            self._result = 0 if self._base is None else max(self.highest - self._base, 0)
        return self._result


@attrs.frozen
class _Mark:
    resident: int
    peak: int


class _Registry:
    """The open windows of this process, and the thread that samples for some of them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        # guards both sets and the sampler, and makes one step of reading the mark and setting it back: microseconds
        # in the kernel, no I/O. Reentrant, so that a signal handler that loads does not wait for its own frame.
        self._lock = threading.RLock()
        self._marked: weakref.WeakSet[Window] = weakref.WeakSet()
        self._sampled: weakref.WeakSet[Window] = weakref.WeakSet()
        self._sampler: threading.Thread | None = None

    def open(self, *, sampled: bool) -> Window:
        with self._lock:
            mark = None if sampled else self.set_back()
            if mark is not None:
                window = Window(self, mark.peak)
                self._marked.add(window)
            else:
                window = Window(self, _read_resident(Resident(_ROOT)))
                self._sampled.add(window)
                self._start()
        return window

    def close(self, window: Window) -> None:
        with self._lock:
            if window in self._marked:
                mark = _read_mark()
                highest = 0 if mark is None else mark.peak
            else:
                highest = _read_resident(Resident(_ROOT)) or 0
            window.highest = max(window.highest, highest)
            self._marked.discard(window)
            self._sampled.discard(window)

    def set_back(self) -> _Mark | None:
        """Take the mark over into the open windows and set it back; None where the kernel does not do that."""
        with self._lock:
            before = _read_mark()
            if before is None:
                return None
            _raise(self._marked, before.peak)
            after = _read_mark() if _write_set_back() else None
            if after is not None and after.peak >= before.peak and after.peak - after.resident > _SLACK:
                return None  # taken without a word, and to no effect
            return after

    def _start(self) -> None:
        if self._sampler is None:
            thread = threading.Thread(target=self._sample, name="modelcache-peaks", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had: then what it is at the end counts
                thread.start()
                self._sampler = thread

    def _sample(self) -> None:
        pause, resident = threading.Event(), Resident(_ROOT)
        while True:
            with self._lock:
                if not self._sampled:
                    self._sampler = None
                    return
                _raise(self._sampled, _read_resident(resident) or 0)  # under the lock: not older than a window
            pause.wait(SAMPLE_SECONDS)


def _raise(windows: "weakref.WeakSet[Window]", highest: int) -> None:
    for window in windows:
        window.highest = max(window.highest, highest)


def _read_resident(resident: Resident) -> int | None:
    try:
        return resident.read()
    except (psutil.Error, OSError):
        return None


def _read_mark() -> _Mark | None:
    try:
        with _opened("status", os.O_RDONLY) as file:
            found = dict(_MARKS.findall(os.read(file, _STATUS_BYTES)))
        return _Mark(int(found[b"RSS"]) * 1024, int(found[b"HWM"]) * 1024)
    except (OSError, KeyError):
        return None


def _write_set_back() -> bool:
    try:
        with _opened("clear_refs", os.O_WRONLY) as file:
            os.write(file, _SET_BACK)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _opened(name: str, flags: int) -> Iterator[int]:
    file = os.open(f"{_ROOT}/proc/self/{name}", flags)
    try:
        yield file
    finally:
        os.close(file)


def _reset() -> None:
    global _registry  # noqa: PLW0603 - one mark a process
    _registry = _Registry()


_registry = _Registry()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
