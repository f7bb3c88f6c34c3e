"""The slow half of a lookup: hold the model if it is there after all, else board its flight and wait for it.

The warm half is ``memory.entries``; what a flight does is ``loading``.
"""

import time
from typing import Any, Generic, TypeVar

from modelcache.errors import CacheClosed
from modelcache.events import Reason
from modelcache.flights import Cancelled, Flight
from modelcache.identity import me
from modelcache.machinery import Machinery
from modelcache.memory.entries import DEFAULT, Lease
from modelcache.units import parse_timeout

T = TypeVar("T")


class Lookup(Generic[T]):
    """Acquires leases whose model was not found by the warm path.

    Args:
        parts: the cache's parts.
        timeout: seconds that a lookup waits where it does not say otherwise; None: for ever.
    """

    def __init__(self, parts: Machinery[Any], timeout: float | None) -> None:
        self._parts = parts
        self._timeout = timeout

    def __call__(self, lease: Lease[T]) -> T:
        """Acquire a lease; return its model."""
        model, parts = lease.model, self._parts
        timeout = self._timeout if lease.timeout is DEFAULT else parse_timeout(lease.timeout)
        parts.enter(f"lookup of {model!a}")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                flight, new = self._board(model, lease)
                if flight is None:
                    break
                parts.start(flight, new=new)
                end = flight.done if parts.flights.running() is None else flight.landing
                arrived = end.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
                self._disembark(model, lease)
                if lease.held is not None:
                    break
                failed_refresh = flight.refresh and flight.error is not None  # which is only its asker's business
                if not arrived or not (failed_refresh or isinstance(flight.error, Cancelled)):
                    raise flight.outcome(timeout)  # noqa: TRY301 - what is caught here cleans up after it
            entry = lease.held
            assert entry is not None  # noqa: S101 - boarding or landing held it
            if flight is None:
                parts.residents.note(entry)
            value: T = entry.value
            parts.pass_on()
        except BaseException:  # whatever it is, nobody gets this lease
            self._disembark(model, lease)
            lease.release()
            parts.pass_on()
            raise
        return value

    def _board(self, model: str, lease: Lease[T]) -> tuple[Flight[T] | None, bool]:
        """Hold the model if it is in memory after all, else wait for its flight; one decision under the guard."""
        parts = self._parts
        with parts.guard:
            asker = parts.flights.running()
            if parts.closed and asker is None:
                raise CacheClosed("the cache is closed: make a new ModelCache", model=model)
            entry = parts.residents.find(model, stays=not parts.closed)
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
                    if not new:
                        parts.guard.notify()  # it goes before others from now on
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
