"""How much must leave memory, and which models that hits: the decisions of an eviction.

Every method runs under the guard and does nothing but decide. Who is in memory at all is ``memory.residents``.
"""

from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

import attrs

from modelcache.events import Reason
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits
from modelcache.policies import Policy

T = TypeVar("T")


class Choosing(Generic[T]):
    """Chooses who gives way.

    Args:
        residents: who is in memory.
        policy: who goes first.

    Attributes:
        elsewhere: bytes that other processes under the same limit have set aside for their loads.
    """

    def __init__(self, residents: Residents[T], policy: Policy) -> None:
        self._residents = residents
        self._policy = policy
        self.elsewhere = 0

    def newcomer(self, limits: Limits, need: int, resident: int) -> Shortage:
        """Return what a newcomer lacks.

        Loads under way count with their reservations. What is in use is at least the sum of what is tracked, beside
        what the process takes without models: an idle mapped model reads low, and grows on first use.

        Args:
            limits: a reading made just before.
            need: bytes at the peak of its load.
            resident: bytes once it is loaded, which is what counts for the budget.
        """
        reserved = sum(hold.peak for hold in self._residents.reserved.values())
        used = self._residents.expect(limits.reading.used) if limits.reading else 0
        return self._shortage(limits, used + reserved + self.elsewhere, need, resident, 1)

    def present(self, limits: Limits, *, reserved: bool, floor: int | None = None) -> Shortage:
        """Return what the models in memory lack themselves.

        Args:
            limits: a reading made just before.
            reserved: also count what loads under way will need; what they have already is counted twice then.
            floor: evict down to this many used bytes rather than to ``high``.
        """
        used = limits.reading.used if limits.reading else 0
        if reserved:
            used += sum(hold.peak for hold in self._residents.reserved.values())
        return self._shortage(limits, used, 0, 0, 0, floor)

    def _shortage(
        self, limits: Limits, used: int, need: int, resident: int, models: int, floor: int | None = None
    ) -> Shortage:
        residents = self._residents
        reserved = sum(hold.resident for hold in residents.reserved.values())
        coming = sum(0 if entry.inherited else entry.bytes for entry in residents.leaving)
        tracked = residents.tracked()
        count = residents.count()
        over_high = used + need - limits.high if limits.reading else 0
        over_budget = tracked + reserved + resident - limits.budget if limits.budget is not None else 0
        over_count = count + models - limits.max_models if limits.max_models is not None else 0
        lowering = floor is not None and over_budget <= 0 and over_count <= 0
        if (over_high > 0 or lowering) and limits.reading:
            reason = Reason.WATERMARK
            figures = {"used": used, "need": need, "limit": limits.reading.limit}
            figures |= {"high": limits.high, "low": limits.low}
        elif over_budget > 0 and limits.budget is not None:
            reason = Reason.MEMORY_BUDGET
            figures = {"used": tracked + reserved, "need": resident, "limit": limits.budget, "high": limits.budget}
        else:
            reason = Reason.MAX_MODELS
            most = limits.max_models or 0
            figures = {"used": count, "need": models, "limit": most, "high": most}
        return Shortage(
            fits=over_high <= 0 and over_budget <= 0 and over_count <= 0,
            over_high=over_high - coming + (limits.high - floor if floor is not None else 0),
            over_budget=over_budget - sum(entry.bytes for entry in residents.leaving),
            over_count=over_count - len(residents.leaving),
            reason=reason,
            figures=figures,
        )

    def choose(
        self,
        shortage: Shortage,
        most: int,
        among: Collection[str] | None = None,
        *,
        whole: bool = False,
        stepwise: bool = False,
        least: int = 0,
    ) -> list[Entry[T]]:
        """Retire just enough models for ``shortage``; what was loaded before a fork goes last.

        Args:
            shortage: what is lacking.
            most: how many models at most, for the watermark, of which it was only guessed what they give back: the
                next reading tells more.
            among: only these models.
            whole: none at all where it is known that what may go does not suffice.
            stepwise: ``most`` holds for all models: what grew may not be theirs, so that their leaving may not help.
            least: bytes to ask for, where something lacks for the watermark and that many may go.
        """
        if least > shortage.over_high > 0:
            more = attrs.evolve(shortage, over_high=least)
            if chosen := self.choose(more, most, among, whole=whole, stepwise=stepwise):
                return chosen
        picked: list[Entry[T]] = []
        guessed, lacking = 0, shortage
        for entry in self._ranked(max(shortage.over_high, shortage.over_budget, 0), among):
            if shortage.met or (guessed >= most and shortage.over_high > 0):
                break
            picked.append(entry)
            guessed += stepwise or not _certain(entry)
            shortage = shortage.after(entry)
        if whole and not shortage.met and not self.suffices(lacking):
            return []
        for entry in picked[-2::-1]:  # the last one may make earlier ones needless: those worth most are spared first
            spared = shortage.without(entry)
            if spared.met and not entry.doomed:
                picked.remove(entry)
                shortage = spared
        return [entry for entry in picked if self._residents.retire(entry, shortage.reason)]

    def least(self) -> Entry[T] | None:
        """Return who would go next; what was loaded before a fork gives nothing back, and is not among them."""
        return next((entry for entry in self._ranked(0, None) if not (entry.inherited or entry.doomed)), None)

    def largest(self, shortage: Shortage) -> Entry[T] | None:
        """Return the largest model that may go, if it alone is enough; what was loaded before a fork is not."""
        idle = (entry for entry in self._residents.resident.values() if not (entry.held() or entry.inherited))
        largest = max(idle, key=lambda entry: entry.bytes, default=None)
        return largest if largest is not None and shortage.after(largest).met else None

    def enough(self, shortage: Shortage) -> set[str]:
        """Return the models that may go, where they are enough by what is booked of them; else none.

        What was loaded before a fork is not among them.
        """
        idle = [entry for entry in self._residents.resident.values() if not (entry.held() or entry.inherited)]
        for entry in idle:
            shortage = shortage.after(entry)
        return {entry.model for entry in idle} if shortage.met else set()

    def suffices(self, shortage: Shortage) -> bool:
        """Whether all that may go now would be enough; for the watermark it may be where a footprint was guessed."""
        idle = [entry for entry in self._residents.entries() if not entry.held()]
        for entry in idle:
            shortage = shortage.after(entry)
        guessed = any(not _certain(entry) for entry in idle)
        return (guessed or shortage.over_high <= 0) and shortage.over_budget <= 0 and shortage.over_count <= 0

    def _ranked(self, need: int, among: Collection[str] | None) -> Iterator[Entry[T]]:
        residents = self._residents
        yield from [entry for entry in residents.doomed.values() if not entry.held() and among is None]  # go anyway
        idle = {
            model: entry
            for model, entry in residents.resident.items()
            if not entry.held() and (among is None or model in among)
        }
        own = {model for model, entry in idle.items() if not entry.inherited}
        for models in (own, idle.keys() - own):
            if models:
                for model in self._policy.victims(need, models):
                    yield idle[model]


def _certain(entry: Entry[Any]) -> bool:
    """Whether it is known what a model gives back: one from before a fork gives nothing, or all, by the gauge."""
    return entry.sure and not entry.inherited
