"""One look of the monitor: growth from outside, new versions, time lost to reloads.

When it looks is ``monitor``; what growth from outside means ``memory.room``, when time is lost ``memory.thrash``.
"""

import time
from typing import Any

from modelcache.events import Event, Reason, Thrashing
from modelcache.machinery import Machinery
from modelcache.memory.residents import Residents
from modelcache.memory.thrash import Change
from modelcache.memory.tier import Limits

_ENOUGH = 3


class Pulse:
    """Samples how long models serve; the cache's guard is held for each call.

    The warm path looks at no clock. So the leases that are held at each look of the monitor stand for the time since
    the last one, which on average is the time that leases are held. Where none is ever seen, requests are counted.
    """

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._requests = 0
        self._looks = 0  # at which leases were seen; one or two may be those that a missed get() takes for a moment

    def served(self, now: float, residents: Residents[Any], request_seconds: float) -> float:
        """Return the seconds that models served since the last look, over all threads.

        Args:
            now: monotonic seconds.
            residents: who holds what; uses are drained.
            request_seconds: what a request is taken to need where no lease is ever seen.
        """
        passed, self._at = now - self._at, now
        total = residents.hits + residents.misses
        requests, self._requests = total - self._requests, total
        held = sum(len(entry.held()) for entry in residents.entries())
        self._looks += held > 0
        return held * passed if self._looks >= _ENOUGH else requests * request_seconds


class Watch:
    """Looks after one cache.

    Args:
        parts: the cache's parts.
    """

    def __init__(self, parts: Machinery[Any]) -> None:
        self._parts = parts
        self._pulse = Pulse()

    def __call__(self) -> bool:
        """Look once; return whether there is anything left to watch."""
        parts = self._parts
        parts.room.look()
        if parts.residents.disk_over:
            parts.disk_room.shrink()  # a lease was forgotten, or a model was still being unloaded at its last release
        parts.disk_room.help_others()
        self._revalidate()
        parts.teller.tell(self._weigh())
        parts.report_policies()
        parts.teller.drop()
        parts.finish()
        with parts.guard:
            residents = parts.residents
            hopeful = residents.lingering.hopeful()  # a collection will bring back what has left
            return bool(residents.resident or residents.doomed or residents.thrash.active or hopeful)

    def _weigh(self) -> list[Event]:
        """Book what was served since the last look; return what is to be told of time lost to reloads."""
        limits = self._parts.memory.limits()
        with self._parts.guard:
            residents, now = self._parts.residents, time.monotonic()
            residents.thrash.served(now, self._pulse.served(now, residents, self._parts.memory.request_seconds))
            change = residents.thrash.look(now)
        return [] if change is None else [_thrashing(self._parts.teller.number(), change, limits)]

    def _revalidate(self) -> None:
        """Start to ask for new versions of the models in use whose time has come."""
        parts, freshness = self._parts, self._parts.freshness
        if freshness.after is None or parts.closed:
            return
        with parts.guard:
            freshness.weary(parts.flights.active.values())
            parts.guard.notify()
            due = freshness.due(parts.residents.resident, parts.shelf.index.models)
        for model in due:
            with parts.guard:
                flight, new = parts.flights.start(model, Reason.REFRESH, to_memory=False)
                if new:
                    flight.refresh = True
                    flight.watchers.add(freshness)
            if new:
                parts.give_to_worker(flight, urgent=False)


def _thrashing(seq: int, change: Change, limits: Limits) -> Thrashing:
    """Return the event of a change."""
    return Thrashing(
        seq=seq,
        time=time.time(),
        tier="memory",
        reason=Reason.SWAPPING if change.entering else Reason.RECOVERED,
        duration=change.window,
        used=limits.reading.used if limits.reading else None,
        limit=limits.reading.limit if limits.reading else None,
        high=limits.high,
        low=limits.low,
        share=change.share,
        reloads_per_minute=change.reloads_per_minute,
        worst=change.worst,
    )
