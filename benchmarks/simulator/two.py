"""Memory over disk: one trace through two tiers (``tiers``), with what both of them wait for added up.

A request that memory misses loads, and fetches first where the artifact is not on disk. The disk tier hears of these
requests only. To the policy of the memory a model costs its load, and its fetch too while its artifact is not on disk;
to that of the disk it costs its fetch.
"""

import attrs

from benchmarks.simulator.tiers import Tier
from benchmarks.simulator.traces import Trace


@attrs.frozen
class Waits:
    """What one replay came to.

    Attributes:
        loads: seconds of the loads that somebody waited for, first loads included.
        fetches: seconds of the fetches, first fetches included.
        misses: requests whose model was not in memory, over all.
        fetched: requests whose artifact was not on disk either, over all.
    """

    loads: float
    fetches: float
    misses: float
    fetched: float

    @property
    def seconds(self) -> float:
        """All that was waited."""
        return self.loads + self.fetches


def replay_two(
    trace: Trace,
    upper: Tier,
    lower: Tier,
    *,
    pins: bool = False,
    tells_hits: bool = False,
    tells_leaving: bool = False,
) -> Waits:
    """Replay a trace through memory (``upper``) over disk (``lower``).

    Args:
        trace: the requests.
        upper: the memory tier.
        lower: the disk tier.
        pins: a model in memory keeps its artifact on disk, as in the library; where nothing else is left to go, memory
            gives up one model after the other. Otherwise an artifact may leave before its model does.
        tells_hits: the disk tier hears of the requests that memory hits, too.
        tells_leaving: to the disk tier a model that leaves memory to make room was asked for once more.
    """
    missed: list[str] = []
    fetched: list[str] = []
    for model in trace.requests:
        if upper.requested(model):
            if tells_hits:
                lower.requested(model)
            continue
        missed.append(model)
        if not lower.requested(model):
            fetched.append(model)
            _fetch(trace, model, upper, lower, pins=pins)
        load = trace.load[model]
        cost = load if model in lower.resident else load + trace.fetch[model]
        left = upper.admit(model, trace.bytes[model], cost)
        for one in left or () if tells_leaving else ():
            lower.requested(one)
    count = len(trace.requests)
    return Waits(
        loads=sum(trace.load[model] for model in missed),
        fetches=sum(trace.fetch[model] for model in fetched),
        misses=len(missed) / count,
        fetched=len(fetched) / count,
    )


def _fetch(trace: Trace, model: str, upper: Tier, lower: Tier, *, pins: bool) -> None:
    """Take an artifact onto the disk; a model whose own leaves before it now costs its fetch as well."""
    size, fetch = trace.bytes[model], trace.fetch[model]
    if not lower.fits(size):
        return
    held = upper.resident.keys() & lower.resident.keys() if pins else frozenset[str]()
    while (gone := lower.admit(model, size, fetch, held)) is None:
        given = next(iter(upper.policy.victims(0, held)))
        upper.drop(given)
        held -= {given}
    for victim in gone:
        if victim in upper.resident:
            upper.price(victim, trace.load[victim] + trace.fetch[victim])
