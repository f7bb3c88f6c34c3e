"""``OpenFile``: an open file that no forked child is to keep: one that carries kernel locks, or is being written.

A lock (``flock``, ``F_OFD_SETLK``) belongs to the open file that parent and child share, and stays until both have
closed it. A child that lives on and never looks at the cache would else keep locked what its parent had locked, also
when that is long dead; and of a file that its parent has deleted, the bytes would stay on disk for as long as the child
lives. A child that is replaced by another program (exec) keeps nothing: ``O_CLOEXEC``.
"""

import contextlib
import os
import threading
from pathlib import Path
from typing import Self

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO would wait for somebody at its other end


class OpenFile:
    """An open file.

    Args:
        path: a file or folder, never by a link.
        flags: how to open it.
        mode: permissions, where that makes it.

    Raises:
        OSError: it can't be opened.

    Attributes:
        descriptor: of the file; -1 once it is closed.
        inherited: whether a child of a fork gets it, and closes it by itself.

    Concurrency: any thread. ``close`` may be called any number of times, in a child too.
    """

    __slots__ = ("descriptor", "inherited")

    def __init__(self, path: Path | str, flags: int, mode: int = 0o600) -> None:
        self.inherited = False
        with _lock:
            self.descriptor = os.open(path, flags | _FLAGS, mode)
            _open.add(self)

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it where the file stands.

        Raises:
            OSError: the disk is full, or broken.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]

    def close(self) -> None:
        """Close it, and with it let go of what it has locked, but for what a parent or child has open too."""
        with contextlib.suppress(OSError):  # closed behind our back (closerange in a daemon): then it is gone
            self.finish()

    def finish(self) -> None:
        """Close it after it was written.

        Raises:
            OSError: the disk is full, or broken.
        """
        with _lock:
            descriptor, self.descriptor = self.descriptor, -1
            _open.discard(self)
            if descriptor >= 0:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NewFile(OpenFile):
    """A new file that is being written.

    To make and close many at once no thread waits for another: a child that is forked just between the call of the
    system and the note of it may keep one open.

    Args:
        path: where; nothing may be there.
        mode: permissions, as far as the umask leaves them.

    Raises:
        OSError: it can't be made.
    """

    __slots__ = ()

    def __init__(self, path: Path | str, mode: int = 0o600) -> None:
        self.inherited = False
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, mode)
        _open.add(self)

    def finish(self) -> None:
        """Close it after it was written.

        Raises:
            OSError: the disk is full, or broken.
        """
        descriptor, self.descriptor = self.descriptor, -1
        _open.discard(self)
        if descriptor >= 0:
            os.close(descriptor)


_open: set[OpenFile] = set()
# guards _open, and that nobody forks between the opening of a file and its entry there; opens and closes only.
_lock = threading.RLock()


def _before_fork() -> None:
    _lock.acquire()


def _after_fork_in_parent() -> None:
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 - who else had it does not exist here
    _lock = threading.RLock()  # guards the same
    for file in list(_open):
        if not file.inherited:
            file.close()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
