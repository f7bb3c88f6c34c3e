"""All processes of this container: what its memory cgroup is charged with, against the limit of that same cgroup."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from modelcache.cgroups import read_used
from modelcache.gauges.base import Reading
from modelcache.gauges.files import KeptFile
from modelcache.gauges.host import HostGauge
from modelcache.gauges.limits import LimitWatch
from modelcache.gauges.process import Resident

_STAT_BYTES = 1 << 14


@attrs.frozen
class _Level:
    folder: Path
    stat: KeptFile


class ContainerGauge:
    """This container: what all its processes use, against its limit.

    Both are read in the cgroup with the smallest limit up the tree (v1 and v2, nested and namespaced; the outermost
    among equals), so that other containers do not count. Where the machine's memory is smaller than any of these
    limits, all of the machine counts, as with :class:`HostGauge`.

    Used is anonymous memory, shared memory (a tmpfs too) or mapped file pages, whichever is more, and, under v2,
    kernel memory that can't be reclaimed and socket buffers. Under v1 the kernel does not tell its reclaimable memory
    (names and inodes of files) from the rest: unpacking many files would look like use, so kernel memory is left out
    there; it is a percent or so beside loaded models.

    Files that are missing, forbidden or garbled count as no limit; where the use can't be read, this process alone
    counts.

    The kernel gathers these figures from its processors up to two seconds late; use is at least what this process has
    by itself, which is known at once.

    Cost: 15 to 20 microseconds, and 1 millisecond once a second, when the limit is read again. Up to three
    descriptors are kept open.

    Concurrency: any thread; no lock, as what is remembered is swapped whole. It works after a fork.

    Args:
        root: the folder that holds ``proc`` and ``sys``; something else in tests.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch = LimitWatch(root, clock)
        self._host = HostGauge(root)
        self._resident = Resident(root)
        self._level: _Level | None = None

    @property
    def limit_source(self) -> str:
        """Path of the file that set the limit of the latest reading, or ``"memory of the machine"``."""
        return self._watch.look().source

    @property
    def limited(self) -> bool:
        """Whether some cgroup has a limit below the machine's memory."""
        return self._watch.look().folder is not None

    @property
    def shared(self) -> str | None:
        """Which limit the latest reading was held against, alike in all processes under it, whatever path they see."""
        folder = self._watch.look().folder
        if folder is None:
            return self._host.shared
        try:
            status = os.stat(folder)  # noqa: PTH116 - of a path that is asked often
        except OSError:
            return None
        return f"cgroup {status.st_dev}:{status.st_ino}"

    def read(self) -> Reading:
        """Return what the container uses and its limit, in bytes.

        Raises:
            psutil.Error, OSError: the system tells nothing at all (a ``/proc`` that is hidden).
        """
        limit = self._watch.look()
        if limit.folder is None:
            return self._host.read()
        level = self._level
        if level is None or level.folder is not limit.folder:
            level = self._level = _Level(limit.folder, KeptFile(limit.folder / "memory.stat", _STAT_BYTES))
        used, own = read_used(limit.kind, level.stat.read()), self._resident.read()
        if used is None:
            return Reading(own, limit.bytes)
        used = max(used, self._resident.read_own())  # the kernel gathers a group's figures late
        return Reading(used, limit.bytes, own)
