"""Keeping within the limits while nothing new comes in: retuning, growth from outside, releases.

It acts, outside the guard, on what ``memory.residents`` decides under it. Room for a newcomer is
``memory.admission``; a batch of evictions is ``memory.evicting``.
"""

from collections.abc import Collection
from typing import Generic, TypeVar

from modelcache import heap
from modelcache.events import Reason
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import FUTILE, Evictor
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import MemoryTier
from modelcache.memory.unloading import Unloader

T = TypeVar("T")

_BACK_OFF = 30  # looks of the monitor that are left out after such a row


class Room(Generic[T]):
    """Evicts what limits demand.

    Args:
        tier: settings and gauge.
        residents: the decisions.
        guard: the cache's lock.
        unloader: carries out what was decided.
        evictor: carries out evictions.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        guard: Guard,
        unloader: Unloader[T],
        evictor: Evictor[T],
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._unloader = unloader
        self._evictor = evictor
        self._pause = 0

    def enforce(self) -> None:
        """Evict what the limits demand now; returns once all that must go, and may, is gone."""
        self._lower(floor=False)

    def look(self) -> None:
        """Answer growth from outside: from above ``high`` down to ``low``; the monitor's tick."""
        self._settle_orphans()
        self._unloader.collect(now=False)
        with self._guard:
            self._residents.holders()  # a lease's age counts from the first look at it
        if self._pause:
            self._pause -= 1
            with self._guard:
                self._residents.drain()
        elif not self._lower(floor=True):
            self._pause = _BACK_OFF

    def _lower(self, *, floor: bool) -> bool:
        """Evict until the limits are met; return False where evicting did not help.

        Args:
            floor: once ``high`` is crossed, go on down to ``low``.
        """
        residents, futile, most = self._residents, 0, 1
        crossed: Shortage | None = None
        while True:
            limits = self._tier.limits()
            with self._guard:
                residents.drain()
                shortage = residents.shortage(limits, 0, 0, floor=limits.low if floor and crossed else None)
                if floor and crossed is None and shortage.over_high > 0:
                    crossed = shortage  # freed heap looks used, but costs no eviction: look again after a trim
                    victims, told = [], []
                else:
                    victims = [] if shortage.met else residents.choose(shortage, most)
                    told = self._evictor.evicted(victims, crossed or shortage, None)
                    if not victims:
                        if self._settled(shortage):
                            return True
                        continue
            if not victims:
                heap.give_back()
                reading = self._tier.limits().reading
                if reading is None or reading.used <= limits.high:
                    return True
                continue
            most *= 2
            futile = 0 if self._evictor.evict(victims, told, limits, shortage.reason) else futile + 1
            if futile >= FUTILE:
                return False

    def _settled(self, shortage: Shortage) -> bool:
        """Book whether a limit stays unmet; False: look once more, for what moved before it could be seen."""
        residents = self._residents
        known = residents.over
        residents.over = not shortage.met and bool(residents.holding_threads() or residents.reserved)
        residents.update_short()
        self._guard.notify()  # a raised limit lets waiting loads go on
        return known or not residents.over

    def _settle_orphans(self) -> None:
        while self._residents.orphans:
            self.release(self._residents.orphans.popleft())

    def release(self, entry: Entry[T]) -> None:
        """Look at what a release makes possible: a pending unload, a limit not met, a load that waits."""
        with self._guard:
            due = entry.doomed
            retired = due is not None and self._residents.retire(entry, due)
            over = self._residents.over
            self._guard.notify()
        if retired:
            self._unloader.carry_out([entry])
        if over:
            self.enforce()

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models``, whose files the disk tier needs; False where none is idle."""
        shortage = Shortage(fits=False, over_high=0, over_budget=0, over_count=1, reason=reason, figures=figures)
        with self._guard:
            self._residents.drain()
            victims = self._residents.choose(shortage, 1, models)
            told = self._evictor.evicted(victims, shortage, for_model or None)
        found = bool(victims)
        if found:
            self._evictor.carry_out(victims, told)
        return found
