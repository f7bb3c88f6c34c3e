"""Published policies, as plainly as they can be written: GDSF, GreedyDual, and Belady's, which know the future.

Each is a ``modelcache.policies.Policy``, so that all run in the same tier; none is made to be fast.
"""

import heapq
import math
from collections.abc import Collection, Iterator

from benchmarks.simulator.traces import Trace
from modelcache.policies import Resident


class Scored:
    """The common part: who has the lowest score goes first, of equals the one last asked for longest ago."""

    def __init__(self) -> None:
        self.clock = 0
        self.last: dict[str, int] = {}
        self.residents: dict[str, Resident] = {}

    def score(self, model: str) -> float:
        """Return what a resident model is worth now."""
        raise NotImplementedError

    def requested(self, model: str, clock: int) -> None:
        """Note the time."""
        self.clock = clock
        self.last[model] = clock

    def admitted(self, resident: Resident) -> None:
        """Take in a model."""
        self.residents[resident.model] = resident

    def removed(self, model: str) -> None:
        """Forget a model."""
        self.residents.pop(model, None)

    def victims(self, need: int, evictable: Collection[str]) -> Iterator[str]:  # noqa: ARG002 - the protocol's
        """Give the evictable models, the lowest score first."""
        heap = [(self.score(model), self.last[model], model) for model in evictable]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[2]


class GreedyDual(Scored):
    """GreedyDual-Size (Cao 1997): ``L + cost / bytes``, set at each use; L is the score of the last victim."""

    def __init__(self) -> None:
        super().__init__()
        self.floor = 0.0
        self.uses: dict[str, int] = {}
        self.scores: dict[str, float] = {}

    def weight(self, model: str) -> float:
        """Return what the score is beside L."""
        resident = self.residents[model]
        return resident.cost / resident.bytes

    def score(self, model: str) -> float:
        """Return the score of the last use."""
        return self.scores[model]

    def requested(self, model: str, clock: int) -> None:
        """Count a use, and score anew."""
        super().requested(model, clock)
        if model in self.residents:
            self.uses[model] += 1
            self.scores[model] = self.floor + self.weight(model)

    def admitted(self, resident: Resident) -> None:
        """Take in a model; its uses count from here."""
        super().admitted(resident)
        self.uses[resident.model] = 1
        self.scores[resident.model] = self.floor + self.weight(resident.model)

    def removed(self, model: str) -> None:
        """Raise L to the victim's score."""
        super().removed(model)
        self.floor = self.scores[model]


class Gdsf(GreedyDual):
    """GDSF (Cherkasova 1998): ``L + uses * cost / bytes``."""

    def weight(self, model: str) -> float:
        """Return what the score is beside L."""
        return self.uses[model] * super().weight(model)


class Belady(Scored):
    """Belady (1966): who is asked for again latest goes first. It has read the trace, so it is no policy to use."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.coming: list[float] = [math.inf] * len(trace.requests)
        self.next: dict[str, float] = {}
        later: dict[str, float] = {}
        for place in range(len(trace.requests) - 1, -1, -1):
            model = trace.requests[place]
            self.coming[place] = later.get(model, math.inf)
            later[model] = place + 1  # clocks start at 1

    def requested(self, model: str, clock: int) -> None:
        """Look up when the model is asked for again."""
        super().requested(model, clock)
        self.next[model] = self.coming[clock - 1]

    def score(self, model: str) -> float:
        """Return how soon it is asked for."""
        return 1 / (self.next[model] - self.clock)


class BeladyCost(Belady):
    """The same with an eye on cost and bytes: seconds saved for each byte and each request that it stays."""

    def score(self, model: str) -> float:
        """Return the seconds saved."""
        resident = self.residents[model]
        return resident.cost / resident.bytes * super().score(model)
