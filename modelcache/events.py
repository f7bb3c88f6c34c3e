"""What a cache tells: one frozen object for each thing that happened, with the figures that decided it.

An event is about the past: by the time a callback sees it, the model may be back. How events reach
callbacks is ``hooks``; turning them into log lines is ``sinks.log``.
"""

import enum
from typing import Any

import attrs

from modelcache.units import format_bytes


class Reason(enum.StrEnum):
    """Why something happened.

    A str, so that it logs and serialises as its value.
    """

    WATERMARK = "watermark"
    """Memory in use, with what a newcomer needs, stood above ``high``; or outside growth did."""
    NEIGHBOUR = "another process"
    """Another process under the same memory limit lacked room, and of the models of all this one was the least worthy;
    ``used``, ``need``, ``limit``, ``high`` and ``for_model`` are that process's."""
    MEMORY_BUDGET = "memory budget"
    """The footprints of the models in memory, with a newcomer's, stood above ``memory.budget``."""
    MAX_MODELS = "max_models"
    """There were, with a newcomer, more models in memory than ``memory.max_models``."""
    DISK_BUDGET = "disk budget"
    """The artifacts on disk, with what a fetch needs, stood above ``disk.budget``."""
    MIN_FREE = "min_free"
    """A fetch would have left less than ``disk.min_free`` on the file system."""
    MEMORY_ERROR = "memory error"
    """A load raised MemoryError, and is tried once more with this room."""
    DAMAGED = "damaged"
    """The artifact on disk was no longer what was published; it is removed, and fetched again."""
    IDLE = "idle"
    """Nobody used the model for ``memory.idle_after`` seconds."""
    EVICTED = "evicted"
    """The model left memory since a tier chose to drop it; the ``Evicted`` event before says why."""
    UNLOAD = "unload"
    """Somebody called ``unload()``."""
    DELETE = "delete"
    """Somebody called ``delete()``."""
    REPLACED = "replaced"
    """A new version of the model was loaded in its place."""
    CLOSE = "close"
    """The cache was closed."""
    REQUEST = "request"
    """Somebody called ``get()`` or ``lease()``, or a loader asked for a part."""
    PREFETCH = "prefetch"
    """Somebody called ``prefetch()``."""
    REFRESH = "refresh"
    """Somebody called ``refresh()``, or ``revalidate_after`` seconds were over."""
    FUTILE = "evicting does not help"
    """What batches of evictions freed was far less than they promised."""
    OLD_LEASE = "old lease"
    """A lease is held for longer than ``memory.lease_warning`` seconds."""
    SWAPPING = "swapping"
    """More time goes into loading again what was evicted than into serving."""
    RECOVERED = "recovered"
    """That is over."""

    @property
    def was_eviction(self) -> bool:
        """Whether a tier chose the model, rather than somebody asking for it to go."""
        return self in _EVICTIONS


_EVICTIONS = frozenset(
    {
        Reason.WATERMARK,
        Reason.NEIGHBOUR,
        Reason.MEMORY_BUDGET,
        Reason.MAX_MODELS,
        Reason.DISK_BUDGET,
        Reason.MIN_FREE,
        Reason.MEMORY_ERROR,
        Reason.IDLE,
        Reason.EVICTED,
    }
)


@attrs.frozen(kw_only=True)
class Event:
    """Base of all events; every event has all of these fields, None where a field says nothing.

    Attributes:
        seq: order of decision within one cache and process, from 1, ascending, with gaps.
        time: seconds since the epoch at which it was decided.
        model: id of the model; None where it is about several.
        tier: ``"memory"`` or ``"disk"``.
        reason: why.
        bytes: size of the model in that tier; for ``Fetched`` the bytes transferred.
        duration: seconds that it took.
        used: bytes (models for ``max_models``) in use at the reading that decided.
        need: bytes (models) that were asked for on top of ``used``.
        limit: bytes at which the machine, container, budget or count ends.
        high: bytes above which eviction starts: the threshold that was compared.
        low: bytes down to which the monitor evicts once ``high`` is crossed from outside.
        for_model: id of the model for which room was made; None when no newcomer was involved.
    """

    seq: int
    time: float
    model: str | None = None
    tier: str | None = None
    reason: Reason | None = None
    bytes: int | None = None
    duration: float | None = None
    used: int | None = None
    need: int | None = None
    limit: int | None = None
    high: int | None = None
    low: int | None = None
    for_model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields that say something, with ``event`` (the class name), as plain JSON-ready values."""
        fields = {"event": type(self).__name__}
        for name, value in attrs.asdict(self, recurse=False).items():
            if value is not None:
                fields[name] = str(value) if isinstance(value, enum.Enum) else value
        return fields

    def __str__(self) -> str:
        """Say in one line what happened and why, with figures."""
        words = [type(self).__name__.lower(), ascii(self.model) if self.model else ""]
        if self.bytes is not None:
            words.append(format_bytes(self.bytes))
        if self.duration is not None:
            words.append(f"in {self.duration:.3f} s")
        if self.tier:
            words.append(f"({self.tier})")
        return " ".join(word for word in words if word) + "".join(f": {part}" for part in self._details() if part)

    def _details(self) -> list[str]:
        return [str(self.reason or ""), self._figures(counted=self.reason is Reason.MAX_MODELS)]

    def _figures(self, *, counted: bool = False) -> str:
        if self.used is None or self.high is None:
            return f"for {self.for_model!a}" if self.for_model else ""
        show = str if counted else format_bytes
        figures = f"used {show(self.used)}"
        if self.need:
            figures += f" + {show(self.need)}" + (f" for {self.for_model!a}" if self.for_model else "")
        return f"{figures} {'>' if self.used + (self.need or 0) > self.high else 'of'} {show(self.high)}"


@attrs.frozen(kw_only=True, str=False)
class Fetched(Event):
    """An artifact came from the source and is published on disk.

    Attributes:
        version: ETag, version id or the like, as the source calls it.
    """

    version: str | None = None


@attrs.frozen(kw_only=True, str=False)
class Loaded(Event):
    """The user's ``load`` returned a model, and it is in memory; ``bytes`` is its footprint."""


