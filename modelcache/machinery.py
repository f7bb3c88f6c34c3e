"""The parts of one cache: built, tied to one another, and carried over a fork.

``cache`` tells the story of a lookup over them. Their figures are ``census``, what else is ordered of them ``orders``,
their end ``closing``.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from modelcache.above import Above
from modelcache.calling import check_callable, make_load
from modelcache.disk.agreeing import Agreement
from modelcache.disk.held import Held
from modelcache.disk.index import Index
from modelcache.disk.publishing import Publisher
from modelcache.disk.removing import Remover
from modelcache.disk.reserving import DiskRoom
from modelcache.disk.shelf import Shelf
from modelcache.disk.tier import DiskTier
from modelcache.errors import CacheClosed, ConfigError, ModelCacheError
from modelcache.events import Hit, Missed, Reason
from modelcache.fetching import Fetcher
from modelcache.flights import Flight, Flights
from modelcache.freshness import Freshness
from modelcache.guard import Guard
from modelcache.history import History
from modelcache.hooks import Hooks
from modelcache.identity import me
from modelcache.loading import Loader
from modelcache.memory.admission import Admission
from modelcache.memory.asking import Appeal
from modelcache.memory.choosing import Choosing
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.giving import Giving
from modelcache.memory.measuring import Measuring
from modelcache.memory.neighbours import Neighbours
from modelcache.memory.residents import Residents
from modelcache.memory.room import Room
from modelcache.memory.tier import MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.monitor import Monitor
from modelcache.peaks import PeakMeter
from modelcache.policies import Guarded
from modelcache.ranks import urgent as urgent_of
from modelcache.sources import Source, source_from
from modelcache.telling import Teller
from modelcache.units import parse_count, parse_seconds
from modelcache.workers import Workers

T = TypeVar("T")


class Machinery(Generic[T]):
    """The parts of one cache; arguments as of ``ModelCache``, which sets ``look``, the monitor's."""

    def __init__(
        self,
        source: str | os.PathLike[str] | Source,
        load: Callable[..., T],
        disk: DiskTier | None,
        memory: MemoryTier | None,
        unload: Callable[[T], object] | None,
        size_of: Callable[[str, Path], int] | None,
        loaders: int,
        retry_after: float,
        revalidate_after: float | None,
    ) -> None:
        make = make_load(load)
        unload = None if unload is None else check_callable(unload, "unload", 1)
        size_of = None if size_of is None else check_callable(size_of, "size_of", 2)
        self.workers = Workers(parse_count(loaders, "loaders"))
        retry_after = parse_seconds(retry_after, "retry_after", zero=True)
        if revalidate_after is not None:
            revalidate_after = parse_seconds(revalidate_after, "revalidate_after")
        self.source = source_from(source)
        self.memory: MemoryTier = _unused(memory, MemoryTier, "memory")
        self.disk: DiskTier = _unused(disk, DiskTier, "disk")
        self.guard = Guard()
        self.hooks = Hooks()
        self.teller = Teller(self.hooks)
        self.closed = False
        self.look: Callable[[], bool] = lambda: True
        self.ended: Callable[[], None] = lambda: None
        self._inherited: list[Entry[T]] | None = None
        self.residents: Residents[T] = Residents(self.memory.policy, self._hit, self._released)
        choosing: Choosing[T] = Choosing(self.residents, self.memory.policy)
        self.history: History[T] = History(self.residents, self.memory.policy, self.guard)
        self.unloader: Unloader[T] = Unloader(self.residents, self.guard, unload, self._let_go, self.teller)
        self.evictor: Evictor[T] = Evictor(self.memory, self.residents, self.guard, self.unloader, self.teller)
        self.disk.bind(self.source.url, self._disk_retuned)
        tier, residents, guard, evictor = self.memory, self.residents, self.guard, self.evictor
        self.neighbours: Neighbours[T] = Neighbours(tier, residents, choosing, guard, evictor, self.disk.store)
        self.giving: Giving[T] = Giving(tier, residents, guard, evictor, self.neighbours, self.teller)
        self.appeal: Appeal[T] = Appeal(self.neighbours, tier, guard, self.giving.answer)
        common = tier, residents, choosing, guard
        self.room: Room[T] = Room(*common, self.unloader, evictor, self.teller, self.appeal)
        admission: Admission[T] = Admission(*common, evictor, self.unloader, self.appeal)
        self.memory.bind(self._retuned)
        index = Index(self.source.url, self.disk.policy)
        agreed = Agreement(self.disk.store, self.source.url, index, self.guard, lambda: self.disk.budget)
        remover, above = Remover(self.disk.store, index, self.guard, agreed), Above(self.residents, self.room)
        self.disk_room = DiskRoom(self.disk, index, self.guard, agreed, above, self.teller, remover)
        self.shelf = Shelf(self.disk, self.source.url, self.guard, index, agreed, remover, self.teller)
        self.flights: Flights[T] = Flights(self.guard, retry_after, loaders)
        self.flights.pressed = self.workers.pressed
        self.monitor = Monitor(self._look, self.memory.interval)
        store, room = self.disk.store, self.disk_room
        publisher = Publisher(store, self.source.url, self.guard, index, agreed, room, remover)
        self.fetcher: Fetcher[T] = Fetcher(
            self.source, self.shelf, publisher, self.flights, self.residents, self.guard, self.teller
        )
        self.freshness = Freshness(revalidate_after)
        self.loader: Loader[T] = Loader(
            fetcher=self.fetcher,
            shelf=self.shelf,
            tier=self.memory,
            residents=self.residents,
            admission=admission,
            room=self.room,
            measuring=Measuring(self.memory, self.residents, PeakMeter()),
            history=self.history,
            unloader=self.unloader,
            flights=self.flights,
            guard=self.guard,
            teller=self.teller,
            load=make,
            size_of=size_of,
            closed=lambda: self.closed,
            landed=self.monitor.start,
            ended=self.neighbours.settle,
            requeue=lambda flight: self.give_to_worker(flight, urgent=False, first=True),
        )

    def _look(self) -> bool:
        return self.look()

    def pass_on(self) -> None:
        """At the end of a verb: log what users' policies did wrong, raise an interrupt kept from user code."""
        self.report_policies()
        self.teller.pass_on()

    def report_policies(self) -> None:
        """Log what users' policies did wrong; keep an interrupt that came from one."""
        for policy in (self.memory.policy, self.disk.policy):
            if isinstance(policy, Guarded):
                try:
                    policy.report()
                except (KeyboardInterrupt, SystemExit) as stop:
                    self.teller.keep(stop)

    def watch_hits(self) -> None:
        """Have hits told from now on where somebody listens, and only noted where nobody does."""
        self.residents.watch_hits(told=self.hooks.listens_hit)

    def _hit(self, entry: Entry[T]) -> None:
        event = Hit(seq=self.teller.number(), time=time.time(), model=entry.model, tier="memory")
        self.teller.tell([event])
        self.teller.pass_on()

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision, its own or one that all processes share."""
        return self.guard.busy or self.shelf.busy

    def enter(self, verb: str) -> None:
        """Begin a verb that decides.

        Raises:
            ModelCacheError: it was called by a signal handler or finalizer that interrupted a decision of its own
                thread, which must end first.
        """
        if self.busy:
            raise ModelCacheError(
                f"{verb} from a signal handler or __del__ in the middle of the cache's own decision: "
                "hand it to another thread"
            )
        self.settle()

    def missed(self, model: str) -> Missed:
        """Book a lookup that was no hit, and return the event for it; the guard is held."""
        self.residents.missed(model)
        tier = "disk" if model in self.shelf.index.models else "source"
        return Missed(seq=self.teller.number(), time=time.time(), model=model, tier=tier, reason=Reason.REQUEST)

    def start(self, flight: Flight[T], *, new: bool) -> None:
        """See to it that some thread runs a flight: this one, where it is a thread of the cache itself."""
        if self.flights.running() is not None or self.workers.own():
            self.loader.run(flight)
        elif new or not flight.claimed:
            self.give_to_worker(flight, urgent=True)

    def give_to_worker(self, flight: Flight[T], *, urgent: bool, first: bool = False) -> None:
        """Have a thread of the cache run a flight; ``first``: before others that are as urgent."""
        try:
            self.workers.submit(functools.partial(self._work, flight, ahead=not urgent), urgent=urgent, first=first)
        except RuntimeError as error:  # stopped, or the interpreter is ending
            failure = CacheClosed(f"no thread for {flight.model!a}: {error}", model=flight.model)
            self.abandon(flight, failure)

        if urgent and self.workers.pressed():
            with self.guard:
                self.guard.notify()  # a prefetch that waits for room gives its thread up

    def _work(self, flight: Flight[T], *, ahead: bool) -> None:
        """On a thread of the cache: run a flight; where nobody is in a hurry any more, it goes to the others."""
        with self.guard:
            late = not ahead and not flight.claimed and flight not in urgent_of(self.flights)
        if late:
            self.give_to_worker(flight, urgent=False)
        else:
            self.loader.run(flight, ahead=ahead)

    def abandon(self, flight: Flight[T], error: ModelCacheError) -> None:
        """End a flight that no thread has begun."""
        with self.guard:
            mine = self.flights.claim(flight)
        if mine:
            self.loader.fail(flight, error)

    def _let_go(self, entry: Entry[T]) -> None:
        """Give back what an entry kept on disk, now that it has left memory."""
        self.history.store(entry)
        held, entry.keeps = entry.keeps, None
        if isinstance(held, Held):
            self.shelf.release(held)
        if entry.reason is Reason.DELETE:
            self.shelf.delete(entry.model)

    def _released(self, entry: Entry[T]) -> None:
        if self.busy:  # a finalizer or signal handler in the middle of a decision: the monitor looks at it
            self.residents.orphaned(entry)
            return
        self.settle()
        if self.room.release(entry) and self.residents.disk_over:
            self.disk_room.shrink()
        self.finish()
        self.pass_on()

    def _retuned(self) -> None:
        self.enter("an assignment to a memory limit")
        with self.guard:
            self.flights.forgive_too_large()
        self.room.enforce()
        self.pass_on()

    def _disk_retuned(self) -> None:
        self.enter("an assignment to a disk limit")
        with self.guard:
            self.flights.forgive_too_large()
        self.disk_room.shrink()
        self.finish()
        self.pass_on()

    def finish(self) -> bool:
        """Remove the temporary folder once a closed cache has nothing left; return whether it has nothing left."""
        if not self.closed:
            return False
        with self.guard:
            left = self.residents.entries() or self.residents.leaving or self.flights.active
        if left:
            return False
        self.neighbours.close()
        self.shelf.close()
        self.monitor.stop()
        self.ended()
        return True

    def reset_after_fork(self) -> None:
        """Forget threads that do not exist here; what the parent had loaded is served from the first lookup on."""
        self.guard.reset_after_fork()
        self.hooks.reset_after_fork()
        self.workers.reset_after_fork()
        self.monitor.reset_after_fork()
        self.flights.reset_after_fork()
        for each in (self.neighbours, self.giving, self.appeal):
            each.reset_after_fork()
        entries = self.residents.reset_after_fork(me(), self._inherited or [])
        kept = [entry for entry in entries if isinstance(entry.keeps, Held)]
        self.shelf.reset_after_fork([entry.keeps for entry in kept], [entry.keeps for entry in kept if entry.held()])
        self._inherited = entries

    def settle(self) -> None:
        """In a child, before the first use: take over the models that were loaded before the fork."""
        if self._inherited is None:
            return
        with self.guard:
            entries, self._inherited = self._inherited or [], None
            self.residents.restore(entries)
        if entries and not self.closed:
            self.monitor.start()
        if entries:
            self.shelf.adopt([entry.keeps for entry in entries if isinstance(entry.keeps, Held)])
        for entry in entries:
            if entry.doomed is not None:
                self.room.release(entry)


def _unused(tier: Any, kind: Any, setting: str) -> Any:
    """Return a tier that serves no cache yet; both are checked before either is used up."""
    if tier is None:
        return kind()
    if not isinstance(tier, kind):
        raise ConfigError(f"{setting}={tier!r} must be a {kind.__name__}", setting=setting, value=tier)
    if tier.bound:
        raise ConfigError(
            f"this {kind.__name__} serves another ModelCache already: give each its own", setting=setting, value=tier
        )
    return tier
