"""Which models are in memory, who may have room, and who gives way: the decisions of the memory tier.

Every method here runs under the guard and does nothing but decide: what is to be unloaded is returned, and
``memory.room`` acts. The warm path, which takes no guard, is ``memory.entries``.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from typing import Generic, TypeVar

from modelcache.events import Reason
from modelcache.identity import me
from modelcache.memory.entries import Entry, Lease
from modelcache.memory.footprints import Footprints
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import Limits
from modelcache.policies import Policy, Resident

T = TypeVar("T")

_USES = 2**17  # notes of use between two drains; beyond it the oldest are lost, and hit counts read low
_TOLD = 10_000  # uses of one drain that the policy hears of; older ones only count


class Residents(Generic[T]):
    """The models of one cache that are in memory, on their way in, or on their way out.

    It is also the desk of the leases (``memory.entries.Desk``): what of it the warm path reads is public.

    Args:
        policy: who goes first.
        lookup: everything but a warm hit.
        hit: tells those who listen for hits.
        released: looks at what a release makes possible.
    """

    def __init__(
        self,
        policy: Policy,
        lookup: Callable[[Lease[T]], T],
        hit: Callable[[Entry[T]], None],
        released: Callable[[Entry[T]], None],
    ) -> None:
        self.lookup = lookup
        self._hit = hit
        self.released = released
        self.resident: dict[str, Entry[T]] = {}
        self._uses: deque[Entry[T]] = deque(maxlen=_USES)
        self.note: Callable[[Entry[T]], None] = self._uses.append
        self.short = False
        self.doomed: dict[str, Entry[T]] = {}
        self.leaving: set[Entry[T]] = set()
        self.orphans: deque[Entry[T]] = deque()
        self.reserved: dict[object, int] = {}
        self.line: dict[object, None] = {}
        self.over = False
        self.disk_over = False
        self.hits = 0
        self.misses = 0
        self.clock = 0
        self.churn = 0
        self._policy = policy
        self.footprints = Footprints()

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
        now = time.time()
        for entry, count in Counter(batch).items():
            entry.hits += count
            entry.used = now
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

    def insert(self, entry: Entry[T]) -> None:
        """Let lookups find a model that was just loaded."""
        entry.hits += self.footprints.hits(entry.model)
        self.footprints.remember(entry.model, entry.bytes, entry.hits)
        self.resident[entry.model] = entry
        self._policy.admitted(Resident(entry.model, entry.bytes, entry.cost))

    def find(self, model: str, *, stays: bool) -> Entry[T] | None:
        """Return a model that is in memory; ``stays``: rescued where it was to leave with its last lease."""
        entry = self.resident.get(model)
        if entry is not None:
            return entry
        if stays:
            return self.rescue(model)
        entry = self.doomed.get(model)
        return None if entry is None or entry.retired else entry

    def rescue(self, model: str) -> Entry[T] | None:
        """Return a model that was to leave with its last lease, and let it stay."""
        entry = self.doomed.get(model)
        if entry is None or entry.retired:
            return None
        del self.doomed[model]
        self.update_short()
        entry.doomed = None
        self.resident[model] = entry
        self._policy.admitted(Resident(model, entry.bytes, entry.cost))
        return entry

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
        self.doomed[entry.model] = entry
        self.update_short()  # before whoever retires it looks at the holds
        return entry.doomed

    def retire(self, entry: Entry[T], reason: Reason) -> bool:
        """Take an entry out of memory unless it is held; the caller then unloads it, outside the guard."""
        if entry.retired:
            return False
        entry.retired = True
        if entry.holds:
            entry.retired = False
            return False
        entry.reason = entry.doomed or reason
        entry.retirer = me()
        for known in (self.resident, self.doomed):
            if known.get(entry.model) is entry:
                del known[entry.model]
        self.update_short()
        self._policy.removed(entry.model)
        self.footprints.remember(entry.model, entry.bytes, entry.hits)
        self.leaving.add(entry)
        self.churn += 1
        return True

    def gone(self, entry: Entry[T]) -> None:
        """Book that an entry's unload is over."""
        self.leaving.discard(entry)
        self.churn += 1

    def shortage(self, limits: Limits, need: int, models: int, *, floor: int | None = None) -> Shortage:
        """Return what ``need`` more bytes and ``models`` more models lack.

        Args:
            limits: a reading made just before.
            need: bytes of the newcomer; 0 for a look at the limits alone.
            models: 1 for a newcomer, else 0.
            floor: evict down to this many used bytes rather than to ``high``.
        """
        reserved = sum(self.reserved.values())
        coming = sum(0 if entry.inherited else entry.bytes for entry in self.leaving)
        tracked = self.tracked()
        count = len(self.resident) + len(self.doomed) + len(self.leaving) + len(self.reserved)
        over_high = limits.reading.used + reserved + need - limits.high if limits.reading else 0
        over_budget = tracked + reserved + need - limits.budget if limits.budget is not None else 0
        over_count = count + models - limits.max_models if limits.max_models is not None else 0
        if over_high > 0 and limits.reading:
            reason = Reason.WATERMARK
            used, high, limit = limits.reading.used + reserved, limits.high, limits.reading.limit
            figures = {"used": used, "need": need, "limit": limit, "high": high, "low": limits.low}
        elif over_budget > 0 and limits.budget is not None:
            reason = Reason.MEMORY_BUDGET
            figures = {"used": tracked + reserved, "need": need, "limit": limits.budget, "high": limits.budget}
        else:
            reason = Reason.MAX_MODELS
            most = limits.max_models or 0
            figures = {"used": count, "need": models, "limit": most, "high": most}
        leaving_budget = sum(entry.bytes for entry in self.leaving)
        return Shortage(
            fits=over_high <= 0 and over_budget <= 0 and over_count <= 0,
            over_high=over_high - coming + (limits.high - floor if floor is not None else 0),
            over_budget=over_budget - leaving_budget,
            over_count=over_count - len(self.leaving),
            reason=reason,
            figures=figures,
        )

    def choose(self, shortage: Shortage, most: int, among: Collection[str] | None = None) -> list[Entry[T]]:
        """Retire just enough models for ``shortage``; what was loaded before a fork goes last.

        Args:
            shortage: what is lacking.
            most: how many models at most, for the watermark, whose footprint was only guessed: the next reading
                tells more.
            among: only these models.
        """
        chosen: list[Entry[T]] = []
        guessed = 0
        for entry in self._ranked(max(shortage.over_high, shortage.over_budget, 0), among):
            if shortage.met or (guessed >= most and shortage.over_high > 0):
                break
            if self.retire(entry, shortage.reason):
                chosen.append(entry)
                guessed += not entry.sure
                shortage = shortage.after(entry)
        return chosen

    def _ranked(self, need: int, among: Collection[str] | None) -> Iterable[Entry[T]]:
        yield from [entry for entry in self.doomed.values() if not entry.holds and among is None]  # to go anyway
        idle = {
            model: entry
            for model, entry in self.resident.items()
            if not entry.holds and (among is None or model in among)
        }
        own = {model for model, entry in idle.items() if not entry.inherited}
        for models in (own, idle.keys() - own):
            if models:
                for model in list(self._policy.victims(need, models)):
                    yield idle[model]

    def idle(self) -> bool:
        """Whether something in memory is not held, so that it can leave."""
        return any(not entry.holds for entry in self.entries())

    def holders(self, among: Collection[str] | None = None) -> tuple[tuple[str, int, float], ...]:
        """Return ``(model, leases, age of the oldest in seconds)`` of each leased model, oldest lease first."""
        found = []
        for entry in self.entries():
            if among is None or entry.model in among:
                ages = entry.ages()
                if ages:
                    found.append((entry.model, len(ages), max(ages)))
        return tuple(sorted(found, key=lambda holder: -holder[2]))

    def holding_threads(self) -> set[object]:
        """Return the identities of the threads that took the leases held now."""
        return {thread for entry in self.entries() for thread in list(entry.holds.values())}

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
            entry.holds = {lease: hold for lease, hold in list(entry.holds.items()) if hold is thread}
        self.resident.clear()  # the same dict: the warm path keeps it
        self.orphans = deque()
        self.leaving = set()
        self.reserved = {}
        self.line = {}
        self.over = self.disk_over = False
        self.update_short()
        return entries

    def restore(self, entries: Iterable[Entry[T]]) -> None:
        """Let lookups in a child find what the parent had loaded."""
        self.resident.update({entry.model: entry for entry in entries if entry.doomed is None})
