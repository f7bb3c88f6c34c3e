"""What all fetches of one source share and must not exceed together: connections at once, and memory on the way.

Who gets which is first come, first served. What is done with them is ``s3_stream``'s and ``s3_saving``'s business.
"""

import contextvars
import threading
from collections.abc import Callable

from modelcache.sources.s3_connection import Grip

TICK = 0.1
"""Seconds between two looks at whether to stop, while something is waited for."""


class Means:
    """So many connections, and as many buffers.

    Concurrency: may be called from all threads of one process. A connection is held for one request only, never
    while its bytes wait to be used, so that a fetch that stands still takes none from the others; answers of small
    files, asked for ahead, wait for no more than the disk.

    Args:
        most: connections at once. Buffers are as many, but each fetch gets one at least.
    """

    def __init__(self, most: int) -> None:
        # Guards the numbers of what is free, and of who wants it; nothing is done under it. Reentrant, as a stream may
        # be closed by a finalizer or a signal handler that interrupts just this.
        self._changed = threading.Condition(threading.RLock())
        self._most = most
        self._connections = most
        self._waiting = self._sharing = 0
        self._buffers = most

    def take(self, grip: Grip) -> None:
        """Wait for a connection; ``give`` gives it back.

        Raises:
            ConnectionAbortedError: told to stop while none was free.
        """
        with self._changed:
            self._waiting += 1
            try:
                while self._connections <= 0:
                    if grip.torn:
                        raise ConnectionAbortedError("told to stop")
                    self._changed.wait(TICK)
                self._connections -= 1
            finally:
                self._waiting -= 1

    def join(self) -> None:
        """Count a fetch among those that take connections ahead, until ``leave``: they have equal shares of them."""
        with self._changed:
            self._sharing += 1

    def leave(self) -> None:
        """Count it no more."""
        with self._changed:
            self._sharing -= 1

    def take_now(self, held: int) -> bool:
        """Take a connection that nobody waits for, and that is no other fetch's; whether there was one.

        Args:
            held: connections that the fetch holds.
        """
        with self._changed:
            allowed = self.may_take(held)
            self._connections -= allowed
            return allowed

    def may_take(self, held: int) -> bool:
        """Whether ``take_now`` would."""
        with self._changed:
            return self._connections > self._waiting and held * self._sharing < self._most

    def give(self) -> None:
        """Give a connection back."""
        with self._changed:
            self._connections += 1
            self._changed.notify()

    def grant(self, wanted: int) -> int:
        """Return how many buffers a fetch may have: one at least, ``wanted`` at most."""
        with self._changed:
            granted = max(1, min(wanted, self._buffers))
            self._buffers -= granted
        return granted

    def give_back(self, granted: int) -> None:
        """Take back what ``grant`` returned."""
        with self._changed:
            self._buffers += granted


def start_threads(threads: list[threading.Thread], number: int, work: Callable[[], None]) -> None:
    """Add so many threads that run ``work`` in the caller's context; fewer where the system gives no more.

    Raises:
        RuntimeError: not even one could be started.
    """
    for _ in range(number):
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name="modelcache-fetch", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: those that there are will do
            if not threads:
                raise
            return
        threads.append(thread)
