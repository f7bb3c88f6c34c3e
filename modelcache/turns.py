"""``Turns``: models are freed, and heap is given back, one after the other.

An allocator holds a lock while it gives heap back, for a second where gigabytes lie in pieces. Whoever frees something
meanwhile waits for that lock with the interpreter in hand, so that all threads stand still. Here it waits without it.
"""

import contextlib
import threading
from collections.abc import Iterator

_LONGEST = 2.0  # seconds that freeing waits: longer than heap of any size takes, but not for ever
_MOMENT = 0.05  # seconds that giving back waits: a finalizer may take as long as it likes


class Turns:
    """Keeps the two apart, as far as that takes no longer than it may.

    Concurrency: any thread, with no lock held.
    """

    def __init__(self) -> None:
        # guards the two dicts; nothing is done under it but waiting, a bounded time. Reentrant, as finalizers free.
        self._changed = threading.Condition(threading.RLock())
        self._freeing: dict[object, int] = {}  # which threads
        self._giving: dict[object, int] = {}

    @contextlib.contextmanager
    def freeing(self) -> Iterator[None]:
        """Free something large inside; waits while others give heap back."""
        turn = object()
        try:
            with self._changed:
                self._wait_for(self._giving, _LONGEST)
                self._freeing[turn] = threading.get_ident()
            yield
        finally:
            self._end(self._freeing, turn)

    @contextlib.contextmanager
    def giving(self) -> Iterator[None]:
        """Give heap back inside; what others are freeing is waited for a moment, and they begin with nothing more."""
        turn = object()
        try:
            with self._changed:
                self._giving[turn] = threading.get_ident()
                self._wait_for(self._freeing, _MOMENT)
            yield
        finally:
            self._end(self._giving, turn)

    def _wait_for(self, threads: dict[object, int], most: float) -> None:
        me = threading.get_ident()  # among them where a finalizer or a signal handler came between
        self._changed.wait_for(lambda: all(other == me for other in threads.values()), most)

    def _end(self, threads: dict[object, int], turn: object) -> None:
        with self._changed:
            threads.pop(turn, None)
            self._changed.notify_all()
