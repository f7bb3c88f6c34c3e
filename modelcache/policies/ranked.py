"""LRU, LFU and FIFO: the three well-known orders, on cachetools' classes.

They know neither bytes nor seconds; ``worth`` does.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator

from cachetools import Cache, FIFOCache, LFUCache, LRUCache

from modelcache.policies.base import Resident


class Ranked:
    """LRU, LFU and FIFO: an order kept by one of cachetools' classes.

    LFU counts from the request that brought the model in, and forgets the count when it leaves; among equals
    the least recently used goes first. All methods are O(1), :meth:`victims` O(models in the tier).

    Concurrency: as :class:`Policy` says.

    Args:
        order: an empty, unbounded cachetools cache; its values are not used.
    """

    def __init__(self, order: Cache[str, None]) -> None:
        self._order = order

    def requested(self, model: str, clock: int) -> None:  # noqa: ARG002 - the protocol's
        """Touch a model of the tier; others have no standing."""
        self._order.get(model)

    def admitted(self, resident: Resident) -> None:
        """Enter a model; one that is there stays where it stands, since measuring is not using."""
        if resident.model not in self._order:
            self._order[resident.model] = None

    def removed(self, model: str) -> None:
        """Forget a model."""
        if model in self._order:
            del self._order[model]

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first, as things stand at the call."""
        return _drain(copy.copy(self._order), frozenset(evictable))


def _drain(order: Cache[str, None], evictable: frozenset[str]) -> Iterator[str]:
    left = len(evictable)
    while order and left:
        model, _ = order.popitem()
        if model in evictable:
            left -= 1
            yield model


RANKED: dict[str, Callable[[], Ranked]] = {
    "lru": lambda: Ranked(LRUCache(math.inf)),
    "lfu": lambda: Ranked(LFUCache(math.inf)),
    "fifo": lambda: Ranked(FIFOCache(math.inf)),
}
"""Makers of the three, by name."""
