"""``MemoryTier``: the settings of the memory tier, with their checks.

What they decide, and which model gives way, is ``memory.residents``; how used memory is read is ``gauges``.
"""

import logging
import math
from collections.abc import Callable

import attrs

from modelcache.errors import ConfigError
from modelcache.gauges import ContainerGauge, Gauge, HostGauge, ProcessGauge, Reading, SafeGauge, default_gauge
from modelcache.policies import Policy, make_policy
from modelcache.units import Percent, Size, format_bytes, parse_count, parse_seconds, parse_size

_log = logging.getLogger("modelcache")
_LOW_SHARE = 7 / 8  # of high, where low is not given


@attrs.frozen
class Limits:
    """What bounds the memory tier at one moment; bytes, but for ``max_models``.

    Attributes:
        reading: what the gauge said; None where it could not be read, and then no watermark holds.
        high: used memory above which models are evicted.
        low: used memory down to which the monitor evicts.
        budget: most bytes of footprints; None: no such bound.
        max_models: most models in memory, loading and unloading; None: no such bound.
    """

    reading: Reading | None
    high: int
    low: int
    budget: int | None
    max_models: int | None

    @property
    def most(self) -> float:
        """Bytes above which one model is refused; infinite where nothing bounds it."""
        high = self.high if self.reading is not None and self.high else math.inf
        return min(high, math.inf if self.budget is None else self.budget)


