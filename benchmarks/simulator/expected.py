"""The figures to reach, measured once by an independent program, and how ours are held against them.

The capacities are 5, 10, 20 and 40 % of the bytes of all models.
"""

import attrs

SHARES = (0.05, 0.1, 0.2, 0.4)
"""Capacities, as a share of the bytes of all models."""

TOLERANCE = 0.01
"""How far, relatively, a figure may be off, beside what it was rounded by."""

LRU_MISSES = {
    "tenants": (0.316, 0.188, 0.071, 0.008),
    "twin": (0.244, 0.177, 0.100, 0.042),
    "web12": (0.404, 0.318, 0.244, 0.185),
    "cdn": (0.686, 0.658, 0.614, 0.580),
}
"""Misses of LRU, over all requests."""

LRU_SECONDS = {
    "tenants": (237518, 146435, 59372, 7033),
    "twin": (77612, 53711, 28718, 11801),
    "web12": (159298, 124214, 94900, 71589),
    "cdn": (179092, 172017, 162497, 154149),
}
"""Reload seconds of LRU."""

WORTH = {
    "tenants": (0.719, 0.619, 0.534, 0.674),
    "twin": (0.653, 0.579, 0.513, 0.547),
    "web12": (0.722, 0.737, 0.773, 0.860),
    "cdn": (0.920, 0.917, 0.936, 0.964),
}
"""Reload seconds of ``worth``, over those of LRU."""

TWO_TIERS_SHARES = (0.1, 0.3)
"""Memory and disk in the run with two tiers, as shares of the bytes of all models."""

TWO_TIERS = {"twin": 0.61, "tenants": 0.63}
"""The most that ``worth`` in both tiers may wait, over LRU in both."""


@attrs.frozen
class Check:
    """One figure held against what is expected.

    Attributes:
        what: what it is.
        expected: the figure to reach.
        got: ours.
        rounding: half a unit of the last digit of ``expected``.
        most: whether less is as good.
    """

    what: str
    expected: float
    got: float
    rounding: float
    most: bool = False

    @property
    def deviation(self) -> float:
        """Return how far off it is, relatively."""
        return self.got / self.expected - 1

    @property
    def passed(self) -> bool:
        """Whether it is near enough."""
        if self.most:
            return self.got <= self.expected
        return abs(self.got - self.expected) <= TOLERANCE * self.expected + self.rounding


def checks(trace: str, place: int, misses: float, lru_seconds: float, worth_seconds: float) -> list[Check]:
    """Return the checks of one trace at the capacity ``SHARES[place]``; none for a trace that is not known."""
    if trace not in WORTH:
        return []
    where = f"{trace} {SHARES[place]:.0%}"
    return [
        Check(f"{where} LRU misses", LRU_MISSES[trace][place], misses, 0.0005),
        Check(f"{where} LRU seconds", LRU_SECONDS[trace][place], lru_seconds, 0.5),
        Check(f"{where} worth / LRU", WORTH[trace][place], worth_seconds / lru_seconds, 0.0005),
    ]
