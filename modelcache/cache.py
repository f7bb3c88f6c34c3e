"""``ModelCache``: the story of a lookup, and the only module that knows all parts.

A warm hit is a dict lookup and a note of use; it takes no lock (``memory.entries``). A miss joins or starts a flight
(``flights``), which a thread of the cache's own runs (``workers``): find, or fetch, the artifact (``fetching``),
make room in memory, load, land (``loading``). Decisions are made under one lock (``guard``), and acted on outside it.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from modelcache import census, lifecycle
from modelcache.closing import Life
from modelcache.disk.tier import DiskTier
from modelcache.errors import CacheClosed
from modelcache.events import Event, Reason
from modelcache.flights import Cancelled, Flight
from modelcache.identity import me
from modelcache.ids import validate_id
from modelcache.machinery import Machinery
from modelcache.memory.entries import DEFAULT, Lease
from modelcache.memory.tier import MemoryTier
from modelcache.orders import Orders
from modelcache.prefetching import Prefetch, check_request
from modelcache.reports import ModelInfo, Stats
from modelcache.sources import Source
from modelcache.units import parse_timeout

T = TypeVar("T")
E = TypeVar("E", bound=Event)

_log = logging.getLogger("modelcache")
_new_lease = object.__new__


class ModelCache(Generic[T]):
    """Models by id: fetched from a source to disk, loaded from disk to memory, dropped when room runs short.

    Args:
        source: an ``s3://`` or ``file://`` URL, a plain folder, or a ``sources.Source``.
        load: makes a model of an artifact: ``load(path)``, or ``load(path, model)`` where it requires a second
            argument. ``path`` is the unpacked folder, or the file itself for a single-file artifact. It runs on
            a thread of the cache, never twice at once for one model.
        disk: the disk tier. None: a folder in the user's cache folder, bounded by ``min_free`` only.
        memory: the memory tier. None: ``MemoryTier()``.
        unload: called with each model exactly once, when it leaves memory for whatever reason, after its last
            lease, on the thread that released or evicted it. It can't know of callers of ``get``: use ``lease``.
        size_of: ``size_of(model, path)`` returns the bytes a model will take in memory, before its first load.
            None: the bytes of its artifact.
        loaders: most fetches and loads under way at once.
        timeout: seconds that a lookup waits; None: for ever. The fetch and the load go on when it ends.
        retry_after: seconds for which a failed fetch or load answers before it is tried again.

    Raises:
        ConfigError: a setting can't work.
        AccessDenied: the disk folder can't be used.

    Concurrency: every method may be called from any thread. Callbacks, ``load``, ``unload`` and ``size_of`` run
    outside all locks and may call the cache. After a fork the child goes on with the models that were loaded,
    with threads of its own. Close it when done: ``with ModelCache(...) as cache`` or ``close()``.
    """

    __slots__ = ("__weakref__", "_desk", "_gettable", "_life", "_orders", "_parts", "_resident", "_timeout")

    def __init__(
        self,
        source: str | os.PathLike[str] | Source,
        load: Callable[[Path], T] | Callable[[Path, str], T],
        *,
        disk: DiskTier | None = None,
        memory: MemoryTier | None = None,
        unload: Callable[[T], object] | None = None,
        size_of: Callable[[str, Path], int] | None = None,
        loaders: int = 4,
        timeout: float | None = 60.0,
        retry_after: float = 5.0,
    ) -> None:
        self._timeout = parse_timeout(timeout)
        self._parts: Machinery[T] = Machinery(
            source, load, disk, memory, unload, size_of, loaders, retry_after, self._lookup
        )
        self._desk = self._parts.residents
        self._resident = self._desk.resident
        self._gettable = self._resident if unload is None else {}
        self._orders = Orders(self._parts)
        self._life = Life(self._parts)
        lifecycle.enrol(self._life)

    @property
    def memory(self) -> MemoryTier:
        """The memory tier; assign to its settings to retune it."""
        return self._parts.memory

    @property
    def disk(self) -> DiskTier:
        """The disk tier; assign to its settings to retune it."""
        return self._parts.disk

    def get(self, id: str, *, timeout: float | None = DEFAULT) -> T:
        """Return a model, fetched and loaded where it is not in memory.

        It is not pinned: the caller's reference keeps the object alive, but the cache may unload it meanwhile.

        Args:
            id: the model's.
            timeout: seconds to wait in place of the cache's own; None: for ever. A warm hit does not look at it.

        Raises:
            InvalidModelId, ModelNotFound, SourceUnavailable, AccessDenied, ArtifactChanged, ArtifactCorrupt,
            UnsafeArtifact, TooLarge, NoRoom, LoadFailed, CacheClosed, Timeout: see ``errors``.
        """
        try:
            entry = self._gettable[id]
            value = entry.value
        except (KeyError, AttributeError, TypeError):  # not there; just unloaded; or not hashable
            pass
        else:
            self._desk.note(entry)
            return value
        self._warn_of_get()
        with self.lease(id, timeout=timeout) as value:
            return value

    def _warn_of_get(self) -> None:
        """Say once that ``unload=`` can't know of callers of ``get``; the first takes the slow path for it."""
        if self._gettable is not self._resident:
            self._gettable = self._resident
            _log.warning("get() beside unload=: a model may be unloaded while its caller still uses it; use lease()")

    def lease(self, id: str, *, timeout: float | None = DEFAULT) -> Lease[T]:
        """Return a one-shot lease on a model: acquired by ``with``, or by ``acquire()``.

        While it is held the model is neither evicted nor unloaded.

        Args:
            id: the model's.
            timeout: seconds that acquiring waits, in place of the cache's own; None: for ever.
        """
        lease: Lease[T] = _new_lease(Lease)
        try:
            lease._entry = self._resident[id]  # noqa: SLF001 - filled here, see Lease
        except (KeyError, TypeError):
            validate_id(id)
            lease._entry = None  # noqa: SLF001
        lease.model = id
        lease._desk = self._desk  # noqa: SLF001
        lease._timeout = timeout  # noqa: SLF001
        return lease

    def _lookup(self, lease: Lease[T]) -> T:
        """Acquire a lease whose model was not found by the warm path."""
        model = lease.model
        timeout = self._timeout if lease.timeout is DEFAULT else parse_timeout(lease.timeout)
        self._parts.enter(f"lookup of {model!a}")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                flight, new = self._board(model, lease)
                if flight is None:
                    break
                self._parts.start(flight, new=new)
                end = flight.done if self._parts.flights.running() is None else flight.landing
                arrived = end.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
                self._disembark(model, lease)
                if lease.held is not None:
                    break
                if not arrived or not isinstance(flight.error, Cancelled):
                    raise flight.outcome(timeout)  # noqa: TRY301 - what is caught here cleans up after it
            entry = lease.held
            assert entry is not None  # noqa: S101 - boarding or landing held it
            if flight is None:
                self._desk.note(entry)
            value = entry.value
            self._parts.pass_on()
        except BaseException:  # whatever it is, nobody gets this lease
            self._disembark(model, lease)
            lease.release()
            self._parts.pass_on()
            raise
        return value

    def _board(self, model: str, lease: Lease[T]) -> tuple[Flight[T] | None, bool]:
        """Hold the model if it is in memory after all, else wait for its flight; one decision under the guard."""
        parts = self._parts
        with parts.guard:
            asker = parts.flights.running()
            if parts.closed and asker is None:
                raise CacheClosed("the cache is closed: make a new ModelCache", model=model)
            entry = self._desk.find(model, stays=not parts.closed)
            if entry is not None:
                lease.hold(entry, me())
                return None, False
            event = parts.missed(model)
            failure = parts.flights.failure(model)
            flight, new = None, False
            if failure is None:
                flight, new = parts.flights.start(model, Reason.REQUEST, to_memory=True, parent=asker)
                if asker is not None:
                    failure = parts.flights.circle(flight, asker)
                if failure is None:
                    flight.waiters[lease] = me()
                    if asker is not None:
                        asker.blocked_on.add(flight)
        parts.teller.tell([event])
        if failure is not None:
            raise failure
        return flight, new

    def _disembark(self, model: str, lease: Lease[T]) -> None:
        """Stop waiting, whatever happened."""
        with (parts := self._parts).guard:
            flight, asker = parts.flights.active.get(model), parts.flights.running()
            if flight is not None:
                flight.waiters.pop(lease, None)
            if asker is not None:
                asker.blocked_on = {ahead for ahead in asker.blocked_on if ahead is not flight and not ahead.landed}
            parts.guard.notify()

    def prefetch(self, ids: Iterable[str], tier: Literal["memory", "disk"] = "memory") -> Prefetch:
        """Bring models in before anybody asks for them; return at once.

        Args:
            ids: the models'.
            tier: how far: ``"memory"``, or ``"disk"`` only.

        Raises:
            InvalidModelId, ConfigError, CacheClosed: nothing was begun. What fails later is in the handle's ``errors``.
        """
        return self._orders.bring(check_request(ids, tier), to_memory=tier == "memory")

    def unload(self, id: str) -> bool:
        """Drop a model from memory, with its last lease where it is leased; its artifact stays on disk.

        Returns:
            Whether it is gone from memory; True for one that was not there. A lookup before the last lease
            ends takes the model back, and it stays.
        """
        return self._orders.drop(validate_id(id), Reason.UNLOAD)

    def delete(self, id: str) -> bool:
        """Drop a model from memory and from disk, with its last lease where it is leased.

        Returns:
            Whether it is gone from both; True for one that was not there.
        """
        return self._orders.drop(validate_id(id), Reason.DELETE)

    def models(self) -> list[ModelInfo]:
        """Return a row for each model in a tier, sorted by id; looking is no use of a model."""
        return census.models(self._parts)

    def stats(self) -> Stats:
        """Return the cache's figures up to this moment."""
        return census.stats(self._parts)

    def history(self, id: str | None = None) -> list[Event]:
        """Return the last 1,000 events, oldest first; only those about the model ``id`` where it is given.

        ``Hit`` is among them only while somebody listens for it.
        """
        if id is not None:
            validate_id(id)
        return [event for event in list(self._parts.teller.recent) if id in {None, event.model, event.for_model}]

    @overload
    def on(self, event: type[E], *, background: bool = False) -> Callable[[Callable[[E], Any]], Callable[[E], Any]]: ...
    @overload
    def on(self, event: type[E], callback: Callable[[E], Any], *, background: bool = False) -> Callable[[E], Any]: ...
    def on(self, event: type[E], callback: Callable[[E], Any] | None = None, *, background: bool = False) -> Any:
        """Call ``callback`` with each event of a type; without a callback, be a decorator.

        Args:
            event: an event class; ``Event`` hears all.
            callback: takes the event. It runs outside all locks, on the thread that caused the event, so
                callbacks may overlap; one that raises is logged and counted, and breaks nothing.
            background: deliver in order on a thread of its own instead; if its queue is full, events are
                dropped and counted.
        """
        if callback is None:
            return functools.partial(self.on, event, background=background)
        self._parts.hooks.on(event, callback, background=background)
        self._parts.watch_hits()
        return callback

    def off(self, callback: Callable[..., Any]) -> bool:
        """Stop calling ``callback`` for every type it was registered for; return whether it was."""
        known = self._parts.hooks.off(callback)
        self._parts.watch_hits()
        return known

    def close(self, *, timeout: float | None = 30.0) -> bool:
        """Let running requests finish, unload everything, end all threads; new requests get ``CacheClosed``.

        What was fetched stays on disk. A lease that is still held unloads its model when it is released.

        Args:
            timeout: seconds to wait for running fetches and loads; None: for ever.

        Returns:
            Whether all is gone. May be called again, from any thread, and from a signal handler.
        """
        return self._life.close(parse_timeout(timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ModelCache of {self._parts.source.url}, {len(self._desk.resident)} models in memory>"
