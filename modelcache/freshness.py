"""Who wants new versions of models that are there already, and which of them are due to be asked for.

The asking is a flight like any other (``fetching``, ``loading``), with ``refresh`` set.
"""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from modelcache.disk.index import Item
from modelcache.errors import ModelCacheError
from modelcache.memory.entries import Entry


class Refreshing:
    """Somebody who waits for a refresh to end.

    Args:
        threads: the identities of the threads that wait; empty: nobody does.
    """

    def __init__(self, *threads: object) -> None:
        self._threads = set(threads)

    def finished(self, model: str, error: ModelCacheError | None) -> None:
        """Hear how it ended."""

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it."""
        return self._threads

    def reset_after_fork(self) -> None:
        """Hear, in a child, that it will not end here."""


class Freshness(Refreshing):
    """When each model in use was last asked for at the source; the cache's guard is held for each call.

    Args:
        after: seconds after which it is asked for again; None: never.
    """

    def __init__(self, after: float | None) -> None:
        super().__init__()
        self._after = after
        self._asked: dict[str, float] = {}
        self._looked = time.monotonic()

    def due(self, entries: Iterable[Entry[Any]], present: Mapping[str, Item]) -> list[str]:
        """Return the models that were used since the last look and whose time has come; they count as asked for.

        A model that was fetched by an earlier process counts from its fetch.

        Args:
            entries: what is in memory.
            present: what is on disk.
        """
        if self._after is None:
            return []
        now, wall = time.monotonic(), time.time()
        looked, self._looked = self._looked, now
        due = []
        for entry in entries:
            if entry.tick < looked:
                continue
            asked = self._asked.get(entry.model)
            if asked is None:
                item = present.get(entry.model)
                age = 0.0 if item is None else max(wall - item.published.record.fetched, 0.0)
                asked = self._asked[entry.model] = now - age
            if now - asked >= self._after:
                self._asked[entry.model] = now
                due.append(entry.model)
        return due
