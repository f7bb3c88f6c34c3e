"""Sizes, percentages and seconds as a user writes them: ``"20 GiB"``, ``"80%"``, ``60.0``.

Parsing and printing only; what a percentage is a percentage *of* is known to the tiers.
"""

import math
import re
from collections.abc import Iterable
from threading import TIMEOUT_MAX

import attrs

from modelcache.errors import ConfigError

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", re.ASCII)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
MAX_BYTES = 2**63 - 1
"""Largest size that is taken for one: what a file offset can hold."""
_LONGEST = 40  # characters of a size or percentage
_HOW = 'give an int of bytes, a string with a unit like "20 GiB", or (where a limit is known) a share like "80%"'


@attrs.frozen
class Percent:
    """A share of a limit that may change; evaluated at each reading.

    Attributes:
        value: percent, above 0 and at most 100.
    """

    value: float

    def of(self, limit: int) -> int:
        """Return this share of ``limit``, in bytes."""
        return int(limit * self.value / 100)

    def __str__(self) -> str:
        return f"{self.value:g}%"


Size = int | Percent
"""What a size setting becomes: bytes, or a share of a limit."""


def parse_bytes(value: object, setting: str, *, zero: bool = False) -> int:
    """Return ``value`` (an int of bytes, or a string with a unit) in bytes.

    Args:
        value: what the user wrote.
        setting: its name, for the message.
        zero: whether 0 is allowed.

    Raises:
        ConfigError: a float, a bool, no unit, an unknown unit, negative, or zero where that can't work.
    """
    if isinstance(value, str) and len(value) <= _LONGEST and (match := _SIZE.fullmatch(value)):
        unit = _UNITS.get(match[2].upper())
        if unit is None:
            raise ConfigError(
                f"{setting}={value!r}: unknown unit {match[2]!r}; use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB",
                setting=setting,
                value=value,
            )
        size = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise ConfigError(f"{setting}={value!r} is not a size: {_HOW}", setting=setting, value=value)
    if size > MAX_BYTES:
        raise ConfigError(f"{setting}={value!r:.40} is more than any machine has: {_HOW}", setting=setting, value=value)
    if size < 0 or (size == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        raise ConfigError(f"{setting}={value!r} must be {least}: {_HOW}", setting=setting, value=value)
    return size


def parse_size(value: object, setting: str, *, zero: bool = False) -> Size:
    """Return ``value`` as bytes, or as :class:`Percent` where it is written ``"80%"``.

    Raises:
        ConfigError: as :func:`parse_bytes`; also a percentage of 0 or above 100.
    """
    if isinstance(value, str) and len(value) <= _LONGEST and (match := _PERCENT.fullmatch(value)):
        share = float(match[1])
        if not 0 < share <= 100:  # noqa: PLR2004 - percent
            raise ConfigError(f"{setting}={value!r} must be above 0% and at most 100%", setting=setting, value=value)
        return Percent(share)
    return parse_bytes(value, setting, zero=zero)


def parse_seconds(value: object, setting: str, *, zero: bool = False) -> float:
    """Return ``value`` as seconds; more than Python can wait is cut to that (292 years).

    Raises:
        ConfigError: not a number, not finite, negative, or zero where that can't work.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
        raise ConfigError(f"{setting}={value!r} must be a finite number of seconds", setting=setting, value=value)
    if value < 0 or (value == 0 and not zero):
        least = "0 or more" if zero else "above 0"
        raise ConfigError(f"{setting}={value!r} must be {least} seconds", setting=setting, value=value)
    return float(min(value, TIMEOUT_MAX))


def parse_timeout(value: object) -> float | None:
    """Return a timeout in seconds, 0 allowed; None stays None: for ever.

    Raises:
        ConfigError: as ``parse_seconds``.
    """
    return None if value is None else parse_seconds(value, "timeout", zero=True)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond what a float can hold
        return False


def parse_count(value: object, setting: str) -> int:
    """Return ``value`` as a whole number above 0.

    Raises:
        ConfigError: anything else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{setting}={value!r} must be a whole number above 0", setting=setting, value=value)
    return value


def format_holders(holders: Iterable[tuple[str, int, float]]) -> str:
    """Return who holds leases, as ``NoRoom.holders`` has it, for people."""
    return ", ".join(f"{model!a} ({leases} leases, {age:.1f} s)" for model, leases, age in holders)


def format_bytes(size: int) -> str:
    """Return ``size`` for people: ``format_bytes(1_500_000)`` is ``"1.4 MiB"``."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:  # noqa: PLR2004 - binary units
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
