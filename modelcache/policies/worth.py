"""``Worth``: keeps what saves the most load seconds a byte. What it was measured on is benchmarks/simulator.

How the least worthy is found without a look at all is ``policies.cooling``.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from statistics import median

from modelcache.policies.base import Resident, Standing, searchable
from modelcache.policies.cooling import PIECE, Cooling, Life, Scored, scores

HALVED_ABOVE = 32
"""Requests of one model after which its count, and the age that goes with it, are halved."""

REMEMBERED = 100_000
"""Models that were here and are not: how many of them keep their history."""

STRANGERS = 10_000
"""Ids that were asked for and never came in (most of them models on their way, or made up): how many are kept."""

_PRICES = 255  # the last prices, of which the median stands in for an unknown one; few, as it is found each time


Restored = tuple[str, int, float, float, float, float]
"""See :meth:`Worth.restore`."""


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

    The answer depends on nothing but what was told, and is the formula's, however many models there are: of most of
    them it is known that they can't be the least worthy yet.

    Cost: all methods O(1), but :meth:`victims`: some tens of microseconds to the first victim in the median with 1,000
    models, below 200 with 100,000; more where very many were asked for since the last call, and the first call scores
    all, milliseconds for each thousand.

    Concurrency: as :class:`~modelcache.policies.Policy` says. :meth:`recall` and :meth:`standing` belong under
    the same lock.
    """

    def __init__(self) -> None:
        self._clock = 0
        self._priced = Cooling()  # models of the tier
        self._unpriced = Cooling()  # those of unknown price
        self._held: dict[str, Life] = {}  # those that can't go anyway
        self._gone: OrderedDict[str, Life] = OrderedDict()
        self._strangers: OrderedDict[str, Life] = OrderedDict()
        self._prices: deque[float] = deque(maxlen=_PRICES)

    def requested(self, model: str, clock: int) -> None:
        """Count a request, hit or miss; ``clock`` counts requests to the cache, and never goes back."""
        now = self._clock = max(self._clock, clock)
        life = self._resident(model)
        life = self._absent(model) if life is None else life
        life.last = now
        life.n += 1
        if life.n > HALVED_ABOVE:
            life.n /= 2
            life.since = now - (now - life.since) / 2
        self._moved(model, life)

    def admitted(self, resident: Resident) -> None:
        """Note bytes and cost. A model that nobody has asked for (prefetched) stands as if asked for once, just now."""
        model = resident.model
        life = self._resident(model) or self._gone.pop(model, None) or self._strangers.pop(model, None)
        life = life or Life(0, self._clock, self._clock)
        life.price = self._price(resident.bytes, resident.cost)
        if model not in self._held:
            self._order(model, life)

    def hold(self, model: str, *, held: bool) -> None:
        """Note that a model of the tier can't go for some time, or can again; only saves looks at it in between."""
        if held and (life := self._resident(model)) is not None:
            self._unorder(model)
            self._held[model] = life
        elif not held and (life := self._held.pop(model, None)) is not None:
            self._order(model, life)

    def restore(self, found: Iterable[Restored], clock: int = 0) -> None:
        """Take in models that are in the tier at its start: as :meth:`admitted` and :meth:`recall` for each, but fast.

        Args:
            found: of each its id, bytes, cost, requests, and the numbers of the requests that were its first and last.
            clock: of these numbers.
        """
        self._clock = max(self._clock, clock)
        ago = self._clock - clock
        known = (self._priced.lives, self._unpriced.lives, self._held, self._gone, self._strangers)
        priced, unpriced = dict[str, Life](), dict[str, Life]()
        seen = any(known)
        for model, size, cost, n, first, last in found:
            if not (0 < n <= HALVED_ABOVE and -math.inf < first <= last <= clock) or (
                seen and any(model in kind for kind in known)
            ):
                self.admitted(Resident(model, size, cost))
                self.recall_all([(model, n, first, last)], clock)
                continue
            price = self._price(size, cost)
            (priced if price else unpriced)[model] = Life(n, first + ago, last + ago, price)
        self._priced.fill(priced)
        self._unpriced.fill(unpriced)

    def removed(self, model: str) -> None:
        """Note that a model left; its history stays."""
        life = self._resident(model)
        if life is not None:
            self._unorder(model)
            self._held.pop(model, None)
            _keep(self._gone, model, life, REMEMBERED)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first; of equals the one idle for longest."""
        among = searchable(evictable)
        if isinstance(among, set | frozenset) and len(among) <= PIECE:
            ordered = self._few(among)
        else:
            ordered = itertools.chain(self._all(), self._last())
        return (model for _, _, model in ordered if model in among)

    def standing(self, model: str) -> Standing | None:
        """Return what is known of a model, here or gone; None where nobody asked for it, or that is forgotten."""
        life = self._resident(model) or self._gone.get(model) or self._strangers.get(model)
        if life is None or not life.n:
            return None
        return Standing(life.n, self._clock - life.since, self._clock - life.last)

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:
        """Take in what :meth:`standing` gave before a restart, whether the model is here or not.

        Where something is known already, the larger count, the earlier beginning and the later last request
        hold, so that recalling twice is recalling once; counts are not added up.
        """
        self._clock = max(self._clock, clock)
        self._learn(model, standing.n, max(standing.age, standing.idle), standing.idle)

    def recall_all(self, found: Iterable[tuple[str, float, float, float]], clock: int) -> None:
        """Take in model, requests, first and last of each: as :meth:`recall` with ``Standing.at(clock)``, but fast.

        What is impossible is passed over.
        """
        self._clock = max(self._clock, clock)
        for model, n, first, last in found:
            idle = max(clock - last, 0)
            age = max(clock - first, idle)
            if 0 < n < math.inf and age < math.inf:
                self._learn(model, n, age, idle)

    def _learn(self, model: str, n: float, age: float, idle: float) -> None:
        since, last = self._clock - age, self._clock - idle
        here = self._resident(model)
        life = here or self._gone.get(model) or self._strangers.pop(model, None) or Life(0, since, last)
        if life.n:
            life.last, life.since = max(life.last, last), min(life.since, since)
        else:  # it came in, which was no request
            life.last, life.since = last, since
        life.n = max(life.n, min(n, HALVED_ABOVE))
        if here is None:
            _keep(self._gone, model, life, REMEMBERED)
        else:
            self._moved(model, life)

    def _resident(self, model: str) -> Life | None:
        return self._priced.lives.get(model) or self._held.get(model) or self._unpriced.lives.get(model)

    def _order(self, model: str, life: Life) -> None:
        into, other = (self._priced, self._unpriced) if life.price else (self._unpriced, self._priced)
        other.drop(model)
        into.put(model, life)

    def _unorder(self, model: str) -> None:
        self._priced.drop(model)
        self._unpriced.drop(model)

    def _moved(self, model: str, life: Life) -> None:
        """Note that the score of a model has changed otherwise than by time."""
        for order in (self._priced, self._unpriced):
            if model in order.lives:
                order.put(model, life)

    def _absent(self, model: str) -> Life:
        """Return the history of a model that is not here, as the one to be forgotten last."""
        history = self._gone.get(model)
        if history is not None:
            self._gone.move_to_end(model)
            return history
        history = self._strangers.get(model) or Life(0, self._clock, self._clock)
        _keep(self._strangers, model, history, STRANGERS)
        return history

    def _price(self, size: int, cost: float) -> float:
        if not 0 < cost < math.inf:  # also where it is not a number
            return 0.0
        price = cost / max(size, 1)
        self._prices.append(price)
        return price * price

    def _few(self, models: Iterable[str]) -> Iterable[Scored]:
        """Return these, the least worthy first: where only few may go, all others would be passed over."""
        lives = {model: life for model in models if (life := self._resident(model)) is not None}
        return sorted(scores(lives, self._clock + 1, self._usual()))

    def _all(self) -> Iterable[Scored]:
        priced = self._priced.ascending(self._clock + 1)
        if not self._unpriced.lives:
            return priced
        usual, unpriced = self._usual(), self._unpriced.ascending(self._clock + 1)
        return heapq.merge(priced, ((score * usual, last, model) for score, last, model in unpriced))

    def _last(self) -> Iterator[Scored]:
        """Give those that can't go, as far as they can after all."""
        yield from sorted(scores(self._held, self._clock + 1, self._usual()))

    def _usual(self) -> float:
        """Return the square of what stands in for a price that is unknown."""
        usual = median(self._prices) if self._prices else 1.0
        return usual * usual  # not **, which raises where it gets too large


def _keep(kept: OrderedDict[str, Life], model: str, history: Life, most: int) -> None:
    kept[model] = history
    kept.move_to_end(model)
    if len(kept) > most:
        kept.popitem(last=False)
