"""What one flight does: find the artifact, fetch it, make room, load, land. The story of a miss.

The order matters: fetch first, make room last, so that nothing is evicted for a model that turns out not to
be there. Who waits for a flight is ``flights``, who runs it ``workers``.
"""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from modelcache.disk.layout import Record
from modelcache.disk.shelf import Contention, Held, Shelf
from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    CacheClosed,
    LoadFailed,
    ModelCacheError,
    NoRoom,
    Timeout,
)
from modelcache.events import Failed, Fetched, Loaded, Reason
from modelcache.fetch import fetch
from modelcache.flights import Cancelled, Flight, Flights, announce, clear_frames, current
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.memory.room import Room
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.sources.base import Artifact, Source
from modelcache.telling import Teller

T = TypeVar("T")

_log = logging.getLogger("modelcache")
_RESTARTS = 3  # fetches of one artifact that changes all the time, before that is an error
_PASSED_ON = (NoRoom, Timeout, CacheClosed)  # what a loader's part met is as true of the whole


@attrs.frozen
class InPlace:
    """An artifact that is loaded where it lies, outside the disk tier."""

    path: Path
    size: int


class Trip(Generic[T]):
    """A flight, as those see it who make room for it."""

    def __init__(self, flight: Flight[T], flights: Flights[T], residents: Residents[T]) -> None:
        self._flight = flight
        self._flights = flights
        self._residents = residents

    @property
    def model(self) -> str:
        """The id of the model."""
        return self._flight.model

    @property
    def state(self) -> str:
        """What the flight is doing."""
        return self._flight.state

    @state.setter
    def state(self, value: str) -> None:
        self._flight.state = value

    def refused(self, refusal: NoRoom) -> None:
        """Note what stands in the way, for a waiter whose time ends meanwhile."""
        self._flight.refusal = refusal

    def wanted(self) -> bool:
        """Whether somebody still waits for it; the guard is held."""
        return self._flight.wanted()

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        return self._flights.hopeless(self._flight, self._residents.holding_threads())


@attrs.define(eq=False)
class Counters:
    """What the loader has done so far; written under the guard."""

    loads: int = 0
    load_seconds: float = 0.0
    fetches: int = 0
    fetched_bytes: int = 0
    failures: int = 0


