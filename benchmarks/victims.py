"""What finding the next victim costs: one eviction from a full tier of 1,000 to 100,000 models, for each policy.

    python -m benchmarks.victims [--rounds 30] [--only worth]

One eviction is what the disk tier does for a newcomer: the request is booked, the policy is asked for one victim among
those that may go (nine of ten; the others are in use, and are asked about one by one), that one leaves, the newcomer
comes in. The peer, in each row, is what one would write first: the least of a list of all that may go.
"""

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable

from benchmarks.grid import grid
from benchmarks.report import machine, percentile
from modelcache.policies import Allowed, Policy, Resident, make_policy

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
PEER = "least of a list"
NAMES = ("lru", "lfu", "fifo", "worth")


class Least:
    """LRU as one would write it first."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}

    def requested(self, model: str, clock: int) -> None:
        """Note when."""
        self.last[model] = clock

    def admitted(self, resident: Resident) -> None:
        """Nothing to note."""

    def removed(self, model: str) -> None:
        """Forget."""
        self.last.pop(model, None)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Give the one asked for longest ago."""
        return [min(list(evictable), key=lambda model: self.last[model])]


class Full:
    """A tier full of models, asked for as often as Zipf's law has it.

    Args:
        policy: who goes first.
        size: how many models it has.
    """

    def __init__(self, policy: Policy, size: int) -> None:
        source = random.Random(size)  # noqa: S311 - a load, not a secret
        self._policy = policy
        self._models: dict[str, bool] = {}
        self._clock = itertools.count(1)
        self._names = (f"new{number}" for number in itertools.count())
        self._weights = source
        names = [f"model{number}" for number in range(size)]
        for name in names:
            self._enter(name)
        weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(size)))
        for name in source.choices(names, cum_weights=weights, k=2 * size):
            policy.requested(name, next(self._clock))
        self.may_go = Allowed(self._models, bool)

    def _enter(self, name: str) -> None:
        self._policy.requested(name, next(self._clock))
        self._models[name] = self._weights.random() < 0.9
        size = self._weights.randrange(1, 1_000)
        self._policy.admitted(Resident(name, size, self._weights.uniform(0.1, 60)))

    def evict(self) -> float:
        """Replace one model; return microseconds."""
        name = next(self._names)
        started = time.perf_counter()
        victim = next(iter(self._policy.victims(1, self.may_go)))
        del self._models[victim]
        self._policy.removed(victim)
        self._enter(name)
        return (time.perf_counter() - started) * 1e6


def make(row: str) -> Policy:
    """Return a new policy for a row."""
    return Least() if row == PEER else make_policy(row, "policy")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="evictions measured of each row at each size")
    parser.add_argument("--only", action="append", choices=NAMES, help="one policy; may be given again")
    options = parser.parse_args()
    rows = (*(options.only or NAMES), PEER)
    figures: dict[tuple[str, int], list[float]] = {}
    for size in SIZES:
        tiers = {row: Full(make(row), size) for row in rows}
        for turn in range(options.rounds + 1):
            for row, tier in tiers.items():
                figure = tier.evict()
                if turn:
                    figures.setdefault((row, size), []).append(figure)
    sys.stdout.write(f"{machine()}; {options.rounds} rounds\n")

    def lines(cell: Callable[[str, int], str]) -> list[list[str]]:
        return [["", *(f"{size:,}" for size in SIZES)], *([row, *(cell(row, size) for size in SIZES)] for row in rows)]

    def cost(row: str, size: int) -> str:
        found = figures[row, size]
        return f"{statistics.median(found):,.0f} ({percentile(found, 0.95):,.0f})"

    def ratio(row: str, size: int) -> str:
        pairs = zip(figures[row, size], figures[PEER, size], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        return f"{statistics.median(ratios):.4f} ({min(ratios):.4f}..{max(ratios):.4f})"

    grid("One eviction: median us (p95), by the number of models", lines(cost))
    grid(f"The same over {PEER!r} of the same round: median (min..max)", lines(ratio))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
