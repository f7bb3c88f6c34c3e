"""Which models are in memory, on their way in, or on their way out.

Every method here runs under the guard and does nothing but decide: what is to be unloaded is returned, and
``memory.unloading`` acts. Who gives way to whom is ``memory.choosing``. The warm path, which takes no guard, is
``memory.entries``.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

from modelcache.events import Reason
from modelcache.identity import me
from modelcache.memory.entries import Entry, Lease
from modelcache.memory.footprints import Footprints, Plan
from modelcache.memory.lingering import Lingering
from modelcache.memory.lives import Lives
from modelcache.memory.thrash import Thrash
from modelcache.policies import Policy, Resident

T = TypeVar("T")

_USES = 2**17  # notes of use between two drains; beyond it the oldest are lost, and hit counts read low
_SPARED = frozenset(
    {
        Reason.WATERMARK,
        Reason.NEIGHBOUR,
        Reason.MEMORY_BUDGET,
        Reason.MAX_MODELS,
        Reason.IDLE,
        Reason.MEMORY_ERROR,
    }
)
_TOLD = 10_000  # uses of one drain that the policy hears of; older ones only count


class Residents(Generic[T]):
    """The models of one cache that are in memory, on their way in, or on their way out.

    It is also the desk of the leases (``memory.entries.Desk``): what of it the warm path reads is public. ``lookup`` is
    set by the cache before its first use.

    Args:
        policy: who goes first.
        hit: tells those who listen for hits.
        released: looks at what a release makes possible.
    """

    def __init__(
        self,
        policy: Policy,
        hit: Callable[[Entry[T]], None],
        released: Callable[[Entry[T]], None],
    ) -> None:
        self.lookup: Callable[[Lease[T]], T]
        self._hit = hit
        self.released = released
        self.resident: dict[str, Entry[T]] = {}
        self._uses: deque[Entry[T]] = deque(maxlen=_USES)
        self.note: Callable[[Entry[T]], None] = self._uses.append
        self.short = False
        self.doomed: dict[int, Entry[T]] = {}  # by identity: a replaced version may wait beside its successor
        self.leaving: set[Entry[T]] = set()
        self.orphans: deque[Entry[T]] = deque()
        self.reserved: dict[object, Plan] = {}
        self.line: dict[object, None] = {}
        self.over = False
        self.disk_over = False
        self.hits = 0
        self.misses = 0
        self.clock = 0
        self.churn = 0
        self._policy = policy
        self.footprints = Footprints()
        self.lives = Lives()
        self.lingering = Lingering()
        self.thrash = Thrash()
        self.deficit = 0  # bytes above high that loads took beyond what was expected of them
        self._base = 0  # bytes in use when no model was in memory, nor on its way

    def watch_hits(self, *, told: bool) -> None:
        """Tell each hit, or only note it."""
        self.note = self._note_and_tell if told else self._uses.append

    def _note_and_tell(self, entry: Entry[T]) -> None:
        self._uses.append(entry)
        self._hit(entry)

    def orphaned(self, entry: Entry[T]) -> None:
        """Note a release from a finalizer; the monitor looks at it."""
        self.orphans.append(entry)

    def drain(self) -> None:
        """Book the uses noted since the last time: hits, last use, standing."""
        uses = self._uses
        batch = []
        for _ in range(len(uses)):
            try:
                batch.append(uses.popleft())
            except IndexError:
                break
        if not batch:
            return
        now, tick = time.time(), time.monotonic()
        for entry, count in Counter(batch).items():
            entry.hits += count
            entry.used = now
            entry.tick = tick
        self.hits += len(batch)
        self.clock += max(len(batch) - _TOLD, 0)
        for entry in batch[-_TOLD:]:
            self.clock += 1
            if not entry.retired:
                self._policy.requested(entry.model, self.clock)

    def missed(self, model: str) -> None:
        """Book a lookup that was no hit."""
        self.misses += 1
        self.clock += 1
        self._policy.requested(model, self.clock)

    def entries(self) -> list[Entry[T]]:
        """Return everything that is in memory, also what is to leave with its last lease."""
        return [*self.resident.values(), *self.doomed.values()]

    def tracked(self) -> int:
        """Return the footprints of everything in memory, in bytes, unloading included."""
        return sum(entry.bytes for entry in [*self.entries(), *self.leaving])

    def occupied(self) -> int:
        """Return what is tracked, in bytes, but for what was loaded before a fork, which is the parent's."""
        return sum(entry.bytes for entry in self._own())

    def _own(self) -> list[Entry[T]]:
        return [entry for entry in [*self.entries(), *self.leaving] if not entry.inherited]

    def expect(self, used: int) -> int:
        """Return the bytes that will be in use once every mapped page is, of ``used`` that are now."""
        own = self._own()
        if not own and not self.reserved:
            self._base = used
        tracked, latent = sum(entry.bytes for entry in own), sum(entry.latent for entry in own)
        return max(used, tracked, min(self._base + tracked, used + latent))

    def count(self) -> int:
        """Return how many models are in memory, loading and unloading ones included."""
        return len(self.resident) + len(self.doomed) + len(self.leaving) + len(self.reserved)

    def insert(self, entry: Entry[T]) -> None:
        """Let lookups find a model that was just loaded; one that it replaces goes with its last lease."""
        self.drain()
        old, life = self.resident.get(entry.model), self.lives.of(entry.model)
        if old is not None:
            self.condemn(old, Reason.REPLACED)
            old.outdated = True
            entry.hits += old.hits
        elif life is not None:
            entry.hits += life.hits
        self._admit(entry)

    def outdate(self, model: str, version: str) -> None:
        """Take note that ``version`` was brought in: nobody takes another one back that is to leave."""
        for entry in [*self.doomed.values(), *self.leaving]:
            entry.outdated = entry.outdated or (entry.model == model and entry.version != version)

    def _admit(self, entry: Entry[T]) -> None:
        self.resident[entry.model] = entry
        known = self.footprints.known(entry.model)
        cost = known.seconds if known is not None and known.seconds else entry.cost
        self._policy.admitted(Resident(entry.model, entry.bytes, cost))

    def find(self, model: str, *, stays: bool) -> Entry[T] | None:
        """Return a model that is in memory; ``stays``: rescued where it was to leave with its last lease."""
        entry = self.resident.get(model)
        if entry is not None:
            return entry
        if stays:
            return self.rescue(model)
        doomed = reversed(self.doomed.values())
        return next((e for e in doomed if e.model == model and not e.retired and not e.outdated), None)

    def rescue(self, model: str) -> Entry[T] | None:
        """Return a model that is to leave but has not begun to, and let it stay."""
        for entry in self.doomed.values():
            if entry.model == model and not entry.retired and not entry.outdated:
                del self.doomed[id(entry)]
                entry.doomed = None
                self.update_short()
                self._admit(entry)
                return entry
        for entry in self.leaving:
            if entry.model == model and not entry.begun and not entry.outdated and entry.reason in _SPARED:
                self.leaving.discard(entry)
                self.churn += 1
                entry.retired = False
                entry.doomed = entry.reason = entry.farewell = None
                self.lives.stayed(model)
                self._admit(entry)
                return entry
        return None

    def doom(self, entry: Entry[T], reason: Reason) -> bool:
        """Make an entry leave: True where it is retired at once, False where its last lease will do it."""
        return self.retire(entry, self.condemn(entry, reason))

    def condemn(self, entry: Entry[T], reason: Reason) -> Reason:
        """Hide an entry from lookups, to be retired later; return for which reason."""
        if entry.doomed is not Reason.DELETE:
            entry.doomed = reason
        if self.resident.get(entry.model) is entry:
            del self.resident[entry.model]
            self._policy.removed(entry.model)
        self.doomed[id(entry)] = entry
        self.update_short()  # before whoever retires it looks at the holds
        return entry.doomed

    def retire(self, entry: Entry[T], reason: Reason) -> bool:
        """Take an entry out of memory unless it is held; the caller then unloads it, outside the guard."""
        if entry.retired:
            return False
        entry.retired = True
        if entry.held():
            entry.retired = False
            return False
        entry.reason = entry.doomed or reason
        entry.retirer = me()
        if self.resident.get(entry.model) is entry:
            del self.resident[entry.model]
            self._policy.removed(entry.model)
        self.doomed.pop(id(entry), None)
        self.update_short()
        self.lives.went(entry.model, entry.hits, entry.reason)
        self.leaving.add(entry)
        self.churn += 1
        return True

    def gone(self, entry: Entry[T]) -> None:
        """Book that an entry's unload is over."""
        self.leaving.discard(entry)
        self.churn += 1

    def idle(self) -> bool:
        """Whether something in memory is not held, so that it can leave."""
        return any(not entry.held() for entry in self.entries())

    def holders(self, among: Collection[str] | None = None) -> tuple[tuple[str, int, float], ...]:
        """Return ``(model, leases, age of the oldest in seconds)`` of each leased model, oldest lease first."""
        found = []
        for entry in self.entries():
            if among is None or entry.model in among:
                ages = entry.ages()
                if ages:
                    found.append((entry.model, len(ages), max(ages.values())))
        return tuple(sorted(found, key=lambda holder: -holder[2]))

    def holding_threads(self) -> set[object]:
        """Return the identities of the threads that took the leases held now."""
        return {hold.thread for entry in self.entries() for hold in entry.held()}

    def update_short(self) -> None:
        """Keep ``short`` current: whether a release has to look at the limits."""
        self.short = bool(self.line or self.doomed) or self.over or self.disk_over

    def reset_after_fork(self, thread: object, unsettled: Iterable[Entry[T]]) -> list[Entry[T]]:
        """In a child: keep the models, and only the leases of the thread that forked; return the models.

        Args:
            thread: its identity.
            unsettled: what a parent that was itself forked, and never used, had still to ``restore``.

        ``resident`` is empty from here until ``restore``, so that the first lookup takes the slow path.
        """
        entries = [*unsettled, *self.entries()]
        self.drain()
        for entry in entries:
            entry.inherited = True
            for hold in entry.held():
                if hold.thread is not thread:
                    hold.thread = None  # its lease is lost: no thread of this process has it
        self.resident.clear()  # the same dict: the warm path keeps it
        self.orphans = deque()
        self.leaving = set()
        self.reserved = {}
        self.line = {}
        self.deficit = 0
        self.lingering = Lingering()  # what lingers here, the parent shares
        self.update_short()
        return entries

    def restore(self, entries: Iterable[Entry[T]]) -> None:
        """Let lookups in a child find what the parent had loaded."""
        self.resident.update({entry.model: entry for entry in entries if entry.doomed is None})
