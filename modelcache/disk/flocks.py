"""``FolderPins``: pins for systems without locks of an open file (macOS): a shared ``flock`` on each folder itself.

Each pin holds a descriptor, so many models in memory need a high limit of these.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from modelcache.disk.files import same
from modelcache.disk.pins import Pin
from modelcache.disk.workshop import FOLDER


class FolderPin:
    """A shared lock on one published folder: while it is held, no process removes the folder."""

    __slots__ = ("_descriptor", "_open")

    def __init__(self, descriptor: int, known: set[int]) -> None:
        self._descriptor = descriptor
        self._open = known
        known.add(descriptor)

    def close(self) -> None:
        """Let go, once; a descriptor that a child inherited is closed, never unlocked."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._open.discard(descriptor)
            with contextlib.suppress(OSError):  # closed behind our back (closerange in a daemon): then it is gone
                os.close(descriptor)


class FolderPins:
    """All pins of one tier in this process.

    Concurrency: any thread; a set of ints is changed by single steps only.
    """

    def __init__(self) -> None:
        self._open: set[int] = set()

    def take(self, folder: Path) -> Pin | None:
        """Pin a folder; None where it is gone, or being removed right now.

        Raises:
            OSError: the system has no descriptor left, or can't read the folder.
        """
        descriptor = _open(folder)
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if same(descriptor, folder):
                return FolderPin(descriptor, self._open)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    @contextlib.contextmanager
    def claim(self, folder: Path) -> Iterator[bool]:
        """Return a context in which nobody can pin a folder; it gives False where somebody has it pinned."""
        descriptor = _open(folder)
        if descriptor is None:
            yield True
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                claimed = True
            except BlockingIOError:
                claimed = False
            yield claimed
        finally:
            os.close(descriptor)

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: close what the parent's other threads had pinned, or the child would hold it for them.

        A lock belongs to the open file, which parent and child share: it stays until both have closed it.
        """
        stays = {pin._descriptor for pin in kept if isinstance(pin, FolderPin)}  # noqa: SLF001 - of this module
        for descriptor in self._open - stays:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.intersection_update(stays)

    def adopted(self) -> None:
        """Nothing is left over: each inherited pin is closed by itself."""

    def close(self) -> None:
        """Nothing is open but what is pinned."""


def _open(folder: Path) -> int | None:
    """Return a descriptor of a folder; None where it is gone, or no folder any more."""
    try:
        return os.open(folder, FOLDER | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
