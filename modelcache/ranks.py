"""Who goes before whom: what a request waits for before what was only asked for in advance; and who can't go on at all.

Nothing is kept here: a flight's rank is what waits for it at this moment, so that it rises as a request joins it, and
falls as the last one leaves. The cache's guard is held for each call.
"""

from typing import TypeVar

from modelcache.flights import Flight, Flights
from modelcache.workers import most_ahead

T = TypeVar("T")


class GivesWay(BaseException):
    """A flight leaves its thread to a request, and goes on later; no error, so that nobody handles it as one."""


def urgent(flights: Flights[T]) -> set[Flight[T]]:
    """Return the flights that requests wait for, themselves or by way of loaders."""
    loaders = {flight.thread for flight in flights.active.values()}
    queue = [flight for flight in flights.active.values() if flight.asked_for(loaders)]
    found: set[Flight[T]] = set()
    while queue:
        flight = queue.pop()
        if flight not in found:
            found.add(flight)
            queue += flight.blocked_on
    return found


def needed(flights: Flights[T], flight: Flight[T]) -> bool:
    """Whether a loader under way waits for a flight: who waits behind others must not wait for it too."""
    return flight.parent is not None or any(flight in other.blocked_on for other in flights.active.values())


def leave(flights: Flights[T], flight: Flight[T]) -> bool:
    """Put a flight back into the queue; False where its thread must go on with it after all."""
    if not flight.lent or flight.cancelled or flight in urgent(flights):
        return False
    flight.claimed, flight.thread, flight.refusal = False, None, None
    flight.state = "queued"
    return True


def hopeless(flights: Flights[T], flight: Flight[T], holders: set[object]) -> bool:
    """Whether nobody who could give room to ``flight`` will: all wait for room, or for it, themselves.

    Args:
        flights: who waits.
        flight: what needs room.
        holders: identities of the threads that hold leases.
    """
    mine = {flight, *flight.ancestors()}
    others = [other for other in flights.active.values() if other not in mine]
    running = sum(other.claimed and other.parent is None for other in flights.active.values())
    ahead = sum(other.claimed and other.ahead for other in flights.active.values())
    full, half_full = running >= flights.loaders, ahead >= most_ahead(flights.loaders)
    first = urgent(flights) if half_full and not full else set()
    for other in others:
        queued = not other.claimed and (full or (half_full and other not in first))
        blocked = any(not ahead.landed for ahead in other.blocked_on)  # its loader may not have woken up yet
        if not (queued or other.state == "waiting for room" or blocked):
            return False
    waiting: set[object] = set(flights.closers)
    for stuck in [*mine, *others]:
        waiting.add(stuck.thread)
        waiting.update(stuck.waiters.values())
        waiting.update(*(watcher.threads() for watcher in stuck.watchers))
    return holders <= waiting
