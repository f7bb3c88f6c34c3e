"""The parts of one cache, put together, and what is done with several of them at once.

``cache`` tells the story of a lookup over these parts; here they are built, asked for their figures, told to
drop a model, carried over a fork, and closed.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from modelcache import lifecycle
from modelcache.calling import check_callable, make_load
from modelcache.disk.shelf import Held, Shelf
from modelcache.disk.tier import DiskTier
from modelcache.errors import CacheClosed, ConfigError, ModelCacheError
from modelcache.events import Hit, Reason
from modelcache.flights import Cancelled, Flight, Flights
from modelcache.guard import Guard
from modelcache.hooks import Hooks
from modelcache.loading import Loader
from modelcache.memory.entries import Entry, Lease
from modelcache.memory.residents import Residents
from modelcache.memory.room import Room
from modelcache.memory.tier import MemoryTier
from modelcache.monitor import Monitor
from modelcache.prefetching import Prefetch
from modelcache.reports import ModelInfo, Stats
from modelcache.sources import Source, source_from
from modelcache.telling import Teller
from modelcache.units import parse_count, parse_seconds
from modelcache.workers import Workers

T = TypeVar("T")

_log = logging.getLogger("modelcache")


class Machinery(Generic[T]):
    """The parts of one cache; arguments as of ``ModelCache``, and how it looks a model up."""

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        source: str | os.PathLike[str] | Source,
        load: Callable[..., T],
        disk: DiskTier | None,
        memory: MemoryTier | None,
        unload: Callable[[T], object] | None,
        size_of: Callable[[str, Path], int] | None,
        loaders: int,
        retry_after: float,
        lookup: Callable[[Lease[T]], T],
    ) -> None:
        make = make_load(load)
        self._unload = None if unload is None else check_callable(unload, "unload", 1)
        size_of = None if size_of is None else check_callable(size_of, "size_of", 2)
        self.workers = Workers(parse_count(loaders, "loaders"))
        retry_after = parse_seconds(retry_after, "retry_after", zero=True)
        self.source = source_from(source)
        self.memory = _tier(memory, MemoryTier, "memory")
        self.disk = _tier(disk, DiskTier, "disk")
        self.guard = Guard()
        self.hooks = Hooks()
        self.teller = Teller(self.hooks)
        self.closed = False
        self._warned_of_get = self._unload is None
        self._inherited: list[Entry[T]] | None = None
        self.residents: Residents[T] = Residents(self.memory.policy, lookup, self._hit, self._released)
        self.room: Room[T] = Room(
            self.memory, self.residents, self.guard, self._unload, self._let_go, self.teller.tell, self.teller.number
        )
        self.memory.bind(self._retuned)
        self.disk.bind(self.source.url, self._disk_retuned)
        self.shelf = Shelf(
            self.disk, self.source.url, self.guard, _Upstairs(self), self.teller.tell, self.teller.number
        )
        self.flights: Flights[T] = Flights(self.guard, retry_after)
        self.monitor = Monitor(self._look, self.memory.interval)
        self.loader: Loader[T] = Loader(
            source=self.source,
            shelf=self.shelf,
            tier=self.memory,
            residents=self.residents,
            room=self.room,
            flights=self.flights,
            guard=self.guard,
            teller=self.teller,
            load=make,
            size_of=size_of,
            closed=lambda: self.closed,
            landed=self.monitor.start,
        )
        self.watch_hits()
        lifecycle.enrol(self)

    def watch_hits(self) -> None:
        """Keep the warm path's one flag current: whether a hit must be told, or a ``get`` warned about."""
        self.residents.watched = self.hooks.listens_hit or not self._warned_of_get

    def _hit(self, entry: Entry[T], *, leased: bool) -> None:
        if not leased:
            self.warn_of_get()
        if self.hooks.wants(Hit):
            event = Hit(seq=self.teller.number(), time=time.time(), model=entry.model, tier="memory")
            self.teller.tell([event])
            self.teller.pass_on()

    def warn_of_get(self) -> None:
        """Say once that ``unload=`` can't know of callers of ``get``."""
        if not self._warned_of_get:
            self._warned_of_get = True
            self.watch_hits()
            _log.warning("get() beside unload=: a model may be unloaded while its caller still uses it; use lease()")

    def refuse_reentry(self, model: str) -> None:
        """Refuse a lookup from a signal handler or finalizer that interrupted a decision of its own thread."""
        if self.guard.busy:
            raise ModelCacheError(
                f"lookup of {ascii(model)} from a signal handler or __del__ in the middle of the cache's own decision: "
                "hand it to another thread",
                model=model,
            )

    def give_to_worker(self, flight: Flight[T], *, urgent: bool) -> None:
        """Have a thread of the cache run a flight."""
        try:
            self.workers.submit(functools.partial(self.loader.run, flight), urgent=urgent)
        except RuntimeError as error:  # stopped, or the interpreter is ending
            failure = CacheClosed(f"no thread for {ascii(flight.model)}: {error}", model=flight.model)
            self._abandon(flight, failure)

    def _abandon(self, flight: Flight[T], error: ModelCacheError) -> None:
        with self.guard:
            mine = self.flights.claim(flight)
        if mine:
            self.loader.fail(flight, error)

    def prefetch(self, model: str, handle: Prefetch, *, to_memory: bool) -> None:
        """Bring one model in for a prefetch, unless it is there already."""
        with self.guard:
            there = model in self.residents.resident or self.residents.rescue(model) is not None
            there = there or (not to_memory and model in self.shelf.items())
            failure = None if there else self.flights.failure(model)
            flight, new = None, False
            if not there and failure is None:
                flight, new = self.flights.start(model, Reason.PREFETCH, to_memory=to_memory)
                flight.watchers.add(handle)
        if flight is None:
            handle.finished(model, failure)
        elif new:
            self.give_to_worker(flight, urgent=False)

    def drop_prefetch(self, handle: Prefetch, models: Iterable[str]) -> None:
        """Stop the flights that only this prefetch wanted."""
        for model in models:
            with self.guard:
                flight = self.flights.active.get(model)
                if flight is None or handle not in flight.watchers:
                    continue
                flight.watchers.discard(handle)
                unwanted = not flight.wanted()
                flight.cancelled = flight.cancelled or unwanted
                self.guard.notify()
            if unwanted:
                self._abandon(flight, Cancelled(f"the prefetch of {ascii(model)} was cancelled", model=model))

    def drop(self, model: str, reason: Reason) -> bool:
        """Unload a model, and delete its artifact where ``reason`` is DELETE; return whether all of it is gone."""
        self.settle()
        with self.guard:
            if reason is Reason.DELETE:
                self.flights.forgive(model)
            entry = self.residents.resident.get(model) or self.residents.doomed.get(model)
            leaving = any(other.model == model for other in self.residents.leaving)
            retired = entry is not None and self.residents.doom(entry, reason)
        if entry is not None and retired:
            self.room.carry_out([entry])
        gone = not leaving and (entry is None or retired)
        if reason is Reason.DELETE and entry is None:
            gone = self.shelf.delete(model) and gone
            with self.guard:
                self.residents.forget(model)
        self.teller.pass_on()
        return gone and not (reason is Reason.DELETE and self._on_disk(model))

    def _on_disk(self, model: str) -> bool:
        with self.guard:
            return model in self.shelf.items()

    def _let_go(self, entry: Entry[T]) -> None:
        """Give back what an entry kept on disk, now that it has left memory."""
        held, entry.keeps = entry.keeps, None
        if isinstance(held, Held):
            self.shelf.release(held)
        if entry.reason is Reason.DELETE:
            self.shelf.delete(entry.model)

    def _released(self, entry: Entry[T]) -> None:
        self.room.release(entry)
        self._finish()
        self.teller.pass_on()

    def _retuned(self) -> None:
        self.settle()
        self.room.enforce()
        self.teller.pass_on()

    def _disk_retuned(self) -> None:
        self.settle()
        self.shelf.shrink()
        self.teller.pass_on()

    def _look(self) -> bool:
        self.room.look()
        self.teller.drop()
        with self.guard:
            return bool(self.residents.resident or self.residents.doomed)

    def models(self) -> list[ModelInfo]:
        """Return a row for each model in a tier, sorted by id."""
        self.settle()
        with self.guard:
            self.residents.drain()
            rows: dict[str, ModelInfo] = {}
            for model, item in self.shelf.items().items():
                flight = self.flights.active.get(model)
                rows[model] = ModelInfo(
                    model=model,
                    tier="disk",
                    state="on disk" if flight is None or flight.state == "queued" else flight.state,
                    bytes=item.published.bytes,
                    leases=0,
                    hits=self.residents.booked_hits(model),
                    last_used=item.used,
                )
            for entry in [*self.residents.leaving, *self.residents.entries()]:
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

    def stats(self) -> Stats:
        """Return all figures at this moment."""
        self.settle()
        limits = self.memory.limits()
        disk_budget = self.disk.budget
        with self.guard:
            residents, done = self.residents, self.loader.counters
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
                evictions=self.room.evictions,
                disk_evictions=self.shelf.evictions,
                models=len(entries),
                leases=sum(len(entry.holds) for entry in entries),
                waiters=sum(len(flight.waiters) for flight in self.flights.active.values()),
                memory_used=limits.reading.used if limits.reading else None,
                memory_limit=limits.reading.limit if limits.reading else None,
                memory_high=limits.high,
                memory_low=limits.low,
                memory_models=residents.tracked(),
                memory_reserved=sum(residents.reserved.values()),
                disk_used=self.shelf.used(),
                disk_budget=disk_budget,
                hook_errors=self.hooks.errors,
                events_dropped=self.hooks.dropped,
                unload_errors=self.room.unload_errors,
            )

    def close(self, timeout: float | None) -> bool:
        """See ``ModelCache.close``."""
        if self.guard.busy:  # a signal handler interrupted a decision of this very thread: it must end first
            threading.Thread(target=self.close, args=(timeout,), name="modelcache-close").start()
            self.closed = True
            return False
        self.settle()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._stop_flights_nobody_waits_for()
        self._unload_all()
        self._await_flights(deadline)
        left = 3600.0 if deadline is None else max(deadline - time.monotonic(), 0.1)
        ended = self.workers.stop(left) & self.monitor.stop(left) & self.hooks.close(left)
        gone = self._finish() and ended
        self.teller.pass_on()
        return gone

    def _stop_flights_nobody_waits_for(self) -> None:
        with self.guard:
            self.closed = True
            flights = list(self.flights.active.values())
            idle = [flight for flight in flights if not flight.waiters]
            for flight in idle:
                flight.cancelled = True
            self.guard.notify()
        for flight in idle:
            self._abandon(flight, CacheClosed(f"the cache was closed before {ascii(flight.model)} was begun"))

    def _unload_all(self) -> None:
        with self.guard:
            self.residents.drain()
            retired = [entry for entry in self.residents.entries() if self.residents.doom(entry, Reason.CLOSE)]
        self.room.carry_out(retired)

    def _await_flights(self, deadline: float | None) -> None:
        """Wait for flights and unloads of others; those that outlast the deadline are told to stop."""
        me = threading.get_ident()
        with self.guard:
            while busy := [flight for flight in self.flights.active.values() if flight.thread != me]:
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    for flight in busy:
                        flight.cancelled = True
                    return
                self.guard.wait(min(left, 1.0))

    def _finish(self) -> bool:
        """Remove the temporary folder once a closed cache has nothing left; return whether it has nothing left."""
        if not self.closed:
            return False
        with self.guard:
            left = self.residents.entries() or self.residents.leaving or self.flights.active
        if left:
            return False
        self.shelf.close()
        return True

    def before_fork(self) -> None:
        """Make sure that no decision is half made."""
        self.guard.__enter__()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self.guard.__exit__(None, None, None)

    def after_fork_in_child(self) -> None:
        """Forget threads that do not exist here; what the parent had loaded is served from the first lookup on."""
        self.guard.reset_after_fork()
        self.hooks.reset_after_fork()
        self.workers.reset_after_fork()
        self.monitor.reset_after_fork()
        self.flights.reset_after_fork()
        entries = self.residents.reset_after_fork(threading.get_ident())
        self.shelf.reset_after_fork(entry.keeps for entry in entries if isinstance(entry.keeps, Held))
        self._inherited = [*(self._inherited or []), *entries]

    def settle(self) -> None:
        """In a child, before the first use: take over the models that were loaded before the fork."""
        if self._inherited is None:
            return
        with self.guard:
            entries, self._inherited = self._inherited or [], None
            self.residents.restore(entries)
        for entry in entries:
            if isinstance(entry.keeps, Held):
                self.shelf.adopt(entry.keeps)
            if entry.doomed is not None:
                self.room.release(entry)
        if entries and not self.closed:
            self.monitor.start()


class _Upstairs:
    """The memory tier, as the disk tier sees it."""

    def __init__(self, parts: Machinery[Any]) -> None:
        self._parts = parts

    def give_up(self, models: Iterable[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        return self._parts.room.give_up(frozenset(models), reason, figures, for_model)

    def holders(self, models: Iterable[str]) -> tuple[tuple[str, int, float], ...]:
        return self._parts.residents.holders(frozenset(models))


def _tier(tier: Any, kind: type, setting: str) -> Any:
    if tier is None:
        return kind()
    if not isinstance(tier, kind):
        raise ConfigError(f"{setting}={tier!r} must be a {kind.__name__}", setting=setting, value=tier)
    return tier
