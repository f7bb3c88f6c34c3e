"""One batch of evictions: tell, unload, give heap back, measure what really came back, judge whether it helped.

Whom it hits is decided in ``memory.choosing``; why a batch is needed, in ``memory.admission`` and ``memory.room``.
"""

import time
from typing import Any, Generic, TypeVar

from modelcache.events import Evicted, Pressure, Reason, Reclaimed
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.memory.entries import Entry
from modelcache.memory.futility import Futility
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.telling import Teller

T = TypeVar("T")

_WORTH_IT = 4  # a search that brings back a fourth of what is missing was worth its time
_VAIN = 16  # no more than this share of ``high`` is asked for since less was promised in vain
_GRAIN = 64  # less than this share of ``high`` tells nothing: small models leave holes in a heap that stays
_MEASURED = {Reason.WATERMARK, Reason.NEIGHBOUR}  # reasons for which the gauge is to fall
_REST = 8.0  # intervals of the monitor for which evictions rest at first that did not help


class Evictor(Generic[T]):
    """Carries out evictions of the memory tier.

    Args:
        tier: settings and gauge.
        residents: keeps the book.
        guard: the cache's lock.
        unloader: carries out what leaves.
        teller: takes events, outside the guard.

    Attributes:
        futility: what the latest evictions were good for; the guard is held.
    """

    def __init__(
        self, tier: MemoryTier, residents: Residents[T], guard: Guard, unloader: Unloader[T], teller: Teller
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._unloader = unloader
        self._teller = teller
        self.futility = Futility(_REST * tier.interval)

    def stopped(self) -> bool:
        """Whether evictions for the watermark rest, as they did not help; the guard is held."""
        return self.futility.stopped(time.monotonic())

    def spare(self, size: int, *, together: bool = False) -> bool:
        """Whether so many bytes may go although evictions rest, for a load that is refused else; the guard is held."""
        return self.futility.spare(size, time.monotonic(), together=together)

    def vain(self, limits: Limits) -> int:
        """Return the bytes that the next batch is to promise, as fewer brought back nothing; the guard is held."""
        return min(self.futility.vain, limits.high // _VAIN)

    def announce(self, victims: list[Entry[T]], shortage: Shortage, for_model: str | None) -> None:
        """Give victims that were just chosen the event that tells of them; what was to leave anyway has none."""
        for entry in victims:
            if not entry.doomed:
                entry.farewell = Evicted(
                    seq=self._teller.number(),
                    time=time.time(),
                    model=entry.model,
                    tier="memory",
                    reason=shortage.reason,
                    bytes=entry.bytes,
                    for_model=for_model,
                    **shortage.figures,
                )

    def carry_out(self, victims: list[Entry[T]]) -> None:
        """Tell and unload, without a look at the gauge."""
        self._unloader.carry_out(victims)

    def evict(self, victims: list[Entry[T]], before: Limits, reason: Reason) -> None:
        """Unload a batch, give heap back, measure, and tell what came back."""
        started, batch = time.monotonic(), list(victims)
        with self._guard:
            explained = sum(plan.peak for plan in self._residents.reserved.values())
            booked = self._residents.occupied()
        collected = self._unloader.carry_out(victims, trim=reason in _MEASURED)
        batch = [entry for entry in batch if entry.begun and entry.retirer is me()]  # the others were asked for again
        promised = sum(0 if entry.inherited else entry.bytes for entry in batch)
        seen = promised - sum(0 if entry.inherited else entry.latent for entry in batch)
        models = [entry.model for entry in batch]
        after = self._tier.limits()
        if before.reading is None or after.reading is None or not batch:
            return
        judged = reason in _MEASURED and seen > 0 and before.reading.used >= booked  # else it need not fall
        with self._guard:
            freed, grain = before.reading.mine - after.reading.mine, self._grain(after, batch)
            missing = self.futility.missing(seen, freed, explained, grain) if judged and not collected else 0
            last = self.futility.verging
        if missing:
            collected, after = self._search(missing, after.reading.mine, last=last)
        if after.reading is None:
            return
        event = Reclaimed(
            seq=self._teller.number(),
            time=time.time(),
            tier="memory",
            reason=reason,
            duration=time.monotonic() - started,
            promised=promised,
            freed=before.reading.mine - after.reading.mine,
            models=len(models),
            collected=collected,
            **_figures(after),
        )
        pressure = None
        with self._guard:
            self._residents.lives.reclaimed(models, event)
            if judged:
                freed, now, largest = event.freed, time.monotonic(), max(entry.bytes for entry in batch)
                if self.futility.judge(seen, freed, explained, after.reading.used, grain, now, largest=largest):
                    pressure = self._pressure(after)
        self._teller.tell([event] if pressure is None else [event, pressure])

    def _grain(self, limits: Limits, batch: list[Entry[T]]) -> int:
        """Return the bytes that must leave to tell whether that helps; the guard is held.

        It is what a model of the usual size takes, the middle one, or a little less, as models of one size differ by
        some pages: small ones lie among others on the heap, which stays, and a single large one in the mean would let
        all small ones go before anything is told.
        """
        sizes = sorted(entry.bytes for entry in [*batch, *self._residents.entries()])
        return max(limits.high // _GRAIN, sizes[len(sizes) // 2] * 7 // 8)

    def _search(self, missing: int, used: int, *, last: bool) -> tuple[bool, Limits]:
        """Look for ``missing`` bytes in cycles; return whether that was done, and what the gauge says then.

        ``used``: bytes that this process had before.
        """
        searched = self._unloader.search(last=last)
        after = self._tier.limits()
        if searched and after.reading is not None:
            self._unloader.judge_search(helped=(used - after.reading.mine) * _WORTH_IT >= missing)
        return searched, after

    def _pressure(self, limits: Limits) -> Pressure:
        """Return the event of an episode that begins; the guard is held."""
        lingering = self._residents.lingering.bytes()
        used = limits.reading.used if limits.reading else 0
        return Pressure(
            seq=self._teller.number(),
            time=time.time(),
            tier="memory",
            reason=Reason.FUTILE,
            promised=self.futility.promised,
            freed=self.futility.freed,
            lingering=lingering,
            foreign=max(used - self._residents.tracked() - lingering, 0),
            **_figures(limits),
        )


def _figures(limits: Limits) -> dict[str, Any]:
    reading = limits.reading
    assert reading is not None  # noqa: S101 - for the type checker
    return {"used": reading.used, "limit": reading.limit, "high": limits.high, "low": limits.low}
