"""One batch of evictions: tell, unload, give heap back, measure what really came back.

Whom it hits is decided in ``memory.residents``; why a batch is needed, in ``memory.admission`` and ``memory.room``.
"""

import time
from typing import Generic, TypeVar

from modelcache.events import Event, Evicted, Reason, Reclaimed
from modelcache.memory.entries import Entry
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.telling import Teller

T = TypeVar("T")

FUTILE = 3
"""Batches in a row that free less than a tenth of what they promised, after which more won't help."""


class Evictor(Generic[T]):
    """Carries out evictions of the memory tier.

    Args:
        tier: settings and gauge.
        unloader: carries out what leaves.
        teller: takes events, outside the guard.

    Attributes:
        count: models evicted so far.
    """

    def __init__(self, tier: MemoryTier, unloader: Unloader[T], teller: Teller) -> None:
        self._tier = tier
        self._unloader = unloader
        self._teller = teller
        self.count = 0

    def evicted(self, victims: list[Entry[T]], shortage: Shortage, for_model: str | None) -> list[Event]:
        """Return the events of a batch that was just decided; what was to leave anyway is no eviction."""
        return [self._evicted(entry, shortage, for_model) for entry in victims if not entry.doomed]

    def _evicted(self, entry: Entry[T], shortage: Shortage, for_model: str | None) -> Event:
        self.count += 1
        return Evicted(
            seq=self._teller.number(),
            time=time.time(),
            model=entry.model,
            tier="memory",
            reason=shortage.reason,
            bytes=entry.bytes,
            for_model=for_model,
            **shortage.figures,
        )

    def carry_out(self, victims: list[Entry[T]], told: list[Event]) -> None:
        """Tell and unload, without a look at the gauge."""
        self._teller.tell(told)
        self._unloader.carry_out(victims)

    def evict(self, victims: list[Entry[T]], told: list[Event], before: Limits, reason: Reason) -> bool:
        """Unload a batch, give heap back, measure; return whether it freed a fair share of what it promised."""
        started = time.monotonic()
        promised = sum(0 if entry.inherited else entry.bytes for entry in victims)
        count = len(victims)
        self._teller.tell(told)
        self._unloader.carry_out(victims, trim=reason is Reason.WATERMARK)
        after = self._tier.limits()
        if before.reading is None or after.reading is None:
            return True
        freed = before.reading.used - after.reading.used
        event = Reclaimed(
            seq=self._teller.number(),
            time=time.time(),
            tier="memory",
            duration=time.monotonic() - started,
            used=after.reading.used,
            limit=after.reading.limit,
            high=after.high,
            low=after.low,
            promised=promised,
            freed=freed,
            models=count,
        )
        self._teller.tell([event])
        return (freed > 0 and freed * 10 >= promised) or reason is not Reason.WATERMARK
