"""Models that have left memory but that somebody still references: their memory does not come back.

Seen by weak references, so lists, dicts and bytes are not among them. The references are never followed, since that
could make a look, under a lock, the last to hold a model: their callbacks note the end. Every method of ``Lingering``
runs under the cache's guard.
"""

import math
import time
import weakref
from typing import Any


class Straggler:
    """One model that was unloaded, and perhaps lives on.

    Args:
        value: the model; it is only referenced weakly.
        model: its id.
        size: its footprint.

    Raises:
        TypeError: it can't be referenced weakly.

    Attributes:
        since: monotonic seconds at which it was unloaded.
    """

    __slots__ = ("_end", "_trace", "bytes", "model", "since")

    def __init__(self, value: object, model: str, size: int) -> None:
        self.model = model
        self.bytes = size
        self.since = time.monotonic()
        self._end: list[Any] = []
        self._trace = weakref.ref(value, self._end.append)

    @property
    def alive(self) -> bool:
        """Whether somebody still references it."""
        return not self._end


class Lingering:
    """The stragglers of one cache."""

    def __init__(self) -> None:
        self._all: list[Straggler] = []
        self._hopeful: list[Straggler] = []  # not yet known to outlive a collection

    def add(self, straggler: Straggler) -> None:
        """Take in a model that was just unloaded, and lives on."""
        self._all = [*self.look(), straggler]
        self._hopeful.append(straggler)

    def look(self) -> list[Straggler]:
        """Return those that live on, the oldest first."""
        self._all = [straggler for straggler in self._all if straggler.alive]
        return list(self._all)

    def hopeful(self) -> bool:
        """Whether one of them may only live in a cycle, so that a collection could end it."""
        self._hopeful = [straggler for straggler in self._hopeful if straggler.alive]
        return bool(self._hopeful)

    def collected(self) -> None:
        """Note that cycles were collected: what lives on is held by somebody, and no collection helps."""
        self._hopeful = []

    def bytes(self) -> int:
        """Return the footprints of those that live on."""
        return sum(straggler.bytes for straggler in self.look())

    def youngest(self) -> float:
        """Return for how many seconds the last to leave of those that live on has been gone; infinity without one."""
        stragglers = self.look()
        return time.monotonic() - stragglers[-1].since if stragglers else math.inf

    def of(self, model: str) -> tuple[int, float]:
        """Return how many of one model live on, and for how long the oldest does, in seconds."""
        since = [straggler.since for straggler in self.look() if straggler.model == model]
        return len(since), (time.monotonic() - min(since) if since else 0.0)


def follow(value: object, model: str, size: int) -> Straggler | None:
    """Return a look at a model that is about to leave; None for a type that can't be referenced weakly."""
    try:
        return Straggler(value, model, size)
    except TypeError:
        return None
