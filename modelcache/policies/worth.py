"""``Worth``: keeps what saves the most load seconds a byte. What it was measured on is benchmarks/simulator."""

import heapq
import itertools
import math
import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from statistics import median

import attrs

from modelcache.policies.base import Resident, Standing, searchable

HALVED_ABOVE = 32
"""Requests of one model after which its count, and the age that goes with it, are halved."""

FULL_SCAN = 10_000
"""Most models in the tier that are all scored; of more only a sample is."""

SAMPLE = 64
"""Models drawn at random before each victim."""

SPARE = 16
"""The least worthy of the last sample that stayed: the next begins with them."""

REMEMBERED = 100_000
"""Models that were here and are not: how many of them keep their history."""

STRANGERS = 10_000
"""Ids that were asked for and never came in (most of them models on their way, or made up): how many are kept."""

_PRICES = 255  # the last prices, of which the median stands in for an unknown one; few, as it is found each time

_Scored = tuple[float, float, str]  # worth squared, last request, id


@attrs.define(eq=False)
class _History:
    n: float  # 0: it came in and nobody has asked for it yet
    since: float
    last: float
    price: float = 0.0  # seconds to bring back a byte, squared; 0: unknown, or the model is not here
    place: int = -1  # in the row that samples are drawn from; of no meaning where the model is not here


