"""The end of a cache, and its way over a fork: what ``lifecycle`` calls for every cache of the process."""

import threading
import time
from collections.abc import Callable
from typing import Any

from modelcache import lifecycle
from modelcache.errors import CacheClosed
from modelcache.events import Reason
from modelcache.flights import Flight
from modelcache.identity import me
from modelcache.machinery import Machinery

_PATIENCE = 5.0  # seconds for another thread that closes the same cache


class Life:
    """Closes one cache, and carries it over forks.

    Args:
        parts: the cache's parts.
    """

    def __init__(self, parts: Machinery[Any]) -> None:
        self._parts = parts
        parts.ended = lambda: lifecycle.discharge(self)

    def before_fork(self) -> None:
        """Make sure that no decision is half made."""
        self._parts.shelf.before_fork()  # in this order: who decides with the ledger may take the guard inside
        self._parts.guard.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._parts.guard.release()
        self._parts.shelf.after_fork_in_parent()

    def after_fork_in_child(self) -> None:
        """Forget threads that do not exist here."""
        self._parts.reset_after_fork()

    def close(self, timeout: float | None) -> bool:
        """Let running requests finish, unload everything, end all threads; see ``ModelCache.close``."""
        parts = self._parts
        if parts.busy:  # a signal handler: the decision that it interrupted must end first
            threading.Thread(target=self.close, args=(timeout,), name="modelcache-close").start()
            self._parts.closed = True
            return False
        self._parts.settle()
        with self._parts.guard:
            self._parts.flights.closers.add(me())
        try:
            return self._close(timeout)
        finally:
            with self._parts.guard:
                self._parts.flights.closers.discard(me())

    def _close(self, timeout: float | None) -> bool:
        parts = self._parts
        deadline = None if timeout is None else time.monotonic() + timeout
        self._refuse_newcomers()
        self._stop_flights_nobody_waits_for()
        self._await_flights(deadline)
        self._unload_all()
        left = threading.TIMEOUT_MAX if deadline is None else max(deadline - time.monotonic(), 0.1)
        ended = parts.workers.stop(left) & parts.hooks.close(left)
        self._await_releases(0.5 if deadline is None else min(deadline - time.monotonic(), 0.5))
        self._await_flights(deadline)  # and whoever has just released the last lease of a model, and unloads it
        self._await_closers(_PATIENCE if deadline is None else min(deadline - time.monotonic(), _PATIENCE))
        gone = parts.finish() and parts.monitor.stop(left) and ended  # a lease left over still needs the monitor
        parts.pass_on()
        return gone

    def abandon(self) -> None:
        """Remove the temporary folder at exit, also from under a fetch that would not end."""
        self._parts.neighbours.close()
        self._parts.shelf.close()

    def _refuse_newcomers(self) -> None:
        """From here on only loaders under way find models, so that they can end well."""
        with self._parts.guard:
            self._parts.closed = True
            self._parts.residents.drain()
            for entry in self._parts.residents.entries():
                self._parts.residents.condemn(entry, Reason.CLOSE)

    def _stop_flights_nobody_waits_for(self) -> None:
        with self._parts.guard:
            idle = [flight for flight in self._parts.flights.active.values() if not flight.waiters]
            for flight in idle:
                flight.cancelled = True
            self._parts.guard.notify()
        for flight in idle:
            self._parts.abandon(flight, CacheClosed(f"the cache was closed before {flight.model!a} was begun"))

    def _unload_all(self) -> None:
        residents = self._parts.residents
        with self._parts.guard:
            retired = [entry for entry in residents.entries() if residents.doom(entry, Reason.CLOSE)]
        self._parts.unloader.carry_out(retired)

    def _await_releases(self, grace: float) -> None:
        """Wait a moment for lookups that have just got their model and are about to let it go."""
        parts = self._parts
        self._await(lambda: bool(parts.residents.holding_threads() - parts.flights.closers), grace)

    def _await_closers(self, grace: float) -> None:
        """Wait for what another thread unloads that closes the cache; not for long: its ``unload=`` may wait here."""
        self._await(lambda: any(entry.retirer is not me() for entry in self._parts.residents.leaving), grace)

    def _await(self, busy: Callable[[], bool], grace: float) -> None:
        """Wait no longer than ``grace`` seconds for something to end; ``busy`` is asked with the guard held."""
        until = time.monotonic() + grace
        with self._parts.guard:
            while busy() and (left := until - time.monotonic()) > 0:
                self._parts.guard.wait(left)

    def _await_flights(self, deadline: float | None) -> None:
        """Wait for flights, and for unloads on other threads; flights that outlast the deadline are told to stop."""
        parts, closers = self._parts, self._parts.flights.closers
        with parts.guard:
            while True:
                busy = [flight for flight in parts.flights.active.values() if not _only_waits_for(flight, closers)]
                if not busy and all(entry.retirer in closers for entry in parts.residents.leaving):
                    return
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    for flight in busy:
                        flight.cancelled = True
                    return
                parts.guard.wait(min(left, 1.0))


def _only_waits_for(flight: Flight[Any], closers: set[object]) -> bool:
    """Whether a flight can't go on before a thread that closes the cache does: it runs it, or has yet to start it."""
    return flight.thread in closers or (not flight.claimed and closers.issuperset(flight.waiters.values()))
