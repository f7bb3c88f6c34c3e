"""``Turns``: models are freed, and heap is given back, one after the other.

An allocator holds a lock while it gives heap back, for a second where gigabytes lie in pieces. Whoever frees something
meanwhile waits for that lock with the interpreter in hand, so that all threads stand still. Here it waits without it.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from modelcache.guard import Guard

_LONGEST = 2.0  # seconds that freeing waits: longer than heap of any size takes, but not for ever
_MOMENT = 0.05  # seconds that giving back waits: a finalizer may take as long as it likes
_Turn = tuple[int, float]  # a thread, and since when, in monotonic seconds


class Turns:
    """Keeps the two apart, as far as that takes no longer than it may.

    Concurrency: any thread, with no lock held.
    """

    def __init__(self) -> None:
        # guards the two lists; nothing is done under it but waiting, a bounded time.
        self._guard = Guard()
        self._freeing: list[_Turn] = []
        self._giving: list[_Turn] = []

    @contextlib.contextmanager
    def freeing(self) -> Iterator[None]:
        """Free something large inside; waits while others give heap back."""
        with self._guard:
            self._await(self._giving, _LONGEST)
            turn = self._begin(self._freeing)
        try:
            yield
        finally:
            self._end(self._freeing, turn)

    @contextlib.contextmanager
    def giving(self) -> Iterator[None]:
        """Give heap back inside; what others are freeing is waited for a moment, and they begin with nothing more."""
        with self._guard:
            turn = self._begin(self._giving)
        try:
            with self._guard:
                self._await(self._freeing, _MOMENT)
            yield
        finally:
            self._end(self._giving, turn)

    def _await(self, turns: list[_Turn], most: float) -> None:
        """Wait until other threads have ended their turns; one that an interrupt kept from ending counts no longer."""
        me, until = threading.get_ident(), time.monotonic() + most  # me: a finalizer or signal handler came between
        while (now := time.monotonic()) < until and any(who != me and now < since + _LONGEST for who, since in turns):
            self._guard.wait(until - now)

    def _begin(self, turns: list[_Turn]) -> _Turn:
        turn = threading.get_ident(), time.monotonic()
        turns.append(turn)
        return turn

    def _end(self, turns: list[_Turn], turn: _Turn) -> None:
        with self._guard:
            turns.remove(turn)
            self._guard.notify()
