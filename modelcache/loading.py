"""What one flight does: find or fetch the artifact, make room, load, land. The story of a miss.

The order matters: fetch first, make room last, so that nothing is evicted for a model that turns out not to
be there. Who waits for a flight is ``flights``, who runs it ``workers``; the first half is ``fetching``.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import attrs

from modelcache.disk.held import Held
from modelcache.disk.shelf import Shelf
from modelcache.errors import CacheClosed, LoadFailed, ModelCacheError, NoRoom, Timeout
from modelcache.events import Failed, Loaded, Reason
from modelcache.fetching import Fetcher, InPlace
from modelcache.flights import Cancelled, Flight, Flights, announce, announce_on_disk, current
from modelcache.freshness import only_refreshes
from modelcache.guard import Guard
from modelcache.history import History
from modelcache.memory.admission import Admission
from modelcache.memory.entries import Entry
from modelcache.memory.footprints import Plan
from modelcache.memory.kinds import kind_of
from modelcache.memory.measuring import Measuring
from modelcache.memory.residents import Residents
from modelcache.memory.room import Room
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.ranks import GivesWay, leave
from modelcache.telling import Teller, clear_frames, complain, text_of
from modelcache.trips import Trip, check_cancelled

T = TypeVar("T")

_PASSED_ON = (NoRoom, Timeout, CacheClosed)  # what a loader's part met is as true of the whole


@attrs.frozen(eq=False)
class Loader(Generic[T]):
    """Runs flights.

    Attributes:
        fetcher: brings artifacts onto this machine.
        shelf: the disk tier.
        tier: settings and gauge of the memory tier.
        residents: who is in memory.
        admission: makes room there.
        room: looks at limits that could not be met before, and makes room for a load that ran out of memory.
        measuring: weighs loads.
        history: what is remembered beside the artifact.
        unloader: carries out what leaves.
        flights: who waits.
        guard: the cache's lock.
        teller: takes events.
        load: the user's loader, called with path and model.
        size_of: the user's estimate, called with model and path; None where there is none.
        closed: whether the cache is closed.
        landed, ended: called after each load, outside the guard; the second also where it failed.
        requeue: has some thread of the cache run a flight later, as its own was needed for a request.
    """

    fetcher: Fetcher[T]
    shelf: Shelf
    tier: MemoryTier
    residents: Residents[T]
    admission: Admission[T]
    room: Room[T]
    measuring: Measuring[T]
    history: History[T]
    unloader: Unloader[T]
    flights: Flights[T]
    guard: Guard
    teller: Teller
    load: Callable[[Path, str], T]
    size_of: Callable[[str, Path], int] | None
    closed: Callable[[], bool]
    landed: Callable[[], None]
    ended: Callable[[], None]
    requeue: Callable[[Flight[T]], None]

    def run(self, flight: Flight[T], parent: Flight[T] | None = None, *, ahead: bool | None = None) -> None:
        """Run a flight to its end, or until it gives way, unless another thread has it; never raises.

        Args:
            flight: what to run.
            parent: the flight whose loader waits for it on this thread, where it did not ask for it as it began.
            ahead: whether this is one of the threads that run what nobody waits for. None: this thread has come to wait
                for it, so that it must not give way any more, whoever runs it.
        """
        with self.guard:
            flight.lent = flight.lent and ahead is not None
            if not self.flights.claim(flight):
                return
            flight.lent, flight.ahead = ahead is not None, bool(ahead)
            flight.parent = flight.parent or parent
        while not flight.context.run(self._run, flight):
            with self.guard:
                left = leave(self.flights, flight)
            if left:
                self.requeue(flight)
                break
        if flight.parent is None:
            self.teller.drop()

    def _run(self, flight: Flight[T]) -> bool:
        """Run a flight; return False where it is to give way."""
        token = current.set(flight)
        try:
            self._fly(flight)
        except GivesWay:
            return False
        except BaseException as error:  # noqa: BLE001 - whatever it is, the waiters must hear of it
            if flight.landed:  # what comes after the landing is not the waiters' business
                complain("after model %a had landed", flight.model, error=error)
            else:
                self.fail(flight, self._typed(flight, error))
        finally:
            if flight.landed:
                announce(flight)
            current.reset(token)
        return True

    def fail(self, flight: Flight[T], error: ModelCacheError) -> None:
        """End a flight in an error: remembered, told, and given to all who wait."""
        try:
            clear_frames(error)
            told = not isinstance(error, Cancelled | CacheClosed)
            with self.guard:
                self.residents.reserved.pop(flight, None)
                self.fetcher.counters.failures += told
                self.flights.fail(flight, error)
            self.ended()
            if told:
                self.teller.tell([self._failed(flight, error)])
        finally:
            announce(flight)

    def _failed(self, flight: Flight[T], error: ModelCacheError) -> Failed:
        return Failed(
            seq=self.teller.number(),
            time=time.time(),
            model=flight.model,
            reason=flight.reason,
            error=type(error).__name__,
            message=text_of(error),
        )

    def _typed(self, flight: Flight[T], error: BaseException) -> ModelCacheError:
        if isinstance(error, ModelCacheError):
            return error
        complain("unexpected error while %a was %s", flight.model, flight.state, error=error)
        failure = LoadFailed(
            f"model {flight.model!a} could not be brought in while {flight.state}: "
            f"{type(error).__name__}: {text_of(error)}",
            model=flight.model,
        )
        failure.__cause__ = error
        return failure

    def _fly(self, flight: Flight[T]) -> None:
        if flight.refresh and self.fetcher.is_current(flight):
            return
        found = self.fetcher.find(flight)
        try:
            announce_on_disk(flight, self.guard)
            with self.guard:
                if flight.refresh:
                    self.residents.outdate(flight.model, found.version)
                    entry = self.residents.resident.get(flight.model)
                    flight.to_memory |= entry is not None and entry.version != found.version
                if not flight.to_memory:
                    self.flights.land(flight, None)
            if flight.to_memory:
                self._after_landing(flight, *self._bring_into_memory(flight, found))
        finally:
            self.fetcher.part(flight, found, kept=flight.entry is not None and self.shelf.keep_files)

    def _bring_into_memory(self, flight: Flight[T], found: Held | InPlace) -> tuple[Entry[T], Limits]:
        """Make room, load and land; from then on the entry keeps what was found."""
        trip = Trip(flight, self.flights, self.residents, self.shelf.index)
        with self.guard:
            trip.give_way(holds=True)
        given = self._given(flight.model, found)
        self.history.recall(flight.model, found)
        with self.guard:
            known = self.residents.footprints.known(flight.model)
        kind = (known.kind if known is not None else "") or kind_of(found.path)
        with self.guard:
            plan = self.residents.footprints.plan(flight.model, found.size, given, kind)
        check_cancelled(flight)
        limits, churn = self.admission.admit(trip, flight, plan)
        flight.state = "loading"
        scale = flight.scale = self.measuring.begin(plan, churn, limits.reading)
        started = time.monotonic()
        value = self._load(flight, plan, found.path)
        duration = time.monotonic() - started
        measured, reading = self.measuring.end(scale, found.path)
        limits = attrs.evolve(limits, reading=reading)
        with self.guard:
            known = self.residents.footprints.learn(flight.model, found.size, measured, duration, limits.most)
            keeps = found if isinstance(found, Held) else None
            size, sure = known.expect(found.size), known.sure(found.size)
            entry = Entry(self.residents, flight.model, value, size, duration, sure=sure, keeps=keeps)
            entry.version = found.version
            entry.latent = min(measured.latent, entry.bytes) if measured is not None else 0
            del value
            del self.residents.reserved[flight]
            self.residents.churn += 1
            self._book(flight, entry, limits, entry.bytes if measured is None else measured.resident - measured.latent)
            self.residents.insert(entry)
            self.flights.land(flight, entry)
            if self.closed():
                self.residents.condemn(entry, Reason.CLOSE)
            elif flight.cancelled and only_refreshes(flight):  # it was unloaded or deleted meanwhile
                self.residents.condemn(entry, Reason.UNLOAD)
        return entry, limits

    def _book(self, flight: Flight[T], entry: Entry[T], limits: Limits, grown: int) -> None:
        """Book a load that ended well, and by which the gauge rose by ``grown``, before it lands; the guard is held."""
        residents, counters = self.residents, self.fetcher.counters
        counters.loads += 1
        counters.load_seconds += entry.cost
        waited = entry.cost + flight.fetch_seconds
        held = residents.tracked() + entry.bytes
        reload = residents.lives.came(entry.model, entry.bytes, waited, held)
        residents.thrash.loaded(time.monotonic(), entry.model, waited, reload=reload)
        if limits.reading is not None:
            residents.deficit = max(residents.deficit, limits.reading.used - limits.high, 0)
        parent = flight.parent
        if parent is not None and parent.scale is not None and flight.scale is not None:
            parent.scale.parts += grown + flight.scale.parts
            parent.scale.moves += 2 + flight.scale.moves  # its admission and its landing

    def _after_landing(self, flight: Flight[T], entry: Entry[T], after: Limits) -> None:
        """Tell, and look at what the landing makes due."""
        self.landed()
        self.ended()
        self.teller.tell([self._loaded(flight, entry.bytes, entry.cost, after)])
        if self.residents.over:
            self.room.enforce()
        self.history.store(entry)
        with self.guard:
            late = [
                other
                for other in self.residents.entries()
                if other.model == entry.model
                and other.doomed in {Reason.CLOSE, Reason.REPLACED, Reason.UNLOAD}
                and self.residents.retire(other, other.doomed)
            ]
        self.unloader.carry_out(late)

    def _loaded(self, flight: Flight[T], size: int, duration: float, after: Limits) -> Loaded:
        return Loaded(
            seq=self.teller.number(),
            time=time.time(),
            model=flight.model,
            tier="memory",
            reason=flight.reason,
            bytes=size,
            duration=duration,
            used=after.reading.used if after.reading else None,
            limit=after.reading.limit if after.reading else None,
            high=after.high,
            low=after.low,
        )

    def _given(self, model: str, found: Held | InPlace) -> int | None:
        """Return the bytes that the user says a model will take; None where nothing is said."""
        if self.size_of is None:
            return None
        try:
            size = self.size_of(model, found.path)
        except BaseException as error:
            raise LoadFailed(
                f"size_of of model {model!a} raised {type(error).__name__}: {text_of(error)}", model=model
            ) from error
        given: object = size  # whatever its annotation says
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise LoadFailed(
                f"size_of of model {model!a} returned {size!r}: it must return bytes, an int of 0 or more",
                model=model,
            )
        return size

    def _load(self, flight: Flight[T], plan: Plan, path: Path) -> T:
        """Load, and once more, with more room, where memory ran out."""
        try:
            return self._call(flight.model, path)
        except LoadFailed as error:
            if not isinstance(error.__cause__, MemoryError) or isinstance(error.__cause__, ModelCacheError):
                raise  # no MemoryError, or a part's TooLarge, which trying again does not change
        self.room.make(plan.peak, flight.model)
        check_cancelled(flight)
        return self._call(flight.model, path)

    def _call(self, model: str, path: Path) -> T:
        """Run the user's loader."""
        try:
            value = self.load(path, model)
        except _PASSED_ON:
            raise
        except BaseException as error:  # SystemExit too: a loader does not end the server
            clear_frames(error)
            said = ": ".join(filter(None, (type(error).__name__, text_of(error))))
            remedy = f"if the artifact is broken, repair it at the source, then refresh({model!a})"
            if isinstance(error, MemoryError) and not isinstance(error, ModelCacheError):
                remedy = "lower memory.high so that more is free for it, or load it in a way that takes less"
            raise LoadFailed(f"load of model {model!a} from {path} raised {said}; {remedy}", model=model) from error
        if value is None:
            raise LoadFailed(
                f"load of model {model!a} from {path} returned None: does it end without 'return model'?",
                model=model,
            )
        return value
