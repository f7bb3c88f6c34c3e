"""What lies on disk and what is reserved, which artifact gives way: the decisions of the disk tier.

Every method runs under the cache's guard and does nothing but decide; ``disk.shelf`` acts. Bytes count from the
moment they are reserved until their files are gone.
"""

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import attrs

from modelcache.disk.layout import ARTIFACT
from modelcache.disk.store import Published
from modelcache.errors import NoRoom
from modelcache.events import Reason
from modelcache.policies import Policy, Resident

RECHECK = 1.0
"""Seconds after which a wait for room, or an artifact that another process reads, is looked at again."""


class Wish(Protocol):
    """For whom room is made."""

    state: str

    @property
    def model(self) -> str:
        """The id of the model that needs the room."""
        ...

    @property
    def urgent(self) -> bool:
        """Whether a request waits for it: then it goes before what nobody waits for; the guard is held."""
        ...

    @property
    def nested(self) -> bool:
        """Whether a loader under way waits for it: then it does not wait behind others; the guard is held."""
        ...

    def spared(self) -> set[str]:
        """Return the models whose files are not removed for it; the guard is held."""
        ...

    def relieved(self) -> bool:
        """Whether somebody is about to let go of files for it; the guard is held."""
        ...

    def check(self) -> None:
        """Raise where it was told to stop, nobody waits for it any more, or it gives way; the guard is held."""
        ...

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...


@attrs.define(eq=False)
class Item:
    """One published folder, as this process knows it.

    Attributes:
        published: what and where it is.
        used: seconds since the epoch of its last use.
        pins: how often this process has it pinned.
        leaving: its removal is under way.
        doomed: it goes with its last pin.
        read_elsewhere: monotonic time until which another process is taken to read it.
        stuck: monotonic time until which the system is taken to refuse its removal.
    """

    published: Published
    used: float
    pins: int = 0
    leaving: bool = False
    doomed: bool = False
    read_elsewhere: float = 0.0
    stuck: float = 0.0

    @property
    def model(self) -> str:
        """Id of the model it was fetched for."""
        return self.published.record.model

    @property
    def bytes(self) -> int:
        """Bytes allocated for it."""
        return self.published.bytes


@attrs.define(eq=False)
class Staging:
    """A folder in which an artifact is built, with the bytes reserved for it.

    Attributes:
        wish: for whom.
        folder: where; it becomes the published folder.
        reserved: bytes set aside in the budget.
        charged: bytes of these that were written or are about to be.
        waiting: it can't go on before others give room.
        beside: bytes of the version on disk that stays until this one is published.
        lacking: it has asked for room that is not there yet.
    """

    wish: Wish
    folder: Path
    reserved: int = 0
    charged: int = 0
    waiting: bool = False
    beside: int = 0
    lacking: bool = False

    @property
    def target(self) -> Path:
        """The empty folder that becomes the artifact."""
        return self.folder / ARTIFACT

    @property
    def spool(self) -> Path:
        """Path of a temporary file, for what can't be unpacked as it streams."""
        return self.folder / "spool"


@attrs.frozen
class DiskLimits:
    """One reading of what bounds the disk tier, all in bytes.

    Attributes:
        budget: most bytes; None: no such bound.
        min_free: bytes to leave free.
        free: bytes that the file system has left.
        total: its size.
    """

    budget: int | None
    min_free: int
    free: int
    total: int


