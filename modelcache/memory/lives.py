"""What is remembered of each model over its loads: hits, what pushed it out, what that has cost since.

Its size is ``memory.footprints``; in plain words all of it is told by ``explaining``. Every method runs under the
cache's guard.
"""

from collections import OrderedDict

import attrs

from modelcache.events import Evicted, Reason, Reclaimed

_MOST = 100_000  # models remembered; beyond it those that left longest ago are forgotten


@attrs.define
class Life:
    """One model, over all its loads in this process.

    Attributes:
        hits: lookups that found it in memory, over its earlier loads.
        left: why it left memory last; None: it never did.
        evicted: the last eviction from memory.
        reclaimed: what the batch of that eviction brought back.
        mark: bytes that the tier had loaded in all at that eviction.
        due: whether its next load is a reload: it was evicted under pressure, not replaced or unloaded since.
        reloads: loads of it after such evictions.
        seconds: that these took.
    """

    hits: int = 0
    left: Reason | None = None
    evicted: Evicted | None = None
    reclaimed: Reclaimed | None = None
    mark: int = 0
    due: bool = False
    reloads: int = 0
    seconds: float = 0.0


class Lives:
    """The lives of the models of one cache.

    Attributes:
        loaded: bytes that were loaded in all.
        reloads: loads of models that were evicted under pressure before.
        reload_seconds: that these took.
        regrets: reloads before as many bytes had been loaded as the tier holds: a tier of twice the size would have
            kept the model.
    """

    def __init__(self) -> None:
        self._all: OrderedDict[str, Life] = OrderedDict()
        self.loaded = 0
        self.reloads = 0
        self.reload_seconds = 0.0
        self.regrets = 0

    def of(self, model: str) -> Life | None:
        """Return a model's life; None if it never was in memory."""
        return self._all.get(model)

    def came(self, model: str, size: int, seconds: float, held: int) -> bool:
        """Book a load of ``size`` bytes; return whether it was a reload.

        Args:
            model: its id.
            size: bytes of its footprint.
            seconds: that its callers waited for fetch and load.
            held: bytes that the tier holds with it.
        """
        life = self._all.setdefault(model, Life())
        again = life.due
        if again:
            life.reloads += 1
            life.seconds += seconds
            self.reloads += 1
            self.reload_seconds += seconds
            self.regrets += self.loaded - life.mark <= held
        life.due = False
        self.loaded += size
        return again

    def went(self, model: str, hits: int, reason: Reason) -> None:
        """Book that a model leaves memory."""
        life = self._all.setdefault(model, Life())
        self._all.move_to_end(model)
        life.hits = max(life.hits, hits)  # an old version may go after the new one
        life.left = reason
        life.due = reason.was_eviction and reason is not Reason.IDLE
        life.mark = self.loaded
        while len(self._all) > _MOST:
            self._all.popitem(last=False)

    def stayed(self, model: str) -> None:
        """Book that a model that was about to leave stays after all."""
        life = self._all.get(model)
        if life is not None:
            life.due = False
            life.left = None if life.evicted is None else life.evicted.reason

    def evicted(self, event: Evicted) -> None:
        """Keep the figures of an eviction."""
        life = self._all.setdefault(str(event.model), Life())
        life.evicted, life.reclaimed = event, None

    def reclaimed(self, models: list[str], event: Reclaimed) -> None:
        """Keep what the batch brought back by which these models went."""
        for model in models:
            life = self._all.get(model)
            if life is not None:
                life.reclaimed = event

    def forget(self, model: str) -> None:
        """Drop what is remembered of a model that is in neither tier."""
        self._all.pop(model, None)
