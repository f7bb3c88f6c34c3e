"""LRU, LFU and FIFO: the three well-known orders, kept so that the next victim is found at once.

They know neither bytes nor seconds; ``worth`` does.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from modelcache.policies.base import Resident, Standing, searchable


class Ranked:
    """FIFO, and what LRU and LFU have in common: an order that knows the models of the tier and nobody else.

    All methods are O(1). :meth:`victims` finds the next model when it is asked for it: it passes over those that
    may not go, and costs nothing for those behind.

    Concurrency: as :class:`Policy` says.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()  # a dict finds its first slowly once many before it left

    def __len__(self) -> int:
        """Return how many models are in the tier."""
        return len(self._order)

    def __contains__(self, model: str) -> bool:
        """Whether a model is in the tier."""
        return model in self._order

    def requested(self, model: str, clock: int) -> None:
        """Ignore: being used changes nothing."""

    def admitted(self, resident: Resident) -> None:
        """Enter a model; one that is there stays where it stands, since measuring is not using."""
        self._order.setdefault(resident.model)

    def removed(self, model: str) -> None:
        """Forget a model."""
        self._order.pop(model, None)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first."""
        among = searchable(evictable)
        return (model for model in self._order if model in among)

    def standing(self, model: str) -> Standing | None:  # noqa: ARG002 - the protocol's
        """Return None: an order is found again by the times of use that a tier keeps."""
        return None

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:
        """Ignore: models come in as they came before."""


class LeastRecent(Ranked):
    """LRU. All methods are O(1)."""

    def requested(self, model: str, clock: int) -> None:  # noqa: ARG002 - the protocol's
        """Touch a model of the tier; others have no standing."""
        if model in self._order:
            self._order.move_to_end(model)

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:  # noqa: ARG002 - the protocol's
        """Place a model of the tier after those that were recalled before it."""
        if model in self._order:
            self._order.move_to_end(model)


class LeastFrequent(Ranked):
    """LFU: counts from the request that brought the model in, and forgets the count when it leaves.

    Among equals the least recently used goes first. All methods are O(1), but :meth:`victims` sorts the different
    counts, which are few.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, int] = {}
        self._ranks: dict[int, OrderedDict[str, None]] = {}  # by count, never empty

    def __len__(self) -> int:
        """Return how many models are in the tier."""
        return len(self._counts)

    def __contains__(self, model: str) -> bool:
        """Whether a model is in the tier."""
        return model in self._counts

    def requested(self, model: str, clock: int) -> None:  # noqa: ARG002 - the protocol's
        """Count a use of a model of the tier; others have no standing."""
        if model in self._counts:
            self._place(model, self._counts[model] + 1)

    def admitted(self, resident: Resident) -> None:
        """Enter a model; one that is there stays where it stands, since measuring is not using."""
        if resident.model not in self._counts:
            self._place(resident.model, 1)

    def removed(self, model: str) -> None:
        """Forget a model and its count."""
        count = self._counts.pop(model, None)
        if count is not None:
            del self._ranks[count][model]
            if not self._ranks[count]:
                del self._ranks[count]

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first."""
        among = searchable(evictable)
        return (model for count in sorted(self._ranks) for model in self._ranks[count] if model in among)

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:  # noqa: ARG002 - the protocol's
        """Give a model of the tier its count back, the larger one where there are two."""
        if model in self._counts:
            self._place(model, max(self._counts[model], round(standing.n)))

    def _place(self, model: str, count: int) -> None:
        """Set a count; the model is the one used last among its equals."""
        self.removed(model)
        self._counts[model] = count
        self._ranks.setdefault(count, OrderedDict())[model] = None


RANKED: dict[str, Callable[[], Ranked]] = {"lru": LeastRecent, "lfu": LeastFrequent, "fifo": Ranked}
"""Makers of the three, by name."""
