"""The caches that are compared, each behind the same three calls. The process that serves from one is ``child``."""

import contextlib
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import attrs
import cachetools

from benchmarks.wall.store import Facts, Store
from modelcache import DiskTier, Loaded, LocalSource, MemoryTier, ModelCache, gauges, heap

TIMEOUT = 10.0  # seconds that a request waits at modelcache; its default is 60

Load = Callable[[Path, str], Any]


@attrs.frozen
class Look:
    """A cache at one moment.

    Attributes:
        held: models in memory.
        hits: requests that found theirs, so far.
        misses: requests that did not.
        evictions: models dropped.
        models: bytes of their footprints; 0 where the cache does not know.
        reserved: bytes reserved for loads under way.
        room: (used + reserved) / high where a load waits for room, else None.
    """

    held: int
    hits: int
    misses: int
    evictions: int
    models: int = 0
    reserved: int = 0
    room: float | None = None


class Row(Protocol):
    """A cache."""

    def lease(self, model: str) -> AbstractContextManager[Any]:
        """Return a model that stays for the length of the block."""

    def look(self) -> Look:
        """Return how it stands."""

    def close(self) -> None:
        """End."""


class Counted:
    """``functools.lru_cache``, bounded by how many models of mean size fit below ``high``."""

    def __init__(self, store: Store, load: Load, facts: dict[str, Facts], high: int, taken: int) -> None:
        mean = sum(fact.resident for fact in facts.values()) / len(facts)

        @functools.lru_cache(maxsize=int((high - taken) / mean))
        def find(model: str) -> Any:
            return load(store.models / model, model)

        self._find = find

    def lease(self, model: str) -> AbstractContextManager[Any]:
        """Return a model; our reference keeps it alive."""
        return contextlib.nullcontext(self._find(model))

    def look(self) -> Look:
        """Return how it stands."""
        info = self._find.cache_info()
        return Look(info.currsize, info.hits, info.misses, info.misses - info.currsize)

    def close(self) -> None:
        """Drop all."""
        self._find.cache_clear()


@attrs.frozen
class _Sized:
    value: Any
    size: int


class Weighed:
    """``cachetools.LRUCache`` under a lock, bounded by artifact bytes; a condition makes each load happen once."""

    def __init__(self, store: Store, load: Load, facts: dict[str, Facts], high: int, taken: int) -> None:
        cache: cachetools.LRUCache[Any, _Sized] = cachetools.LRUCache(high - taken, lambda sized: sized.size)

        @cachetools.cached(cache, condition=threading.Condition(), info=True)
        def find(model: str) -> _Sized:
            return _Sized(load(store.models / model, model), facts[model].artifact)

        self._cache = cache
        self._find: Any = find

    def lease(self, model: str) -> AbstractContextManager[Any]:
        """Return a model; our reference keeps it alive."""
        return contextlib.nullcontext(self._find(model).value)

    def look(self) -> Look:
        """Return how it stands."""
        info, held = self._find.cache_info(), len(self._cache)
        return Look(held, info.hits, info.misses, info.misses - held)

    def close(self) -> None:
        """Drop all."""
        self._find.cache_clear()


class Measured:
    """modelcache, with the models on its disk tier already.

    Attributes:
        underrated: the most bytes that a load took beyond what was reserved for it.
    """

    def __init__(self, store: Store, load: Load, facts: dict[str, Facts], loaders: int, gauge: str) -> None:
        self._facts = facts
        self._expected: dict[str, int] = {}
        self.underrated = 0
        self._cache = ModelCache(
            LocalSource(store.models),
            load=load,
            disk=DiskTier(store.tier, min_free=0),
            memory=MemoryTier(gauge=gauges.ContainerGauge() if gauge == "container" else gauges.ProcessGauge()),
            loaders=loaders,
            timeout=TIMEOUT,
        )
        self._cache.on(Loaded, self._note)

    def _note(self, event: Loaded) -> None:
        """Compare what was reserved with what the load really takes."""
        model = event.model or ""
        fact = self._facts[model]
        # where the event does not say: what it took last time, else the size of its files
        reserved = event.need if event.need is not None else self._expected.get(model, fact.artifact)
        self.underrated = max(self.underrated, fact.peak - reserved)
        self._expected[model] = event.bytes or 0

    def lease(self, model: str) -> AbstractContextManager[Any]:
        """Return a lease."""
        return self._cache.lease(model)

    def look(self) -> Look:
        """Return how it stands; a model that waits for room says so."""
        waiting = any(row.state == "waiting for room" for row in self._cache.models())
        stats = self._cache.stats()
        room = ((stats.memory_used or 0) + stats.memory_reserved) / stats.memory_high if waiting else None
        return Look(
            stats.models,
            stats.hits,
            stats.misses,
            stats.evictions,
            stats.memory_models,
            stats.memory_reserved,
            room,
        )

    def close(self) -> None:
        """End."""
        assert self._cache.close(), "a model was left behind"


ROWS = ("lru_cache", "cachetools", "no trim", "modelcache")


def make(name: str, store: Store, load: Load, loaders: int, gauge: str, high: int, taken: int) -> Row:
    """Return a cache.

    Args:
        name: which.
        store: the models.
        load: loads one from its folder.
        loaders: how many loads modelcache runs at once; to the others that is not known.
        gauge: ``"process"`` or ``"container"``.
        high: bytes that the process may use.
        taken: bytes that it uses before any model.
    """
    facts = store.facts()
    if name == "lru_cache":
        return Counted(store, load, facts, high, taken)
    if name == "cachetools":
        return Weighed(store, load, facts, high, taken)
    if name == "no trim":
        heap.give_back = lambda: False
    return Measured(store, load, facts, loaders, gauge)
