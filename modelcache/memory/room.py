"""Keeping within the limits while nothing new comes in: retuning, growth from outside, releases.

It acts, outside the guard, on what ``memory.choosing`` decides under it. Room for a newcomer is
``memory.admission``; a batch of evictions is ``memory.evicting``.
"""

import time
from collections.abc import Collection
from typing import Generic, TypeVar

import attrs

from modelcache import heap
from modelcache.events import Event, Pressure, Reason
from modelcache.guard import Guard
from modelcache.memory.asking import Appeal, Verdict
from modelcache.memory.choosing import Choosing
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.telling import Teller

T = TypeVar("T")

_ASKED_ANEW = {None, Verdict.LOOK}


class Room(Generic[T]):
    """Evicts what limits demand.

    Args:
        tier: settings and gauge.
        residents: who is in memory.
        choosing: the decisions.
        guard: the cache's lock.
        unloader: carries out what was decided.
        evictor: carries out evictions.
        teller: takes events.
        appeal: asks other processes under the same limit.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        choosing: Choosing[T],
        guard: Guard,
        unloader: Unloader[T],
        evictor: Evictor[T],
        teller: Teller,
        appeal: Appeal[T],
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._choosing = choosing
        self._guard = guard
        self._unloader = unloader
        self._evictor = evictor
        self._teller = teller
        self._appeal = appeal
        self._neighbours = appeal.neighbours
        self._churn = 0  # at the monitor's last look
        self._put_off = False

    def enforce(self) -> None:
        """Evict what the limits demand now; returns once all that must go, and may, is gone, or it does not help."""
        with self._guard:
            self._evictor.futility.over()  # another limit, another try
        self._lower(outside=False)

    def look(self) -> None:
        """Answer growth from outside: from above ``high`` down to ``low``; the monitor's tick."""
        self._settle_orphans()
        self._unloader.collect(urgent=False)
        self._teller.tell(self._old_leases())
        self._drop_idle()
        if not self._progresses():
            self._lower(outside=True)

    def _progresses(self) -> bool:
        """Whether models leave just now, so that their memory is on its way; every other look is taken all the same."""
        with self._guard:
            before, self._churn = self._churn, self._residents.churn
            self._put_off = not self._put_off and bool(self._residents.leaving) and self._churn != before
        return self._put_off

    def _lower(self, *, outside: bool) -> None:
        """Evict until the limits are met, or evicting has not helped.

        Args:
            outside: look for growth from outside, and go down to ``low`` then. What loads took beyond what was
                expected of them is no such growth: it is worked off by just enough.
        """
        residents, most, trimmed, floor = self._residents, 1, False, None
        crossed: Shortage | None = None
        verdict: Verdict | None = None
        while True:
            limits = self._tier.limits()
            self._look_around(limits, outside=outside)
            with self._guard:
                residents.drain()
                shortage, stopped = self._lacking(limits, outside=outside, floor=floor)
                if shortage.met:
                    if stopped or self._settled(shortage):
                        return
                    continue
                trim = not trimmed and shortage.over_high > 0  # freed heap looks used, but costs no eviction
                deficit = residents.deficit + self._neighbours.deficit
                if outside and crossed is None and not trim and shortage.over_high > deficit:
                    floor = limits.low
                asks = outside and not trim and verdict in _ASKED_ANEW and self._neighbours.apply(shortage)
                victims = [] if trim or asks else self._choosing.choose(shortage, most, stepwise=outside)
                crossed = crossed if trim or shortage.fits else shortage
                self._evictor.announce(victims, crossed or shortage, None)
                if not victims and not trim and not asks and self._settled(shortage):
                    return
            verdict = self._appeal.ask(shortage, None, _no_check, common=True) if asks else None
            if verdict is Verdict.HELPED:
                return  # whoever has asked goes on
            if trim:
                trimmed = True
                self._unloader.collect(urgent=not outside)
                heap.give_back()
            elif victims:
                most = most * 2 if verdict is not Verdict.OWN else 1
                self._evictor.evict(victims, limits, shortage.reason)

    def _lacking(self, limits: Limits, *, outside: bool, floor: int | None) -> tuple[Shortage, bool]:
        """Return what must leave now, and whether evictions for the watermark rest; the guard is held."""
        residents = self._residents
        shortage = self._choosing.present(limits, reserved=not outside, floor=floor)
        if shortage.fits and limits.reading is not None and not residents.reserved:
            residents.deficit = 0
            self._evictor.futility.look(limits.reading.used, limits.low)
        stopped = shortage.over_high > 0 and self._evictor.stopped()
        if stopped:  # the other limits hold all the same
            shortage = self._choosing.present(attrs.evolve(limits, reading=None), reserved=not outside)
        return shortage, stopped

    def _look_around(self, limits: Limits, *, outside: bool) -> None:
        """Learn who else is under a limit that is passed; while nothing is short nobody looks."""
        if outside and limits.reading is not None and limits.reading.used > limits.high:
            self._neighbours.look()

    def _settled(self, shortage: Shortage) -> bool:
        """Book whether a limit stays unmet; False: look once more, for what moved before it could be seen."""
        residents = self._residents
        known = residents.over
        residents.over = not shortage.met and bool(residents.holding_threads() or residents.reserved)
        residents.update_short()
        self._guard.notify()  # a raised limit lets waiting loads go on
        return known or not residents.over

    def _old_leases(self) -> list[Event]:
        """Note the ages of leases, and return what is to be told of the oldest."""
        told: list[Event] = []
        with self._guard:
            self._residents.holders()  # a lease's age counts from the first look at it
            oldest = self._tier.lease_warning
            if oldest is None:
                return told
            for entry in self._residents.entries():
                age = max(entry.ages().values(), default=0.0)
                if age >= oldest and not entry.warned:
                    entry.warned = True
                    told.append(
                        Pressure(
                            seq=self._teller.number(),
                            time=time.time(),
                            model=entry.model,
                            tier="memory",
                            reason=Reason.OLD_LEASE,
                            bytes=entry.bytes,
                            duration=age,
                        )
                    )
                elif age < oldest:
                    entry.warned = False
        return told

    def _drop_idle(self) -> None:
        """Evict what nobody used for ``idle_after`` seconds."""
        after = self._tier.idle_after
        if after is None:
            return
        with self._guard:
            self._residents.drain()
            now = time.monotonic()
            for entry in self._residents.resident.values():
                entry.tick = now if entry.held() else entry.tick  # a lease is use to its end
            due = now - after
            idle = [entry for entry in self._residents.resident.values() if entry.tick <= due and not entry.held()]
            shortage = Shortage(False, 0, 0, len(idle), Reason.IDLE, {})  # noqa: FBT003 - its first field
            victims = [entry for entry in idle if self._residents.retire(entry, Reason.IDLE)]
            self._evictor.announce(victims, shortage, None)
        if victims:
            self._evictor.carry_out(victims)

    def make(self, amount: int, for_model: str) -> None:
        """Evict models of ``amount`` bytes, whatever the gauge says: a load has just run out of memory."""
        shortage = Shortage(False, 0, amount, 0, Reason.MEMORY_ERROR, {"need": amount})  # noqa: FBT003 - its first field
        with self._guard:
            self._residents.drain()
            victims = self._choosing.choose(shortage, 1)
            self._evictor.announce(victims, shortage, for_model)
        self._evictor.carry_out(victims)
        self._unloader.collect(urgent=True)
        heap.give_back()

    def _settle_orphans(self) -> None:
        while self._residents.orphans:
            self.release(self._residents.orphans.popleft())

    def release(self, entry: Entry[T]) -> bool:
        """Look at what a release makes possible: a pending unload, a limit not met, a load that waits.

        Returns:
            Whether nobody holds the model any more; else nothing has become possible.
        """
        with self._guard:
            due = entry.doomed
            retired = due is not None and self._residents.retire(entry, due)
            free = retired or not entry.held()
            over = self._residents.over and free
            self._guard.notify()
        if retired:
            self._unloader.carry_out([entry])
        if over:
            self._lower(outside=False)
        return free

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models``, whose files the disk tier needs; False where none is idle."""
        shortage = Shortage(fits=False, over_high=0, over_budget=0, over_count=1, reason=reason, figures=figures)
        with self._guard:
            self._residents.drain()
            victims = self._choosing.choose(shortage, 1, models)
            self._evictor.announce(victims, shortage, for_model or None)
        found = bool(victims)
        if found:
            self._evictor.carry_out(victims)
        return found


def _no_check() -> None:
    """Stop for nothing."""
