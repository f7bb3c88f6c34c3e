"""What a model is worth, as a figure that can be compared between processes: which of them has the least worthy one.

A policy's own clock counts the requests to one process; a busy process's runs faster than an idle one's. Here all is in
seconds of the machine's monotonic clock, which its processes share. Which model of one process goes is the policy's
choice; only that one is rated.
"""

import math
import time
from typing import Any

from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.policies import Policy, Standing, Worth
from modelcache.policies.ranked import LeastFrequent, LeastRecent, Ranked

_INSTANT = 0.001  # seconds, so that nothing is divided by 0
_NOBODY = Standing(1, 0, 0)


def kind_of_policy(policy: Policy) -> str:
    """Return by what a policy's models are rated: only alike ones can be compared."""
    if isinstance(policy, Worth):
        return "worth"
    if isinstance(policy, LeastFrequent):
        return "lfu"
    return "fifo" if isinstance(policy, Ranked) and not isinstance(policy, LeastRecent) else "lru"


class Worthiness:
    """Rates models of one process; the cache's guard is held for each call.

    Args:
        policy: whose order it is. One of a user's own is rated by last use.
        residents: what is known of the models.
    """

    def __init__(self, policy: Policy, residents: Residents[Any]) -> None:
        self._policy = policy
        self._residents = residents
        self._kind = kind_of_policy(policy)
        self._began = time.monotonic()

    def rate(self, entry: Entry[Any]) -> float:
        """Return what a model is worth; the lowest goes first. Uses are drained."""
        if self._kind == "worth":
            return self._saved(entry)
        if self._kind == "lfu":
            return float(entry.hits)
        return entry.born if self._kind == "fifo" else entry.tick

    def _saved(self, entry: Entry[Any]) -> float:
        """Return load seconds saved for each byte and second of keeping it: ``worth``, but by the clock of all."""
        now = time.monotonic()
        each = max(now - self._began, _INSTANT) / max(self._residents.clock, 1)  # seconds from one request to the next
        standing = (self._policy.standing(entry.model) if isinstance(self._policy, Worth) else None) or _NOBODY
        idle = max(now - entry.tick, 0.0) + each
        age = max((standing.age + 1) * each, idle)
        known = self._residents.footprints.known(entry.model)
        cost = known.seconds if known is not None and known.seconds else entry.cost
        return standing.n / math.sqrt(age * idle) * cost / max(entry.bytes, 1)
