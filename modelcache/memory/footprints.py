"""What a model takes in memory: measured around its load, remembered after it left.

Before the first load it is guessed from the artifact, or said by the user (``loading``). Figures are of this
process, and of loads beside which nothing else was loaded or unloaded.
"""

from modelcache.memory.tier import Limits

_NOISE = 2**20  # bytes by which a process grows and shrinks on its own, so that less measures nothing


class Footprints:
    """Footprints and hits of every model that was in memory; the cache's guard is held for each call."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}

    def expected(self, model: str) -> int | None:
        """Return the bytes that a model took when it was last in memory; None if it never was."""
        known = self._known.get(model)
        return known[0] if known else None

    def hits(self, model: str) -> int:
        """Return the hits of a model over its earlier loads."""
        known = self._known.get(model)
        return known[1] if known else 0

    def remember(self, model: str, size: int, hits: int) -> None:
        """Keep the figures of a model that enters or leaves memory."""
        self._known[model] = (size, hits)

    def forget(self, model: str) -> None:
        """Drop what is remembered of a model that is in neither tier."""
        self._known.pop(model, None)


def measured(guess: int, before: Limits, after: Limits, *, alone: bool) -> tuple[int, bool] | None:
    """Return the footprint of a load in bytes, and whether that is more than a guess; None: it was not measured.

    A measurement below what the artifact (or the user) says does not lower it: a mapped model reads low until it
    is used; growth below ``_NOISE`` says only that the model is small.

    Args:
        guess: bytes as the artifact, or the user, says.
        before: a reading before the load.
        after: a reading after it.
        alone: whether nothing else was loaded, unloaded or imported meanwhile.
    """
    if not alone or before.reading is None or after.reading is None:
        return None
    grown = after.reading.used - before.reading.used
    return (max(grown, guess), True) if grown >= _NOISE else (guess, False)