class MemoryTier:
    """How much memory models may use, and which of them gives way.

    Used memory is measured by the gauge: by default what the container uses, against its limit (the smallest of those
    of its cgroups, v1 and v2); without one what this process has resident, against the machine's memory. Before a load,
    just enough is evicted that used memory and what the newcomer needs stay at most ``high``; growth from outside is
    answered by a monitor thread, which evicts from above ``high`` down to ``low``. Processes that share such a limit,
    and a disk folder, agree: the model that is worth least goes, whichever of them has it.

    Args:
        high: upper watermark: a percentage of the limit (it follows a limit that changes), or a size
            (``"6 GiB"``, an int of bytes).
        low: lower watermark, at most ``high``. None: 7/8 of ``high``, following it.
        budget: most bytes that the footprints of models may add up to, beside the watermark; a percentage is
            one of the limit. None: no such bound.
        max_models: most models in memory, loading and unloading ones counted. None: no such bound.
        policy: ``"worth"`` (measured bytes, load seconds and frequency), ``"lru"``, ``"lfu"``, ``"fifo"``, or a
            ``policies.Policy``.
        gauge: what reads used memory and its limit; None: ``gauges.ContainerGauge()`` where a cgroup has a limit below
            the machine's memory, else ``gauges.ProcessGauge()``.
        interval: seconds between two looks of the monitor.
        idle_after: seconds after which a model that nobody used is dropped, to within ``interval``; None: never.
        lease_warning: seconds after which a lease that is still held is told once, as ``Pressure``; None: never.
        request_seconds: what a request takes, for the share of time lost to reloads where leases are too short to be
            seen, or none are taken.

    Raises:
        ConfigError: a setting can't work.

    Concurrency: settings may be read and assigned from any thread. An assignment returns once all that must go,
    and may, is unloaded and its memory given back; leased models are looked at again as they are released.
    A tier serves one cache.
    """

    __slots__ = (  # no typos
        "_budget",
        "_changed",
        "_gauge",
        "_high",
        "_idle_after",
        "_interval",
        "_lease_warning",
        "_low",
        "_max_models",
        "_policy",
        "_request_seconds",
    )

    def __init__(
        self,
        high: int | str = "80%",
        low: int | str | None = None,
        budget: int | str | None = None,
        max_models: int | None = None,
        policy: str | Policy = "worth",
        gauge: Gauge | None = None,
        interval: float = 1.0,
        idle_after: float | None = None,
        lease_warning: float | None = 300.0,
        request_seconds: float = 0.1,
    ) -> None:
        self._high = _parse_high(high)
        self._low = None if low is None else parse_size(low, "low")
        self._budget = None if budget is None else parse_size(budget, "budget")
        self._max_models = None if max_models is None else parse_count(max_models, "max_models")
        self._policy = make_policy(policy, "policy")
        self._interval = parse_seconds(interval, "interval")
        self._idle_after = None if idle_after is None else parse_seconds(idle_after, "idle_after")
        self._lease_warning = None if lease_warning is None else parse_seconds(lease_warning, "lease_warning")
        self._request_seconds = parse_seconds(request_seconds, "request_seconds", zero=True)
        if gauge is not None and not isinstance(gauge, Gauge):
            raise ConfigError(
                f"gauge={gauge!r} has no read(): give an object whose read() returns a gauges.Reading",
                setting="gauge",
                value=gauge,
            )
        self._gauge = SafeGauge(default_gauge() if gauge is None else gauge)
        self._changed: Callable[[], None] | None = None
        self._check_order(self._high, self._low)

    def _check_order(self, high: Size, low: Size | None) -> None:
        """Refuse ``low`` above ``high``; kinds that can't be compared as written are compared at this moment."""
        if low is None:
            return
        if isinstance(high, Percent) and isinstance(low, Percent):
            wrong = low.value > high.value
        elif isinstance(high, Percent) or isinstance(low, Percent):
            reading = self._gauge.read()
            wrong = reading is not None and _in_bytes(low, reading.limit) > _in_bytes(high, reading.limit)
        else:
            wrong = low > high
        if wrong:
            raise ConfigError(
                f"low={_shown(low)} is above high={_shown(high)}: give a low of at most high, or None for 7/8 of it",
                setting="low",
                value=str(low),
            )

    def limits(self) -> Limits:
        """Read the gauge and return all limits, in bytes; reads files, so never call it under the guard."""
        reading = self._gauge.read()
        limit = reading.limit if reading is not None else 0
        high = _in_bytes(self._high, limit)
        low = int(high * _LOW_SHARE) if self._low is None else min(_in_bytes(self._low, limit), high)
        budget = None if self._budget is None else _in_bytes(self._budget, limit)
        return Limits(reading, high, low, budget, self._max_models)

    def read(self) -> Reading | None:
        """Read the gauge alone; None where it never could be read. Never call it under the guard."""
        return self._gauge.read()

    @property
    def measures_process(self) -> bool:
        """Whether the gauge is one of ours, that sees this process's own memory."""
        return isinstance(self._gauge.gauge, ProcessGauge | ContainerGauge | HostGauge)

    @property
    def shared(self) -> str | None:
        """Which limit other processes share; None: nobody does, as far as the gauge says."""
        return self._told("shared")

    @property
    def limit_source(self) -> str | None:
        """What set the limit: path of a file, or words; None where a user's gauge does not say."""
        return self._told("limit_source")

    def _told(self, name: str) -> str | None:
        """Return what the gauge says beside its readings; None where it does not, or not well."""
        try:
            told = getattr(self._gauge.gauge, name, None)
        except Exception:  # noqa: BLE001 - a user's gauge, or no descriptor left
            return None
        return told if isinstance(told, str) else None

    @property
    def high(self) -> int:
        """Upper watermark in bytes, at this moment. May be assigned at any time."""
        return self.limits().high

    @high.setter
    def high(self, value: int | str) -> None:
        high = _parse_high(value)
        self._check_order(high, self._low)
        self._high = high
        self._tell()

    @property
    def low(self) -> int:
        """Lower watermark in bytes, at this moment. May be assigned; None: 7/8 of ``high``."""
        return self.limits().low

    @low.setter
    def low(self, value: int | str | None) -> None:
        low = None if value is None else parse_size(value, "low")
        self._check_order(self._high, low)
        self._low = low
        self._tell()

    @property
    def budget(self) -> int | None:
        """Most bytes of footprints, at this moment; None: no such bound. May be assigned at any time."""
        return self.limits().budget

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        self._budget = None if value is None else parse_size(value, "budget")
        self._tell()

    @property
    def max_models(self) -> int | None:
        """Most models in memory; None: no such bound. May be assigned at any time."""
        return self._max_models

    @max_models.setter
    def max_models(self, value: int | None) -> None:
        self._max_models = None if value is None else parse_count(value, "max_models")
        self._tell()

    @property
    def policy(self) -> Policy:
        """Who gives way first; fixed at construction."""
        return self._policy

    @property
    def interval(self) -> float:
        """Seconds between two looks of the monitor; fixed at construction."""
        return self._interval

    @property
    def idle_after(self) -> float | None:
        """Seconds after which a model that nobody used is dropped; fixed at construction."""
        return self._idle_after

    @property
    def lease_warning(self) -> float | None:
        """Seconds after which a held lease is told; fixed at construction."""
        return self._lease_warning

    @property
    def request_seconds(self) -> float:
        """Seconds that a request is taken to need; fixed at construction."""
        return self._request_seconds

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed()

    @property
    def bound(self) -> bool:
        """Whether it serves a cache already."""
        return self._changed is not None

    def bind(self, changed: Callable[[], None]) -> None:
        """Attach the tier to its one cache; called by ``ModelCache``.

        Args:
            changed: called after each assignment, without any lock held.
        """
        self._changed = changed


def _parse_high(value: int | str) -> Size:
    high = parse_size(value, "high")
    if isinstance(high, int) and high <= 100:  # noqa: PLR2004 - percent
        _log.warning('high=%s is %s bytes, so that no model fits: was "%s%%" meant?', high, high, high)
    return high


def _shown(size: Size) -> str:
    return str(size) if isinstance(size, Percent) else format_bytes(size)


def _in_bytes(size: Size, limit: int) -> int:
    return size.of(limit) if isinstance(size, Percent) else size
