"""``models()`` and ``stats()``: one look at all parts of a cache. Looking is no use of a model."""

from typing import Any

from modelcache.machinery import Machinery
from modelcache.reports import ModelInfo, Stats


def models(parts: Machinery[Any]) -> list[ModelInfo]:
    """Return a row for each model in a tier, sorted by id."""
    parts.settle()
    with parts.guard:
        parts.residents.drain()
        rows: dict[str, ModelInfo] = {}
        for model, item in parts.shelf.index.present().items():
            flight = parts.flights.active.get(model)
            rows[model] = ModelInfo(
                model=model,
                tier="disk",
                state="on disk" if flight is None or flight.state == "queued" else flight.state,
                bytes=item.bytes,
                leases=0,
                hits=life.hits if (life := parts.residents.lives.of(model)) else 0,
                last_used=item.used,
            )
        for entry in [*parts.residents.leaving, *parts.residents.entries()]:
            rows[entry.model] = ModelInfo(
                model=entry.model,
                tier="memory",
                state="unloading" if entry.retired else "in memory",
                bytes=entry.bytes,
                leases=len(entry.holds),
                hits=entry.hits,
                last_used=entry.used,
            )
    return [rows[model] for model in sorted(rows)]


def stats(parts: Machinery[Any]) -> Stats:
    """Return all figures at this moment."""
    parts.settle()
    limits = parts.memory.limits()
    disk_budget = parts.disk.budget
    with parts.guard:
        residents, done = parts.residents, parts.fetcher.counters
        residents.drain()
        entries = residents.entries()
        return Stats(
            hits=residents.hits,
            misses=residents.misses,
            loads=done.loads,
            load_seconds=done.load_seconds,
            fetches=done.fetches,
            fetched_bytes=done.fetched_bytes,
            failures=done.failures,
            evictions=parts.unloader.evictions,
            disk_evictions=parts.disk_room.evictions,
            models=len(entries),
            leases=sum(len(entry.holds) for entry in entries),
            waiters=sum(len(flight.waiters) for flight in parts.flights.active.values()),
            memory_used=limits.reading.used if limits.reading else None,
            memory_limit=limits.reading.limit if limits.reading else None,
            memory_high=limits.high,
            memory_low=limits.low,
            memory_models=residents.tracked(),
            memory_reserved=sum(plan.peak for plan in residents.reserved.values()),
            disk_used=parts.shelf.index.used(),
            disk_budget=disk_budget,
            hook_errors=parts.hooks.errors,
            events_dropped=parts.hooks.dropped,
            unload_errors=parts.unloader.errors,
        )
