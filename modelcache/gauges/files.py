"""Small files of the kernel that are read again and again through one descriptor that stays open.

What they say is known to the gauges. Limits are read too seldom for this: ``cgroups.read_text`` opens and closes.
"""

import contextlib
import os
import weakref
from pathlib import Path


class KeptFile:
    """A file whose text is asked for often: opened at the first reading, kept, and closed once this is collected.

    The descriptor is trusted only while it is the file that was opened: a program that becomes a daemon closes all
    descriptors, and the number may then be somebody else's, which is neither read nor closed. After a fork the file
    is opened anew, as ``/proc/self`` is another folder then; so it is once its cgroup has gone.

    Concurrency: any thread; no lock, as what is open is swapped whole and closed by its last user.

    Args:
        path: of the file; it may not exist.
        size: bytes that are read at most.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._held: _Open | None = None

    def read(self) -> bytes:
        """Return what it says now; empty where it can't be read. About 2 microseconds more than the kernel takes."""
        held = self._held
        if held is not None and held.pid == os.getpid() and held.is_ours():
            try:
                return os.pread(held.number, self._size, 0)
            except OSError:
                pass
        return self._read_anew()

    def _read_anew(self) -> bytes:
        self._held = None
        try:
            held = _Open(self._path)
            text = os.pread(held.number, self._size, 0)
        except (OSError, ValueError):
            return b""
        self._held = held
        return text


_latest: dict[int, object] = {}
"""Who opened a number last, among ours: after somebody closed them all, two may have opened one file in turn."""


class _Open:
    """An open descriptor, and which file it is."""

    __slots__ = ("__weakref__", "identity", "number", "pid")

    def __init__(self, path: Path) -> None:
        self.pid = os.getpid()
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.identity = _identify(self.number)
        token = _latest[self.number] = object()
        weakref.finalize(self, _close, self.number, self.identity, token)

    def is_ours(self) -> bool:
        """Whether the number still stands for the file that was opened."""
        return _identify(self.number) == self.identity


def _identify(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _close(number: int, identity: tuple[int, int] | None, token: object) -> None:
    if _latest.get(number) is not token:
        return
    del _latest[number]
    if identity is not None and _identify(number) == identity:
        with contextlib.suppress(OSError):
            os.close(number)
