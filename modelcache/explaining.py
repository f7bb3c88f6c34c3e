"""``explain()``: one paragraph about one model, in plain words, with the figures that decided."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from modelcache.events import Event, Evicted, Failed, Fetched, Loaded, Reason, Unloaded
from modelcache.flights import Flight
from modelcache.gauges.limits import MACHINE
from modelcache.machinery import Machinery
from modelcache.memory.entries import Entry
from modelcache.memory.footprints import Known
from modelcache.memory.lives import Life
from modelcache.memory.tier import Limits
from modelcache.units import format_bytes

_SETTING = {
    Reason.WATERMARK: "memory.high",
    Reason.NEIGHBOUR: "its memory.high",
    Reason.MEMORY_BUDGET: "memory.budget",
    Reason.MAX_MODELS: "memory.max_models",
    Reason.DISK_BUDGET: "disk.budget",
}
_DOING = {
    "queued": "waits for a thread to bring it in",
    "fetching": "is being fetched",
    "waiting for room": "waits for room",
    "waiting for a measurement": "waits to be loaded alone, so that it can be measured",
    "loading": "is being loaded",
    "done": "has just been brought in",
}
_LEFT = {
    Reason.UNLOAD: "was unloaded by unload()",
    Reason.DELETE: "was deleted by delete()",
    Reason.REPLACED: "was replaced by a new version",
    Reason.CLOSE: "was unloaded as the cache was closed",
}
_MOST = 5  # holders that are named


def explain(parts: Machinery[Any], model: str) -> str:
    """Return the paragraph; looking is no use of a model."""
    parts.settle()
    parts.shelf.look()
    limits, source = parts.memory.limits(), parts.memory.limit_source
    recent = [event for event in list(parts.teller.recent) if event.model == model]
    with parts.guard:
        parts.residents.drain()
        sentences = [
            *_whereabouts(parts, model),
            *_past(parts, model, recent),
            *_lingering(parts, model),
            *_failure(parts, model, recent),
            *_state(parts, limits, source),
        ]
    return " ".join(sentence if sentence.endswith(".") else f"{sentence}." for sentence in sentences)


def _whereabouts(parts: Machinery[Any], model: str) -> Iterator[str]:
    """Tell which tiers it is in, what is done with it, who holds it."""
    residents = parts.residents
    entries = [entry for entry in [*residents.entries(), *residents.leaving] if entry.model == model]
    old = [entry for entry in entries if Reason.REPLACED in {entry.doomed, entry.reason}]
    present = [entry for entry in entries if entry not in old]
    item, flight = parts.shelf.index.models.get(model), parts.flights.active.get(model)
    known = residents.footprints.known(model)
    disk = "" if item is None else f"on disk ({format_bytes(item.bytes)})"
    if present:
        yield f"{model!a} is in memory" + (f" and {disk}" if disk else "")
    elif disk:
        yield f"{model!a} is {disk}, not in memory"
    else:
        yield f"{model!a} is neither in memory nor on disk"
    if flight is not None:
        yield from _under_way(parts, flight, beside=bool(entries))
    for entry in present:
        yield from _in_memory(entry, known)
        yield from _holders(entry, "It")
    if not present and known is not None:
        yield f"In memory it would take {_footprint(known.in_use, known)}"
    for entry in old:
        yield f"An older version is still in memory ({format_bytes(entry.bytes)})"
        yield from _holders(entry, "That version")
    if present and item is not None and present[0].version not in {None, item.record.version}:
        yield "What is on disk is another version, which has not been loaded"


def _under_way(parts: Machinery[Any], flight: Flight[Any], *, beside: bool) -> Iterator[str]:
    """Tell what is done to bring it in, and for how long."""
    what = "A new version" if beside and flight.refresh else "It"
    waiters = len(flight.waiters)
    many = f", and {_count(waiters, 'lookup waits', 'lookups wait')} for it" if waiters else ""
    plan = parts.residents.reserved.get(flight)
    room = "" if plan is None else f", with {format_bytes(plan.peak)} reserved for it"
    lasts = "" if flight.landed else f" ({_span(time.monotonic() - flight.since)} so far)"
    yield f"{what} {_DOING[flight.state]}{lasts}{room}{many}"
    if flight.refusal is not None:
        yield f"In its way: {flight.refusal}"


def _in_memory(entry: Entry[Any], known: Known | None) -> Iterator[str]:
    found = f"{_count(entry.hits, 'lookup', 'lookups')} found it" if entry.hits else "no lookup has found it there yet"
    yield (
        f"It takes {_footprint(entry.bytes, known)}; its load took {_span(entry.cost)}, {found}, and it was last used "
        f"{_ago(entry.used)}"
    )
    if entry.inherited:
        yield "It was loaded before a fork, so that dropping it gives nothing back, and it goes last"


def _holders(entry: Entry[Any], subject: str) -> Iterator[str]:
    """Tell who holds one load of it, and whether it leaves."""
    ages = entry.ages()
    if ages:
        oldest: dict[str, float] = {}
        for hold, age in ages.items():
            name = str(getattr(hold.thread, "name", "?"))
            oldest[name] = max(oldest.get(name, 0.0), age)
        ranked = sorted(oldest.items(), key=lambda holder: -holder[1])
        names = ", ".join(f"{name!a} ({_span(age)})" for name, age in ranked[:_MOST])
        more = f" and {len(ranked) - _MOST} more" if len(ranked) > _MOST else ""
        threads = "thread" if len(ranked) == 1 else "threads"
        yield f"{_count(len(ages), 'lease holds', 'leases hold')} it, taken by {threads} {names}{more}"
    if entry.retired:
        yield f"{subject} is being unloaded now"
    elif entry.doomed is Reason.REPLACED:
        yield f"{subject} leaves with its last lease"
    elif entry.doomed is not None:
        why = {Reason.CLOSE: "the cache was closed"}.get(entry.doomed, f"{entry.doomed}() was called")
        yield f"{subject} leaves with its last lease, since {why}"


def _footprint(size: int, known: Known | None) -> str:
    """Return a footprint, and where the figure comes from."""
    text = format_bytes(size)
    if known is None:
        return text
    if known.resident is not None:
        peak = known.peak or 0
        return f"{text}, as measured" + (f", and {format_bytes(peak)} while it loads" if peak > size else "")
    if known.given:
        return f"{text}, by the word of size_of"
    text = f"{text}, guessed from its artifact"
    if known.doubtful is not None:
        seen = format_bytes(known.doubtful)
        why = "other models were loaded meanwhile" if known.distrusted else "that is more than all models may take"
        return f"{text} (the {seen} that were measured are not trusted, as {why})"
    return f"{text} (too little to be measured)" if known.weighed else text


def _past(parts: Machinery[Any], model: str, recent: list[Event]) -> Iterator[str]:
    """Tell how it left each tier, and what that has cost."""
    life, gone = parts.residents.lives.of(model), _last(recent, (Evicted, Fetched), tier="disk")
    if not isinstance(gone, Evicted) or model in parts.shelf.index.models:
        gone = None
    evicted = life.evicted if life is not None else None
    both = gone is not None and evicted is not None and _figures(gone) == _figures(evicted)
    if life is not None and evicted is not None:
        yield f"It was evicted from memory{' and from disk' if both else ''} {_eviction(evicted)}"
        yield from _came_back(life)
    yield from _left(life, recent)
    if life is not None and life.reloads:
        many = "once" if life.reloads == 1 else f"{life.reloads} times"
        yield f"It was loaded again {many} after evictions, which took {_span(life.seconds)} in all"
    elif life is not None and life.due:
        yield "It has not been loaded again since"
    if gone is not None and not both:
        yield f"Its artifact was evicted from disk {_eviction(gone)}"


def _figures(event: Evicted) -> tuple[object, ...]:
    """Return what decided an eviction."""
    return event.reason, event.for_model, event.used, event.need, event.high


def _came_back(life: Life) -> Iterator[str]:
    back = life.reclaimed
    if back is None:
        return
    what = "That" if back.models == 1 else f"That batch of {back.models} models"
    freed = format_bytes(back.freed) if (back.freed or 0) > 0 else "nothing"
    yield f"{what} promised {format_bytes(back.promised or 0)}, and {freed} came back"


def _left(life: Life | None, recent: list[Event]) -> Iterator[str]:
    """Tell why it left memory last, where that was no eviction."""
    event = _last(recent, (Unloaded,))
    reason = event.reason if event is not None else life.left if life is not None else None
    if reason in _LEFT:
        yield f"It {_LEFT[reason]}" + (f" {_ago(event.time)}" if event is not None else "")


def _eviction(event: Evicted) -> str:
    """Return when, for whom and why, to be put after "evicted"."""
    text = _ago(event.time)
    if event.for_model:
        own = event.for_model == event.model and event.reason is not Reason.NEIGHBOUR
        text += " to make room for " + ("its new version" if own else f"{event.for_model!a}")
    if event.reason is Reason.NEIGHBOUR:
        text += ", giving way for another process under the same limit as the least worthy model of all"
    if event.reason is Reason.IDLE:
        return f"{text}, since nobody had used it for memory.idle_after seconds"
    if event.reason is Reason.MEMORY_ERROR:
        return f"{text}, whose load had run out of memory"
    show = str if event.reason is Reason.MAX_MODELS else format_bytes
    used, need, high = event.used or 0, event.need or 0, event.high or 0
    needed = f" and {show(need)} needed" if need else ""
    if event.reason is Reason.MIN_FREE:
        left = format_bytes((event.limit or 0) - high)
        return f"{text}: with {show(used)} in use{needed}, less than disk.min_free = {left} would have been left"
    setting = f"{_SETTING.get(event.reason or Reason.WATERMARK, 'a limit')} = {show(high)}"
    if not need:
        return f"{text}: the {show(used)} in use were above {setting}"
    return f"{text}: with {show(used)} in use{needed}, {show(used + need)} would have passed {setting}"


def _lingering(parts: Machinery[Any], model: str) -> Iterator[str]:
    count, age = parts.residents.lingering.of(model)
    why = "somebody still references the object, so that its memory does not come back"
    if count == 1:
        yield f"A load of it that was unloaded {_span(age)} ago lingers: {why}"
    elif count:
        yield f"{count} loads of it that were unloaded up to {_span(age)} ago linger: {why}"


def _failure(parts: Machinery[Any], model: str, recent: list[Event]) -> Iterator[str]:
    """Tell what went wrong last, where nothing has gone well since."""
    failure = parts.flights.failure(model)
    event = _last(recent, (Failed, Loaded, Fetched))
    when = f" {_ago(event.time)}" if isinstance(event, Failed) else ""
    if failure is not None:
        yield f"Its last fetch or load failed{when}, and lookups get that error until it is tried again: {failure}"
    elif isinstance(event, Failed):
        what = "The last try to bring in a new version" if event.reason is Reason.REFRESH else "Its last fetch or load"
        yield f"{what} failed{when}: {event.message}"


def _state(parts: Machinery[Any], limits: Limits, source: str | None) -> Iterator[str]:
    """Tell how the memory tier is; ``source``: what set its limit."""
    reading = limits.reading
    if reading is None:
        yield "Memory in use can't be read now, so that no watermark holds"
    else:
        where = f" (set by {'the ' if source == MACHINE else ''}{source})" if source else ""
        yield (
            f"Memory: {format_bytes(reading.used)} in use, high {format_bytes(limits.high)}, "
            f"low {format_bytes(limits.low)}, limit {format_bytes(reading.limit)}{where}"
        )
    if parts.neighbours.others:
        many = _count(len(parts.neighbours.others), "other process shares", "other processes share")
        yield f"{many} that limit, by the last look: the least worthy model of all goes first"
    if parts.evictor.stopped():
        yield "Evictions rest, since they did not bring memory back"
    if parts.residents.thrash.active:
        yield "More time goes into loading again what was evicted than into serving"
    if parts.closed:
        yield "The cache is closed"


def _last(recent: list[Event], kinds: tuple[type[Event], ...], tier: str | None = None) -> Event | None:
    """Return the latest event of some kinds."""
    fitting: Iterable[Event] = (
        event for event in reversed(recent) if isinstance(event, kinds) and tier in {None, event.tier}
    )
    return next(iter(fitting), None)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _ago(moment: float) -> str:
    return f"{_span(time.time() - moment)} ago"


def _span(seconds: float) -> str:
    """Return a time for people; a clock that went back reads as 0."""
    seconds = max(seconds, 0.0)
    for most, unit, size in ((1, "ms", 0.001), (120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < most:
            return f"{seconds / size:.1f} {unit}" if unit in {"s", "h"} else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
