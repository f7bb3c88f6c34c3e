"""The first half of a flight: find the artifact on disk, or fetch, unpack and publish it.

The bytes themselves are ``fetch``'s business; room for them is made by ``disk.shelf``. The second half is ``loading``.
"""

import errno
import functools
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from modelcache.disk.agreeing import FetchedElsewhere
from modelcache.disk.index import RECHECK
from modelcache.disk.layout import Record
from modelcache.disk.reserving import Contention
from modelcache.disk.shelf import Held, Shelf
from modelcache.errors import AccessDenied, ArtifactChanged, LoadFailed, ModelCacheError, NoRoom
from modelcache.events import Fetched
from modelcache.fetch import fetch
from modelcache.flights import Cancelled, Flight, Flights
from modelcache.guard import Guard
from modelcache.memory.residents import Residents
from modelcache.sources.base import Artifact, Source
from modelcache.telling import Teller, text_of

T = TypeVar("T")

_TICK = 0.001  # seconds between two versions at least
_RESTARTS = 3  # fetches of one artifact that changes all the time, before that is an error


@attrs.frozen
class InPlace:
    """An artifact that is loaded where it lies, outside the disk tier."""

    path: Path
    size: int
    version: str


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

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile."""
        self._flight.refusal = refusal

    @property
    def nested(self) -> bool:
        """Whether a loader under way waits for it."""
        return self._flight.parent is not None

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, or for room as it does; the guard is held."""
        return self._flights.waiting(self._flight)

    def own_threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, and that run it; the guard is held."""
        return self._flight.threads()

    def check(self) -> None:
        """Raise where the flight was told to stop, or nobody waits for it any more; the guard is held.

        Who joins it between this and its end starts another one, rather than get an error that was not his.
        """
        check_cancelled(self._flight)
        if not self._flight.wanted():
            if self._flight.refresh and self._flight.refusal is not None:  # or nobody would hear why the old one stays
                raise self._flight.refusal.fresh()
            raise Cancelled(f"nobody waits for {self._flight.model!a} any more", model=self._flight.model)

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        return self._flights.hopeless(self._flight, self._residents.holding_threads())


@attrs.define
class _Quest:
    """What the tries to fetch one artifact have come to.

    Attributes:
        beside: bytes of the version on disk that stays until there is a new one.
        known: name of the folder of the version that is on disk.
        least: bytes to reserve at once.
        restarts: how often the artifact changed while it was fetched.
    """

    beside: int = 0
    known: str = ""
    least: int = 0
    restarts: int = 0


@attrs.define(eq=False)
class Counters:
    """What the loader has done so far; written under the guard."""

    loads: int = 0
    load_seconds: float = 0.0
    fetches: int = 0
    fetched_bytes: int = 0
    failures: int = 0


@attrs.frozen(eq=False)
class Fetcher(Generic[T]):
    """Brings artifacts onto this machine.

    Attributes:
        source: where they come from.
        shelf: the disk tier.
        flights: who waits.
        residents: who holds leases.
        guard: the cache's lock.
        teller: takes events.
        counters: what was done.
    """

    source: Source
    shelf: Shelf
    flights: Flights[T]
    residents: Residents[T]
    guard: Guard
    teller: Teller
    counters: Counters = attrs.field(factory=Counters)

    def find(self, flight: Flight[T]) -> Held | InPlace:
        """Return the artifact on this machine, fetched where it was not."""
        flight.state = "fetching"
        with self.guard:
            missed = bool(flight.waiters)  # a prefetch, or a look for a new version, is no use of an artifact
        held = self.shelf.open(flight.model, missed=missed)
        if held is not None and not flight.refresh:
            return held
        with self.guard:
            entry = self.residents.resident.get(flight.model)
        served = entry.version if entry is not None else held.version if held is not None else None
        try:
            found = self._from_source(flight, held)
        except BaseException as error:
            if held is not None and isinstance(error, Exception) and flight.to_memory:
                flight.stale = _stale(flight.model, error)  # only who asked for a new version hears of it
                return held
            if held is not None:
                self.shelf.release(held)
            raise
        flight.renewed = served is not None and found.version != served
        return found

    def _from_source(self, flight: Flight[T], held: Held | None) -> Held | InPlace:
        """Fetch what the source has now, unless that is what is held."""
        quest = _Quest() if held is None else _Quest(beside=held.item.bytes, known=held.item.name)
        while True:
            artifact = self.source.find(flight.model)
            if artifact.path is not None:
                if held is not None:  # it was an archive before
                    self.shelf.release(held)
                    self.shelf.delete(flight.model)
                return InPlace(artifact.path, artifact.size, artifact.version)
            if held is not None and artifact.version == held.version:
                return held
            fresh = self._attempt(flight, artifact, quest)
            if fresh is not None:
                if held is not None:
                    self.shelf.release(held)
                return fresh

    def _attempt(self, flight: Flight[T], artifact: Artifact, quest: _Quest) -> Held | None:
        """Fetch an artifact, or take it from another process; None where the source is to be asked again."""
        try:
            return self._fetch(flight, artifact, quest)
        except ArtifactChanged:
            quest.restarts += 1
            if quest.restarts >= _RESTARTS:
                raise
        except Contention as contention:
            quest.least = contention.need
            with self.guard:
                self.guard.wait(RECHECK)
        except FetchedElsewhere:
            found = self.shelf.await_others(Trip(flight, self.flights, self.residents))
            if found is not None and flight.refresh and found.version != artifact.version:
                quest.known = found.item.name
                self.shelf.release(found)
                return None
            return found
        return None

    def _fetch(self, flight: Flight[T], artifact: Artifact, quest: _Quest) -> Held:
        started = time.monotonic()
        trip = Trip(flight, self.flights, self.residents)
        staging = self.shelf.stage(trip, artifact.size, quest.least, quest.beside, quest.known)
        flight.state = "fetching"
        try:
            path = fetch(
                self.source,
                artifact,
                staging,
                grow=functools.partial(self.shelf.grow, staging),
                check=lambda: check_cancelled(flight),
                mode=self.shelf.mode,
            )
            record = Record(
                model=flight.model,
                source=self.source.url,
                version=artifact.version,
                single=None if path.is_dir() else path.name,
                size=_apparent(path),
                fetched=self._stamp(flight.model),
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
        flight.fetch_seconds = record.fetch_seconds
        with self.guard:
            self.counters.fetches += 1
            self.counters.fetched_bytes += artifact.size
        event = Fetched(
            seq=self.teller.number(),
            time=time.time(),
            model=flight.model,
            tier="disk",
            reason=flight.reason,
            bytes=artifact.size,
            duration=record.fetch_seconds,
            version=artifact.version,
        )
        self.teller.tell([event])
        return held

    def _stamp(self, model: str) -> float:
        """Return the time of a fetch in seconds since the epoch: after the version before, whatever the clock says."""
        with self.guard:
            before = self.shelf.index.models.get(model)
        return max(time.time(), before.record.fetched + _TICK if before is not None else 0.0)


def check_cancelled(flight: Flight[Any]) -> None:
    """Stop a flight that was told to.

    Raises:
        Cancelled: it was.
    """
    if flight.cancelled:
        raise Cancelled(f"the fetch of {flight.model!a} was told to stop", model=flight.model)


def _stale(model: str, error: Exception) -> ModelCacheError:
    """Return why the source could not be asked, without what its frames keep alive."""
    if isinstance(error, ModelCacheError):
        return error.fresh()
    told = LoadFailed(
        f"a new version of {model!a} could not be fetched: {type(error).__name__}: {text_of(error)}", model=model
    )
    told.__cause__ = error
    return told


def _apparent(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _disk_error(error: OSError, model: str, folder: Path, need: int, free: int) -> ModelCacheError:
    """Return what the file system said while an artifact was written, as an error that says what to do."""
    where = f"while model {model!a} was written below {folder.parent}"
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
