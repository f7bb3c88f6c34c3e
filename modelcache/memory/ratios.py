"""What models were measured to take, over what their artifacts suggest: of each kind of artifact, and of all."""

from collections import deque
from collections.abc import Collection

LEARNED = 64
"""Loads that are remembered, the latest ones."""

_FEW = 3  # measurements of a kind from which on it is told from others
_KINDS = 256  # that are told apart


class Ratios:
    """One kind of ratio; the cache's guard is held for each call."""

    def __init__(self) -> None:
        self._all: deque[float] = deque(maxlen=LEARNED)
        self._kinds: dict[str, deque[float]] = {}

    def add(self, kind: str, ratio: float) -> None:
        """Take one in."""
        self._all.append(ratio)
        if kind in self._kinds or len(self._kinds) < _KINDS:
            self._kinds.setdefault(kind, deque(maxlen=LEARNED)).append(ratio)

    def usual(self, kind: str, share: float) -> float:
        """Return the ratio below which ``share`` of its kind lies, or of all where the kind is hardly known."""
        own = self._kinds.get(kind, ())
        return share_of(own if len(own) >= _FEW else self._all, share)


def share_of(learned: Collection[float], share: float) -> float:
    """Return the figure below which ``share`` of what was learned lies; 1 before anything was."""
    if not learned:
        return 1.0
    ranked = sorted(learned)
    return ranked[min(int(len(ranked) * share), len(ranked) - 1)]
