"""``ModelCache``: what a user holds in hand, and the only module that knows all parts.

A warm hit is a dict lookup and a note of use; it takes no lock (``memory.entries``). A miss (``lookup``) joins or
starts a flight (``flights``), which a thread of the cache's own runs (``workers``): find, or fetch, the artifact
(``fetching``), make room in memory, load, land (``loading``). Decisions are made under one lock (``guard``), and
acted on outside it.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from modelcache import census, explaining, lifecycle
from modelcache.closing import Life
from modelcache.disk.tier import DiskTier
from modelcache.events import Event, Reason
from modelcache.ids import validate_id
from modelcache.lookup import Lookup
from modelcache.machinery import Machinery
from modelcache.memory.entries import DEFAULT, Lease
from modelcache.memory.tier import MemoryTier
from modelcache.orders import Orders
from modelcache.prefetching import Prefetch, check_request
from modelcache.reports import ModelInfo, Stats
from modelcache.sources import Source
from modelcache.units import parse_timeout
from modelcache.watching import Watch

T = TypeVar("T")
E = TypeVar("E", bound=Event)

_log = logging.getLogger("modelcache")


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
            None: the bytes of its artifact, times what other artifacts became.
        loaders: most fetches and loads under way at once.
        timeout: seconds that a lookup waits; None: for ever. When it ends, a fetch or load under way goes on; one that
            waits for room goes on for whoever else waits for it.
        retry_after: seconds for which a failed fetch or load answers before it is tried again.
        revalidate_after: seconds after which the source is asked whether a model in use has a new version, which is
            then brought in as ``refresh`` does; nobody waits for it. None: only ``refresh`` asks.

    Raises:
        ConfigError: a setting can't work.
        AccessDenied: the disk folder can't be used.

    Concurrency: every method may be called from any thread. Callbacks, ``load``, ``unload`` and ``size_of`` run
    outside all locks and may call the cache. After a fork the child goes on with the models that were loaded,
    with threads of its own. Close it when done: ``with ModelCache(...) as cache`` or ``close()``.
    """

    __slots__ = ("__weakref__", "_desk", "_gettable", "_life", "_orders", "_parts", "_resident")

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
        revalidate_after: float | None = None,
    ) -> None:
        wait = parse_timeout(timeout)
        self._parts: Machinery[T] = Machinery(
            source, load, disk, memory, unload, size_of, loaders, retry_after, revalidate_after
        )
        lookup: Lookup[T] = Lookup(self._parts, wait)
        self._parts.residents.lookup = lookup
        self._parts.look = Watch(self._parts)
        self._desk = self._parts.residents
        self._resident = self._desk.resident
        self._gettable = self._resident if unload is None else {}
        self._orders = Orders(self._parts, wait)
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
        lease: Lease[T] = Lease()
        try:
            lease._entry = self._resident[id]  # noqa: SLF001 - filled here, see Lease
        except (KeyError, TypeError):
            validate_id(id)
            lease._entry = None  # noqa: SLF001
        lease.model = id
        lease._desk = self._desk  # noqa: SLF001
        lease._timeout = timeout  # noqa: SLF001
        return lease

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

    def refresh(self, id: str, *, timeout: float | None = DEFAULT) -> bool:
        """Ask the source for a new version of a model that is in a tier, and bring it in beside the old one.

        New lookups get the new version once it is there; leases finish on the old one, which then goes (``Unloaded``
        with reason ``REPLACED``). Where anything fails the old version stays in memory, unless it had to make room for
        the new one, as nobody leased it and both did not fit.

        Args:
            id: the model's.
            timeout: seconds to wait in place of the cache's own; None: for ever. It goes on when that ends.

        Returns:
            Whether there was a new version; False also for a model that is in no tier, nor on its way there. The
            next lookup of that one asks the source, whatever failed a moment ago.

        Raises:
            ModelCacheError: as ``get``.
        """
        return self._orders.refresh(validate_id(id), timeout)

    def explain(self, id: str) -> str:
        """Return in plain words, with figures, where a model is, what pushed it out and why, what that has cost since.

        Looking is no use of a model.
        """
        return explaining.explain(self._parts, validate_id(id))

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
