"""Whether the memory tier thrashes: more time goes into loading again what it evicted than into serving.

Denning, *Thrashing: its causes and prevention*, AFIPS 1968. Here: which time counts, over which window, and when it
begins and is over. Telling it (``events.Thrashing``), and how much memory would end it, is not done here.
"""

from collections import deque
from collections.abc import Iterator

import attrs

SHORTEST = 60.0
"""Seconds that the window covers at least."""
LOADS = 20
"""Loads that it reaches back over, where they took longer."""
ENTER = 0.5
"""Share of the time that goes into reloads from which on the tier thrashes ..."""
RELOADS = 10
"""... if there were this many of them in the window."""
LEAVE = 0.25
"""Share below which that is over."""
WORST = 5
"""Models that a change names."""

_SLICE = 1.0  # seconds that are kept as one
_FINE = 16  # older slices are joined, up to this part of their age: the memory of a day is a few hundred slices
_ROOM = 128  # slices by which their number may grow until they are joined again
_NAMES = 64  # models that a slice names; of more, those that cost least are counted without their name


@attrs.frozen
class Change:
    """The tier began to thrash, or it is over.

    Attributes:
        entering: whether it began.
        share: reload seconds over reload and serving seconds, 0 to 1, within the window.
        reloads_per_minute: within the window.
        worst: ``(model, reload seconds)`` of the models that cost most, the worst first.
        window: seconds.
    """

    entering: bool
    share: float
    reloads_per_minute: float
    worst: tuple[tuple[str, float], ...]
    window: float


@attrs.define
class _Slice:
    """What happened between two moments, both included; seconds."""

    start: float
    end: float
    serving: float = 0.0
    reloading: float = 0.0
    reloads: int = 0
    models: dict[str, float] = attrs.Factory(dict)  # reload seconds

    def reloaded(self, model: str, seconds: float) -> None:
        self.reloading += seconds
        self.reloads += 1
        self._charge(model, seconds)

    def join(self, later: "_Slice") -> None:
        self.end = later.end
        self.serving += later.serving
        self.reloading += later.reloading
        self.reloads += later.reloads
        for model, seconds in later.models.items():
            self._charge(model, seconds)

    def _charge(self, model: str, seconds: float) -> None:
        self.models[model] = self.models.get(model, 0.0) + seconds
        if len(self.models) >= 2 * _NAMES:
            self.models = dict(_heaviest(self.models, _NAMES))


class Thrash:
    """Compares the time spent on reloads with the time spent on serving, over the latest window.

    The window ends now. It covers the time between the last ``LOADS`` loads of any kind, at least ``SHORTEST``
    seconds; with no load and no serving in it, the share is 0. Its start is exact to a second, or a ``_FINE``-th of
    its length where that is more. Once thrashing is over, loads before that no longer stretch the window.

    Concurrency: none of its own: the cache's guard is held for each call. Every call takes well under a
    millisecond and bounded memory, whatever the rate and however long the window. A time before that of an earlier
    call counts as that one's.

    Attributes:
        active: whether the tier thrashes, as of the last :meth:`look`.
    """

    def __init__(self) -> None:
        self.active = False
        self._slices: deque[_Slice] = deque()  # by time
        self._loads: deque[float] = deque(maxlen=LOADS)  # when the latest ended
        self._join_at = _ROOM

    def loaded(self, now: float, model: str, seconds: float, *, reload: bool) -> None:
        """Book a load that ended.

        Args:
            now: seconds, monotonic, as for all methods.
            model: its id.
            seconds: that it took, 0 or more.
            reload: whether this tier had evicted the model under pressure; no first load, new version, or return
                of a model that somebody unloaded.
        """
        latest = self._latest(now)
        self._loads.append(latest.end)
        if reload:
            latest.reloaded(model, seconds)

    def served(self, now: float, seconds: float) -> None:
        """Book serving: seconds, 0 or more, that leases were held since the last call, all of them added up."""
        if seconds:
            self._latest(now).serving += seconds

    def look(self, now: float) -> Change | None:
        """Return what changed: one :class:`Change` when thrashing begins, one when it is over, else None."""
        self._forget(now)
        window = list(self._window(now))
        reloads = sum(part.reloads for part in window)
        share = _share(window)
        if self.active:
            if share >= LEAVE:
                return None
        elif share < ENTER or reloads < RELOADS:
            return None
        seconds = self._seconds()
        self.active = not self.active
        if not self.active:
            self._loads.clear()
        return Change(self.active, share, reloads * 60 / seconds, _worst(window), seconds)

    def share(self, now: float) -> float:
        """Return reload seconds over reload and serving seconds, 0 to 1, within the window."""
        return _share(list(self._window(now)))

    def _seconds(self) -> float:
        return max(SHORTEST, self._loads[-1] - self._loads[0]) if self._loads else SHORTEST

    def _window(self, now: float) -> Iterator[_Slice]:
        start = now - self._seconds()
        return (part for part in self._slices if part.end >= start)

    def _latest(self, now: float) -> _Slice:
        """Return the slice of this moment."""
        if self._slices and now < self._slices[-1].start + _SLICE:
            latest = self._slices[-1]
            latest.end = max(latest.end, now)
            return latest
        self._forget(now)
        self._slices.append(_Slice(now, now))
        if len(self._slices) >= self._join_at:
            self._join(now)
        return self._slices[-1]

    def _forget(self, now: float) -> None:
        """Drop what no window can reach any more."""
        reach = min(now - SHORTEST, self._loads[0]) if self._loads else now - SHORTEST
        while self._slices and self._slices[0].end < reach:
            self._slices.popleft()

    def _join(self, now: float) -> None:
        joined: deque[_Slice] = deque()
        for part in self._slices:
            if joined and part.end - joined[-1].start <= (now - part.end) / _FINE:
                joined[-1].join(part)
            else:
                joined.append(part)
        self._slices = joined
        self._join_at = len(joined) + _ROOM


def _share(window: list[_Slice]) -> float:
    reloading = sum(part.reloading for part in window)
    both = reloading + sum(part.serving for part in window)
    return reloading / both if both else 0.0


def _worst(window: list[_Slice]) -> tuple[tuple[str, float], ...]:
    models: dict[str, float] = {}
    for part in window:
        for model, seconds in part.models.items():
            models[model] = models.get(model, 0.0) + seconds
    return tuple(_heaviest(models, WORST))


def _heaviest(models: dict[str, float], count: int) -> list[tuple[str, float]]:
    return sorted(models.items(), key=lambda item: (-item[1], item[0]))[:count]
