"""Tiers without models: a policy is told and asked as the library's tiers do, and the waiting is added up.

A request is booked first, victims go next, the newcomer comes in last, so it is never its own victim. A model
larger than its tier is loaded for the request and not kept. Nothing is leased and nothing fails here. Memory over disk
is ``two``.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import attrs

from benchmarks.simulator.traces import Trace
from modelcache.policies import Policy, Resident


@attrs.frozen
class Outcome:
    """What one replay came to.

    Attributes:
        misses: requests whose model was not there, over all.
        bytes: bytes of these, over the bytes of all.
        seconds: what those who missed waited, first loads included.
    """

    misses: float
    bytes: float
    seconds: float


class Tier:
    """One tier.

    Args:
        policy: who goes first.
        capacity: bytes.
        spare: keep a victim that the others make unnecessary, the most worthy first.
    """

    def __init__(self, policy: Policy, capacity: int, *, spare: bool = False) -> None:
        self.policy = policy
        self.resident: dict[str, int] = {}
        self._free = self._capacity = capacity
        self._clock = 0
        self._spare = spare

    def requested(self, model: str) -> bool:
        """Book a request; return whether the model is here."""
        self._clock += 1
        self.policy.requested(model, self._clock)
        return model in self.resident

    def admit(self, model: str, size: int, cost: float, held: AbstractSet[str] = frozenset()) -> list[str] | None:
        """Make room for a model and take it in; return who left, or None, and nobody leaves, where it does not fit.

        ``held``: models that may not leave.
        """
        if not self.fits(size):
            return None
        victims = self._victims(size - self._free, held) if size > self._free else []
        if size > self._free + sum(self.resident[victim] for victim in victims):
            return None
        for victim in victims:
            self.drop(victim)
        self.resident[model] = size
        self._free -= size
        self.policy.admitted(Resident(model, size, cost))
        return victims

    def drop(self, model: str) -> None:
        """Let a model leave."""
        self._free += self.resident.pop(model)
        self.policy.removed(model)

    def fits(self, size: int) -> bool:
        """Whether a model of this size fits in at all."""
        return size <= self._capacity

    def price(self, model: str, cost: float) -> None:
        """Tell the policy that bringing back a resident model now costs something else."""
        self.policy.admitted(Resident(model, self.resident[model], cost))

    def _victims(self, need: int, held: AbstractSet[str]) -> list[str]:
        chosen = []
        for victim in self.policy.victims(need, self.resident.keys() - held if held else self.resident.keys()):
            chosen.append(victim)
            need -= self.resident[victim]
            if need <= 0:
                break
        return self._needed(chosen, -need) if self._spare else chosen

    def _needed(self, chosen: list[str], surplus: int) -> list[str]:
        kept = []
        for victim in reversed(chosen):
            if self.resident[victim] <= surplus:
                surplus -= self.resident[victim]
            else:
                kept.append(victim)
        return kept[::-1]


def replay(trace: Trace, policy: Policy, capacity: int, *, spare: bool = False) -> Outcome:
    """Replay a trace through one memory tier whose disk holds everything: a miss costs the load."""
    tier = Tier(policy, capacity, spare=spare)
    missed = []
    for model in trace.requests:
        if not tier.requested(model):
            missed.append(model)
            tier.admit(model, trace.bytes[model], trace.load[model])
    return outcome(trace, missed, trace.load)


def outcome(trace: Trace, missed: Iterable[str], cost: Mapping[str, float]) -> Outcome:
    """Add up the requests that missed."""
    missed = list(missed)
    sizes = trace.bytes
    return Outcome(
        misses=len(missed) / len(trace.requests),
        bytes=sum(sizes[model] for model in missed) / sum(sizes[model] for model in trace.requests),
        seconds=sum(cost[model] for model in missed),
    )
