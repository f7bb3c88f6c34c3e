"""The limit that holds for this process, looked up once a second: cgroups, else the machine's memory.

Which files a cgroup keeps its limit in is known to ``cgroups``.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import attrs
import psutil  # type: ignore[import-untyped,unused-ignore]

from modelcache.cgroups import Limit, find_folders, read_limit, read_text

LIMIT_SECONDS = 1.0
"""A limit is read from the kernel at most this often."""

MACHINE = "memory of the machine"
"""Source of a limit that no file of a cgroup sets."""

_NO_LIMIT_YET = Limit(1, "")


@attrs.frozen
class _Seen:
    """All that is remembered between readings; replaced as a whole, so that it needs no lock."""

    pid: int
    memberships: str | None = None
    folders: tuple[tuple[str, Path], ...] = ()
    limit: Limit = _NO_LIMIT_YET
    at: float = -math.inf


class LimitWatch:
    """The smallest of the limits up the tree of cgroups and the machine's memory.

    Files that are missing, forbidden or garbled count as no limit; where no descriptor is left to read them, the last
    limit stays.

    Concurrency: any thread; no lock, as what is remembered is swapped as one object, and two threads at worst
    read the same files twice. After a fork it looks anew.

    Args:
        root: the folder that holds ``proc`` and ``sys``; something else in tests.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._root = Path(root)
        self._clock = clock
        self._seen = _Seen(os.getpid())

    def look(self) -> Limit:
        """Return the limit; takes a microsecond, and about one millisecond once a second.

        Raises:
            OSError: no descriptor is left, and none ever was.
        """
        seen, pid, now = self._seen, os.getpid(), self._clock()
        if seen.pid != pid:
            seen = _Seen(pid)
        if now - seen.at >= LIMIT_SECONDS:
            seen = self._seen = self._look_again(seen, now)
        return seen.limit

    def _look_again(self, seen: _Seen, now: float) -> _Seen:
        try:
            memberships = read_text(self._root / "proc/self/cgroup")
            moved = memberships != seen.memberships
            folders = find_folders(self._root, memberships) if moved else seen.folders
            limit = read_limit(folders)
            machine = Limit(total_memory(read_text(self._root / "proc/meminfo")), MACHINE)
        except OSError:
            if seen.limit is _NO_LIMIT_YET:
                raise
            return attrs.evolve(seen, at=now)
        if limit is None or limit.bytes >= machine.bytes:  # also the many ways to say "no limit"
            limit = machine
        return _Seen(seen.pid, memberships, folders, limit, now)


def total_memory(meminfo: str) -> int:
    """Return the machine's memory in bytes, above 0: as ``/proc/meminfo`` says, or else the system."""
    for line in meminfo.split("\n"):
        words = line.split()
        if len(words) == 3 and words[0] == "MemTotal:" and words[1].isdecimal():  # noqa: PLR2004 - a kB line
            return int(words[1]) * 1024 or 1
    return int(psutil.virtual_memory().total)
