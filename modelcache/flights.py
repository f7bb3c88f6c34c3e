"""One fetch or load under way for each model, and all who wait for it.

Who runs a flight is ``workers``, what it does is ``loading``, who goes before whom ``ranks``. Here: who waits, whether
waits run in a circle, and which failures are remembered. All state is guarded by the cache's guard.
"""

import contextvars
import threading
import time
import weakref
from collections.abc import Callable  # noqa: TC003 - for one annotation of an attribute
from typing import Any, Generic, Protocol, TypeVar

from modelcache.errors import CacheClosed, InvalidModelId, LoadFailed, ModelCacheError, NoRoom, Timeout, TooLarge
from modelcache.events import Reason
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.memory.entries import Entry, Lease
from modelcache.memory.measuring import Scale
from modelcache.transfers import Transfer

T = TypeVar("T")

_NEVER_REMEMBERED = (NoRoom, Timeout, CacheClosed, InvalidModelId)
_MOST_REMEMBERED = 10_000  # ids of failures kept; beyond it the oldest go, so that made-up ids cost no memory


class Cancelled(CacheClosed):
    """A flight was told to stop; who still waits for it starts another one."""


class Watcher(Protocol):
    """Somebody who wants a model brought in, but does not wait in a lookup (a prefetch).

    Attributes:
        urgent: whether its threads wait as a lookup does.
        to_memory: whether it wants more than to have the model on disk.
    """

    urgent: bool
    to_memory: bool

    def finished(self, model: str, error: ModelCacheError | None) -> None:
        """Hear how it ended; called outside the guard."""
        ...

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it."""
        ...

    def reset_after_fork(self) -> None:
        """Hear, in a child, that it will not end here."""
        ...


class Flight(Generic[T]):
    """One model on its way.

    Attributes:
        model: its id.
        to_memory: whether it is to be loaded, or only fetched to disk; may be raised while it is under way.
        reason: who asked first.
        state: ``"queued"``, ``"fetching"``, ``"waiting for room"``, ``"waiting for a measurement"``, ``"loading"`` or
            ``"done"``.
        since: when it got into that state, in seconds of ``time.monotonic()``.
        waiters: leases that wait for it, each with the identity of its thread.
        watchers: prefetches that want it.
        blocked_on: flights whose end its loader waits for.
        parent: the flight whose loader asked for it and runs it on its own thread.
        entry: what it brought into memory; error: how it failed.
        landing: set once one of these is there; loaders that wait for a part go on from here.
        done: set once that was told; everybody else goes on from here, so that callbacks come first.
        refusal: what stands in the way while it waits for room.
        cancelled: told to stop as soon as it can.
        lent: its thread may leave it, to go on later, where a request needs the thread.
        ahead: it has one of the threads that run what nobody waits for.
        transfer: its bytes on their way.
        least: bytes on disk to reserve for it at least, as it turned out before.
        thread: identity of the thread that runs it.
        fetch_seconds: what the fetch took; 0 where the artifact was there.
        refresh: whether the source is asked although the artifact is there.
        renewed: whether it brought in a new version.
        stale: why it could not ask for one, where it goes on with the old one.
        scale: what its load is weighed with; None before that.
    """

    def __init__(self, model: str, *, to_memory: bool, reason: Reason, parent: "Flight[T] | None") -> None:
        self.model = model
        self.to_memory = to_memory
        self.reason = reason
        self.parent = parent
        self.context = contextvars.copy_context()
        self._state = "queued"
        self.since = time.monotonic()
        self.claimed = False
        self.waiters: dict[Lease[T], object] = {}
        self.watchers: set[Watcher] = set()
        self.blocked_on: set[Flight[T]] = set()
        self.entry: Entry[T] | None = None
        self.error: ModelCacheError | None = None
        self.refusal: NoRoom | None = None
        self.cancelled = False
        self.lent = False
        self.ahead = False
        self.transfer = Transfer()
        self.least = 0
        self.thread: object = None
        self.fetch_seconds = 0.0
        self.refresh = False
        self.renewed = False
        self.stale: ModelCacheError | None = None
        self.scale: Scale | None = None
        self.landing = threading.Event()
        self.done = threading.Event()

    @property
    def state(self) -> str:
        """What is done for it now."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        if state != self._state:
            self._state, self.since = state, time.monotonic()

    def wanted(self) -> bool:
        """Whether anybody still wants it."""
        return bool(self.waiters or self.watchers) and not self.cancelled

    def outcome(self, timeout: float | None, late: str = "") -> ModelCacheError:
        """Return the error for a caller that leaves; ``late`` is what to say instead where only its time is over."""
        if self.error is not None:
            return self.error.fresh()
        if self.refusal is not None:
            return self.refusal.fresh()
        late = late or (
            f"model {self.model!a} was not there after {timeout} s: it is {self.state}, which goes on; "
            "ask again, raise timeout=, or prefetch it"
        )
        return Timeout(late, model=self.model, timeout=timeout, state=self.state)

    @property
    def landed(self) -> bool:
        """Whether it is over, well or not; the guard is held."""
        return self.state == "done"

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it or its ancestors, and that run them."""
        chain = [self, *self.ancestors()]
        watching = [watcher.threads() for flight in chain for watcher in flight.watchers]
        return {flight.thread for flight in chain}.union(*(flight.waiters.values() for flight in chain), *watching)

    def asked_for(self, loaders: set[object]) -> bool:
        """Whether a thread waits for it in a lookup or a refresh that is none of these."""
        if self.waiters and not loaders.issuperset(self.waiters.values()):
            return True
        for watcher in self.watchers:  # noqa: SIM110 - half the time of any(), and asked of a thousand flights
            if watcher.urgent and not loaders.issuperset(watcher.threads()):
                return True
        return False

    def ancestors(self) -> "set[Flight[T]]":
        """Return the flights whose loaders, one inside the other, asked for this one."""
        found: set[Flight[T]] = set()
        flight = self.parent
        while flight is not None:
            found.add(flight)
            flight = flight.parent
        return found


current: contextvars.ContextVar[Flight[Any] | None] = contextvars.ContextVar("modelcache_flight", default=None)
"""The flight whose loader is running here; a lookup made from it takes no second thread."""


class Flights(Generic[T]):
    """All flights of one cache, and the failures it remembers.

    Args:
        guard: the cache's lock; held by the caller of every method, unless said otherwise.
        retry_after: seconds for which a failure answers in place of a new try.
        loaders: most flights that run at once, nested ones not counted.
    """

    def __init__(self, guard: Guard, retry_after: float, loaders: int) -> None:
        self._guard = guard
        self.loaders = loaders
        self._retry_after = retry_after
        self.active: dict[str, Flight[T]] = {}
        self.parting: dict[Flight[T], bool] = {}  # with an artifact in hand, which an entry keeps (True) or lets go
        self.handles: weakref.WeakSet[Watcher] = weakref.WeakSet()  # all prefetches that somebody still looks at
        self.pressed: Callable[[], bool] = lambda: False  # whether a request waits for a thread
        self.closers: set[object] = set()  # identities of the threads that are closing the cache
        self._failures: dict[str, tuple[ModelCacheError, float]] = {}

    def failure(self, model: str) -> ModelCacheError | None:
        """Return the remembered failure of a model, fresh for one more caller; None where it may be tried."""
        error, until = self._failures.get(model, (None, 0.0))
        if error is not None and time.monotonic() < until:
            return error.fresh()
        self._failures.pop(model, None)
        return None

    def forgive(self, model: str) -> None:
        """Forget a failure, so that the next lookup tries anew."""
        self._failures.pop(model, None)

    def forgive_too_large(self) -> None:
        """Forget which models were too large, now that a limit has changed."""
        for model, (error, _) in list(self._failures.items()):
            if isinstance(error, TooLarge):
                del self._failures[model]

    def start(
        self, model: str, reason: Reason, *, to_memory: bool, parent: Flight[T] | None = None
    ) -> tuple[Flight[T], bool]:
        """Return the flight of a model, and whether it is new and must be given to a thread."""
        flight = self.active.get(model)
        if flight is not None:
            flight.to_memory = flight.to_memory or to_memory
            return flight, False
        flight = Flight(model, to_memory=to_memory, reason=reason, parent=parent)
        self.active[model] = flight
        return flight, True

    def running(self) -> Flight[T] | None:
        """Return the flight of this cache whose loader called us; needs no guard."""
        flight = current.get()
        if flight is None or flight.done.is_set() or self.active.get(flight.model) is not flight:
            return None
        return flight

    def circle(self, flight: Flight[T], asker: Flight[T]) -> LoadFailed | None:
        """Return an error where ``flight`` itself waits, over any number of threads, for ``asker``."""
        seen: dict[Flight[T], Flight[T] | None] = {flight: None}
        queue = [flight]
        while queue:
            at = queue.pop()
            if at is asker:
                path = [at.model]
                while (before := seen[at]) is not None:
                    path.append(before.model)
                    at = before
                circle = " -> ".join(ascii(model) for model in [asker.model, *reversed(path)])
                return LoadFailed(
                    f"loaders ask for each other in a circle: {circle}; break it in load()", model=asker.model
                )
            for ahead in at.blocked_on - seen.keys():
                seen[ahead] = at
                queue.append(ahead)
        return None

    def claim(self, flight: Flight[T]) -> bool:
        """Take a flight to run it; False where another thread has it, or it is over."""
        if flight.claimed or flight.done.is_set():
            return False
        flight.claimed = True
        flight.thread = me()
        return True

    def land(self, flight: Flight[T], entry: Entry[T] | None) -> None:
        """End a flight well; every waiter holds the entry from now on."""
        if entry is not None:
            for lease, thread in flight.waiters.items():
                lease.hold(entry, thread)
        flight.entry = entry
        self._failures.pop(flight.model, None)
        self._end(flight)

    def fail(self, flight: Flight[T], error: ModelCacheError) -> None:
        """End a flight in an error, and remember it where that helps."""
        flight.error = error
        if self._retry_after and not flight.refresh and not isinstance(error, _NEVER_REMEMBERED):
            self._failures.pop(flight.model, None)
            self._failures[flight.model] = (error, time.monotonic() + self._retry_after)
            while len(self._failures) > _MOST_REMEMBERED:
                del self._failures[next(iter(self._failures))]
        self._end(flight)

    def _end(self, flight: Flight[T]) -> None:
        flight.state = "done"
        flight.landing.set()
        if self.active.get(flight.model) is flight:
            del self.active[flight.model]
        self._guard.notify()

    def waiting(self, flight: Flight[T]) -> set[object]:
        """Return the identities of the threads that wait for a flight, or for another one that waits for room."""
        others = (other.threads() for other in self.active.values() if other.state == "waiting for room")
        return flight.threads().union(*others, self.closers)

    def reset_after_fork(self) -> None:
        """In a child: the parent's threads do not exist here, so neither do their flights."""
        for watcher in {*self.handles}.union(*(flight.watchers for flight in self.active.values())):
            watcher.reset_after_fork()
        self.active, self.parting, self.closers = {}, {}, set()


def announce(flight: Flight[Any]) -> None:
    """Wake everybody who waits for a flight that is over; called outside the guard."""
    if flight.done.is_set():
        return
    flight.done.set()
    error = flight.error
    if flight.refresh and error is not None:  # which is only its asker's business
        error = Cancelled(f"the refresh of {flight.model!a} failed", model=flight.model)
    for watcher in list(flight.watchers):
        watcher.finished(flight.model, error)


def announce_on_disk(flight: Flight[Any], guard: Guard) -> None:
    """Tell those who want a model on disk only that it is there, where it is to be loaded as well."""
    with guard:
        content = {watcher for watcher in flight.watchers if flight.to_memory and not watcher.to_memory}
        flight.watchers -= content
    for watcher in content:
        watcher.finished(flight.model, None)
