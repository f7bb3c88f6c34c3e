"""``Pins``: kernel locks that say who reads which published folder, and which vanish with their process.

One file, a byte for each folder: who reads a folder has a shared lock on its byte, who removes it asks for the
exclusive one. The locks are of the open file (``F_OFD_SETLK``, fcntl(2)), so one descriptor carries any number of them.
Where the system has no such locks (macOS), ``disk.flocks`` does the same with a descriptor for each folder.

Correctness does not rest on a lock alone: a removal is a rename first, and whoever pins looks whether the folder is
still there.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from modelcache.disk.files import same
from modelcache.openfiles import OpenFile

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid; padded
_BUSY = {errno.EAGAIN, errno.EACCES}


class Pin(Protocol):
    """A published folder that no process removes while this is held."""

    def close(self) -> None:
        """Let go, once; what a child inherited is never unlocked."""
        ...


class Pins(Protocol):
    """All pins of one tier in this process.

    Concurrency: any thread. After a fork the child calls ``reset_after_fork`` before anything else.
    """

    def take(self, folder: Path, staged: Path) -> Pin | None:
        """Pin a folder, which may still lie at ``staged``; None where it is gone, or being removed right now.

        Raises:
            OSError: the system has no descriptor left, or can't read the folder.
        """
        ...

    def claim(self, folder: Path) -> contextlib.AbstractContextManager[bool]:
        """Return a context in which nobody can pin a folder; it gives False where somebody has it pinned.

        Raises:
            OSError: the system has no descriptor left.
        """
        ...

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: pin ``kept`` anew and let go of all other pins of the parent; nothing that waits."""
        ...

    def adopted(self) -> None:
        """In a child: let go of what could only be kept together with the parent, for lack of descriptors."""
        ...

    def close(self) -> None:
        """Close what is open; pins that are left over stay until their own end."""
        ...


class RangePin:
    """A shared lock on one byte."""

    __slots__ = ("_age", "_home", "_name")

    def __init__(self, home: "RangePins", name: str, age: int) -> None:
        self._home: RangePins | None = home
        self._name = name
        self._age = age

    def close(self) -> None:
        """Let go, once."""
        home, self._home = self._home, None
        if home is not None:
            home.release(self._name, self._age)


class RangePins:
    """Pins by locks on the bytes of one file.

    Args:
        path: the file; made where it is missing.
        mode: its permissions.
        writable: whether folders may be claimed; else the file is only read, and need not be there.

    Raises:
        OSError: it can't be opened, or the system has no such locks.
    """

    def __init__(self, path: Path, mode: int, *, writable: bool = True) -> None:
        self._path = path
        self._mode = mode
        self._writable = writable
        self._inherited: list[OpenFile] = []  # which carry locks that are still wanted
        self._age = 0  # forks on the way from the process that made it
        self._begin()

    def _begin(self) -> None:
        # guards the descriptors and counts; calls that never wait (fcntl, open, fstat) are all that happens under it.
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._readers: OpenFile | None = None

    def probe(self) -> None:
        """Make sure that locks exclude one another.

        Raises:
            OSError: they don't, or there are none.
        """
        first, second, place = self._open(), self._open(), secrets.randbits(55)  # others may probe at this moment
        try:
            _set(first.descriptor, fcntl.F_WRLCK, place)
            try:
                _set(second.descriptor, fcntl.F_RDLCK, place)
            except OSError as error:
                if error.errno not in _BUSY:
                    raise
            else:
                raise OSError(errno.ENOLCK, "a lock there excludes nobody")
        finally:
            first.close()
            second.close()

    def _open(self) -> OpenFile:
        if not self._writable:
            return OpenFile(self._path, os.O_RDONLY)
        file = OpenFile(self._path, os.O_RDWR | os.O_CREAT, self._mode & 0o666)
        try:
            if os.fstat(file.descriptor).st_uid == os.geteuid():
                os.fchmod(file.descriptor, self._mode & 0o666)  # whatever the umask
        except BaseException:
            file.close()
            raise
        return file

    def _look(self) -> OpenFile:
        """Return the file as others see it, with all pins on it: somebody may have removed it under us.

        The lock is held.
        """
        if self._readers is not None:
            if same(self._readers.descriptor, self._path):
                return self._readers
            self._inherited.append(self._readers)
        self._readers = fresh = self._open()
        fresh.inherited = True
        for name in self._counts:
            with contextlib.suppress(OSError):  # somebody claims it: it goes under us, as its whole file did
                _set(fresh.descriptor, fcntl.F_RDLCK, _place(name))
        return fresh

    def _enter(self, name: str) -> bool:
        """Count one more reader of a folder; False where it is being removed right now. The lock is held."""
        if self._counts[name] == 0:
            try:
                _set(self._look().descriptor, fcntl.F_RDLCK, _place(name))
            except FileNotFoundError:
                pass  # a folder that only can be read, and that nobody has ever written to: nobody removes here
            except OSError as error:
                if error.errno not in _BUSY:
                    raise
                return False
        self._counts[name] += 1
        return True

    def take(self, folder: Path, staged: Path) -> Pin | None:
        """Pin a folder, which may still lie at ``staged``; None where it is gone, or being removed right now."""
        with self._lock:
            if not self._enter(folder.name):
                return None
        pin = RangePin(self, folder.name, self._age)
        try:
            there = staged.is_dir() and not staged.is_symlink()
        except BaseException:
            pin.close()
            raise
        if not there:
            pin.close()
            return None
        return pin

    def release(self, name: str, age: int) -> None:
        """Let one pin go; called by it. One of a parent's is not ours to release."""
        with self._lock:
            if age != self._age:
                return
            if self._counts[name] > 1:
                self._counts[name] -= 1
            elif self._counts.pop(name, 0) and self._readers is not None:
                with contextlib.suppress(OSError):  # closed behind our back: then it is gone
                    _set(self._readers.descriptor, fcntl.F_UNLCK, _place(name))

    @contextlib.contextmanager
    def claim(self, folder: Path) -> Iterator[bool]:
        """Return a context in which nobody can pin a folder; it gives False where somebody has it pinned."""
        file = self._open()
        try:
            try:
                _set(file.descriptor, fcntl.F_WRLCK, _place(folder.name))
                claimed = True
            except OSError as error:
                if error.errno not in _BUSY:
                    raise
                claimed = False
            yield claimed
        finally:
            file.close()

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: what the parent has locked is locked by the open file that both share, until both close it."""
        shared, self._inherited = [*self._inherited, *([self._readers] if self._readers is not None else [])], []
        self._age += 1
        self._begin()
        try:
            for pin in kept:
                if isinstance(pin, RangePin) and self._enter(pin._name):  # noqa: SLF001 - of this module
                    pin._age = self._age  # noqa: SLF001 - the same
        except OSError:  # no descriptor left: the parent's hold as well
            self._inherited = shared
            return
        for file in shared:
            file.close()

    def adopted(self) -> None:
        """In a child: close what carries the parent's locks."""
        with self._lock:
            inherited, self._inherited = self._inherited, []
        for file in inherited:
            file.close()

    def close(self) -> None:
        """Close what carries no pin."""
        with self._lock:
            if self._counts:
                return
            idle, self._readers, self._inherited = [self._readers, *self._inherited], None, []
        for file in idle:
            if file is not None:
                file.close()


def _place(name: str) -> int:
    """Return the byte that stands for a folder: where two meet, one stays a little longer than it must."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


def _set(descriptor: int, kind: int, place: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, place, 1, 0))