@attrs.frozen(eq=False)
class Loader(Generic[T]):
    """Runs flights.

    Attributes:
        source: where artifacts come from.
        shelf: the disk tier.
        tier: settings and gauge of the memory tier.
        residents: who is in memory.
        room: makes room there.
        flights: who waits.
        guard: the cache's lock.
        teller: takes events.
        load: the user's loader, called with path and model.
        size_of: the user's estimate, called with model and path; None where there is none.
        closed: whether the cache is closed.
        landed: called after each load, outside the guard.
        counters: what was done.
    """

    source: Source
    shelf: Shelf
    tier: MemoryTier
    residents: Residents[T]
    room: Room[T]
    flights: Flights[T]
    guard: Guard
    teller: Teller
    load: Callable[[Path, str], T]
    size_of: Callable[[str, Path], int] | None
    closed: Callable[[], bool]
    landed: Callable[[], None]
    counters: Counters = attrs.field(factory=Counters)

    def run(self, flight: Flight[T]) -> None:
        """Run a flight to its end, unless another thread has it; never raises."""
        with self.guard:
            if not self.flights.claim(flight):
                return
        flight.context.run(self._run, flight)
        if flight.parent is None:
            self.teller.drop()

    def _run(self, flight: Flight[T]) -> None:
        token = current.set(flight)
        try:
            self._fly(flight)
        except BaseException as error:  # whatever it is, the waiters must hear of it
            self.fail(flight, self._typed(flight, error))
        finally:
            current.reset(token)

    def fail(self, flight: Flight[T], error: ModelCacheError) -> None:
        """End a flight in an error: remembered, told, and given to all who wait."""
        clear_frames(error)
        told = not isinstance(error, Cancelled | CacheClosed)
        with self.guard:
            self.residents.reserved.pop(flight, None)
            self.counters.failures += told
            self.flights.fail(flight, error)
        if told:
            self.teller.tell([self._failed(flight, error)])
        announce(flight)

    def _failed(self, flight: Flight[T], error: ModelCacheError) -> Failed:
        return Failed(
            seq=self.teller.number(),
            time=time.time(),
            model=flight.model,
            reason=flight.reason,
            error=type(error).__name__,
            message=str(error),
        )

    def _typed(self, flight: Flight[T], error: BaseException) -> ModelCacheError:
        if isinstance(error, ModelCacheError):
            return error
        _log.error("unexpected error while %a was %s", flight.model, flight.state, exc_info=error)
        failure = LoadFailed(
            f"model {ascii(flight.model)} could not be brought in while {flight.state}: "
            f"{type(error).__name__}: {error}",
            model=flight.model,
        )
        failure.__cause__ = error
        return failure

    def _fly(self, flight: Flight[T]) -> None:
        found = self._find(flight)
        try:
            with self.guard:
                if not flight.to_memory:
                    self.flights.land(flight, None)
            if flight.to_memory:
                found = self._bring_into_memory(flight, found)
        finally:
            if isinstance(found, Held):
                self.shelf.release(found)
        announce(flight)

    def _find(self, flight: Flight[T]) -> Held | InPlace:
        """Return the artifact on this machine, fetched where it was not."""
        flight.state = "fetching"
        held = self.shelf.open(flight.model)
        if held is not None:
            return held
        least = 0
        restarts = 0
        while True:
            artifact = self.source.find(flight.model)
            if artifact.path is not None:
                return InPlace(artifact.path, artifact.size)
            try:
                return self._fetch(flight, artifact, least)
            except ArtifactChanged:
                restarts += 1
                if restarts >= _RESTARTS:
                    raise
            except Contention as contention:
                least = contention.need
                with self.guard:
                    self.guard.wait(self.tier.interval)

    def _fetch(self, flight: Flight[T], artifact: Artifact, least: int) -> Held:
        started = time.monotonic()
        trip = Trip(flight, self.flights, self.residents)
        staging = self.shelf.stage(trip, max(artifact.size, least))
        flight.state = "fetching"
        try:
            path = fetch(
                self.source,
                artifact,
                staging,
                check=lambda: self._check_cancelled(flight),
                mode=self.shelf.mode,
            )
            record = Record(
                model=flight.model,
                source=self.source.url,
                version=artifact.version,
                single=None if path.is_dir() else path.name,
                size=_apparent(path),
                fetched=time.time(),
                fetch_seconds=time.monotonic() - started,
            )
            held = self.shelf.publish(staging, record)
        except OSError as error:
            self.shelf.discard(staging)
            if isinstance(error, ModelCacheError):
                raise
            raise _disk_error(error, flight.model, staging.folder, artifact.size, self.shelf.free()) from error
        except BaseException:
            self.shelf.discard(staging)
            raise
        with self.guard:
            self.counters.fetches += 1
            self.counters.fetched_bytes += artifact.size
        event = Fetched(
            seq=self.teller.number(),
            time=record.fetched,
            model=flight.model,
            tier="disk",
            reason=flight.reason,
            bytes=artifact.size,
            duration=record.fetch_seconds,
            version=artifact.version,
        )
        self.teller.tell([event])
        return held

    def _check_cancelled(self, flight: Flight[T]) -> None:
        if flight.cancelled:
            raise Cancelled(f"the fetch of {ascii(flight.model)} was told to stop", model=flight.model)

    def _bring_into_memory(self, flight: Flight[T], found: Held | InPlace) -> InPlace | Held:
        """Make room, load and land; return what is still to be released: nothing, once the entry keeps it."""
        need, sure = self._expect(flight.model, found)
        self._check_cancelled(flight)
        trip = Trip(flight, self.flights, self.residents)
        before = self.room.admit(trip, flight, need)
        flight.state = "loading"
        started = time.monotonic()
        with self.guard:
            churn = self.residents.churn
        value = self._call(flight.model, found.path)
        duration = time.monotonic() - started
        after = self.tier.limits()
        with self.guard:
            alone = churn == self.residents.churn and len(self.residents.reserved) == 1
            size, measured = self.residents.measured(need, before, after, alone=alone)
            keeps = found if isinstance(found, Held) else None
            entry = Entry(flight.model, value, size, duration, sure=sure or measured, keeps=keeps)
            del value
            del self.residents.reserved[flight]
            self.residents.churn += 1
            self.residents.insert(entry)
            self.flights.land(flight, entry)
            self.counters.loads += 1
            self.counters.load_seconds += duration
            late = self.closed() and self.residents.doom(entry, Reason.CLOSE)
        self.landed()
        self.teller.tell([self._loaded(flight, size, duration, after)])
        if late:
            self.room.carry_out([entry])
        return InPlace(found.path, found.size)

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

    def _expect(self, model: str, found: Held | InPlace) -> tuple[int, bool]:
        """Return the bytes that a load is expected to take, and whether that is more than a guess."""
        with self.guard:
            known = self.residents.expected(model)
        if known is not None and known[1]:
            return known
        if self.size_of is None:
            return known or (found.size, False)
        try:
            size = self.size_of(model, found.path)
        except BaseException as error:
            raise LoadFailed(
                f"size_of of model {ascii(model)} raised {type(error).__name__}: {error}", model=model
            ) from error
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise LoadFailed(
                f"size_of of model {ascii(model)} returned {size!r}: it must return bytes, an int of 0 or more",
                model=model,
            )
        return size, True

    def _call(self, model: str, path: Path) -> T:
        """Run the user's loader."""
        try:
            value = self.load(path, model)
        except _PASSED_ON:
            raise
        except BaseException as error:  # SystemExit too: a loader does not end the server
            clear_frames(error)
            raise LoadFailed(
                f"load of model {ascii(model)} from {path} raised {type(error).__name__}: {error}", model=model
            ) from error
        if value is None:
            raise LoadFailed(
                f"load of model {ascii(model)} from {path} returned None: does it end without 'return model'?",
                model=model,
            )
        return value


def _apparent(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _disk_error(error: OSError, model: str, folder: Path, need: int, free: int) -> ModelCacheError:
    """Return what the file system said while an artifact was written, as an error that says what to do."""
    where = f"while model {ascii(model)} was written below {folder.parent}"
    facts: dict[str, Any] = {"model": model}
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoRoom(
            f"the disk is full ({error.strerror}) {where}: {need} bytes to fetch, {free} bytes free; free some, "
            "raise disk.min_free, or lower disk.budget",
            tier="disk",
            need=need,
            used=0,
            limit=free,
            **facts,
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return AccessDenied(f"no permission ({error.strerror}) {where}: check its owner and mode", **facts)
    return LoadFailed(f"the disk tier failed ({error}) {where}: check the file system", **facts)
