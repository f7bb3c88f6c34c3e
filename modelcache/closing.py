"""The end of a cache, and its way over a fork: what ``lifecycle`` calls for every cache of the process."""

import threading
import time
from typing import Any

from modelcache import lifecycle
from modelcache.errors import CacheClosed
from modelcache.events import Reason
from modelcache.machinery import Machinery


class Life:
    """Closes one cache, and carries it over forks.

    Args:
        parts: the cache's parts.
    """

    def __init__(self, parts: Machinery[Any]) -> None:
        self._parts = parts

    def before_fork(self) -> None:
        """Make sure that no decision is half made."""
        self._parts.guard.__enter__()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._parts.guard.__exit__(None, None, None)

    def after_fork_in_child(self) -> None:
        """Forget threads that do not exist here."""
        self._parts.reset_after_fork()

    def close(self, timeout: float | None) -> bool:
        """Let running requests finish, unload everything, end all threads; see ``ModelCache.close``."""
        if self._parts.guard.busy:  # a signal handler interrupted a decision of this very thread: it must end first
            threading.Thread(target=self.close, args=(timeout,), name="modelcache-close").start()
            self._parts.closed = True
            return False
        self._parts.settle()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._stop_flights_nobody_waits_for()
        self._unload_all()
        self._await_flights(deadline)
        left = 3600.0 if deadline is None else max(deadline - time.monotonic(), 0.1)
        ended = self._parts.workers.stop(left) & self._parts.monitor.stop(left) & self._parts.hooks.close(left)
        gone = self._parts.finish() and ended
        if gone:
            lifecycle.discharge(self)
        self._parts.pass_on()
        return gone

    def abandon(self) -> None:
        """Remove the temporary folder at exit, also from under a fetch that would not end."""
        self._parts.shelf.close()

    def _stop_flights_nobody_waits_for(self) -> None:
        with self._parts.guard:
            self._parts.closed = True
            flights = list(self._parts.flights.active.values())
            idle = [flight for flight in flights if not flight.waiters]
            for flight in idle:
                flight.cancelled = True
            self._parts.guard.notify()
        for flight in idle:
            self._parts.abandon(flight, CacheClosed(f"the cache was closed before {flight.model!a} was begun"))

    def _unload_all(self) -> None:
        with self._parts.guard:
            self._parts.residents.drain()
            retired = [
                entry for entry in self._parts.residents.entries() if self._parts.residents.doom(entry, Reason.CLOSE)
            ]
        self._parts.unloader.carry_out(retired)

    def _await_flights(self, deadline: float | None) -> None:
        """Wait for flights, and for unloads on other threads; flights that outlast the deadline are told to stop."""
        parts, me = self._parts, threading.get_ident()
        with parts.guard:
            while True:
                busy = [flight for flight in parts.flights.active.values() if flight.thread != me]
                if not busy and not parts.residents.leaving:
                    return
                left = 1.0 if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    for flight in busy:
                        flight.cancelled = True
                    return
                parts.guard.wait(min(left, 1.0))
