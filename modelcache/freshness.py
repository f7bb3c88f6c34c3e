"""Who wants new versions of models that are there already, and which of them are due to be asked for.

The asking is a flight like any other (``fetching``, ``loading``), with ``refresh`` set.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from modelcache.disk.items import Item
from modelcache.errors import ModelCacheError
from modelcache.flights import Flight
from modelcache.memory.entries import Entry


class Refreshing:
    """Somebody who waits for a refresh to end.

    Args:
        threads: the identities of the threads that wait; empty: nobody does.
    """

    to_memory = True  # it waits for all of it

    def __init__(self, *threads: object) -> None:
        self.urgent = bool(threads)
        self._threads = set(threads)

    def finished(self, model: str, error: ModelCacheError | None) -> None:
        """Hear how it ended."""

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it."""
        return self._threads

    def reset_after_fork(self) -> None:
        """Hear, in a child, that it will not end here."""


def only_refreshes(flight: Flight[Any]) -> bool:
    """Whether a flight is a refresh that nobody has joined for the model itself; the guard is held."""
    return flight.refresh and not flight.waiters and all(isinstance(each, Refreshing) for each in flight.watchers)


class Freshness(Refreshing):
    """When each model in use was last asked for at the source; the cache's guard is held for each call.

    Args:
        after: seconds after which it is asked for again; None: never.
    """

    def __init__(self, after: float | None) -> None:
        super().__init__()
        self.after = after
        self._asked: dict[str, float] = {}
        self._looked = time.monotonic()

    def due(self, resident: Mapping[str, Entry[Any]], present: Mapping[str, Item]) -> list[str]:
        """Return the models that were used since the last look and whose time has come; they count as asked for.

        A model that was fetched by an earlier process counts from its fetch.

        Args:
            resident: what is in memory.
            present: what is on disk.
        """
        if self.after is None:
            return []
        now, wall = time.monotonic(), time.time()
        looked, self._looked = self._looked, now
        due = []
        for model, entry in resident.items():
            if entry.tick < looked:
                continue
            asked = self._asked.get(model)
            if asked is None:
                item = present.get(model)
                age = 0.0 if item is None else max(wall - item.record.fetched, 0.0)
                asked = self._asked[model] = now - age
            if now - asked >= self.after:
                self._asked[model] = now
                due.append(model)
        if len(self._asked) > len(resident) + len(present):  # some are in no tier any more
            self._asked = {model: at for model, at in self._asked.items() if model in resident or model in present}
        return due

    def weary(self, flights: Iterable[Flight[Any]]) -> None:
        """Stop waiting for flights that wait for room: they are in the way of lookups, and nobody is in a hurry."""
        for flight in flights:
            if flight.state == "waiting for room":
                flight.watchers.discard(self)
