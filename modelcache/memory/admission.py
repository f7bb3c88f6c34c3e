"""Room for a newcomer: just enough is evicted, and who can't be served waits in line.

It acts, outside the guard, on what ``memory.residents`` decides under it. Limits that are lowered, and growth from
outside, are ``memory.room``.
"""

from typing import Generic, Protocol, TypeVar

from modelcache import heap
from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Reason
from modelcache.guard import Guard
from modelcache.memory.evicting import FUTILE, Evictor
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.memory.unloading import Unloader
from modelcache.units import format_bytes, format_holders

T = TypeVar("T")


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
        residents: the decisions.
        guard: the cache's lock.
        evictor: carries out evictions.
        unloader: collects and gives heap back.
    """

    def __init__(
        self, tier: MemoryTier, residents: Residents[T], guard: Guard, evictor: Evictor[T], unloader: Unloader[T]
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._evictor = evictor
        self._unloader = unloader

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
                victims = residents.choose(shortage, most) if looked and turn and futile < FUTILE else []
                told = self._evictor.evicted(victims, shortage, applicant.model)
                if looked and not victims:
                    rows, futile = rows + (futile >= FUTILE), 0
                    self._wait(applicant, need, shortage, turn=turn, last=rows > 1)
            if not looked and shortage.over_high > 0:  # dead cycles and freed heap look used, but cost no eviction
                self._unloader.collect(now=True)
                heap.give_back()
            if victims:
                most *= 2
                futile = 0 if self._evictor.evict(victims, told, limits, shortage.reason) else futile + 1

    def _leaving(self, applicant: Applicant, model: str | None = None) -> bool:
        """Whether some model (or this one) is being unloaded by a thread that does not wait for the applicant."""
        waiting = applicant.threads()
        return any(entry.retirer not in waiting and model in {None, entry.model} for entry in self._residents.leaving)

    def _wait(self, applicant: Applicant, need: int, shortage: Shortage, *, turn: bool, last: bool) -> None:
        """Wait for something to change; the guard is held.

        Raises:
            NoRoom: nothing will, or (``last``) evicting did not help twice over.
            Cancelled: it was told to stop, or nobody waits for it any more.
        """
        applicant.state = "waiting for room"
        applicant.check()
        refusal = self._no_room(applicant.model, need, shortage)
        lost = not self._residents.idle() and not self._leaving(applicant) and applicant.hopeless()
        own = applicant.own_threads() & self._residents.holding_threads()
        mine = turn or bool(own)  # else the head of the line decides
        if last or (lost and mine):
            raise refusal
        applicant.refused(refusal)
        self._guard.wait(self._tier.interval)

    def _no_room(self, model: str, need: int, shortage: Shortage) -> NoRoom:
        """Return the error that says what is in the way; the guard is held."""
        holders = self._residents.holders()
        figures = shortage.figures
        show = str if shortage.reason is Reason.MAX_MODELS else format_bytes
        setting = f"memory.{_SETTING[shortage.reason]}"
        if shortage.fits:
            why = "others wait for room before it: ask again"
        elif holders:
            why = f"leases hold {format_holders(holders)}: release leases, or raise {setting}"
        elif self._residents.tracked():
            why = f"evicting did not help: free memory elsewhere in this process, or raise {setting}"
        else:
            why = f"that is the process without any model: raise {setting} well above it"
        return NoRoom(
            f"no room in memory for {model!a}: it needs {format_bytes(need)}, {setting} allows "
            f"{show(figures['high'])} and {show(figures['used'])} are used; {why}",
            model=model,
            tier="memory",
            need=need,
            used=figures["used"],
            limit=figures["high"],
            holders=holders,
        )


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
