"""What a gauge is, what it tells, and a guard around one that can't be trusted."""

import contextlib
import logging
import math
import numbers
import operator
from typing import Any, Protocol, runtime_checkable

import attrs

from modelcache.errors import ConfigError

_log = logging.getLogger("modelcache")


@attrs.frozen
class Reading:
    """What a gauge tells.

    Attributes:
        used: bytes in use that the kernel can't take back for free; 0 or more, may be above ``limit``.
        limit: bytes at which memory ends; above 0.
        own: of what is used, what this process has by itself; None: all of it, or that is not known.
    """

    used: int
    limit: int
    own: int | None = attrs.field(default=None, eq=False)

    @property
    def mine(self) -> int:
        """Bytes that this process's own loads and evictions move: what others do meanwhile is not among them."""
        return self.used if self.own is None else self.own


@runtime_checkable
class Gauge(Protocol):
    """Measures memory; a seam that a user, or a test, may fill.

    Concurrency: called from several threads, also at once, with no lock of the cache held; before each load and
    every ``interval`` seconds, so it should take well under a millisecond. It must work after a fork.

    A gauge of what several processes use together may have an attribute ``shared``: a str that is the same in all that
    stand under that limit, or None where nobody does. The caches of such processes agree on who gives way if they share
    a disk folder too.
    """

    def read(self) -> Reading:
        """Return the reading of this moment; what it raises is logged, and the last good reading is used."""


class SafeGauge:
    """A gauge whose readings are checked, and which never raises.

    While the gauge fails, or gives nonsense, the last good reading is returned; each such episode is logged once.

    Concurrency: any thread; the gauge is called on the caller's, with no lock held, and the log is written there.
    No lock: both attributes are plain and swapped whole; threads that fail at once may log an episode twice.

    Args:
        gauge: the user's, or ours.

    Raises:
        ConfigError: it has no ``read``, or is a class instead of an instance.

    Attributes:
        gauge: as given.
    """

    def __init__(self, gauge: Gauge) -> None:
        if isinstance(gauge, type) or not callable(getattr(gauge, "read", None)):
            problem = f"gauge={gauge!r:.100} needs a method read() that returns a Reading"
            raise ConfigError(problem, setting="gauge", value=gauge)
        self.gauge = gauge
        self._last: Reading | None = None
        self._failing = False

    def read(self) -> Reading | None:
        """Return the reading of this moment, else the last good one, else None: there never was one.

        Raises:
            KeyboardInterrupt, SystemExit: raised by the gauge, or arriving meanwhile.
        """
        try:
            reading = check_reading(self.gauge.read())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a stranger's code raises ends here
            self._fail(error)
            return self._last
        self._failing = False
        self._last = reading
        return reading

    def _fail(self, error: BaseException) -> None:
        if self._failing:
            return
        self._failing = True
        with contextlib.suppress(Exception):  # a log handler is a stranger's code as well
            name = type(self.gauge).__qualname__
            _log.error("gauge %s failed; its last good reading, %s, is used", name, self._last, exc_info=error)


def check_reading(reading: object) -> Reading:
    """Return ``reading``, or anything with numbers ``used`` and ``limit``, as a :class:`Reading` of ints.

    Raises:
        ConfigError: an attribute is missing, no finite number, negative, or a limit of 0.
    """
    used, limit = _whole(reading, "used"), _whole(reading, "limit")
    if used < 0 or limit <= 0:
        raise ConfigError(f"a gauge read {reading!r:.200}: used must be 0 or more and limit above 0", value=reading)
    own = None if getattr(reading, "own", None) is None else max(_whole(reading, "own"), 0)
    return Reading(used, limit, own)


def _whole(reading: object, name: str) -> int:
    value: Any = getattr(reading, name, None)
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return math.trunc(float(value))
    raise ConfigError(
        f"a gauge read {reading!r:.200}: {name} must be a number of bytes", setting="gauge", value=reading
    )