@attrs.frozen
class DiskShortage:
    """What one decision lacks.

    Attributes:
        missing: bytes that must go, what is leaving not counted; 0 or less where nothing must.
        reason: which limit is exceeded.
        figures: the reading and threshold that say so, as fields of an event; empty where nothing is exceeded.
    """

    missing: int
    reason: Reason
    figures: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether it may go ahead now; what is leaving has not left yet."""
        return not self.figures


class Index:
    """All published folders and stagings of one disk tier.

    Args:
        source: URL of the cache's source; folders of other sources count, but are nobody's model here.
        policy: who goes first.
    """

    def __init__(self, source: str, policy: Policy) -> None:
        self._source = source
        self._policy = policy
        self.items: dict[str, Item] = {}  # by folder name
        self.models: dict[str, Item] = {}  # this source's, the latest generation of each
        self.stagings: set[Staging] = set()
        self.debris: dict[Path, int] = {}  # staged folders that could not be deleted yet, with their bytes
        self._clock = 0

    def requested(self, model: str) -> None:
        """Book a memory miss; hits in memory are no use of an artifact."""
        self._clock += 1
        self._policy.requested(model, self._clock)

    def add(self, published: Published) -> Item:
        """Take in a published folder; the newest generation is the model's present one."""
        item = Item(published, min(published.used, time.time()))  # a time in the future is taken as now
        record = published.record
        self.items[published.folder.name] = item
        present = self.models.get(record.model)
        if record.source == self._source and (present is None or present.published.record.fetched <= record.fetched):
            self.models[record.model] = item
            if present is not None and present.pins:
                present.doomed = True
            self._policy.admitted(Resident(record.model, published.bytes, record.fetch_seconds))
        return item

    def take_in(self, found: Iterable[Published]) -> None:
        """Take in what a scan found: in order of fetch, then of use, so that any policy finds its order again."""
        known = self.items.keys()
        fresh = [
            self.add(published)
            for published in sorted(found, key=lambda published: published.record.fetched)
            if published.folder.name not in known
        ]
        for item in sorted(fresh, key=lambda item: item.used):
            self._policy.requested(item.model, self._clock)

    def forget(self, item: Item) -> None:
        """Drop an item whose files are gone."""
        self.items.pop(item.published.folder.name, None)
        if self.models.get(item.model) is item:
            del self.models[item.model]
            self._policy.removed(item.model)

    def present(self) -> dict[str, Item]:
        """Return the present item of each model of this source."""
        return {model: item for model, item in self.models.items() if not item.leaving}

    def pinned(self) -> list[str]:
        """Return the models whose artifacts this process has pinned."""
        return [item.model for item in self.items.values() if item.pins]

    def leaving(self) -> int:
        """Return the bytes of the artifacts whose removal is under way."""
        return sum(item.bytes for item in self.items.values() if item.leaving)

    def used(self) -> int:
        """Return the bytes that artifacts, fetches and removals under way take."""
        reserved = sum(staging.reserved for staging in self.stagings)
        return sum(item.bytes for item in self.items.values()) + reserved + sum(self.debris.values())

    def shortage(self, amount: int, limits: DiskLimits) -> DiskShortage:
        """Return what ``amount`` more bytes lack; 0 for a look at the limits alone."""
        used, going = self.used(), self.leaving()
        if limits.budget is not None and used + amount > limits.budget:
            figures = {"used": used, "need": amount, "limit": limits.budget, "high": limits.budget}
            return DiskShortage(used + amount - limits.budget - going, Reason.DISK_BUDGET, figures)
        unwritten = sum(max(staging.reserved - staging.charged, 0) for staging in self.stagings)
        left = limits.free - unwritten - amount
        if limits.min_free and left < limits.min_free:
            high = limits.total - limits.min_free
            taken = limits.total - limits.free + unwritten
            figures = {"used": taken, "need": amount, "limit": limits.total, "high": high}
            return DiskShortage(limits.min_free - left - going, Reason.MIN_FREE, figures)
        return DiskShortage(0, Reason.DISK_BUDGET, {})

    def pressed(self) -> bool:
        """Whether a request lacks room."""
        return any(staging.lacking and staging.wish.urgent for staging in self.stagings)

    def choose(self, missing: int, spared: Collection[str] = ()) -> list[Item]:
        """Mark just enough to go, no ``spared`` one: what is no model's present artifact first, then by the policy."""
        now = time.monotonic()
        idle = [
            item
            for item in self.items.values()
            if not item.pins and not item.leaving and max(item.read_elsewhere, item.stuck) < now
            if item.model not in spared or self.models.get(item.model) is not item
        ]
        current = {item.model: item for item in idle if self.models.get(item.model) is item}
        strangers = sorted((item for item in idle if current.get(item.model) is not item), key=lambda item: item.used)
        chosen: list[Item] = []
        for item in strangers:
            if missing > 0:
                missing -= item.bytes
                chosen.append(item)
        if missing > 0 and current:
            for model in list(self._policy.victims(missing, current.keys())):
                if missing <= 0:
                    break
                missing -= current[model].bytes
                chosen.append(current[model])
        for item in chosen:
            item.leaving = True
        return chosen

    def read_elsewhere(self) -> bool:
        """Whether another process reads something that could go otherwise."""
        now = time.monotonic()
        return any(item.read_elsewhere >= now for item in self.items.values())

    def kept(self, item: Item) -> None:
        """Book that an item that was to go has stayed: another process reads it, or the system refuses."""
        item.leaving = False
        if item.stuck < time.monotonic():
            item.read_elsewhere = time.monotonic() + RECHECK

    def reset_after_fork(self) -> None:
        """In a child: the parent's fetches, removals and pins are not ours."""
        self.stagings = set()
        self.debris = {}
        for item in list(self.items.values()):
            item.pins = 0
            if item.leaving:
                self.forget(item)
