"""Room for a newcomer: just enough is evicted, and who can't be served waits in line.

It acts, outside the guard, on what ``memory.choosing`` decides under it. Limits that are lowered, and growth from
outside, are ``memory.room``.
"""

import sys
import time
from typing import Generic, TypeVar

import attrs

from modelcache import heap
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.memory import needs
from modelcache.memory.applicant import Applicant
from modelcache.memory.asking import Appeal, Verdict
from modelcache.memory.choosing import Choosing
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.footprints import Plan
from modelcache.memory.refusals import no_room, refuse_too_large
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader

T = TypeVar("T")

_ASKED_ANEW = {None, Verdict.LOOK}  # who were asked just before are not asked again, but where they gave way

_PATIENCE = 2.0  # seconds for which a load that is to be measured waits to be alone, and for which others leave it so
_TIDY = 1.0  # seconds between two looks of one that waits at what others freed meanwhile
_REQUEST = 5.0  # seconds for which an evicted model may still be in the variable of a request that is about to end
_LOOK = 0.1  # seconds between two looks at whether it has ended: nothing wakes who waits for that


@attrs.define
class _Try:
    """How far one admission has come.

    Attributes:
        since: monotonic seconds at which it began.
        most: models that may go at once where it was only guessed what they give back.
        rows: decisions in a row at which evictions rested, as they did not help.
        losses: decisions in a row at which nothing that others do would have made room.
        bare: whether it goes on with less than its peak.
        tidy: monotonic seconds before which freed heap is not given back again.
        verdict: what came of asking other processes just before.
    """

    since: float = attrs.Factory(time.monotonic)
    most: int = 1
    rows: int = 0
    losses: int = 0
    bare: bool = False
    tidy: float = 0.0
    verdict: Verdict | None = None


@attrs.define
class _Step(Generic[T]):
    """What one decision came to.

    Attributes:
        asks: whether other processes are asked to give way.
        victims: who goes here.
        last: whether it is refused next.
    """

    asks: bool = False
    victims: list[Entry[T]] = attrs.Factory(list)
    last: bool = False