@attrs.frozen(kw_only=True, str=False)
class Unloaded(Event):
    """A model has left memory and its ``unload=`` has run (``duration``), for whatever reason.

    Attributes:
        error: text of what ``unload=`` raised; None where it went well.
    """

    error: str | None = None

    def _details(self) -> list[str]:
        return [*super()._details(), f"unload= raised {self.error}" if self.error else ""]


@attrs.frozen(kw_only=True, str=False)
class Evicted(Event):
    """A tier chose to drop a model; ``bytes`` is what that promises to give back."""


@attrs.frozen(kw_only=True, str=False)
class Reclaimed(Event):
    """A batch of evictions for a memory limit is over; for the watermark freed heap was given back to the system, too.

    ``used``, ``limit``, ``high`` and ``low`` are those of the memory, after it and whatever the reason.

    Attributes:
        promised: bytes that the footprints of the evicted models promised.
        freed: bytes that the gauge really fell by, of several processes' use this one's; negative where something else
            grew meanwhile.
        models: how many were evicted.
        collected: whether cycles were collected for it (``duration`` includes that, and giving heap back).
    """

    promised: int = 0
    freed: int = 0
    models: int = 0
    collected: bool = False

    def _details(self) -> list[str]:
        promised, freed = format_bytes(self.promised), format_bytes(self.freed)
        lost = " (others grew meanwhile, or somebody still holds them)" if self.freed * 2 < self.promised else ""
        return [f"models={self.models} promised {promised}, {freed} came back{lost}", self._figures()]


@attrs.frozen(kw_only=True, str=False)
class Hit(Event):
    """A lookup found its model in memory. Made only while somebody listens for it."""


@attrs.frozen(kw_only=True, str=False)
class Missed(Event):
    """A lookup did not find its model in memory; ``tier`` is where it must come from, ``"disk"`` or ``"source"``."""


@attrs.frozen(kw_only=True, str=False)
class Failed(Event):
    """A fetch or load ended in an error, which all waiters got; most are remembered for ``retry_after``.

    Or, with the reason ``DAMAGED``, an artifact on disk was not as it was published: it is fetched again.

    Attributes:
        error: class name of the error.
        message: its text.
    """

    error: str | None = None
    message: str | None = None

    def _details(self) -> list[str]:
        return [*super()._details(), f"{self.error}: {self.message}"]


@attrs.frozen(kw_only=True, str=False)
class Pressure(Event):
    """Something keeps memory from coming back; told once for each episode.

    With reason ``FUTILE`` evicting did not help, and the cache stops it for a while: what grew is not the cache's, or
    somebody still holds models that were evicted. With reason ``OLD_LEASE`` a lease on ``model`` is held for
    ``duration`` seconds already.

    Attributes:
        promised: bytes that the footprints of the evicted models promised.
        freed: bytes that the gauge really fell by; negative where something grew meanwhile.
        lingering: bytes of models that were evicted, and that somebody still references.
        foreign: bytes in use that are no model's.
    """

    promised: int | None = None
    freed: int | None = None
    lingering: int | None = None
    foreign: int | None = None

    def _details(self) -> list[str]:
        if self.promised is None or self.freed is None:
            return super()._details()
        shares = f"evicted {format_bytes(self.promised)}, {format_bytes(self.freed)} came back"
        rest = f"{format_bytes(self.lingering or 0)} lingers, {format_bytes(self.foreign or 0)} is no model's"
        return [str(self.reason or ""), shares, rest, self._figures()]


@attrs.frozen(kw_only=True, str=False)
class Thrashing(Event):
    """The memory tier spends more time loading again what it evicted than models spend serving; or no longer.

    One event on entering (reason ``SWAPPING``: a share of at least half, and at least ten reloads), one on leaving
    (``RECOVERED``: under a quarter). Denning, *Thrashing: its causes and prevention*, AFIPS 1968.

    Attributes:
        share: reload seconds over reload and serving seconds, 0 to 1, over the last ``duration`` seconds.
        reloads_per_minute: loads of models that the tier had evicted under pressure.
        worst: ``(model, reload seconds)`` of those that cost most, the worst first.
        memory_needed: bytes of ``high`` that would end it; None: not known.
    """

    share: float = 0.0
    reloads_per_minute: float = 0.0
    worst: tuple[tuple[str, float], ...] = ()
    memory_needed: int | None = None

    def _details(self) -> list[str]:
        figures = f"{self.share:.0%} of the time goes into reloads, {self.reloads_per_minute:.1f} a minute"
        worst = ", ".join(f"{model!a} {seconds:.1f} s" for model, seconds in self.worst)
        return [str(self.reason or ""), figures, f"worst: {worst}" if worst else "", self._figures()]
