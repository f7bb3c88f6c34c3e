"""This process, with its children where they are asked for: what they have resident, against the limit that holds."""

import math
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import psutil  # type: ignore[import-untyped,unused-ignore]

from modelcache.gauges.base import Reading
from modelcache.gauges.files import KeptFile
from modelcache.gauges.limits import LIMIT_SECONDS, LimitWatch

_STATM_BYTES = 256


class ProcessGauge:
    """This process: what it has resident, against the smallest limit that holds for it.

    Used is the resident set: anonymous, shared and mapped file pages; page cache does not count. The limit is the
    smallest memory limit of its cgroups up the tree (v1, v2, both; ``memory.high`` too) and the machine's memory.
    Files that are missing, forbidden or garbled count as no limit.

    Cost: about 4 microseconds, and 1 millisecond once a second, when the limit is read again; with ``children``
    about 15 microseconds more for each, and a walk over all processes of the machine once a second. One descriptor
    is kept open.

    Concurrency: any thread; no lock. After a fork it notices the new process by itself.

    Args:
        root: the folder that holds ``proc`` and ``sys``; something else in tests.
        children: add what all processes below this one have resident; found anew at most once a second. Pages that
            they share with it since a fork are counted once for each, so this reads too high rather than too low.
            They are looked for on the live system, whatever ``root`` is.
        clock: seconds, monotonic.
    """

    def __init__(
        self, root: Path = Path("/"), *, children: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch = LimitWatch(root, clock)
        self._resident = Resident(root)
        self._children = _Children(clock) if children else None

    @property
    def limit_source(self) -> str:
        """Path of the file that set the limit of the latest reading, or ``"memory of the machine"``."""
        return self._watch.look().source

    def read(self) -> Reading:
        """Return what is resident and its limit, in bytes.

        Raises:
            psutil.Error, OSError: the system tells nothing at all (a ``/proc`` that is hidden).
        """
        used = self._resident.read()
        if self._children is not None:
            used += self._children.read()
        return Reading(used, self._watch.look().bytes)


class Resident:
    """The resident set of this process, by the cheapest way there is.

    Concurrency: any thread, in any process after a fork; no lock.

    Args:
        root: the folder that holds ``proc``.
    """

    def __init__(self, root: Path) -> None:
        self._statm = KeptFile(Path(root) / "proc/self/statm", _STATM_BYTES)

    def read(self) -> int:
        """Return its bytes.

        Raises:
            psutil.Error, OSError: neither ``statm`` nor the system tells.
        """
        pages = self._pages()
        return int(psutil.Process().memory_info().rss) if pages is None else pages[0] * mmap.PAGESIZE

    def read_own(self) -> int:
        """Return the bytes that it shares with no file and no other process by name; 0 where that is not told."""
        pages = self._pages()
        return 0 if pages is None else max(pages[0] - pages[1], 0) * mmap.PAGESIZE

    def _pages(self) -> tuple[int, int] | None:
        """Return resident and, of these, shared pages (proc(5), statm); None where the kernel does not tell."""
        fields = self._statm.read().split(None, 3)
        if len(fields) > 3 and fields[1].isdigit() and fields[2].isdigit():  # noqa: PLR2004 - size, these two, the rest
            return int(fields[1]), int(fields[2])
        return None


@attrs.frozen
class _Family:
    pid: int
    at: float
    members: tuple[psutil.Process, ...]


class _Children:
    """What all processes below this one have resident; no lock, as what is remembered is swapped whole."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._family = _Family(os.getpid(), -math.inf, ())

    def read(self) -> int:
        family, now = self._family, self._clock()
        if family.pid != os.getpid() or now - family.at >= LIMIT_SECONDS:
            family = self._family = _Family(os.getpid(), now, _descendants())
        return sum(map(_resident, family.members))


def _descendants() -> tuple[psutil.Process, ...]:
    try:
        return tuple(psutil.Process().children(recursive=True))
    except (psutil.Error, OSError):
        return ()


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.Error, OSError):  # it has ended, or is not ours to look at
        return 0
