"""``models()`` and ``stats()``: one look at all parts of a cache. Looking is no use of a model."""

import time
from collections import Counter
from typing import Any

from modelcache.machinery import Machinery
from modelcache.reports import ModelInfo, Stats


def models(parts: Machinery[Any]) -> list[ModelInfo]:
    """Return a row for each model in a tier, sorted by id."""
    parts.settle()
    parts.shelf.look()
    with parts.guard:
        parts.residents.drain()
        rows: dict[str, ModelInfo] = {}
        for model, item in parts.shelf.index.models.items():
            flight = parts.flights.active.get(model)
            rows[model] = ModelInfo(
                model=model,
                tier="disk",
                state="on disk" if flight is None or flight.state == "queued" else flight.state,
                bytes=item.bytes,
                leases=0,
                hits=life.hits if (life := parts.residents.lives.of(model)) else 0,
                last_used=item.used,
                **_sizes(parts, model),
            )
        residents = parts.residents
        leases = Counter[str]()  # those on a version that was replaced count as the model's
        for entry in [*residents.leaving, *residents.doomed.values(), *residents.resident.values()]:
            leases[entry.model] += len(entry.held())
            rows[entry.model] = ModelInfo(
                model=entry.model,
                tier="memory",
                state="unloading" if entry.retired else "in memory",
                bytes=entry.bytes,
                leases=leases[entry.model],
                hits=entry.hits,
                last_used=entry.used,
                **_sizes(parts, entry.model),
            )
    return [rows[model] for model in sorted(rows)]


def _sizes(parts: Machinery[Any], model: str) -> dict[str, Any]:
    """Return what is known of a model's size, as fields of its row; the guard is held."""
    lingering, age = parts.residents.lingering.of(model)
    sizes = {"lingering": lingering, "lingering_for": age}
    known = parts.residents.footprints.known(model)
    if known is None:
        return sizes
    in_use = "measured" if known.resident is not None else "given" if known.given else "estimate"
    figures = {"estimate": known.estimate, "measured": known.resident, "doubtful": known.doubtful, "peak": known.peak}
    return {**sizes, **figures, "in_use": in_use}


def stats(parts: Machinery[Any]) -> Stats:
    """Return all figures at this moment."""
    parts.settle()
    parts.shelf.look()
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
            leases=sum(len(entry.held()) for entry in entries),
            waiters=sum(len(flight.waiters) for flight in parts.flights.active.values()),
            memory_used=limits.reading.used if limits.reading else None,
            memory_limit=limits.reading.limit if limits.reading else None,
            memory_high=limits.high,
            memory_low=limits.low,
            memory_models=residents.tracked(),
            lingering=len(residents.lingering.look()),
            lingering_bytes=residents.lingering.bytes(),
            reloads=residents.lives.reloads,
            reload_seconds=residents.lives.reload_seconds,
            regrets=residents.lives.regrets,
            pressed=parts.evictor.stopped(),
            thrashing=residents.thrash.active,
            swap_share=residents.thrash.share(time.monotonic()),
            memory_reserved=sum(plan.peak for plan in residents.reserved.values()),
            disk_used=parts.shelf.index.used(),
            disk_budget=disk_budget,
            hook_errors=parts.hooks.errors,
            events_dropped=parts.hooks.dropped,
            unload_errors=parts.unloader.errors,
        )
