"""A memory cgroup of our own with a limit, for benchmarks of what happens at it; cgroup v1, where it may be written to.

How a benchmark prints is ``report``. A child process moves itself in before it imports anything, so that all that it
takes is charged there.
"""

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_ROOT = Path("/sys/fs/cgroup/memory")
_WAIT = 5.0  # seconds in which a group whose processes ended can be removed


class Unavailable(Exception):
    """No group can be made here; the text says why."""


def own_group() -> Path:
    """Return the folder of the memory cgroup that this process is in.

    Raises:
        Unavailable: there is none of v1 here.
    """
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            for folder in (_ROOT / path.lstrip("/"), _ROOT):
                if (folder / "memory.limit_in_bytes").exists():
                    return folder
    raise Unavailable("no cgroup v1 memory controller is mounted under /sys/fs/cgroup/memory")


def enter(group: str) -> None:
    """Move this process into a group."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))


class Group:
    """A child of our own memory cgroup, removed at the end of the block.

    Args:
        name: of its folder, which also gets our pid.
        limit: bytes; None: no limit.

    Raises:
        Unavailable: it can't be made; from ``__enter__``.
    """

    def __init__(self, name: str, limit: int | None) -> None:
        self._name = name
        self._limit = limit
        self.path = Path()

    def __enter__(self) -> Self:
        """Make it."""
        self.path = own_group() / f"modelcache-{self._name}-{os.getpid()}"
        try:
            self.path.mkdir()
            if self._limit is not None:
                (self.path / "memory.limit_in_bytes").write_text(str(self._limit))
        except OSError as error:
            raise Unavailable(f"a memory cgroup can't be made: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it, once the processes in it have ended."""
        end = time.monotonic() + _WAIT
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def kills(self) -> int:
        """Return how many processes the kernel has killed here for want of memory."""
        for line in (self.path / "memory.oom_control").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
        return 0

    def stat(self) -> dict[str, int]:
        """Return ``memory.stat``: ``total_rss``, ``total_cache``, ``total_mapped_file`` and so on, in bytes."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def used(self) -> int:
        """Return the bytes in use here as ``gauges.ContainerGauge`` counts them, which must run inside to do so."""
        stat = self.stat()
        return stat["total_rss"] + max(stat["total_shmem"], stat["total_mapped_file"])
