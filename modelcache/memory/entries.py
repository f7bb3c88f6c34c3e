"""``Entry``, ``Hold`` and ``Lease``: a model in memory, and a claim on it. This is the warm path.

A warm ``acquire`` and its ``release`` take no lock: a hold is taken *before* the entry's ``retired`` flag is looked
at; whoever retires an entry sets the flag *before* it looks at the holds. So at least one of the two sees the other.
Holds are used again: a lease takes one from its entry's ``spare`` and puts it back, so that a lease which was released
in time has no finalizer to run, which would cost as much as all the rest. Everything else about residents is
``memory.residents``.
"""

import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from modelcache.errors import ModelCacheError
from modelcache.events import Evicted, Reason
from modelcache.identity import here, me

T = TypeVar("T")

DEFAULT: Any = type("Default", (), {"__repr__": lambda _: "<the cache's timeout>"})()
"""Stands for a timeout that the caller left to the cache."""


class Entry(Generic[T]):
    """One load of a model.

    Attributes:
        desk: whose it is.
        model: its id.
        value: what ``load`` returned; deleted once it is unloaded.
        spare: holds that no lease has; taken and put back without a lock.
        known: all holds that there are, by their ``id``: as many as were ever held at a time.
        retired: set, under the guard, by whoever takes it out of memory; undone where a hold came first.
        bytes: its footprint, as far as known.
        latent: of these, mapped pages that were not used when it was loaded: dropping them may free nothing.
        sure: whether ``bytes`` was measured or given by the user, not guessed from the artifact.
        cost: seconds that the load took.
        doomed: why it goes with its last hold; None while it stays.
        reason: why it went.
        farewell: the event that tells of its eviction, once its unload begins; None where it is no eviction.
        begun: whether its unload has begun, after which nobody takes it back.
        retirer: identity of the thread that carries its departure out.
        inherited: loaded before a fork, so that dropping it gives nothing back.
        keeps: what must stay open as long as it is in memory: its pin on the disk tier.
        hits: lookups that found it, booked when the uses are drained.
        used: seconds since the epoch of its last use, booked likewise; ``tick``: the same, monotonic.
        born: monotonic seconds at which it was loaded.
        version: the source's version of what it was loaded from; None where that is not known.
        outdated: whether a newer version was brought in, so that nobody takes this one back.
        warned: whether the age of a lease on it was told.
    """

    __slots__ = (
        "begun",
        "born",
        "bytes",
        "cost",
        "desk",
        "doomed",
        "farewell",
        "hits",
        "inherited",
        "keeps",
        "known",
        "latent",
        "model",
        "outdated",
        "reason",
        "retired",
        "retirer",
        "spare",
        "sure",
        "tick",
        "used",
        "value",
        "version",
        "warned",
    )

    def __init__(
        self, desk: "Desk[T]", model: str, value: T, size: int, cost: float, *, sure: bool = False, keeps: Any = None
    ) -> None:
        self.desk = desk
        self.model = model
        self.value = value
        self.spare: list[Hold[T]] = []
        self.known: dict[int, weakref.ref[Hold[T]]] = {}
        self.retired = False
        self.bytes = size
        self.sure = sure
        self.latent = 0
        self.cost = cost
        self.doomed: Reason | None = None
        self.reason: Reason | None = None
        self.farewell: Evicted | None = None
        self.begun = False
        self.retirer: object = None
        self.inherited = False
        self.keeps = keeps
        self.hits = 0
        self.used = time.time()
        self.tick = self.born = time.monotonic()
        self.version: str | None = None
        self.outdated = False
        self.warned = False

    def held(self) -> "list[Hold[T]]":
        """Return the holds that leases have now."""
        if len(self.known) == len(self.spare):  # most entries, most of the time
            return []
        holds = [ref() for ref in list(self.known.values())]
        return [hold for hold in holds if hold is not None and hold.thread is not None]

    def ages(self) -> dict["Hold[T]", float]:
        """Return how long each hold has been seen, in seconds; the guard is held.

        The warm path does not look at a clock, so a hold's age counts from the first look at it; the monitor looks
        every interval.
        """
        now = time.monotonic()
        ages = {}
        for hold in self.held():
            hold.since = since = now if hold.since is None else hold.since
            ages[hold] = now - since
        return ages


class Hold(Generic[T]):
    """A lease's claim on an entry; used by one lease after the other, by one at a time.

    It belongs to its lease alone (the entry knows it weakly), so that what is dropped without being released, a
    forgotten lease or one that an interrupt took out of ``__exit__``, ends here.

    Attributes:
        entry: which is held; None while it is spare.
        thread: identity of the thread that took it; None while it is spare.
        since: when it was first seen held, in monotonic seconds; None: not yet.
    """

    __slots__ = ("__weakref__", "entry", "since", "thread")

    def __init__(self, entry: Entry[T]) -> None:
        self.entry: Entry[T] | None = None
        self.thread: object = None
        self.since: float | None = None
        entry.known[id(self)] = weakref.ref(self)

    def __del__(self) -> None:
        """Release what was forgotten, or what an interrupt kept from being released, and say so."""
        entry = getattr(self, "entry", None)  # an interrupt may have come before it was filled
        if entry is None:
            return
        entry.known.pop(id(self), None)
        if self.thread is not None:
            self.thread = None
            entry.desk.orphaned(entry)
            warnings.warn(
                f"a lease on {entry.model!a} was collected unreleased: use it in a 'with' statement",
                ResourceWarning,
                stacklevel=2,
            )


