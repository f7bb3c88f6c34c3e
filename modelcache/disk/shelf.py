"""What lies on disk, what is being fetched, and which artifact gives way: the decisions of the disk tier.

State is changed under the cache's guard; files are touched outside it, by ``disk.store``. The settings are
``disk.tier``'s. Bytes count from the moment they are reserved until their files are gone.
"""

import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

import attrs

from modelcache.disk.layout import ARTIFACT, BLOCK, Record, charged, folder_prefix
from modelcache.disk.store import Pin, Published
from modelcache.disk.tier import DiskTier
from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Event, Evicted, Reason
from modelcache.guard import Guard
from modelcache.policies import Resident
from modelcache.units import format_bytes

_OVERHEAD = 3 * BLOCK  # the published folder, artifact/ in it, and the record
_POLL = 1.0  # seconds after which a wait for room looks at the file system again: others fill and free it too


class Upstairs(Protocol):
    """What the disk tier must know of the memory tier, which keeps the files of its models."""

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models`` from memory; return whether there was one."""
        ...

    def holders(self, models: Collection[str]) -> tuple[tuple[str, int, float], ...]:
        """Return ``(model, leases, age of the oldest in seconds)`` for each leased one; the guard is held."""
        ...


class Wish(Protocol):
    """For whom room is made."""

    state: str

    @property
    def model(self) -> str:
        """The id of the model that needs the room."""
        ...

    def refused(self, refusal: NoRoom) -> None:
        """Note what stands in the way, for a waiter whose time ends meanwhile; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...

    def wanted(self) -> bool:
        """Whether somebody still waits for it; the guard is held."""
        ...


@attrs.define(eq=False)
class Item:
    """One published folder, as this process knows it; guarded by the cache's guard."""

    published: Published
    used: float
    pins: int = 0
    leaving: bool = False
    doomed: bool = False  # goes with its last pin
    read_elsewhere: float = 0.0  # monotonic time until which another process is taken to read it


@attrs.define(eq=False)
class Held:
    """A published artifact that no process removes while this is open."""

    item: Item
    pin: Pin | None

    @property
    def path(self) -> Path:
        """What the loader gets."""
        return self.item.published.path

    @property
    def size(self) -> int:
        """Bytes of the artifact's files."""
        return self.item.published.record.size


@attrs.frozen
class _Limits:
    """One reading of what bounds the shelf, all in bytes; made outside the guard, since it asks the file system."""

    budget: int | None
    min_free: int
    free: int
    total: int


class Contention(Exception):  # noqa: N818 - a signal between fetches, never seen by a user
    """Two fetches wait for one another's room: this one gives up its share, and starts again later.

    Attributes:
        need: bytes to reserve at the next start, so that the two do not meet again.
    """

    def __init__(self, need: int) -> None:
        super().__init__(need)
        self.need = need


@attrs.define(eq=False)
class Staging:
    """A folder in which an artifact is built, with the bytes reserved for it."""

    shelf: "Shelf"
    wish: Wish
    folder: Path
    reserved: int = 0
    charged: int = 0
    waiting: bool = False

    @property
    def target(self) -> Path:
        """The empty folder that becomes the artifact."""
        return self.folder / ARTIFACT

    @property
    def spool(self) -> Path:
        """Path of a temporary file, for what can't be unpacked as it streams."""
        return self.folder / "spool"

    def grow(self, amount: int) -> None:
        """Charge bytes about to be written (negative: given back); make room where the reservation is used up.

        Raises:
            TooLarge: the artifact can never fit within the budget.
            NoRoom: what is in the way is leased, or not ours.
        """
        self.charged += amount
        if self.charged > self.reserved:
            self.shelf.reserve(self, self.charged - self.reserved)


