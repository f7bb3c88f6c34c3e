"""Making room in memory: evict, measure, and wait where all is leased.

It acts on what ``memory.residents`` decides; ``memory.unloading`` carries it out. Everything that waits or runs a
user's code happens outside the guard.
"""

import time
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from modelcache import heap
from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Event, Evicted, Reason, Reclaimed
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.telling import Teller
from modelcache.units import format_bytes

T = TypeVar("T")

_FUTILE = 3  # batches in a row that free less than a tenth of what they promised, after which more won't help
_BACK_OFF = 30  # looks of the monitor that are left out after such a row


class Applicant(Protocol):
    """Who needs room in memory."""

    state: str

    @property
    def model(self) -> str:
        """The id of the model that is to be loaded."""
        ...

    @property
    def nested(self) -> bool:
        """Whether a loader under way waits for it: then it does not wait behind others."""
        ...

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, and that run it; the guard is held."""
        ...

    def check(self) -> None:
        """Raise Cancelled where it was told to stop."""
        ...

    def wanted(self) -> bool:
        """Whether somebody still waits for it; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile; the guard is held."""
        ...


class Room(Generic[T]):
    """The acting half of the memory tier.

    Args:
        tier: settings and gauge.
        residents: the decisions.
        guard: the cache's lock.
        unloader: carries out what was decided.
        teller: takes events, outside the guard.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        guard: Guard,
        unloader: Unloader[T],
        teller: Teller,
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._unloader = unloader
        self._teller = teller
        self._pause = 0
        self.evictions = 0

    def admit(self, applicant: Applicant, token: object, need: int) -> tuple[Limits, int]:
        """Reserve ``need`` bytes under ``token``, evicting just enough; who waits is served in turn.

        Returns:
            The reading that allowed it, and what ``residents.churn`` is as long as nothing else moves.

        Raises:
            TooLarge: the model can never fit.
            NoRoom: what is in the way is leased, or is not the cache's.
        """
        try:
            return self._admit(applicant, token, need)
        finally:
            with self._guard:
                self._residents.line.pop(token, None)
                self._residents.update_short()
                self._guard.notify()

    def _admit(self, applicant: Applicant, token: object, need: int) -> tuple[Limits, int]:
        residents, futile, most, rows = self._residents, 0, 1, 0
        while True:
            churn = residents.churn
            applicant.state = "loading"
            limits = self._tier.limits()
            _refuse_too_large(applicant.model, need, limits)
            with self._guard:
                residents.drain()
                shortage = residents.shortage(limits, need, 1)
                turn = applicant.nested or next(iter(residents.line), token) is token
                if turn and shortage.fits and not self._leaving(applicant, applicant.model):
                    residents.reserved[token] = need
                    applicant.refused(None)
                    residents.churn += 1
                    return limits, churn + 1
                looked = token in residents.line  # only from now on a release sees that somebody waits
                residents.line[token] = None
                residents.update_short()
                victims = residents.choose(shortage, most) if looked and turn and futile < _FUTILE else []
                told = [self._evicted(entry, shortage, applicant.model) for entry in victims if not entry.doomed]
                if looked and not victims:
                    rows, futile = rows + (futile >= _FUTILE), 0
                    self._wait(applicant, need, shortage, turn=turn, last=rows > 1)
            if not looked and shortage.over_high > 0:  # dead cycles and freed heap look used, but cost no eviction
                self._unloader.collect(now=True)
                heap.give_back()
            if victims:
                most *= 2
                futile = 0 if self._evict(victims, told, limits, shortage.reason) else futile + 1

    def _leaving(self, applicant: Applicant, model: str | None = None) -> bool:
        """Whether some model (or this one) is being unloaded by a thread that does not wait for the applicant."""
        waiting = applicant.threads()
        return any(entry.retirer not in waiting and model in {None, entry.model} for entry in self._residents.leaving)

    def _wait(self, applicant: Applicant, need: int, shortage: Shortage, *, turn: bool, last: bool) -> None:
        """Wait for something to change; the guard is held.

        Raises:
            NoRoom: nothing will, nobody waits any more, or (``last``) evicting did not help twice over.
            Cancelled: it was told to stop.
        """
        applicant.state = "waiting for room"
        applicant.check()
        refusal = self._no_room(applicant.model, need, shortage)
        lost = not self._residents.idle() and not self._leaving(applicant) and applicant.hopeless()
        mine = turn or not applicant.threads().isdisjoint(self._residents.holding_threads())  # else the head decides
        if last or not applicant.wanted() or (lost and mine):
            raise refusal
        applicant.refused(refusal)
        self._guard.wait(self._tier.interval)

    def _no_room(self, model: str, need: int, shortage: Shortage) -> NoRoom:
        """Return the error that says what is in the way; the guard is held."""
        holders = self._residents.holders()
        held = ", ".join(f"{model!a} ({leases} leases, {age:.1f} s)" for model, leases, age in holders)
        figures = shortage.figures
        show = str if shortage.reason is Reason.MAX_MODELS else format_bytes
        ours = self._residents.tracked()
        where = f"leases hold {held}" if held else f"nothing can be evicted ({format_bytes(ours)} are models)"
        where = "others wait for room before it" if shortage.fits else where
        return NoRoom(
            f"no room in memory for {model!a}: it needs {format_bytes(need)}, {shortage.reason} allows "
            f"{show(figures['high'])} and {show(figures['used'])} are used; {where}: release leases, "
            f"or raise memory.{_SETTING[shortage.reason]}",
            model=model,
            tier="memory",
            need=need,
            used=figures["used"],
            limit=figures["high"],
            holders=holders,
        )

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
                    told = [self._evicted(entry, crossed or shortage, None) for entry in victims if not entry.doomed]
                    if not victims:
                        if self._settled(shortage):
                            return True
                        continue
            if not victims:
                heap.give_back()
                reading = self._tier.limits().reading
                if reading is None or reading.used <= limits.high:
                    crossed = None
                continue
            most *= 2
            futile = 0 if self._evict(victims, told, limits, shortage.reason) else futile + 1
            if futile >= _FUTILE:
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
            told = [self._evicted(entry, shortage, for_model or None) for entry in victims]
        found = bool(victims)
        if found:
            self._teller.tell(told)
            self._unloader.carry_out(victims)
        return found

    def _evicted(self, entry: Entry[T], shortage: Shortage, for_model: str | None) -> Event:
        self.evictions += 1
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

    def _evict(self, victims: list[Entry[T]], told: list[Event], before: Limits, reason: Reason) -> bool:
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


_SETTING = {
    Reason.WATERMARK: "high",
    Reason.MEMORY_BUDGET: "budget",
    Reason.MAX_MODELS: "max_models",
}


def _refuse_too_large(model: str, need: int, limits: Limits) -> None:
    bounds = [("budget", limits.budget)] if limits.budget is not None else []
    if limits.reading is not None:
        bounds.append(("high", limits.high))
    for setting, bound in bounds:
        if need > bound:
            raise TooLarge(
                f"model {model!a} needs {format_bytes(need)} of memory, more than memory.{setting} = "
                f"{format_bytes(bound)} allows with nothing else loaded: raise it, or serve the model elsewhere",
                model=model,
                tier="memory",
                need=need,
                limit=bound,
            )
