"""The first half of a flight: find the artifact on disk, or fetch, unpack and publish it.

The bytes themselves are ``fetch``'s business; room for them is made by ``disk.shelf``. The second half is ``loading``.
"""

import errno
import functools
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from modelcache.disk.held import Held
from modelcache.disk.items import RECHECK, Staging
from modelcache.disk.layout import Record
from modelcache.disk.publishing import Publisher
from modelcache.disk.refusals import Contention, FetchedElsewhere
from modelcache.disk.shelf import Shelf
from modelcache.errors import AccessDenied, ArtifactChanged, LoadFailed, ModelCacheError, NoRoom
from modelcache.events import Fetched
from modelcache.fetch import fetch
from modelcache.flights import Flight, Flights
from modelcache.guard import Guard
from modelcache.memory.residents import Residents
from modelcache.sources.base import Artifact, Source
from modelcache.telling import Teller, text_of
from modelcache.trips import Trip, check_cancelled

T = TypeVar("T")

_TICK = 0.001  # seconds between two versions at least
_RESTARTS = 3  # fetches of one artifact that changes all the time, before that is an error


@attrs.frozen
class InPlace:
    """An artifact that is loaded where it lies, outside the disk tier."""

    path: Path
    size: int
    version: str


@attrs.define
class _Quest:
    """What the tries to fetch one artifact have come to.

    Attributes:
        beside: bytes of the version on disk that stays until there is a new one.
        known: name of the folder of the version that is on disk.
        restarts: how often the artifact changed while it was fetched.
    """

    beside: int = 0
    known: str = ""
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
        publisher: brings artifacts into it.
        flights: who waits.
        residents: who holds leases.
        guard: the cache's lock.
        teller: takes events.
        counters: what was done.
    """

    source: Source
    shelf: Shelf
    publisher: Publisher
    flights: Flights[T]
    residents: Residents[T]
    guard: Guard
    teller: Teller
    counters: Counters = attrs.field(factory=Counters)

    def find(self, flight: Flight[T]) -> Held | InPlace:
        """Return the artifact on this machine, fetched where it was not; ``part`` with it."""
        found = self._find(flight)
        with self.guard:
            self.flights.parting[flight] = self.shelf.keep_files
        return found

    def part(self, flight: Flight[T], found: Held | InPlace, *, kept: bool) -> None:
        """Let go of what ``find`` returned; ``kept``: its entry in memory does that."""
        try:
            if isinstance(found, Held) and not kept:
                self.shelf.release(found)
        finally:
            with self.guard:
                self.flights.parting.pop(flight, None)
                self.guard.notify()

    def _find(self, flight: Flight[T]) -> Held | InPlace:
        self._trip(flight).stand_back(self.guard)
        flight.state = "fetching"
        with self.guard:
            missed = bool(flight.waiters)  # a prefetch, or a look for a new version, is no use of an artifact
        held = self.shelf.open(flight.model, missed=missed)
        if held is not None and not flight.refresh:
            self._sized(flight, 0)
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

    def is_current(self, flight: Flight[T]) -> bool:
        """Whether a look for a new version is over: the source has what is in memory, which needs no artifact."""
        with self.guard:
            entry = self.residents.resident.get(flight.model)
            if entry is None or flight.model in self.shelf.index.models:
                return False
        artifact = self.source.find(flight.model)
        with self.guard:
            stays = entry.version == artifact.version and self.residents.resident.get(flight.model) is entry
            if stays and not flight.to_memory:
                self.flights.land(flight, None)
            return stays and not flight.to_memory

    def _trip(self, flight: Flight[T]) -> Trip[T]:
        return Trip(flight, self.flights, self.residents, self.shelf.index)

    def _sized(self, flight: Flight[T], size: int) -> None:
        """Take note of how many bytes are to be transferred."""
        with self.guard:
            flight.transfer.found(size)

    def _from_source(self, flight: Flight[T], held: Held | None) -> Held | InPlace:
        """Fetch what the source has now, unless that is what is held."""
        quest = _Quest() if held is None else _Quest(beside=held.item.bytes, known=held.item.name)
        while True:
            artifact = self.source.find(flight.model)
            kept = artifact.path is not None or (held is not None and artifact.version == held.version)
            self._sized(flight, 0 if kept else artifact.size)
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
            flight.least = contention.need
            with self.guard:
                self.guard.wait(RECHECK)
        except FetchedElsewhere:
            found = self.shelf.await_others(self._trip(flight))
            if found is not None and flight.refresh and found.version != artifact.version:
                quest.known = found.item.name
                self.shelf.release(found)
                return None
            if found is not None:
                with self.guard:
                    flight.transfer.spare()
            return found
        return None

    def _count(self, flight: Flight[T], amount: int) -> None:
        with self.guard:
            flight.transfer.count(amount)

    def _stage(self, flight: Flight[T], artifact: Artifact, quest: _Quest) -> Staging:
        try:
            taken = sum(self.publisher.blocks.charged(file.size) for file in artifact.files)
            return self.publisher.stage(self._trip(flight), taken, flight.least, quest.beside, quest.known)
        except OSError as error:  # of a folder, or of the ledger, on a full disk
            if isinstance(error, ModelCacheError):
                raise
            path = self.publisher.path
            raise _disk_error(error, flight.model, path / "tmp", artifact.size, self.publisher.free()) from error

    def _fetch(self, flight: Flight[T], artifact: Artifact, quest: _Quest) -> Held:
        started = time.monotonic()
        staging = self._stage(flight, artifact, quest)
        flight.state = "fetching"
        with self.guard:
            flight.transfer.begin()
        try:
            path = fetch(
                self.source,
                artifact,
                staging,
                grow=functools.partial(self.publisher.grow, staging),
                check=lambda: check_cancelled(flight),
                count=functools.partial(self._count, flight),
                mode=self.publisher.mode,
                blocks=self.publisher.blocks,
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
            held = self.publisher.publish(staging, record)
        except OSError as error:
            self.publisher.discard(staging)
            if isinstance(error, ModelCacheError):
                raise
            raise _disk_error(error, flight.model, staging.folder, artifact.size, self.publisher.free()) from error
        except BaseException:
            flight.least = max(flight.least, staging.charged)  # a next try asks for all of it before it begins
            self.publisher.discard(staging)
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