class Shelf:
    """The index and the bytes of one disk tier.

    Args:
        tier: its settings and folder.
        source: URL of the cache's source; folders of other sources count, but are nobody's model here.
        guard: the cache's lock.
        upstairs: the memory tier.
        tell: takes events, outside the guard.
        number: gives each event its ``seq``.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        tier: DiskTier,
        source: str,
        guard: Guard,
        upstairs: Upstairs,
        tell: Callable[[Iterable[Event]], None],
        number: Callable[[], int],
    ) -> None:
        self.tier = tier
        self._store = tier.store
        self._source = source
        self._guard = guard
        self._upstairs = upstairs
        self._tell = tell
        self._number = number
        self._items: dict[str, Item] = {}  # by folder name
        self._models: dict[str, Item] = {}  # this source's, the latest generation of each
        self._stagings: set[Staging] = set()
        self._clock = 0
        self.evictions = 0
        self.refresh()

    def refresh(self, prefix: str = "") -> None:
        """Learn what other processes published or removed; only names with ``prefix`` are looked at."""
        names = {name for name in self._store.names() if name.startswith(prefix)}
        with self._guard:
            known = {name for name in self._items if name.startswith(prefix)}
            for name in known - names:
                if not self._items[name].leaving:
                    self._forget(self._items[name])
        found = [item for name in names - known if (item := self._store.read(name))]
        found.sort(key=lambda item: item.record.fetched)
        with self._guard:
            fresh = [self._add(published) for published in found if published.folder.name not in self._items]
            for item in sorted(fresh, key=lambda item: item.used):
                self.tier.policy.requested(item.published.record.model, self._clock)

    def _add(self, published: Published) -> Item:
        item = Item(published, min(published.used, time.time()))  # a time in the future is taken as now
        record = published.record
        self._items[published.folder.name] = item
        present = self._models.get(record.model)
        if record.source == self._source and (present is None or present.published.record.fetched <= record.fetched):
            self._models[record.model] = item
            self.tier.policy.admitted(Resident(record.model, published.bytes, record.fetch_seconds))
        return item

    def _forget(self, item: Item) -> None:
        self._items.pop(item.published.folder.name, None)
        model = item.published.record.model
        if self._models.get(model) is item:
            del self._models[model]
            self.tier.policy.removed(model)

    @property
    def mode(self) -> int:
        """Permissions of folders made in this tier."""
        return self._store.mode

    def free(self) -> int:
        """Return the bytes that the file system has left."""
        return self._store.free()

    def items(self) -> dict[str, Item]:
        """Return the present item of each model of this source; the guard is held."""
        return {model: item for model, item in self._models.items() if not item.leaving}

    def used(self) -> int:
        """Return the bytes that artifacts, fetches and removals under way take; the guard is held."""
        return sum(item.published.bytes for item in self._items.values()) + sum(
            staging.reserved for staging in self._stagings
        )

    def open(self, model: str) -> Held | None:
        """Return the model's artifact, pinned; None where it must be fetched."""
        with self._guard:
            self._clock += 1
            self.tier.policy.requested(model, self._clock)
            known = model in self._models
        if not known:
            self.refresh(folder_prefix(self._source, model))
        while True:
            with self._guard:
                item = self._models.get(model)
                if item is None or item.leaving or item.doomed:
                    return None
                item.pins += 1
                item.used = time.time()
            pin = self._store.pin(item.published.folder)
            if pin is not None:
                return Held(item, pin)
            with self._guard:  # another process removed it
                item.pins -= 1
                self._forget(item)

    def release(self, held: Held) -> bool:
        """Let go of a pinned artifact; return whether a pending ``delete`` removed it."""
        pin, held.pin = held.pin, None
        if pin is None:
            return False
        pin.close()
        with self._guard:
            held.item.pins -= 1
            due = held.item.doomed and not held.item.pins
            self._guard.notify()
        return due and self._remove([held.item]) == []

    def delete(self, model: str) -> bool:
        """Remove a model's artifact, with its last pin where it is pinned; return whether it is gone."""
        with self._guard:
            item = self._models.get(model)
            if item is None:
                return True
            if item.pins or item.leaving:
                item.doomed = True
                return False
            item.leaving = True
        return self._remove([item]) == []

    def stage(self, wish: Wish, size: int) -> Staging:
        """Reserve room for a download of ``size`` bytes, and return a folder for it.

        Raises:
            TooLarge: it can never fit within the budget; nothing was downloaded.
            NoRoom: what is in the way is leased, or not ours.
        """
        self.refresh()
        staging = Staging(self, wish, self._store.path)
        with self._guard:
            self._stagings.add(staging)
        try:
            self.reserve(staging, charged(size) + _OVERHEAD)
            staging.folder = self._store.stage()
        except BaseException:
            self._drop(staging)
            raise
        staging.charged = _OVERHEAD
        return staging

    def discard(self, staging: Staging) -> None:
        """Delete what was staged, and give its reservation back."""
        if staging.folder != self._store.path:
            self._store.discard(staging.folder)
        self._drop(staging)

    def _drop(self, staging: Staging) -> None:
        with self._guard:
            self._stagings.discard(staging)
            self._guard.notify()

    def publish(self, staging: Staging, record: Record) -> Held:
        """Make a staged artifact visible, durably, and return it pinned.

        Raises:
            TooLarge, NoRoom: what the file system allocated does not fit.
            OSError: the disk is full, or broken.
        """
        size = self._store.seal(staging.folder, record)
        if size > staging.reserved:
            self.reserve(staging, size - staging.reserved)
        pin = self._store.pin(staging.folder)
        prefix = folder_prefix(self._source, record.model)
        folder = self._store.publish(staging.folder, prefix)
        with self._guard:
            self._stagings.discard(staging)
            old = [item for name, item in self._items.items() if name.startswith(prefix) and not item.leaving]
            item = self._add(Published(record, folder, size, record.fetched))
            item.pins += 1
            for stale in old:
                stale.doomed = True
                stale.leaving = not stale.pins
            self._guard.notify()
        self._remove([stale for stale in old if stale.leaving])
        return Held(item, pin)

    def reserve(self, staging: Staging, amount: int) -> None:
        """Add to a reservation, evicting or waiting where that is needed; see ``Staging.grow``."""
        while True:
            limits = self._read_limits()
            if limits.budget is not None and staging.reserved + amount > limits.budget:
                raise _too_large(staging, amount, limits.budget)
            with self._guard:
                missing, reason, figures = self._missing(amount, limits)
                if missing <= 0:
                    staging.reserved += amount
                    return
                victims = self._victims(missing)
                pinned = [item.published.record.model for item in self._items.values() if item.pins]
                told = [self._evicted(item, reason, figures, staging.wish.model) for item in victims]
                if not victims:
                    self._check_hope(staging, amount, figures, pinned)
            if victims:
                self._tell(told)
                self._remove(victims)
            elif not self._upstairs.give_up(pinned, reason, figures, staging.wish.model):
                self._wait(staging, amount, figures)

    def _read_limits(self) -> "_Limits":
        return _Limits(self.tier.budget, self.tier.min_free, self._store.free(), self._store.total())

    def _missing(self, amount: int, limits: "_Limits") -> tuple[int, Reason, dict[str, int]]:
        """Return how many bytes must go before ``amount`` fits, why, and the reading that says so."""
        budget, min_free, free, total = attrs.astuple(limits)
        used = self.used()
        going = sum(item.published.bytes for item in self._items.values() if item.leaving)
        if budget is not None and used + amount > budget:
            figures = {"used": used, "need": amount, "limit": budget, "high": budget}
            return max(used - going + amount - budget, 1), Reason.DISK_BUDGET, figures
        unwritten = sum(max(staging.reserved - staging.charged, 0) for staging in self._stagings)
        if min_free and free - unwritten - amount < min_free:
            figures = {"used": total - free + unwritten, "need": amount, "limit": total, "high": total - min_free}
            return max(min_free + amount + unwritten - free - going, 1), Reason.MIN_FREE, figures
        return 0, Reason.DISK_BUDGET, {}

    def _victims(self, missing: int) -> list[Item]:
        """Choose what goes and mark it as leaving: leftovers of no model of ours first, then by the policy."""
        if any(item.leaving for item in self._items.values()) and missing <= 1:
            return []
        now = time.monotonic()
        idle = [
            item for item in self._items.values() if not item.pins and not item.leaving and item.read_elsewhere < now
        ]
        current = {item.published.record.model: item for item in idle if self._is_current(item)}
        strangers = sorted((item for item in idle if not self._is_current(item)), key=lambda item: item.used)
        ranked = (current[model] for model in self.tier.policy.victims(missing, current.keys()) if model in current)
        chosen: list[Item] = []
        for item in [*strangers, *ranked]:
            if missing <= 0:
                break
            item.leaving = True
            chosen.append(item)
            missing -= item.published.bytes
        return chosen

    def _is_current(self, item: Item) -> bool:
        return self._models.get(item.published.record.model) is item

    def _evicted(self, item: Item, reason: Reason, figures: dict[str, int], for_model: str | None) -> Event:
        self.evictions += 1
        return Evicted(
            seq=self._number(),
            time=time.time(),
            model=item.published.record.model,
            tier="disk",
            reason=reason,
            bytes=item.published.bytes,
            for_model=for_model,
            **figures,
        )

    def _remove(self, items: Collection[Item]) -> list[Item]:
        """Delete the files of items marked as leaving; return those that another process still reads."""
        kept = [item for item in items if not self._store.remove(item.published.folder)]
        with self._guard:
            for item in items:
                if item in kept:
                    item.leaving = False
                    item.read_elsewhere = time.monotonic() + _POLL
                else:
                    self._forget(item)
            self._guard.notify()
        return kept

    def _check_hope(self, staging: Staging, amount: int, figures: dict[str, int], pinned: Collection[str]) -> None:
        """Raise where waiting can't help: nothing here would ever give room, or all wait for one another."""
        others = self._stagings - {staging}
        staging.waiting = True
        leaving = any(item.leaving for item in self._items.values())
        if others and all(other.waiting for other in others) and not leaving:
            staging.waiting = False
            raise Contention(staging.reserved + amount)
        if not others and not leaving and not pinned:
            raise self._no_room(staging, amount, figures, pinned)

    def _wait(self, staging: Staging, amount: int, figures: dict[str, int]) -> None:
        with self._guard:
            pinned = [item.published.record.model for item in self._items.values() if item.pins]
            alone = not (self._stagings - {staging}) and not any(item.leaving for item in self._items.values())
            if not staging.wish.wanted() or (alone and pinned and staging.wish.hopeless()):
                raise self._no_room(staging, amount, figures, pinned)
            staging.wish.refused(self._no_room(staging, amount, figures, pinned))
            state, staging.wish.state = staging.wish.state, "waiting for room"
            self._guard.wait(_POLL)
            staging.wish.state = state
            staging.waiting = False

    def _no_room(self, staging: Staging, amount: int, figures: dict[str, int], pinned: Collection[str]) -> NoRoom:
        holders = self._upstairs.holders(pinned)
        held = ", ".join(f"{ascii(model)} ({leases} leases, {age:.1f} s)" for model, leases, age in holders)
        used, high = figures["used"], figures["high"]
        return NoRoom(
            f"no room on disk for {ascii(staging.wish.model)}: it needs {format_bytes(amount)} more, "
            f"{format_bytes(used)} of {format_bytes(high)} are taken in {self._store.path}"
            + (f", held by leases on {held}" if held else "")
            + ": raise disk.budget, lower disk.min_free, or free the disk",
            model=staging.wish.model,
            tier="disk",
            need=amount,
            used=used,
            limit=high,
            holders=holders,
        )

    def shrink(self) -> None:
        """Evict what a lowered budget or a raised ``min_free`` demands; returns once all that may go is gone."""
        while True:
            limits = self._read_limits()
            with self._guard:
                missing, reason, figures = self._missing(0, limits)
                victims = self._victims(missing) if missing > 0 else []
                pinned = [item.published.record.model for item in self._items.values() if item.pins]
                told = [self._evicted(item, reason, figures, None) for item in victims]
                self._guard.notify()
            if victims:
                self._tell(told)
                if len(self._remove(victims)) == len(victims):
                    return
            elif missing <= 0 or not self._upstairs.give_up(pinned, reason, figures, ""):
                return

    def reset_after_fork(self, kept: Iterable[Held]) -> None:
        """In a child: the parent's fetches, removals and loads are not ours; no I/O but closing descriptors.

        Args:
            kept: what models that were loaded before the fork keep pinned; ``adopt`` each of them later.
        """
        self._stagings = set()
        self._store.reset_after_fork()
        for item in [item for item in self._items.values() if item.leaving]:
            self._forget(item)
        for item in self._items.values():
            item.pins = 0
        for held in kept:
            held.item.pins += 1

    def adopt(self, held: Held) -> None:
        """In a child: replace the pin that a held artifact inherited by one of our own."""
        inherited = held.pin
        if inherited is not None:
            held.pin = self._store.pin(held.item.published.folder) or Pin(-1)
            inherited.close()

    def close(self) -> None:
        """Remove this process's temporary folder; the artifacts stay for the next start."""
        self._store.close()


def _too_large(staging: Staging, amount: int, budget: int) -> TooLarge:
    need = staging.reserved + amount
    return TooLarge(
        f"model {ascii(staging.wish.model)} needs {format_bytes(need)} on disk, more than the whole disk budget "
        f"of {format_bytes(budget)}: raise disk.budget",
        model=staging.wish.model,
        tier="disk",
        need=need,
        limit=budget,
    )
