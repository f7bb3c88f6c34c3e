"""``explain()``: one paragraph about one model, in plain words, with the figures that decided."""

import time
from collections.abc import Iterator
from typing import Any

from modelcache.events import Evicted, Reason
from modelcache.machinery import Machinery
from modelcache.memory.entries import Entry
from modelcache.memory.lives import Life
from modelcache.memory.tier import Limits
from modelcache.units import format_bytes

_SETTING = {
    Reason.WATERMARK: "memory.high",
    Reason.MEMORY_BUDGET: "memory.budget",
    Reason.MAX_MODELS: "memory.max_models",
    Reason.DISK_BUDGET: "disk.budget",
    Reason.MIN_FREE: "disk.min_free",
}


def explain(parts: Machinery[Any], model: str) -> str:
    """Return the paragraph; looking is no use of a model."""
    parts.settle()
    limits = parts.memory.limits()
    with parts.guard:
        parts.residents.drain()
        entries = [entry for entry in [*parts.residents.entries(), *parts.residents.leaving] if entry.model == model]
        sentences = [*_whereabouts(parts, model, entries)]
        for entry in entries:
            sentences += _in_memory(entry)
        sentences += _footprint(parts, model)
        life = parts.residents.lives.of(model)
        if life is not None:
            sentences += _past(life)
        count, age = parts.residents.lingering.of(model)
        if count:
            sentences.append(
                f"{count} earlier {'load' if count == 1 else 'loads'} of it linger: unloaded {age:.1f} s ago, but "
                "somebody still references the object, so that its memory does not come back"
            )
        failure = parts.flights.failure(model)
    if failure is not None:
        sentences.append(f"Its last fetch or load failed, which is remembered for a while: {failure}")
    sentences += _limits(parts, limits)
    return " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)


def _whereabouts(parts: Machinery[Any], model: str, entries: list[Entry[Any]]) -> Iterator[str]:
    item = parts.shelf.index.present().get(model)
    disk = "" if item is None else f"on disk ({format_bytes(item.bytes)})"
    flight = parts.flights.active.get(model)
    if entries:
        yield f"{model!a} is in memory" + (f", and {disk}" if disk else "")
    elif disk:
        yield f"{model!a} is {disk}, not in memory"
    else:
        yield f"{model!a} is neither in memory nor on disk"
    if flight is not None:
        waiters = len(flight.waiters)
        yield f"It is {flight.state} now, and {waiters} {'lookup waits' if waiters == 1 else 'lookups wait'} for it"
        if flight.refusal is not None:
            yield f"In its way: {flight.refusal}"


def _in_memory(entry: Entry[Any]) -> Iterator[str]:
    ago = max(time.time() - entry.used, 0)
    size = format_bytes(entry.bytes)
    yield f"It takes {size}, loaded in {entry.cost:.3f} s, was found {entry.hits} times, last used {ago:.1f} s ago"
    ages = entry.ages()
    if ages:
        names = sorted({str(getattr(holder, "name", "?")) for holder in list(entry.holds.values())})
        many = "1 lease holds it" if len(ages) == 1 else f"{len(ages)} leases hold it"
        yield f"{many}, the oldest for {max(ages):.1f} s, taken by {', '.join(names)}"
    if entry.retired:
        yield "It is being unloaded"
    elif entry.doomed is not None:
        yield f"It leaves with its last lease ({entry.doomed})"
    if entry.inherited:
        yield "It was loaded before a fork, so that dropping it gives nothing back, and it goes last"


def _footprint(parts: Machinery[Any], model: str) -> Iterator[str]:
    known = parts.residents.footprints.known(model)
    if known is None:
        return
    source = "the word of size_of" if known.given else "what its artifact suggests"
    if known.resident is not None:
        peak = f" (peak {format_bytes(known.peak)})" if known.peak is not None else ""
        yield f"Its footprint is measured: {format_bytes(known.resident)}{peak}"
    elif known.doubtful is not None:
        yield (
            f"Its footprint is {source}, {format_bytes(known.estimate)}; a measurement of "
            f"{format_bytes(known.doubtful)} is not trusted, as other models were loaded meanwhile"
        )
    else:
        yield f"Its footprint is {source}, {format_bytes(known.estimate)}: growth was too small to be measured"


def _past(life: Life) -> Iterator[str]:
    event = life.evicted
    if event is not None:
        yield from _eviction(event)
        back = life.reclaimed
        if back is not None:
            yield (
                f"{'That' if back.models == 1 else f'The batch of {back.models} models'} promised "
                f"{format_bytes(back.promised)}, and "
                + (f"{format_bytes(back.freed)} came back" if back.freed > 0 else "nothing came back")
            )
    if life.left is not None and not life.left.was_eviction:
        yield f"It left memory last by {life.left}"
    if life.reloads:
        many = "once" if life.reloads == 1 else f"{life.reloads} times"
        yield f"It was loaded again {many} after evictions, which cost its callers {life.seconds:.1f} s"
    elif life.due:
        yield "Nobody has asked for it since"


def _eviction(event: Evicted) -> Iterator[str]:
    ago = max(time.time() - event.time, 0)
    whom = f" to make room for {event.for_model!a}" if event.for_model else ""
    if event.reason is Reason.IDLE:
        yield f"It was evicted {ago:.1f} s ago, since nobody had used it for memory.idle_after seconds"
        return
    if event.reason is Reason.MEMORY_ERROR:
        yield f"It was evicted {ago:.1f} s ago{whom}, whose load had run out of memory"
        return
    show = str if event.reason is Reason.MAX_MODELS else format_bytes
    used, need, high = event.used or 0, event.need or 0, event.high or 0
    setting = _SETTING.get(event.reason or Reason.WATERMARK, "a limit")
    needed = f" and {show(need)} needed" if need else ""
    yield (
        f"It was evicted {ago:.1f} s ago{whom}: with {show(used)} in use{needed}, "
        f"{show(used + need)} would have passed {setting} = {show(high)}"
    )


def _limits(parts: Machinery[Any], limits: Limits) -> Iterator[str]:
    if limits.reading is None:
        yield "Memory in use can't be read now, so that no watermark holds"
        return
    reading = limits.reading
    source = parts.memory.limit_source
    where = f" (set by {source})" if source else ""
    yield (
        f"Memory: {format_bytes(reading.used)} in use, high {format_bytes(limits.high)}, "
        f"low {format_bytes(limits.low)}, limit {format_bytes(reading.limit)}{where}"
    )
