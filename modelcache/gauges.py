"""How much memory is used, and of what: the :class:`Gauge` protocol and the gauge of this process.

Where a cgroup keeps its limit is known to ``cgroups``; percentages of a limit are taken by the memory tier, which
also decides what to do about a reading.
"""

import contextlib
import logging
import math
import numbers
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import attrs
import psutil  # type: ignore[import-untyped,unused-ignore]

from modelcache.cgroups import Limit, find_folders, read_limit, read_text
from modelcache.errors import ConfigError

LIMIT_SECONDS = 1.0
"""A limit is read from the kernel at most this often."""

_NO_LIMIT_YET = Limit(1, "")
_log = logging.getLogger("modelcache")


@attrs.frozen
class Reading:
    """What a gauge tells.

    Attributes:
        used: bytes in use that the kernel can't take back for free; 0 or more, may be above ``limit``.
        limit: bytes at which memory ends; above 0.
    """

    used: int
    limit: int


@runtime_checkable
class Gauge(Protocol):
    """Measures memory; a seam that a user, or a test, may fill.

    Concurrency: called from several threads, also at once, with no lock of the cache held; before each load and
    every ``interval`` seconds, so it should take well under a millisecond. It must work after a fork.
    """

    def read(self) -> Reading:
        """Return the reading of this moment; what it raises is logged, and the last good reading is used."""


@attrs.frozen
class _Seen:
    """All that is remembered between readings; replaced as a whole, so that it needs no lock."""

    pid: int
    process: psutil.Process
    memberships: str | None = None
    folders: tuple[tuple[str, Path], ...] = ()
    limit: Limit = _NO_LIMIT_YET
    at: float = -math.inf


class ProcessGauge:
    """This process: what it has resident, against the smallest limit that holds for it.

    Used is the resident set: anonymous, shared and mapped file pages; page cache does not count. The limit is the
    smallest memory limit of its cgroups up the tree (v1, v2, both; ``memory.high`` too) and the machine's memory.
    Files that are missing, forbidden or garbled count as no limit. A reading takes about 20 microseconds, and
    1 millisecond once a second, when the limit is read again.

    Concurrency: any thread; no lock, as what is remembered is swapped as one object, and two threads at worst
    read the same files twice. After a fork it notices the new process by itself.

    Args:
        root: the folder that holds ``proc`` and ``sys``; something else in tests.
        clock: seconds, monotonic.
    """

    def __init__(self, root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = Path(root)
        self._clock = clock
        self._seen = _Seen(os.getpid(), psutil.Process())

    @property
    def limit_source(self) -> str:
        """Path of the file that set the limit of the latest reading, or ``"memory of the machine"``."""
        return self._look().limit.source

    def read(self) -> Reading:
        """Return the resident set of this process and its limit, in bytes.

        Raises:
            psutil.Error, OSError: the system does not tell (a ``/proc`` that is hidden).
        """
        seen = self._look()
        return Reading(int(seen.process.memory_info().rss), seen.limit.bytes)

    def _look(self) -> _Seen:
        seen, pid, now = self._seen, os.getpid(), self._clock()
        if seen.pid != pid:
            seen = _Seen(pid, psutil.Process(pid))
        if now - seen.at >= LIMIT_SECONDS:
            seen = self._seen = self._look_again(seen, now)
        return seen

    def _look_again(self, seen: _Seen, now: float) -> _Seen:
        memberships = read_text(self._root / "proc/self/cgroup")
        moved = memberships != seen.memberships
        folders = find_folders(self._root, memberships) if moved else seen.folders
        machine = Limit(self._machine(), "memory of the machine")
        limit = read_limit(folders)
        if limit is None or limit.bytes >= machine.bytes:  # also the many ways to say "no limit"
            limit = machine
        return _Seen(seen.pid, seen.process, memberships, folders, limit, now)

    def _machine(self) -> int:
        for line in read_text(self._root / "proc/meminfo").split("\n"):
            words = line.split()
            if len(words) == 3 and words[0] == "MemTotal:" and words[1].isdecimal():  # noqa: PLR2004 - a kB line
                return int(words[1]) * 1024 or 1
        return int(psutil.virtual_memory().total)


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
    return Reading(used, limit)


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
