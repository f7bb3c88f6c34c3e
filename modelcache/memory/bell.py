"""``Bell``: how one process wakes another that shares a memory limit with it, and whether that one still lives.

A named pipe in the process's own temporary folder, from which one thread reads. The kernel keeps it only as long as its
reader lives: who rings a dead process's bell is told so at once; a paused one hears it later; nobody polls.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from modelcache.telling import complain

_MANY = 4096  # rings that are heard as one
_LAST = 2.0  # seconds that the end waits for what was heard before
_GONE = {errno.ENXIO, errno.ENOENT, errno.ENOTDIR}


class Bell:
    """One process's bell.

    Concurrency: any thread.

    Args:
        heard: called on the bell's thread after one ring or several.
    """

    def __init__(self, heard: Callable[[], object]) -> None:
        self._heard = heard
        self._descriptor = -1
        self._identity: tuple[int, int] | None = None
        self._begin()

    def _begin(self) -> None:
        # guards which pipe is open, and that one thread reads it: making it (mkfifo, open) is all that happens under it
        self._lock = threading.RLock()
        self._path: Path | None = None
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def hang(self, path: Path, mode: int) -> None:
        """Make the pipe, and the thread that hears it; nothing where it hangs there already.

        Raises:
            OSError: it can't be made.
            RuntimeError: no thread is to be had.
        """
        with self._lock:
            if self._path == path and path.exists():
                return
            self.take_down()
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, mode & 0o666)
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # also to write: then it never ends
            stop = threading.Event()
            thread = threading.Thread(target=self._run, args=(descriptor, stop), name="modelcache-bell", daemon=True)
            try:
                thread.start()
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor, self._path, self._stop, self._thread = descriptor, path, stop, thread
            self._identity = _identify(descriptor)

    def _run(self, descriptor: int, stop: threading.Event) -> None:
        try:
            while os.read(descriptor, _MANY) and not stop.is_set():
                try:
                    self._heard()
                except Exception as error:  # noqa: BLE001 - the ledger or a user's code: the others go on without us
                    complain("another process asked for room in memory, and got no answer", error=error)
        finally:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def take_down(self) -> None:
        """Remove the pipe, and end the thread; from now on this process counts as gone."""
        with self._lock:
            path, stop, self._path, self._stop, self._descriptor = self._path, self._stop, None, None, -1
            if path is None or stop is None:
                return
            stop.set()
            ring(path)
            with contextlib.suppress(OSError):
                path.unlink()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(_LAST)  # it may be in the middle of an eviction

    def reset_after_fork(self) -> None:
        """In a child: the parent's bell is not ours; the pipe is closed, or the parent would seem to live on in us."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and _identify(descriptor) == self._identity:  # else a daemon has closed it behind our back
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._begin()


def _identify(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def ring(path: Path | str) -> bool:
    """Wake the process that hears this bell; return whether it lives."""
    return _touch(path, b"\0")


def lives(path: Path | str) -> bool:
    """Whether somebody hears this bell; takes a few microseconds, and wakes nobody."""
    return _touch(path, b"")


def _touch(path: Path | str, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.errno not in _GONE  # no descriptor left, say: that is no news of the other one
    try:
        if data:
            with contextlib.suppress(OSError):  # full: it is paused, and will hear many rings as one
                os.write(descriptor, data)
    finally:
        os.close(descriptor)
    return True
