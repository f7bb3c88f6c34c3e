"""``Pin``: a kernel lock on a published folder, which vanishes with its process.

A shared ``flock`` on the folder's own descriptor says that somebody reads it; who wants to remove it asks for the
exclusive one. Correctness does not rest on it alone: a removal is a rename first.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path

from modelcache.disk.files import same
from modelcache.disk.workshop import FOLDER


class Pin:
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


class Pins:
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
        try:
            descriptor = os.open(folder, FOLDER | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:  # gone, or no folder any more
                return None
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if same(descriptor, folder):
                with contextlib.suppress(OSError):
                    now = time.time_ns()  # by itself the kernel would take a clock that ticks every 4 ms
                    os.utime(descriptor, ns=(now, now))  # the folder's own time is its recency, for the next start
                return Pin(descriptor, self._open)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: close what the parent's other threads had pinned, or the child would hold it for them.

        A lock belongs to the open file, which parent and child share: it stays until both have closed it.
        """
        stays = {pin._descriptor for pin in kept}  # noqa: SLF001 - of this module
        for descriptor in self._open - stays:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.intersection_update(stays)
