"""What a cache says of itself when asked: rows for ``models()`` and figures for ``stats()``."""

import attrs


@attrs.frozen(kw_only=True)
class ModelInfo:
    """One model in a tier, at one moment.

    Attributes:
        model: its id.
        tier: ``"memory"`` or ``"disk"``, the highest it is in.
        state: ``"in memory"``, ``"unloading"``, ``"on disk"``, ``"fetching"``, ``"waiting for room"`` or ``"loading"``.
        bytes: its footprint in memory, or what the file system allocated for it on disk.
        leases: how many leases hold it.
        hits: lookups that found it in memory, over all its loads in this process.
        last_used: seconds since the epoch of its last use; of hits, to within the monitor's interval.
    """

    model: str
    tier: str
    state: str
    bytes: int
    leases: int
    hits: int
    last_used: float


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
        memory_reserved: reserved for loads under way.
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
