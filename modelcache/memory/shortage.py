"""``Shortage``: what the memory tier lacks for one decision. How it is met is ``memory.choosing``."""

from typing import Any

import attrs

from modelcache.events import Reason
from modelcache.memory.entries import Entry


@attrs.frozen
class Shortage:
    """What one decision lacks; amounts of 0 or less lack nothing.

    Attributes:
        fits: whether it may go ahead now.
        over_high: bytes that must leave memory for the watermark, what is leaving not counted.
        over_budget: bytes that must leave for the budget.
        over_count: models that must leave for ``max_models``.
        reason: which limit is exceeded first.
        figures: the reading and threshold that say so, as fields of an event.
    """

    fits: bool
    over_high: int
    over_budget: int
    over_count: int
    reason: Reason
    figures: dict[str, int]

    @property
    def met(self) -> bool:
        """Whether nothing more must leave."""
        return self.over_high <= 0 and self.over_budget <= 0 and self.over_count <= 0

    def after(self, entry: Entry[Any]) -> "Shortage":
        """Return what is still lacking once ``entry`` leaves; what came before a fork gives nothing back."""
        return self._change(entry, 1)

    def without(self, entry: Entry[Any]) -> "Shortage":
        """Return what is lacking if ``entry``, which was to leave, stays after all."""
        return self._change(entry, -1)

    def _change(self, entry: Entry[Any], sign: int) -> "Shortage":
        return attrs.evolve(
            self,
            over_high=self.over_high - sign * (0 if entry.inherited else entry.bytes),
            over_budget=self.over_budget - sign * entry.bytes,
            over_count=self.over_count - sign,
        )
