"""Collecting cycles and giving heap back, no more often than it pays: both stall other threads.

What is collected for, models that live on in cycles or what a load left behind, is known to ``memory.unloading`` and
``memory.measuring``; which allocator is asked to ``heap``.
"""

import gc
import threading
import time

from modelcache import heap

_REST = 10.0  # seconds between two collections that nobody waits for
_LONGEST = 1.0  # seconds that one which can't be done without waits for its turn: refusing a load is worse
_SHARE = 10  # a collection that somebody waits for takes at most a tenth of the time


class Garbage:
    """One cache's share in the process's garbage.

    Concurrency: any thread, with no lock held. The two times are plain; two threads at worst collect twice.
    """

    def __init__(self) -> None:
        self._ended = float("-inf")
        self._took = 0.0

    def collect(self, *, urgent: bool, wait: bool = False) -> bool:
        """Run ``gc.collect()`` unless one was just before; return whether it ran.

        Args:
            urgent: a load waits for what this may free.
            wait: wait for its turn, a second at most, and run it then.
        """
        rest = _SHARE * self._took if urgent else max(_REST, _SHARE * self._took)
        left = self._ended + rest - time.monotonic()
        if left > 0 and not wait:
            return False
        if left > 0:
            threading.Event().wait(min(left, _LONGEST))
        started = time.monotonic()
        gc.collect()
        self._ended = time.monotonic()
        self._took = self._ended - started
        return True

    def give_back(self) -> None:
        """Give freed heap back to the system."""
        heap.give_back()
