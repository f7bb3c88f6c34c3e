"""What a cache says of itself when asked: rows for ``models()`` and figures for ``stats()``."""

import attrs


@attrs.frozen(kw_only=True)
class ModelInfo:
    """One model in a tier, at one moment.

    Attributes:
        model: its id.
        tier: ``"memory"`` or ``"disk"``, the highest it is in.
        state: ``"in memory"``, ``"unloading"``, ``"on disk"``, ``"fetching"``, ``"waiting for room"``,
            ``"waiting for a measurement"`` (of a model that must load alone for it) or ``"loading"``.
        bytes: its footprint in memory, or what the file system allocated for it on disk.
        leases: how many leases hold it.
        hits: lookups that found it in memory, over all its loads in this process.
        last_used: seconds since the epoch of its last use; of hits, to within the monitor's interval.
        estimate: bytes that it was expected to take before it was measured: the word of ``size_of``, or what artifacts
            of its size usually become; None: never loaded.
        measured: bytes that it took, blended over its loads; None: not measured yet.
        doubtful: bytes of the last measurement that is not trusted, as others loaded meanwhile; None: none.
        peak: bytes while it loads; None: not measured.
        in_use: which decides: ``"measured"``, ``"given"`` (by ``size_of``) or ``"estimate"``; None: never loaded.
        lingering: earlier loads of it that were unloaded, and that somebody still references.
        lingering_for: seconds for which the oldest of these does.
    """

    model: str
    tier: str
    state: str
    bytes: int
    leases: int
    hits: int
    last_used: float
    estimate: int | None = None
    measured: int | None = None
    doubtful: int | None = None
    peak: int | None = None
    in_use: str | None = None
    lingering: int = 0
    lingering_for: float = 0.0


@attrs.frozen(kw_only=True)
class Stats:
    """Figures of one cache since it was made, in this process; sizes in bytes.

    Attributes:
        hits: lookups that found their model in memory.
        misses: lookups that did not.
        loads: models loaded.
        load_seconds: time in the user's ``load``, all loads together.
        fetches: artifacts fetched.
        fetched_bytes: bytes transferred from the source.
        failures: fetches and loads that failed.
        evictions: models that the memory tier dropped.
        disk_evictions: artifacts that the disk tier dropped.
        models: models in memory now.
        leases: leases held now.
        waiters: lookups that wait now.
        memory_used: used memory as the gauge reads it; None where it can't be read.
        memory_limit: its limit; None where it can't be read.
        memory_high: upper watermark.
        memory_low: lower watermark.
        memory_models: footprints of the models in memory.
        memory_reserved: reserved for the peaks of loads under way.
        lingering: models that were unloaded, and that somebody still references.
        lingering_bytes: their footprints.
        reloads: loads of models that were evicted under pressure before.
        reload_seconds: time in these, fetches included.
        regrets: reloads so soon that a memory tier of twice the size would have kept the model.
        pressed: whether evictions rest, as they did not help (see ``Pressure``).
        thrashing: whether more time goes into reloads than into serving (see ``Thrashing``).
        swap_share: that share of the time, 0 to 1, over the last minute or more.
        disk_used: allocated or reserved on disk.
        disk_budget: its budget; None: bounded by ``min_free`` only.
        hook_errors: callbacks that raised.
        events_dropped: events for background callbacks that were dropped as their queue was full.
        unload_errors: ``unload=`` calls that raised.
    """

    hits: int
    misses: int
    loads: int
    load_seconds: float
    fetches: int
    fetched_bytes: int
    failures: int
    evictions: int
    disk_evictions: int
    models: int
    leases: int
    waiters: int
    memory_used: int | None
    memory_limit: int | None
    memory_high: int
    memory_low: int
    memory_models: int
    memory_reserved: int
    lingering: int
    lingering_bytes: int
    reloads: int
    reload_seconds: float
    regrets: int
    pressed: bool
    thrashing: bool
    swap_share: float
    disk_used: int
    disk_budget: int | None
    hook_errors: int
    events_dropped: int
    unload_errors: int

    @property
    def hit_ratio(self) -> float:
        """Share of lookups that found their model in memory, 0 to 1; 0 before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0
