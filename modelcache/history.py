"""What is remembered of a model over restarts: its footprint, its load seconds, its standing with the policy.

The file beside the artifact is ``disk.figures``; models that are loaded in place have none, and are measured anew.
"""

from typing import Any, Generic, TypeVar

from modelcache.disk import figures
from modelcache.disk.figures import Figures
from modelcache.disk.held import Held
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.policies import Policy, Standing, Worth

T = TypeVar("T")


class History(Generic[T]):
    """Stores and recalls; all methods do I/O, and take the guard for their decisions only.

    Args:
        residents: whose footprints these are.
        policy: of the memory tier.
        guard: the cache's lock.
    """

    def __init__(self, residents: Residents[T], policy: Policy, guard: Guard) -> None:
        self._residents = residents
        self._policy = policy
        self._guard = guard

    def recall(self, model: str, found: Any) -> None:
        """Take over what an earlier process knew of a model that is about to be loaded, unless this one knows it."""
        with self._guard:
            known = self._residents.footprints.known(model) is not None
        if known or not isinstance(found, Held):
            return
        kept = figures.read(found.folder)
        if kept is None:
            return
        with self._guard:
            self._residents.footprints.recall(model, found.size, kept.resident, kept.peak, kept.seconds)
            if isinstance(self._policy, Worth) and kept.n > 0:
                self._policy.recall(model, Standing(kept.n, kept.age, kept.idle))

    def store(self, entry: Entry[T]) -> None:
        """Keep what is known of a model that is in memory, or just leaves it."""
        held = entry.keeps
        if not isinstance(held, Held):
            return
        with self._guard:
            known = self._residents.footprints.known(entry.model)
            standing = self._policy.standing(entry.model) if isinstance(self._policy, Worth) else None
        if known is None:
            return
        covers = known.covers(held.size)  # else they are those of a smaller version
        kept = Figures(known.resident if covers else None, known.peak if covers else None, known.seconds)
        if standing is not None:
            kept = Figures(kept.resident, kept.peak, kept.seconds, standing.n, standing.age, standing.idle)
        figures.write(held.folder, kept)
