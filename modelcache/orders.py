"""What is ordered of a cache beside lookups: bring models in ahead of time, drop them from memory or from disk."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from modelcache.errors import CacheClosed, ModelCacheError
from modelcache.events import Reason
from modelcache.flights import Cancelled, Flight
from modelcache.freshness import Refreshing, only_refreshes
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
        self._parts.shelf.look()
        guard = self._parts.guard
        handle = Prefetch(
            models, to_memory=to_memory, guard=guard, drop=self._drop, wait_for=self._help, again=self._again
        )
        with guard:
            self._parts.flights.handles.add(handle)
        for model in models:
            self._prefetch(model, handle)
        return handle

    def _again(self, handle: Prefetch, model: str, error: ModelCacheError) -> bool:
        """Bring a model in anew whose flight somebody else told to stop; return whether that is so."""
        if not isinstance(error, Cancelled) or handle.cancelled or self._parts.closed:
            return False
        self._prefetch(model, handle, here=self._parts.workers.own())
        return True

    def _prefetch(self, model: str, handle: Prefetch, *, here: bool = False) -> None:
        """Bring one model in for a prefetch, unless it is there already, or the prefetch was cancelled meanwhile."""
        parts = self._parts
        with parts.guard:
            if not handle.wants(model):
                return
            failure: ModelCacheError | None = None
            flight, new = None, False
            on_disk = model in parts.shelf.index.models
            there = model in parts.residents.resident or parts.residents.rescue(model) is not None
            if parts.closed:
                failure = CacheClosed(f"the cache was closed before {model!a} was begun", model=model)
            elif not there and (handle.to_memory or not on_disk):
                failure = parts.flights.failure(model)
                if failure is None:
                    flight, new = parts.flights.start(model, Reason.PREFETCH, to_memory=handle.to_memory)
                    flight.watchers.add(handle)
                    handle.boarded(model, flight)
                    if new and on_disk:
                        flight.transfer.found(0)
        if flight is None:
            handle.finished(model, failure)
        elif here:  # all other threads of the cache may wait for it
            self._parts.loader.run(flight)
        elif new or not flight.claimed:
            self._parts.give_to_worker(flight, urgent=False)

    @contextlib.contextmanager
    def _help(self, handle: Prefetch) -> Iterator[None]:
        """Around a wait: run its flights here where this is a thread of the cache, which must not wait for others.

        A loader is known to wait for them until the wait ends.
        """
        parts, ahead = self._parts, set()
        parts.enter("wait for a prefetch")
        asker = parts.flights.running()
        with parts.guard:
            models = handle.wanted()
            parts.guard.notify()  # whoever waits for room learns that one more thread waits
        try:
            for model in models if asker is not None or parts.workers.own() else ():
                with parts.guard:
                    flight = parts.flights.active.get(model)
                    circle = parts.flights.circle(flight, asker) if flight is not None and asker is not None else None
                    if flight is not None and asker is not None and circle is None:
                        ahead.add(flight)
                        asker.blocked_on.add(flight)
                if circle is not None:
                    handle.finished(model, circle)
                elif flight is not None:
                    parts.loader.run(flight, asker)
            yield
        finally:
            if asker is not None:
                with parts.guard:
                    asker.blocked_on -= ahead
                    parts.guard.notify()

    def _drop(self, handle: Prefetch) -> None:
        """Stop the flights that only this prefetch wanted."""
        self._parts.enter("cancel of a prefetch")
        with self._parts.guard:
            models = handle.give_up()
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
        watcher, renewed = Refreshing(me()), False
        parts.shelf.look()
        while True:
            flight, new, mine = self._board(model, watcher)
            if flight is None:
                break
            try:
                parts.start(flight, new=new)
                end = flight.done if parts.flights.running() is None else flight.landing
                arrived = end.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
            finally:
                self._disembark(flight, watcher)
            renewed = renewed or flight.renewed
            error = flight.error or flight.stale
            if arrived and (not mine or isinstance(error, Cancelled)):
                continue
            parts.pass_on()
            if not arrived:
                late = f"the refresh of {model!a} was not over after {timeout} s: it is {flight.state}, which goes on, "
                late += "and the old version is served meanwhile; ask again, or raise timeout="
                raise flight.outcome(timeout, late)
            if error is not None:
                raise error.fresh()
            return renewed
        parts.pass_on()
        return renewed

    def _board(self, model: str, watcher: Refreshing) -> tuple[Flight[Any] | None, bool, bool]:
        """Wait for a model's flight, a new one where there is none; None for a model in no tier nor on its way.

        Returns:
            The flight; whether it is new; whether it will ask the source only from now on.
        """
        parts = self._parts
        with parts.guard:
            if parts.closed:
                raise CacheClosed("the cache is closed: make a new ModelCache", model=model)
            tiers = (parts.residents.resident, parts.shelf.index.models, parts.flights.active)
            if not any(model in tier for tier in tiers):  # one on its way may have asked the source before the upload
                parts.flights.forgive(model)  # the next lookup asks the source, whatever failed a moment ago
                return None, False, False
            asker = parts.flights.running()
            flight, new = parts.flights.start(model, Reason.REFRESH, to_memory=False, parent=asker)
            circle = parts.flights.circle(flight, asker) if asker is not None else None
            if circle is not None:
                raise circle
            flight.refresh = flight.refresh or new
            flight.watchers.add(watcher)
            if asker is not None:
                asker.blocked_on.add(flight)
            return flight, new, flight.refresh and flight.state == "queued"

    def _disembark(self, flight: Flight[Any], watcher: Refreshing) -> None:
        """Stop waiting for a flight, whatever happened."""
        with self._parts.guard:
            flight.watchers.discard(watcher)
            asker = self._parts.flights.running()
            if asker is not None:
                asker.blocked_on.discard(flight)
            self._parts.guard.notify()

    def drop(self, model: str, reason: Reason) -> bool:
        """Unload a model, and delete its artifact where ``reason`` is DELETE; return whether all of it is gone."""
        parts, residents = self._parts, self._parts.residents
        parts.enter(f"{reason}({model!a})")
        with parts.guard:
            residents.drain()
            if reason is Reason.DELETE:
                parts.flights.forgive(model)
            flight = parts.flights.active.get(model)
            if flight is not None and only_refreshes(flight):
                flight.cancelled = True  # or it would bring the model back
            entries = [entry for entry in residents.entries() if entry.model == model]
            leaving = any(other.model == model for other in residents.leaving)
            present = [entry for entry in entries if entry.doomed is not Reason.REPLACED]  # the others go by themselves
            retired = [
                entry for entry in entries if residents.doom(entry, reason if entry in present else Reason.REPLACED)
            ]
            gone = not leaving and len(retired) == len(entries)
            held = any(entry not in retired for entry in present)
        parts.unloader.carry_out(retired)
        if reason is Reason.DELETE:
            gone = (held or parts.shelf.delete(model)) and gone and not self._on_disk(model)
            with parts.guard:
                if gone or not present:
                    residents.footprints.forget(model)
                    residents.lives.forget(model)
        parts.finish()
        parts.pass_on()
        return gone

    def _on_disk(self, model: str) -> bool:
        with self._parts.guard:
            return model in self._parts.shelf.index.models
