"""Collecting cycles, no more often than it pays: a full collection stalls all threads.

What is collected for, models that live on in cycles or what a load left behind, is known to ``memory.unloading`` and
``memory.measuring``.
"""

import gc
import threading
import time

from modelcache import heap

_REST = 10.0  # seconds between two collections that nobody waits for
_LONGEST = 1.0  # seconds that one which has helped lately waits for its turn: refusing a load is worse
_SHARE = 10  # a collection that somebody waits for takes at most a tenth of the time
_VAIN = 4  # times as rare, for each one in a row that was in vain
_RAREST = 128  # times as rare at most


class Garbage:
    """One cache's share in the process's garbage, for one purpose: whether it pays for one says nothing of another.

    Concurrency: any thread, with no lock held. What it remembers is plain; two threads at worst collect twice.
    """

    def __init__(self) -> None:
        self._ended = float("-inf")
        self._took = 0.0
        self._rarity = 1

    def turn(self, *, urgent: bool, wait: bool = False, last: bool = False) -> bool:
        """Return whether a collection may run now, as none was just before.

        Args:
            urgent: a load waits for what this may free.
            wait: wait for its turn, a second at most: unless the latest were in vain.
            last: the load is refused otherwise, so that after some in vain it has its turn no later than others.
        """
        rest = _SHARE * self._took * (1 if last else self._rarity)
        vain = self._rarity > 1
        left = self._ended + (max(_REST, rest) if vain or not urgent else rest) - time.monotonic()
        if left > 0 and (vain or not wait):
            return False
        if left > 0:
            threading.Event().wait(min(left, _LONGEST))
        return True

    def collect(self) -> None:
        """Run ``gc.collect()``."""
        with heap.freeing():
            started = time.monotonic()
            gc.collect()
        self._ended = time.monotonic()
        self._took = self._ended - started

    def judge(self, *, helped: bool) -> None:
        """Take note of what the last collection was good for: those in vain become rare, as they stall all threads."""
        self._rarity = 1 if helped else min(self._rarity * _VAIN, _RAREST)
