"""Room for a newcomer: just enough is evicted, and who can't be served waits in line.

It acts, outside the guard, on what ``memory.choosing`` decides under it. Limits that are lowered, and growth from
outside, are ``memory.room``.
"""

import math
import time
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import attrs

from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Reason
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.memory.choosing import Choosing
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.footprints import Plan
from modelcache.memory.garbage import Garbage
from modelcache.memory.neighbours import Neighbours, Verdict
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.units import format_bytes, format_holders

T = TypeVar("T")

_PATIENCE = 2.0  # seconds for which a load that is to be measured waits to be alone, and for which others leave it so
_TIDY = 1.0  # seconds between two looks of one that waits at what others freed meanwhile
_REQUEST = 5.0  # seconds for which an evicted model may still be in the variable of a request that is about to end
_LOOK = 0.1  # seconds between two looks at whether it has ended: nothing wakes who waits for that


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

    def first(self, line: Iterable[object]) -> bool:
        """Whether nobody in the line goes before it; the guard is held."""
        ...

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, or for room as it does; the guard is held."""
        ...

    def own_threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, and that run it; the guard is held."""
        ...

    def check(self) -> None:
        """Raise Cancelled where it was told to stop, or nobody waits for it any more; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile; the guard is held."""
        ...


class Admission(Generic[T]):
    """Lets loads into memory, one decision at a time.

    Args:
        tier: settings and gauge.
        residents: who is in memory.
        choosing: the decisions.
        guard: the cache's lock.
        evictor: carries out evictions.
        unloader: collects cycles.
        garbage: gives heap back.
        neighbours: other processes under the same limit.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        choosing: Choosing[T],
        guard: Guard,
        evictor: Evictor[T],
        unloader: Unloader[T],
        garbage: Garbage,
        neighbours: Neighbours[T],
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._choosing = choosing
        self._guard = guard
        self._evictor = evictor
        self._unloader = unloader
        self._garbage = garbage
        self._neighbours = neighbours
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
        residents, most, rows, losses, bare = self._residents, 1, 0, 0, False
        since, tidy, verdict = time.monotonic(), 0.0, None
        while True:
            last = False  # whether it is refused next
            churn = residents.churn
            applicant.state = "loading"
            self._neighbours.look()
            limits = self._tier.limits()
            plan = _sober(plan, limits)
            _refuse_too_large(applicant.model, plan, limits)
            with self._guard:
                residents.drain()
                need = _bare(plan, limits) if bare else _peak(plan, limits)
                shortage = self._choosing.newcomer(limits, need, plan.resident)
                turn = applicant.nested or applicant.first(residents.line)
                clear = self._clear(token, plan, since, nested=applicant.nested)
                fits = turn and clear and shortage.fits and not self._leaving(applicant, applicant.model)
                crowded = fits and self._reserve(applicant, token, attrs.evolve(plan, peak=need, thread=me()))
                looked = token in residents.line  # only from now on a release sees that somebody waits
                residents.line[token] = None
                residents.update_short()
                stopped = shortage.over_high > 0 and self._evictor.stopped()
                able = looked and turn and clear and not stopped and not fits
                asks = able and verdict is None and self._neighbours.apply(shortage)
                victims = self._choose(shortage, limits, most, verdict) if able and not asks else []
                self._evictor.announce(victims, shortage, applicant.model)
                if looked and not victims and not asks and not fits:
                    if not bare and turn and self._may_go_bare(applicant, since):
                        bare = True
                    else:
                        rows = rows + 1 if stopped else 0
                        applicant.state = "waiting for room" if clear else "waiting for a measurement"
                        lost = not rows and self._lost(applicant, shortage, turn=turn)
                        losses = losses + 1 if lost else 0
                        last = losses == 1 and shortage.over_high > 0 and not residents.holding_threads()
                        self._wait(applicant, plan, shortage, losses=losses, rows=rows)
            if fits:
                if self._neighbours.claim():
                    return limits, -1 if crowded else churn + 1
                self._take_back(token)
            verdict = self._neighbours.ask(shortage, applicant.model, applicant.check) if asks else None
            if verdict is Verdict.LOOK:
                verdict = None
            if last:
                self._unloader.search(last=True)
            elif not victims and not asks and not fits and shortage.over_high > 0 and time.monotonic() >= tidy:
                self._unloader.collect(urgent=True)  # dead cycles and freed heap look used, but cost no eviction
                self._garbage.give_back()
                tidy = time.monotonic() + _TIDY
            if victims:
                most, losses = most * 2, 0
                self._evictor.evict(victims, limits, shortage.reason)
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

    def _choose(self, shortage: Shortage, limits: Limits, most: int, verdict: Verdict | None) -> list[Entry[T]]:
        """Choose who goes here: one where it is the least worthy of all processes', after which they are asked anew."""
        if verdict is Verdict.WAIT:
            return []
        if verdict is Verdict.OWN:
            return self._choosing.choose(shortage, 1, stepwise=True)
        return self._choosing.choose(shortage, most, whole=True, least=self._evictor.vain(limits))

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

        It waits for leases no longer than ``_PATIENCE``: they may be for ever.
        """
        if self._others_load(applicant) or self._leaving(applicant):
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
        refusal = self._no_room(applicant.model, shortage)
        ending = self._ending(shortage)
        if rows > 1 or (losses > 1 and not ending):
            raise refusal
        applicant.refused(refusal)
        interval = self._tier.interval
        if losses == 1:  # leases come and go without the guard, others woke up as well: look again before that is final
            interval = _LOOK if len(self._residents.line) > 1 else 0.0
        if plan.alone or self._solo[0]:
            interval = min(interval, _PATIENCE)
        if ending or (shortage.over_high > 0 and self._neighbours.hopeful):
            interval = min(interval, _LOOK)
        self._guard.wait(interval)

    def _lost(self, applicant: Applicant, shortage: Shortage, *, turn: bool) -> bool:
        """Whether nothing that others do will make room; the guard is held."""
        if shortage.fits or self._leaving(applicant) or not applicant.hopeless():
            return False
        if self._neighbours.apply(shortage) and self._neighbours.hopeful:
            return False
        own = applicant.own_threads() & self._residents.holding_threads()
        mine = turn or bool(own)  # else the head of the line decides
        if not mine or not applicant.hopeless():
            return False
        return shortage.met or not self._choosing.suffices(shortage)  # met: by what only this very thread unloads

    def _ending(self, shortage: Shortage) -> bool:
        """Whether memory is short while a model that just left is still referenced: by a request, for all we know."""
        return shortage.over_high > 0 and self._residents.lingering.youngest() < _REQUEST

    def _no_room(self, model: str, shortage: Shortage) -> NoRoom:
        """Return the error that says what is in the way; the guard is held."""
        holders = self._residents.holders()
        figures = shortage.figures
        need = figures["need"]
        show = str if shortage.reason is Reason.MAX_MODELS else format_bytes
        setting = f"memory.{_SETTING[shortage.reason]}"
        if shortage.fits:
            why = "others wait for room before it: ask again"
        elif holders:
            why = f"leases hold {format_holders(holders)}: release leases, or raise {setting}"
        elif shortage.reason is Reason.WATERMARK and (lingering := self._residents.lingering.bytes()):
            why = (
                f"evicting did not help, as somebody still references evicted models of {format_bytes(lingering)}: "
                f"drop these references, use lease() rather than get(), or raise {setting}"
            )
        elif self._residents.tracked():
            why = f"evicting did not help: free memory elsewhere in this process, or raise {setting}"
        else:
            why = f"that is the process without any model: raise {setting} well above it"
        return NoRoom(
            f"no room in memory for {model!a}: it needs {show(need)}, {setting} allows "
            f"{show(figures['high'])} and {show(figures['used'])} are used; {why}",
            model=model,
            tier="memory",
            need=need,
            used=figures["used"],
            limit=figures["high"],
            holders=holders,
        )


_SETTING = {Reason.WATERMARK: "high", Reason.MEMORY_BUDGET: "budget", Reason.MAX_MODELS: "max_models"}


def _sober(plan: Plan, limits: Limits) -> Plan:
    """Return the plan of a load, which what other models became may not make larger than half of what is allowed."""
    if plan.sure or limits.most == math.inf:
        return plan
    return attrs.evolve(plan, resident=min(plan.resident, max(plan.artifact, int(limits.most // 2))))


def _peak(plan: Plan, limits: Limits) -> int:
    """Return the bytes to reserve for a peak: one that is only estimated takes no more than half of what is allowed."""
    return plan.peak if plan.peak_sure else min(plan.peak, max(plan.resident, limits.high // 2))


def _bare(plan: Plan, limits: Limits) -> int:
    """Return the least to reserve: a peak that was measured may go beyond ``high``, but not beyond the limit."""
    if not plan.peak_sure or limits.reading is None:
        return plan.resident
    return max(plan.resident, plan.peak - max(limits.reading.limit - limits.high, 0))


def _refuse_too_large(model: str, plan: Plan, limits: Limits) -> None:
    bounds = [("budget", limits.budget)] if limits.budget is not None else []
    if limits.reading is not None:
        bounds.append(("high", limits.high))
    for setting, bound in bounds:
        if plan.resident > bound:
            raise TooLarge(
                f"model {model!a} needs {format_bytes(plan.resident)} of memory, more than memory.{setting} = "
                f"{format_bytes(bound)} allows with nothing else loaded: raise it, or serve the model elsewhere",
                model=model,
                tier="memory",
                need=plan.resident,
                limit=bound,
            )
