"""What lies on disk and what is reserved, which artifact gives way: the decisions of the disk tier.

Every method runs under the cache's guard and does nothing but decide; ``disk.shelf`` acts. Bytes count from the
moment they are reserved until their files are gone. What other processes have done is told by the ledger.
"""

import secrets
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol

import attrs

from modelcache.disk.book import Row, State
from modelcache.disk.layout import ARTIFACT, Record
from modelcache.errors import NoRoom
from modelcache.events import Reason
from modelcache.policies import Allowed, Policy, Resident, recall_order

RECHECK = 1.0
"""Seconds after which a wait for room, or an artifact that another process reads, is looked at again."""

_TOLD = 64  # uses of one model by another process, since the last look, that a policy is told of


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
        name: of the folder.
        record: what it says of itself.
        used: seconds since the epoch of its last use.
        uses: how often it was used, by any process, as far as that was told.
        state: what is to become of it.
        was: what was to become of it before somebody began to remove it here.
        pins: how often this process has it pinned.
        verified: whether this process has compared its digest, or has computed it.
        read_elsewhere: monotonic time until which another process is taken to read it.
        stuck: monotonic time until which the system is taken to refuse its removal.
    """

    name: str
    record: Record
    used: float
    uses: int = 0
    state: State = State.PRESENT
    was: State = State.PRESENT
    pins: int = 0
    verified: bool = False
    read_elsewhere: float = 0.0
    stuck: float = 0.0

    @property
    def model(self) -> str:
        """Id of the model it was fetched for."""
        return self.record.model

    @property
    def bytes(self) -> int:
        """Bytes allocated for it."""
        return self.record.bytes


@attrs.define(eq=False)
class Staging:
    """A folder in which an artifact is built, with the bytes reserved for it.

    Attributes:
        wish: for whom.
        folder: where; it becomes the published folder.
        id: under which the ledger knows it.
        reserved: bytes set aside in the budget.
        charged: bytes of these that were written or are about to be.
        told: how many of these the ledger knows of.
        waiting: it can't go on before others give room.
        wanted: bytes that others were told it waits for.
        listed: whether the ledger knows of it.
        beside: bytes of the version on disk that stays until this one is published.
        known: name of the folder of that version; empty where there is none.
        lacking: it has asked for room that is not there yet.
    """

    wish: Wish
    folder: Path
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    reserved: int = 0
    charged: int = 0
    told: int = 0
    waiting: bool = False
    wanted: int = 0
    listed: bool = False
    beside: int = 0
    known: str = ""
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


@attrs.frozen
class Others:
    """What is set aside in the budget, as the ledger says.

    Attributes:
        reserved: bytes, of all processes.
        unwritten: how many of these were not written yet, when that was last told.
        sharing: whether another process has some, or wants some.
        moving: whether one of these may go on without getting more.
        wanted: bytes without which others can't go on.
    """

    reserved: int = 0
    unwritten: int = 0
    sharing: bool = False
    moving: bool = False
    wanted: int = 0


class Index:
    """All published folders and stagings of one disk tier, as this process knows them.

    Args:
        source: URL of the cache's source; folders of other sources count, but are nobody's model here.
        policy: who goes first.

    Attributes:
        items: by folder name.
        models: the one that is served, for each model of this source.
        stagings: of this process.
        debris: what could not be deleted yet: path, and id in the ledger.
        others: what is set aside.
    """

    def __init__(self, source: str, policy: Policy) -> None:
        self._source = source
        self._policy = policy
        self.items: dict[str, Item] = {}
        self.models: dict[str, Item] = {}
        self.stagings: set[Staging] = set()
        self.debris: dict[Path, str] = {}
        self.others = Others()
        self._bytes = 0  # of all items
        self._strangers: dict[str, Item] = {}  # what is no model's present artifact
        self._going: dict[str, Item] = {}
        self._coming: dict[str, Item] = {}
        self._pinned: set[Item] = set()
        self._elsewhere: set[Item] = set()
        self._epoch = ""
        self._seq = 0
        self._clock = 0

    def since(self, epoch: str) -> int:
        """Return the number of the last change that is known of a ledger."""
        return self._seq if epoch == self._epoch else 0

    def requested(self, model: str) -> None:
        """Book a memory miss; hits in memory are no use of an artifact."""
        self._clock += 1
        self._policy.requested(model, self._clock)

    def learn(self, epoch: str, rows: Iterable[Row], seq: int, me: str, *, whole: bool) -> None:
        """Take in what has changed; ``whole``: what is not among the rows is gone."""
        rows = list(rows)
        if whole:
            listed = {row.name for row in rows}
            for name in [name for name in self.items if name not in listed]:
                self.forget(self.items[name])
            rows.sort(key=lambda row: row.record.fetched)  # so that a policy finds the order of their coming
        now = time.time()
        fresh = [item for row in rows if (item := self._learn(row, me, now)) is not None]
        ours = [item for item in fresh if self.models.get(item.model) is item]
        recall_order(self._policy, [item.model for item in sorted(ours, key=lambda item: item.used)])
        if whole or epoch == self._epoch:  # else it was doubted since the rows were asked for
            self._epoch, self._seq = epoch, seq

    def doubt(self) -> None:
        """Have all be learned anew: something was learned that did not come about."""
        self._epoch = ""

    def _learn(self, row: Row, me: str, now: float) -> Item | None:
        """Take in one row; return the item where it is new here."""
        item = self.items.get(row.name)
        if row.state is State.GONE:
            if item is not None:
                self.forget(item)
            return None
        if item is None:
            used = min(row.used, now)  # a time in the future is taken as now
            item = self.items[row.name] = Item(row.name, row.record, used, row.uses, row.state)
            self._bytes += row.record.bytes
            self._place(item)
            return item
        if row.by != me and item is self.models.get(item.model):
            for _ in range(min(row.uses - item.uses, _TOLD)):
                self.requested(item.model)
        item.used, item.uses = max(item.used, min(row.used, now)), row.uses
        self.become(item, row.state)
        return None

    def become(self, item: Item, state: State) -> None:
        """Note what is to become of an item."""
        if item.state is not state:
            item.state = state
            self._place(item)

    def _place(self, item: Item) -> None:
        """Put an item where its state says that it belongs."""
        record, state = item.record, item.state
        present = self.models.get(record.model)
        for kind in (self._going, self._coming, self._strangers):
            if kind:
                kind.pop(item.name, None)
        if state is State.LEAVING:
            self._going[item.name] = item
        elif state is State.ARRIVING:
            self._coming[item.name] = item
        serves = state is State.PRESENT and record.source == self._source
        if serves and present is not item and (present is None or present.record.fetched <= record.fetched):
            if present is not None:
                self._strangers[present.name] = present
            self.models[record.model] = present = item
            self._policy.admitted(Resident(record.model, record.bytes, record.fetch_seconds))
        elif not serves and present is item:
            del self.models[record.model]
            self._policy.removed(record.model)
        if state is State.DOOMED or (state is State.PRESENT and present is not item):
            self._strangers[item.name] = item

    def of(self, model: str) -> list[Item]:
        """Return all versions of a model of this source; whatever is not served is in one of few, short lists."""
        present = self.models.get(model)
        others = [at for kind in (self._going, self._coming, self._strangers) for at in kind.values()]
        found = [at for at in others if at.model == model and at.record.source == self._source]
        return found if present is None else [present, *found]

    def forget(self, item: Item) -> None:
        """Drop an item whose files are gone."""
        if self.items.pop(item.name, None) is item:
            self._bytes -= item.bytes
            item.state = State.GONE
            self._place(item)

    def pin(self, item: Item) -> None:
        """Book that this process reads an item."""
        item.pins += 1
        self._pinned.add(item)

    def unpin(self, item: Item) -> None:
        """Book that one who read an item is done."""
        item.pins -= 1
        if not item.pins:
            self._pinned.discard(item)

    def pinned(self) -> list[str]:
        """Return the models whose artifacts this process has pinned."""
        return [item.model for item in self._pinned]

    def leaving(self) -> int:
        """Return the bytes of the artifacts whose removal is under way."""
        return sum(item.bytes for item in self._going.values())

    def moving(self) -> bool:
        """Whether something is about to be published or removed, by any process."""
        return bool(self._going or self._coming)

    def used(self) -> int:
        """Return the bytes that artifacts, fetches and removals under way take."""
        return self._bytes + self.others.reserved

    def shortage(self, amount: int, limits: DiskLimits) -> DiskShortage:
        """Return what ``amount`` more bytes lack; 0 for a look at the limits alone."""
        used, going = self.used(), self.leaving()
        if limits.budget is not None and used + amount > limits.budget:
            figures = {"used": used, "need": amount, "limit": limits.budget, "high": limits.budget}
            return DiskShortage(used + amount - limits.budget - going, Reason.DISK_BUDGET, figures)
        unwritten = self.others.unwritten - sum(min(at.charged, at.reserved) - at.told for at in self.stagings)
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
        """Choose just enough to go, none ``spared``: what is no model's present artifact first, then by the policy."""
        chosen: list[Item] = []
        if missing <= 0:
            return chosen
        for item in sorted(filter(_idle, self._strangers.values()), key=lambda item: item.used):
            if missing <= 0:
                return chosen
            missing -= item.bytes
            chosen.append(item)
        if missing > 0 and self.models:
            may = lambda item: _idle(item) and item.model not in spared  # noqa: E731 - of this line
            for model in self._policy.victims(missing, Allowed(self.models, may)):
                missing -= self.models[model].bytes
                chosen.append(self.models[model])
                if missing <= 0:
                    break
        return chosen

    def read_elsewhere(self) -> bool:
        """Whether another process reads something that could go otherwise."""
        since = time.monotonic() - RECHECK  # one look longer than it counts, or there would be a gap between the two
        self._elsewhere = {item for item in self._elsewhere if item.read_elsewhere >= since}
        return bool(self._elsewhere)

    def kept(self, item: Item, state: State) -> None:
        """Book that an item that was to go has stayed: another process reads it, or the system refuses."""
        self.become(item, state)
        if item.stuck < time.monotonic():
            item.read_elsewhere = time.monotonic() + RECHECK
            self._elsewhere.add(item)

    def reset_after_fork(self) -> None:
        """In a child: the parent's fetches, removals and pins are not ours."""
        self.stagings = set()
        self.debris = {}
        for item in self._pinned:
            item.pins = 0
        self._pinned = set()


def _idle(item: Item) -> bool:
    return not item.pins and max(item.read_elsewhere, item.stuck) < time.monotonic()
