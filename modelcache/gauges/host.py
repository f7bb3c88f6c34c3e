"""The whole machine: memory that is not available to anybody, against all there is."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped,unused-ignore]

from modelcache.gauges.base import Reading
from modelcache.gauges.files import KeptFile
from modelcache.gauges.limits import MACHINE

_MEMINFO_BYTES = 1 << 12
_TOTAL = re.compile(rb"^MemTotal: +(\d{1,18}) kB$", re.MULTILINE)
_AVAILABLE = re.compile(rb"^MemAvailable: +(\d{1,18}) kB$", re.MULTILINE)


class HostGauge:
    """This machine: memory that the kernel can't hand out, whoever has it, against all there is.

    For a machine, or a virtual one, that serves models and little else. Limits of cgroups are not looked at. Used is
    ``MemTotal`` less ``MemAvailable`` of ``/proc/meminfo``; what it does not tell, psutil does.

    Cost: about 10 microseconds. One descriptor is kept open.

    Concurrency: any thread; no lock. It works after a fork.

    Args:
        root: the folder that holds ``proc``; something else in tests.
        clock: as the other gauges take it; nothing is remembered here, so it is not asked.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock: Callable[[], float] = time.monotonic,  # noqa: ARG002 - one way to make any of the gauges
    ) -> None:
        self._meminfo = KeptFile(Path(root) / "proc/meminfo", _MEMINFO_BYTES)

    @property
    def limit_source(self) -> str:
        """``"memory of the machine"``."""
        return MACHINE

    @property
    def shared(self) -> str | None:
        """``"machine"``: all processes on it share it."""
        return "machine"

    def read(self) -> Reading:
        """Return what the machine uses and what it has, in bytes.

        Raises:
            OSError: the system tells nothing at all.
        """
        text = self._meminfo.read()
        total, available = _TOTAL.search(text), _AVAILABLE.search(text)
        if total is not None and available is not None and (limit := int(total[1]) * 1024):
            return Reading(max(limit - int(available[1]) * 1024, 0), limit)
        memory = psutil.virtual_memory()
        return Reading(max(int(memory.total) - int(memory.available), 0), int(memory.total))
