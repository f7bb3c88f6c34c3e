"""``Trip``: a flight, as those see it who make room for it in memory and on disk.

What room is made for whom is ``memory.admission`` and ``disk.reserving``; who goes before whom is ``ranks``.
"""

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from modelcache.disk.index import Index
from modelcache.disk.items import RECHECK
from modelcache.errors import NoRoom
from modelcache.flights import Cancelled, Flight, Flights
from modelcache.guard import Guard
from modelcache.memory.residents import Residents
from modelcache.ranks import GivesWay, hopeless, needed, urgent

T = TypeVar("T")


class Trip(Generic[T]):
    """A flight that needs room; the guard is held for each call, but for ``state`` and where it says otherwise.

    Args:
        flight: the flight.
        flights: who waits.
        residents: who holds leases, and who waits for room in memory.
        index: who waits for room on disk.
    """

    def __init__(self, flight: Flight[T], flights: Flights[T], residents: Residents[T], index: Index) -> None:
        self._flight = flight
        self._flights = flights
        self._residents = residents
        self._index = index

    @property
    def model(self) -> str:
        """The id of the model."""
        return self._flight.model

    @property
    def state(self) -> str:
        """What the flight is doing."""
        return self._flight.state

    @state.setter
    def state(self, value: str) -> None:
        self._flight.state = value

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile."""
        self._flight.refusal = refusal

    @property
    def urgent(self) -> bool:
        """Whether a request waits for it."""
        return self._flight in urgent(self._flights)

    @property
    def nested(self) -> bool:
        """Whether a loader under way waits for it."""
        return needed(self._flights, self._flight)

    def first(self, line: Iterable[object]) -> bool:
        """Whether nobody in a line of flights goes before it: those for requests do, then those that came earlier."""
        line = list(line)
        ahead = urgent(self._flights) if line else set()
        if self._flight in ahead:
            line = [each for each in line if each in ahead]
        elif not ahead.isdisjoint(line):
            return False
        return not line or line[0] is self._flight

    def spared(self) -> set[str]:
        """Return the models that are not evicted for it, as requests wait for them; empty for a request."""
        ahead = urgent(self._flights)
        return set() if self._flight in ahead else {flight.model for flight in ahead}

    def relieved(self) -> bool:
        """Whether somebody is about to let go of files.

        A flight that has just landed and keeps no files, a model whose unload runs on a thread that does not wait for
        this, or a prefetch that waits for room in memory.
        """
        landed = [(flight, kept) for flight, kept in self._flights.parting.items() if flight.landed]
        parting = [flight for flight, kept in landed if flight.entry is None or not kept]
        if any(flight.thread not in self.threads() for flight in parting):
            return True
        if any(entry.keeps is not None and entry.retirer not in self.threads() for entry in self._residents.leaving):
            return True
        line, ahead = self._residents.line, urgent(self._flights)
        return self._flight in ahead and any(
            other.lent and other in line and other not in ahead for other in self._flights.active.values()
        )

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, or for room as it does."""
        return self._flights.waiting(self._flight)

    def own_threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, and that run it."""
        return self._flight.threads()

    def check(self) -> None:
        """Raise where the flight was told to stop, nobody waits for it any more, or its thread is needed elsewhere.

        Who joins it between this and its end starts another one, rather than get an error that was not his.
        """
        check_cancelled(self._flight)
        if not self._flight.wanted():
            if self._flight.refresh and self._flight.refusal is not None:  # or nobody would hear why the old one stays
                raise self._flight.refusal.fresh()
            raise Cancelled(f"nobody waits for {self._flight.model!a} any more", model=self._flight.model)
        self.give_way(holds=self._flight in self._residents.line)

    def give_way(self, *, holds: bool) -> None:
        """Leave the thread to a request that waits for one, or for what the flight ``holds`` on disk.

        Raises:
            GivesWay: that is so.
            Cancelled: it was told to stop, which comes first: it would not be put back into the queue.
        """
        check_cancelled(self._flight)
        if not self._flight.lent:
            return
        if (self._flights.pressed() or (holds and self._index.pressed())) and not self.urgent:
            raise GivesWay

    def stand_back(self, guard: Guard) -> None:
        """Wait with nothing in hand as long as a request waits for room on disk; called outside the guard."""
        with guard:
            while self._flight.lent and self._index.pressed() and not self.urgent:
                self.state = "waiting for room"
                self.check()
                guard.wait(RECHECK)

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too."""
        return hopeless(self._flights, self._flight, self._residents.holding_threads())


def check_cancelled(flight: Flight[Any]) -> None:
    """Stop a flight that was told to.

    Raises:
        Cancelled: it was.
    """
    if flight.cancelled:
        raise Cancelled(f"the fetch of {flight.model!a} was told to stop", model=flight.model)
