"""How much memory is used, and of how much: the :class:`Gauge` protocol, and gauges of process, container, machine.

Where a cgroup keeps its limit and its use is known to ``cgroups``; percentages of a limit are taken by the memory
tier, which also decides what to do about a reading.

Used is what the kernel can't take back for free: anonymous and shared memory, mapped file pages, and kernel memory.
Page cache is not used memory, however active: a download fills it on purpose.
"""

from pathlib import Path

from modelcache.gauges.base import Gauge, Reading, SafeGauge, check_reading
from modelcache.gauges.container import ContainerGauge
from modelcache.gauges.host import HostGauge
from modelcache.gauges.limits import LIMIT_SECONDS
from modelcache.gauges.process import ProcessGauge


def default_gauge(root: Path = Path("/")) -> Gauge:
    """Return the gauge of a tier that is given none: the container's where a cgroup limits it, else the process's.

    It is decided once: a limit that is set later is the process's.

    Args:
        root: the folder that holds ``proc`` and ``sys``; something else in tests.
    """
    container = ContainerGauge(root)
    try:
        limited = container.limited
    except OSError:  # no descriptor left to look with
        limited = False
    return container if limited else ProcessGauge(root)


__all__ = [
    "LIMIT_SECONDS",
    "ContainerGauge",
    "Gauge",
    "HostGauge",
    "ProcessGauge",
    "Reading",
    "SafeGauge",
    "check_reading",
    "default_gauge",
]