class Desk(Protocol[T]):
    """What a lease needs of its cache.

    Attributes:
        note: takes note of a use: appends to a bounded list, which slow work drains; where somebody listens for
            hits, it tells them too.
        short: whether somebody waits for room, a limit could not be met, or a model is to go with its last lease:
            then each release looks again.
    """

    note: Callable[[Entry[T]], None]
    short: bool

    def lookup(self, lease: "Lease[T]") -> T:
        """Find, fetch and load: everything but a warm hit."""
        ...

    def released(self, entry: Entry[T]) -> None:
        """Look at what this release makes possible."""
        ...

    def orphaned(self, entry: Entry[T]) -> None:
        """Note a release from a finalizer, where no lock may be taken."""
        ...


class Lease(Generic[T]):
    """A hold on one model: while it is held the model is neither evicted nor unloaded.

    Made by ``ModelCache.lease``; acquired by ``with`` (which gives the model) or by ``acquire()``. One-shot: a
    lease that was released is not acquired again. One that is collected while held is released, with a
    ResourceWarning.

    Concurrency: ``release`` may be called from any thread, any number of times. ``acquire`` waits for fetch
    and load where the model is not in memory, and must be called once, by one thread. After a fork, the
    child has only the leases of the thread that forked.

    Attributes:
        model: id of the model.
    """

    __slots__ = ("_desk", "_entry", "_hold", "_timeout", "model")

    model: str
    _desk: Desk[T] | None  # None once it was acquired: a lease is one-shot
    _timeout: float | None
    _entry: Entry[T] | None  # what was in memory when it was made; None once it was acquired
    _hold: Hold[T]  # its own from acquire to release, unset before and after

    # No __init__: ModelCache.lease fills the slots, which is a fifth of a warm hit faster.

    def acquire(self) -> T:
        """Return the model, held until ``release``.

        Raises:
            ModelCacheError: any of the library's errors; also where this lease was acquired before.
        """
        entry, desk = self._entry, self._desk
        if desk is None:
            raise ModelCacheError(
                f"this lease on {self.model!a} was used already: a lease is one-shot, ask for a new one",
                model=self.model,
            )
        if entry is None:
            return desk.lookup(self)
        try:
            try:
                hold = entry.spare.pop()
            except IndexError:  # more at a time than ever before
                hold = Hold(entry)
            hold.since = None
            hold.entry = entry
            self._hold = hold
            try:
                hold.thread = here.token
            except AttributeError:  # the first lease of this thread
                hold.thread = me()
            self._entry = None
            if not entry.retired:
                self._desk = None
                desk.note(entry)
                return entry.value
        except BaseException:  # an interrupt, perhaps from a callback that hears of hits: nobody gets this lease
            self.release()
            raise
        self.release()  # which looks again, as whoever retired it may have been put off by this hold
        return desk.lookup(self)

    __enter__ = acquire

    def release(
        self,
        kind: type[BaseException] | None = None,  # noqa: ARG002 - these three make it an __exit__
        error: BaseException | None = None,  # noqa: ARG002
        trace: TracebackType | None = None,  # noqa: ARG002
        /,
    ) -> None:
        """Let the model go; an unload that waits for that, or a limit that is not met, is seen to before this returns.

        The arguments are those of ``__exit__``, and are ignored.
        """
        try:
            hold = self._hold
            del self._hold  # whoever deletes it has released it
        except AttributeError:
            return
        entry = hold.entry
        hold.thread = hold.entry = None
        entry.spare.append(hold)  # type: ignore[union-attr]
        if entry.desk.short:  # type: ignore[union-attr]
            entry.desk.released(entry)  # type: ignore[union-attr,arg-type]

    __exit__ = release

    def hold(self, entry: Entry[T], thread: object) -> None:
        """Take hold of an entry on behalf of the thread that waits for it; the guard is held."""
        try:
            hold = entry.spare.pop()
        except IndexError:
            hold = Hold(entry)
        hold.since = None
        hold.entry = entry
        self._hold = hold
        hold.thread = thread
        self._entry = self._desk = None

    @property
    def held(self) -> Entry[T] | None:
        """What is held; None before and after."""
        hold = getattr(self, "_hold", None)
        return hold.entry if hold is not None and hold.thread is not None else None

    @property
    def timeout(self) -> float | None:
        """Seconds that ``acquire`` waits at most; None: for ever."""
        return self._timeout

    def __repr__(self) -> str:
        """Say which model, and whether it is held."""
        return f"<Lease of {self.model!r}, {'held' if self.held else 'not held'}>"