class Worth:
    """Evicts the model that saves the fewest seconds for each byte it takes and each request to the cache.

    ``worth = rate * cost / bytes``, where ``rate`` is the geometric mean of ``n / age`` (how often a model was
    asked for since it was first seen) and ``n / idle`` (the same, since it was last seen); age and idle are
    counted in requests to the cache, not in seconds. When ``n`` passes 32, it and the age are halved, so that
    the past fades. No other constants. A model without a known cost (0, negative, not a number) counts as one
    of the median cost a byte among the last that were seen.

    The history of a model stays when it is evicted: that of the last 100,000 that left (or were asked for since).
    An id that was asked for and never came in is kept among the last 10,000 such ids only, so that made-up ids
    cost little and push nobody out.

    Up to 10,000 models in the tier all are scored, once for each call of :meth:`victims`, and the answer depends
    on nothing but what was told. Above that a sample is: the 16 next in line of the last answer, and 64 more at
    random before each victim. So a caller should take no more victims than it needs.

    Cost: all methods O(1), but :meth:`victims`: up to 10,000 models about a third of a millisecond for each thousand,
    above that a quarter to half a millisecond for each victim, however many there are.

    Concurrency: as :class:`~modelcache.policies.Policy` says. :meth:`recall` and :meth:`standing` belong under
    the same lock.

    Args:
        full_scan: most models in the tier that are all scored.
    """

    def __init__(self, *, full_scan: int = FULL_SCAN) -> None:
        self._full_scan = full_scan
        self._clock = 0
        self._residents: dict[str, _History] = {}
        self._row: list[str] = []  # their ids, each at its place, to draw from
        self._gone: OrderedDict[str, _History] = OrderedDict()
        self._strangers: OrderedDict[str, _History] = OrderedDict()
        self._prices: deque[float] = deque(maxlen=_PRICES)
        self._stayed: list[_Scored] = []
        self._random = random.Random(0)  # noqa: S311 - a sample, not a secret

    def requested(self, model: str, clock: int) -> None:
        """Count a request, hit or miss; ``clock`` counts requests to the cache, and never goes back."""
        now = self._clock = max(self._clock, clock)
        history = self._residents.get(model) or self._absent(model)
        history.last = now
        history.n += 1
        if history.n > HALVED_ABOVE:
            history.n /= 2
            history.since = now - (now - history.since) / 2

    def admitted(self, resident: Resident) -> None:
        """Note bytes and cost. A model that nobody has asked for (prefetched) stands as if asked for once, just now."""
        model = resident.model
        history = self._residents.get(model)
        if history is None:
            history = self._gone.pop(model, None) or self._strangers.pop(model, None)
            history = self._residents[model] = history or _History(0, self._clock, self._clock)
            history.place = len(self._row)
            self._row.append(model)
        history.price = self._price(resident)

    def removed(self, model: str) -> None:
        """Note that a model left; its history stays."""
        history = self._residents.pop(model, None)
        if history is not None:
            last = self._row.pop()
            if last != model:
                self._row[history.place] = last
                self._residents[last].place = history.place
            _keep(self._gone, model, history, REMEMBERED)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first; of equals the one idle for longest."""
        among = searchable(evictable)
        if len(self._residents) > self._full_scan:
            return self._sampled(among)
        listed = isinstance(evictable, set | frozenset)  # else a walk through it may cost more than the scores
        heap = self._scored(evictable if listed else self._residents)
        heapq.heapify(heap)
        return (model for model in _drain(heap, len(heap)) if model in among)

    def standing(self, model: str) -> Standing | None:
        """Return what is known of a model, here or gone; None where nobody asked for it, or that is forgotten."""
        history = self._residents.get(model) or self._gone.get(model) or self._strangers.get(model)
        if history is None or not history.n:
            return None
        return Standing(history.n, self._clock - history.since, self._clock - history.last)

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:
        """Take in what :meth:`standing` gave before a restart, whether the model is here or not.

        Where something is known already, the larger count, the earlier beginning and the later last request
        hold, so that recalling twice is recalling once; counts are not added up.
        """
        self._clock = max(self._clock, clock)
        since, last = self._clock - max(standing.age, standing.idle), self._clock - standing.idle
        n = min(standing.n, HALVED_ABOVE)
        history = self._residents.get(model) or self._gone.get(model) or self._strangers.pop(model, None)
        history = history or _History(0, since, last)
        if history.n:
            history.last, history.since = max(history.last, last), min(history.since, since)
        else:  # it came in, which was no request
            history.last, history.since = last, since
        history.n = max(history.n, n)
        if model not in self._residents:
            _keep(self._gone, model, history, REMEMBERED)

    def _absent(self, model: str) -> _History:
        """Return the history of a model that is not here, as the one to be forgotten last."""
        history = self._gone.get(model)
        if history is not None:
            self._gone.move_to_end(model)
            return history
        history = self._strangers.get(model) or _History(0, self._clock, self._clock)
        _keep(self._strangers, model, history, STRANGERS)
        return history

    def _price(self, resident: Resident) -> float:
        if not (math.isfinite(resident.cost) and resident.cost > 0):
            return 0.0
        price = resident.cost / max(resident.bytes, 1)
        self._prices.append(price)
        return price * price

    def _scored(self, models: Iterable[str]) -> list[_Scored]:
        """Return the square of each model's worth: no root, same order."""
        usual = median(self._prices) if self._prices else 1.0
        usual *= usual  # not **, which raises where it gets too large
        now = self._clock + 1
        get = self._residents.get
        return [
            ((one.n * one.n or 1.0) * (one.price or usual) / ((now - one.since) * (now - one.last)), one.last, model)
            for model in models
            if (one := get(model)) is not None
        ]

    def _sampled(self, evictable: AbstractSet[str]) -> Iterator[str]:
        """Give the least worthy of a sample that grows by ``SAMPLE`` models before each victim."""
        drawn = [model for _, _, model in heapq.nsmallest(SPARE, self._stayed) if model in evictable]
        seen = frozenset(drawn)
        pool = (model for model in _shuffled(self._row, self._random) if model not in seen and model in evictable)
        heap = self._stayed = self._scored(drawn)  # who is still in it next time stayed
        heapq.heapify(heap)
        while more := self._scored(itertools.islice(pool, SAMPLE)):
            for scored in more:
                heapq.heappush(heap, scored)
            yield from _drain(heap, 1)
        yield from _drain(heap, len(heap))


def _shuffled(row: Sequence[str], source: random.Random) -> Iterator[str]:
    """Give all of a row in random order (Fisher and Yates), without a copy: only what has moved is noted."""
    moved: dict[int, str] = {}
    for last in range(len(row) - 1, -1, -1):
        place = int(source.random() * (last + 1))  # far faster than randrange
        yield moved.get(place, row[place])
        moved[place] = moved.pop(last, row[last])


def _keep(kept: OrderedDict[str, _History], model: str, history: _History, most: int) -> None:
    kept[model] = history
    kept.move_to_end(model)
    if len(kept) > most:
        kept.popitem(last=False)


def _drain(heap: list[_Scored], most: int) -> Iterator[str]:
    for _ in range(min(most, len(heap))):
        yield heapq.heappop(heap)[2]