class Admission(Generic[T]):
    """Lets loads into memory, one decision at a time.

    Args:
        tier: settings and gauge.
        residents: who is in memory.
        choosing: the decisions.
        guard: the cache's lock.
        evictor: carries out evictions.
        unloader: collects cycles.
        appeal: asks other processes under the same limit.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        choosing: Choosing[T],
        guard: Guard,
        evictor: Evictor[T],
        unloader: Unloader[T],
        appeal: Appeal[T],
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._choosing = choosing
        self._guard = guard
        self._evictor = evictor
        self._unloader = unloader
        self._appeal = appeal
        self._neighbours = appeal.neighbours
        self._solo: tuple[object, float] = (None, 0.0)  # who loads alone now, and until when others leave it so

    def admit(self, applicant: Applicant, token: object, plan: Plan) -> tuple[Limits, int]:
        """Reserve what ``plan`` says under ``token``, evicting just enough; who waits is served in turn.

        Returns:
            The reading that allowed it, and what ``residents.churn`` is as long as nothing else moves: -1, which it
            never is, where another load is under way.

        Raises:
            TooLarge: the model can never fit.
            NoRoom: what is in the way is leased, or is not the cache's.
        """
        try:
            return self._admit(applicant, token, plan)
        finally:
            with self._guard:
                self._residents.line.pop(token, None)
                self._residents.update_short()
                self._guard.notify()

    def _admit(self, applicant: Applicant, token: object, plan: Plan) -> tuple[Limits, int]:
        residents, entry = self._residents, _Try()
        while True:
            churn = residents.churn
            applicant.state = "loading"
            known = self._neighbours.look()
            limits = self._tier.limits()
            plan = needs.sober(plan, limits)
            refuse_too_large(applicant.model, plan, limits)
            with self._guard:
                residents.drain()
                need = needs.bare(plan, limits) if entry.bare else needs.peak(plan, limits)
                shortage = self._choosing.newcomer(limits, need, plan.resident)
                turn = applicant.nested or applicant.first(residents.line)
                clear = self._clear(token, plan, entry.since, nested=applicant.nested)
                fits = turn and clear and shortage.fits and not self._leaving(applicant, applicant.model)
                if fits and self._neighbours.others and residents.churn != churn:
                    continue  # one that has landed meanwhile is perhaps not in the reading yet
                if fits:
                    crowded = self._reserve(applicant, token, attrs.evolve(plan, peak=need, thread=me()))
                else:
                    step = self._decide(applicant, token, plan, entry, shortage, limits, turn=turn, clear=clear)
            if not fits:
                self._act(applicant, entry, step, shortage, limits)
            elif self._neighbours.claim(known):
                return limits, -1 if crowded else churn + 1
            else:
                self._take_back(token)

    def _decide(
        self,
        applicant: Applicant,
        token: object,
        plan: Plan,
        entry: "_Try",
        shortage: Shortage,
        limits: Limits,
        *,
        turn: bool,
        clear: bool,
    ) -> "_Step[T]":
        """Decide, for one that does not fit now, who goes or who is asked; else wait; the guard is held."""
        residents = self._residents
        looked = token in residents.line  # only from now on a release sees that somebody waits
        residents.line[token] = None
        residents.update_short()
        stopped = shortage.over_high > 0 and self._evictor.stopped()
        able = looked and turn and clear and not stopped
        step: _Step[T] = _Step(asks=able and entry.verdict in _ASKED_ANEW and self._neighbours.apply(shortage))
        if able and not step.asks:
            step.victims = self._choose(shortage, limits, entry)
        elif entry.rows and stopped and turn and clear:  # it is refused next
            step.victims = self._spare(shortage)
        self._evictor.announce(step.victims, shortage, applicant.model)
        if not looked or step.victims or step.asks:
            return step
        if not entry.bare and turn and self._may_go_bare(applicant, entry.since):
            entry.bare = True
            return step
        entry.rows = entry.rows + 1 if stopped else 0
        applicant.state = "waiting for room" if clear else "waiting for a measurement"
        lost = not entry.rows and self._lost(applicant, shortage, turn=turn)
        entry.losses = entry.losses + 1 if lost else 0
        step.last = entry.losses == 1 and shortage.over_high > 0 and not residents.holding_threads()
        self._wait(applicant, plan, shortage, losses=entry.losses, rows=entry.rows)
        return step

    def _act(self, applicant: Applicant, entry: "_Try", step: "_Step[T]", shortage: Shortage, limits: Limits) -> None:
        """Do, outside the guard, what was decided."""
        entry.verdict = self._appeal.ask(shortage, applicant.model, applicant.check) if step.asks else None
        if step.last:
            self._unloader.search(last=True)
        elif not step.victims and not step.asks and shortage.over_high > 0 and time.monotonic() >= entry.tidy:
            self._unloader.collect(urgent=True)  # dead cycles and freed heap look used, but cost no eviction
            heap.give_back()
            entry.tidy = time.monotonic() + _TIDY
        if step.victims:
            entry.most, entry.losses = entry.most * 2, 0
            self._evictor.evict(step.victims, limits, shortage.reason)
            if shortage.over_high > 0:
                self._unloader.collect(urgent=True)

    def _reserve(self, applicant: Applicant, token: object, plan: Plan) -> bool:
        """Set aside what a load takes; return whether others are under way beside it."""
        crowded = self._others_load(applicant)
        self._residents.reserved[token] = plan
        if plan.alone:
            self._solo = (token, time.monotonic() + _PATIENCE)
        applicant.refused(None)
        self._residents.churn += 1
        return crowded

    def _take_back(self, token: object) -> None:
        """Set it aside no longer: another process was faster."""
        with self._guard:
            self._residents.reserved.pop(token, None)
            self._residents.churn += 1
            self._guard.notify()

    def _choose(self, shortage: Shortage, limits: Limits, entry: "_Try") -> list[Entry[T]]:
        """Choose who goes here: one where it is the least worthy of all processes', after which they are asked anew."""
        if entry.verdict is Verdict.WAIT:
            return []
        if entry.verdict is Verdict.OWN:
            return self._choosing.choose(shortage, 1, stepwise=True)
        return self._choosing.choose(shortage, entry.most, whole=True, least=self._evictor.vain(limits))

    def _spare(self, shortage: Shortage) -> list[Entry[T]]:
        """Choose one that alone makes room, though evictions rest; where none is so large, just enough together."""
        largest = self._choosing.largest(shortage)
        if largest is None:
            enough = self._choosing.enough(shortage)
            together = enough and self._evictor.spare(shortage.over_high, together=True)
            return self._choosing.choose(shortage, sys.maxsize, enough) if together else []
        if not self._evictor.spare(largest.bytes):
            return []
        return [largest] if self._residents.retire(largest, shortage.reason) else []

    def _clear(self, token: object, plan: Plan, since: float, *, nested: bool) -> bool:
        """Whether nobody is to be left alone: neither another load that is measured, nor, by others, this one.

        Bounded, as a loader may wait for a thread that waits here.
        """
        now = time.monotonic()
        owner, until = self._solo
        if owner is not None and (owner not in self._residents.reserved or now >= until):
            self._solo = owner, until = None, 0.0
        if nested or token is owner:
            return True
        if owner is not None:
            return False
        return not plan.alone or not self._residents.reserved or now - since >= _PATIENCE

    def _may_go_bare(self, applicant: Applicant, since: float) -> bool:
        """Whether a load may go on with less than its peak reserved, as nothing makes room for that.

        It waits for leases no longer than ``_PATIENCE``: they may be for ever. Only one load under a limit does so.
        """
        if self._others_load(applicant) or self._leaving(applicant) or self._choosing.elsewhere:
            return False
        waited = time.monotonic() - since >= _PATIENCE
        return waited or self._residents.holding_threads() <= applicant.threads()

    def _others_load(self, applicant: Applicant) -> bool:
        """Whether loads are under way that do not wait for this one."""
        own = applicant.own_threads()
        return any(plan.thread not in own for plan in self._residents.reserved.values())

    def _leaving(self, applicant: Applicant, model: str | None = None) -> bool:
        """Whether some model (or this one) is being unloaded by a thread that does not wait for the applicant."""
        waiting = applicant.threads()
        return any(entry.retirer not in waiting and model in {None, entry.model} for entry in self._residents.leaving)

    def _wait(self, applicant: Applicant, plan: Plan, shortage: Shortage, *, losses: int, rows: int) -> None:
        """Wait for something to change; the guard is held.

        Raises:
            NoRoom: nothing will, and no model that just left is in some request's variable; or evictions still rest
                (``rows``) since they did not help.
            Cancelled: it was told to stop, or nobody waits for it any more.
        """
        applicant.check()
        refusal = no_room(applicant.model, shortage, self._residents)
        ending = self._ending(shortage)
        if rows > 1 or (losses > 1 and not ending):
            raise refusal
        applicant.refused(refusal)
        interval = self._tier.interval
        if losses == 1:  # leases come and go without the guard, others woke up as well: look again before that is final
            interval = _LOOK if len(self._residents.line) > 1 else 0.0
        if plan.alone or self._solo[0]:
            interval = min(interval, _PATIENCE)
        if ending or self._neighbours.hopeful(shortage):
            interval = min(interval, _LOOK)
        self._guard.wait(interval)

    def _lost(self, applicant: Applicant, shortage: Shortage, *, turn: bool) -> bool:
        """Whether nothing that others do will make room; the guard is held."""
        if shortage.fits or self._leaving(applicant) or not applicant.hopeless():
            return False
        if self._neighbours.hopeful(shortage):
            return False
        own = applicant.own_threads() & self._residents.holding_threads()
        mine = turn or bool(own)  # else the head of the line decides
        if not mine or not applicant.hopeless():
            return False
        return shortage.met or not self._choosing.suffices(shortage)  # met: by what only this very thread unloads

    def _ending(self, shortage: Shortage) -> bool:
        """Whether memory is short while a model that just left is still referenced: by a request, for all we know."""
        return shortage.over_high > 0 and self._residents.lingering.youngest() < _REQUEST
