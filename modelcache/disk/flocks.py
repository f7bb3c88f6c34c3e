"""``FolderPins``: pins for systems without locks of an open file (macOS): a shared ``flock`` on each folder itself.

Each pin holds a descriptor, so many models in memory need a high limit of these.
"""

import contextlib
import errno
import fcntl
from collections.abc import Iterable, Iterator
from pathlib import Path

from modelcache.disk.files import same
from modelcache.disk.pins import Pin
from modelcache.disk.workshop import FOLDER
from modelcache.openfiles import OpenFile


class FolderPin:
    """A shared lock on one published folder: while it is held, no process removes the folder."""

    __slots__ = ("_file", "_open")

    def __init__(self, file: OpenFile, known: set[OpenFile]) -> None:
        self._file = file
        self._open = known
        known.add(file)
        file.inherited = True

    def close(self) -> None:
        """Let go, once; a descriptor that a child inherited is closed, never unlocked."""
        self._open.discard(self._file)
        self._file.close()


class FolderPins:
    """All pins of one tier in this process.

    Concurrency: any thread; a set is changed by single steps only.
    """

    def __init__(self) -> None:
        self._open: set[OpenFile] = set()

    def take(self, folder: Path, staged: Path) -> Pin | None:
        """Pin a folder, which may still lie at ``staged``; None where it is gone, or being removed right now.

        Raises:
            OSError: the system has no descriptor left, or can't read the folder.
        """
        del folder  # the lock is on what it will be a name of
        file = _open(staged)
        if file is None:
            return None
        try:
            fcntl.flock(file.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if same(file.descriptor, staged):
                return FolderPin(file, self._open)
        except BlockingIOError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    @contextlib.contextmanager
    def claim(self, folder: Path) -> Iterator[bool]:
        """Return a context in which nobody can pin a folder; it gives False where somebody has it pinned."""
        file = _open(folder)
        if file is None:
            yield True
            return
        try:
            try:
                fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                claimed = True
            except BlockingIOError:
                claimed = False
            yield claimed
        finally:
            file.close()

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: close what the parent has pinned but for ``kept``, or the child would hold it for the parent.

        A lock belongs to the open file, which parent and child share: it stays until both have closed it.
        """
        stays = {pin._file for pin in kept if isinstance(pin, FolderPin)}  # noqa: SLF001 - of this module
        for file in self._open - stays:
            file.close()
        self._open.intersection_update(stays)

    def adopted(self) -> None:
        """Nothing is left over: each inherited pin is closed by itself."""

    def close(self) -> None:
        """Nothing is open but what is pinned."""


def _open(folder: Path) -> OpenFile | None:
    """Open a folder; None where it is gone, or no folder any more."""
    try:
        return OpenFile(folder, FOLDER)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return None
        raise
