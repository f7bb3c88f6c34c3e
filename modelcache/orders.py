"""What is ordered of a cache beside lookups: bring models in ahead of time, drop them from memory or from disk."""

import time
from collections.abc import Iterable
from typing import Any

from modelcache.errors import CacheClosed
from modelcache.events import Reason
from modelcache.flights import Cancelled
from modelcache.freshness import Refreshing
from modelcache.identity import me
from modelcache.machinery import Machinery
from modelcache.memory.entries import DEFAULT
from modelcache.prefetching import Prefetch
from modelcache.units import parse_timeout


class Orders:
    """Carries out ``prefetch``, ``refresh``, ``unload`` and ``delete``.

    Args:
        parts: the cache's parts.
        timeout: seconds that ``refresh`` waits where it does not say otherwise; None: for ever.
    """

    def __init__(self, parts: Machinery[Any], timeout: float | None) -> None:
        self._parts = parts
        self._timeout = timeout

    def bring(self, models: list[str], *, to_memory: bool) -> Prefetch:
        """Begin to bring models in, and return the handle.

        Raises:
            CacheClosed: nothing was begun.
        """
        self._parts.enter("prefetch")
        if self._parts.closed:
            raise CacheClosed("the cache is closed: make a new ModelCache")
        handle = Prefetch(models, self._drop_prefetch, self._help)
        for model in models:
            self._prefetch(model, handle, to_memory=to_memory)
        return handle

    def _prefetch(self, model: str, handle: Prefetch, *, to_memory: bool) -> None:
        """Bring one model in for a prefetch, unless it is there already."""
        with self._parts.guard:
            there = model in self._parts.residents.resident or self._parts.residents.rescue(model) is not None
            there = there or (not to_memory and model in self._parts.shelf.index.present())
            failure = None if there else self._parts.flights.failure(model)
            flight, new = None, False
            if not there and failure is None:
                flight, new = self._parts.flights.start(model, Reason.PREFETCH, to_memory=to_memory)
                flight.watchers.add(handle)
        if flight is None:
            handle.finished(model, failure)
        elif new or not flight.claimed:
            self._parts.give_to_worker(flight, urgent=False)

    def _help(self, handle: Prefetch, models: Iterable[str]) -> None:
        """Before a wait: run its flights here where this is a thread of the cache, which must not wait for others."""
        parts = self._parts
        asker = parts.flights.running()
        for model in models:
            with parts.guard:
                flight = parts.flights.active.get(model)
                circle = parts.flights.circle(flight, asker) if flight is not None and asker is not None else None
                parts.guard.notify()  # whoever waits for room learns that one more thread waits
            if circle is not None:
                handle.finished(model, circle)
            elif flight is not None and (asker is not None or parts.workers.own()):
                parts.loader.run(flight)

    def _drop_prefetch(self, handle: Prefetch, models: Iterable[str]) -> None:
        """Stop the flights that only this prefetch wanted."""
        for model in models:
            with self._parts.guard:
                flight = self._parts.flights.active.get(model)
                if flight is None or handle not in flight.watchers:
                    continue
                flight.watchers.discard(handle)
                unwanted = not flight.wanted()
                flight.cancelled = flight.cancelled or unwanted
                self._parts.guard.notify()
            if unwanted:
                self._parts.abandon(flight, Cancelled(f"the prefetch of {model!a} was cancelled", model=model))

    def refresh(self, model: str, timeout: float | None) -> bool:
        """Bring in a new version of a model that is in a tier; return whether there was one.

        Raises:
            ModelCacheError: it could not be brought in, and the old one stays.
        """
        parts = self._parts
        timeout = self._timeout if timeout is DEFAULT else parse_timeout(timeout)
        parts.enter(f"refresh({model!a})")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with parts.guard:
                if parts.closed:
                    raise CacheClosed("the cache is closed: make a new ModelCache", model=model)
                if model not in parts.residents.resident and model not in parts.shelf.index.present():
                    return False
                flight, new = parts.flights.start(
                    model, Reason.REFRESH, to_memory=False, parent=parts.flights.running()
                )
                flight.refresh = mine = new or flight.refresh
                watcher = Refreshing(me())
                flight.watchers.add(watcher)
            try:
                parts.start(flight, new=new)
                arrived = flight.done.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
            finally:
                with parts.guard:
                    flight.watchers.discard(watcher)
                    parts.guard.notify()
            if not arrived or (mine and flight.error is not None and not isinstance(flight.error, Cancelled)):
                parts.pass_on()
                raise flight.outcome(timeout)
            if mine and flight.error is None:
                parts.pass_on()
                if flight.stale is not None:
                    raise flight.stale.fresh()
                return flight.renewed

    def drop(self, model: str, reason: Reason) -> bool:
        """Unload a model, and delete its artifact where ``reason`` is DELETE; return whether all of it is gone."""
        self._parts.enter(f"{reason}({model!a})")
        with self._parts.guard:
            self._parts.residents.drain()
            if reason is Reason.DELETE:
                self._parts.flights.forgive(model)
            entries = [entry for entry in self._parts.residents.entries() if entry.model == model]
            leaving = any(other.model == model for other in self._parts.residents.leaving)
            retired = [entry for entry in entries if self._parts.residents.doom(entry, reason)]
            gone = not leaving and len(retired) == len(entries)
        self._parts.unloader.carry_out(retired)
        if reason is Reason.DELETE and not entries:
            gone = self._parts.shelf.delete(model) and gone
        if reason is Reason.DELETE and gone:
            with self._parts.guard:
                self._parts.residents.footprints.forget(model)
                self._parts.residents.lives.forget(model)
        self._parts.finish()
        self._parts.pass_on()
        return gone and not (reason is Reason.DELETE and self._on_disk(model))

    def _on_disk(self, model: str) -> bool:
        with self._parts.guard:
            return model in self._parts.shelf.index.present()
