"""What lies on disk and what is reserved, which artifact gives way: the decisions of the disk tier.

Every method runs under the cache's guard and does nothing but decide; ``disk.shelf`` acts. Bytes count from the
moment they are reserved until their files are gone. What other processes have done is told by the ledger.
"""

import time
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter, itemgetter
from pathlib import Path  # noqa: TC003 - as elsewhere

from modelcache.disk.book import Asked, Row, named
from modelcache.disk.items import RECHECK, DiskLimits, DiskShortage, Item, Others, Staging
from modelcache.disk.layout import Record
from modelcache.disk.states import REMOVING, STATES, State
from modelcache.disk.uncollected import uncollected
from modelcache.events import Reason
from modelcache.policies import Allowed, Policy, Resident, Worth, recall_order

_FETCHED = 1 + Record._fields.index("fetched")  # in a row
_LAST = 3  # in what was asked for
_TOLD = 64  # uses of one model by another process, since the last look, that a policy is told of


class Index:
    """All published folders and stagings of one disk tier, as this process knows them.

    Args:
        source: URL of the cache's source; folders of other sources are no models here, but give way by the same order.
        policy: who goes first.

    Attributes:
        items: by folder name.
        models: the one that is served, for each model of this source.
        stagings: of this process.
        debris: what could not be deleted yet, and its bytes; the ledger knows each by the name of its folder.
        others: what is set aside.
    """

    def __init__(self, source: str, policy: Policy) -> None:
        self._source = source
        self._policy = policy
        self.items: dict[str, Item] = {}
        self.models: dict[str, Item] = {}
        self.stagings: set[Staging] = set()
        self.debris: dict[Path, int] = {}
        self.others = Others()
        self._bytes = 0  # of all items
        self._others: dict[str, Item] = {}  # as ``models``, of other sources, by what the policy calls them
        self._old: dict[str, Item] = {}  # what is no model's present artifact: few
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

    def learn(
        self, epoch: str, rows: list[Row], asked: tuple[int, list[Asked]], seq: int, me: str, *, whole: bool
    ) -> None:
        """Take in what has changed; ``whole``: what is not among the rows is gone.

        ``asked``: how many requests there were by any process, and the models that were asked for.
        """
        if whole:
            if self.items:
                listed = {row[0] for row in rows}
                for name in [name for name in self.items if name not in listed]:
                    self.forget(self.items[name])
            rows.sort(key=itemgetter(_FETCHED))  # so that a policy finds the order of their coming
        with uncollected(len(rows)):
            self._admit(self._take_in(rows, me), *asked)
        if whole or epoch == self._epoch:  # else it was doubted since the rows were asked for
            self._epoch, self._seq = epoch, seq

    def _take_in(self, rows: Iterable[Row], me: str) -> Mapping[str, Item]:
        """Take in what has changed, perhaps very much; return the new items that are served, by the policy's names."""
        now, gone, present, mine, models = time.time(), int(State.GONE), int(State.PRESENT), self._source, self.models
        first, new = not self.items, list[Item]()
        sources, singles = {mine: mine}, dict[str | None, str | None]()
        for (
            name, model, source, version, single, size, fetched, seconds, taken, digest, last, state, _, uses, by
        ) in rows:  # fmt: skip
            used = min(last, now)  # a time in the future is taken as now
            item = self.items.get(name)
            if state == gone:
                if item is not None:
                    self.forget(item)
            elif item is not None:
                if by != me and not isinstance(self._policy, Worth) and self._serves(item):
                    for _ in range(min(uses - item.uses, _TOLD)):
                        self.requested(self._named(item))
                item.used, item.uses = max(item.used, used), uses
                self.become(item, STATES[state])
            else:
                item = self.items[name] = Item(
                    name,
                    model,
                    sources.setdefault(source, source),  # what many have in common is kept once
                    version,
                    singles.setdefault(single, single),
                    size,
                    fetched,
                    seconds,
                    taken,
                    digest,
                    used,
                    uses,
                    STATES[state],
                )
                self._bytes += taken
                new.append(item)
                if state == present and source == mine and model not in models:
                    models[model] = item
                else:
                    self._place(item)
        if first and len(new) == len(models):  # as nearly always: they are the same
            return models
        return {self._named(item): item for item in new if self._serves(item)}

    def _named(self, item: Item) -> str:
        """Return what the policy calls the model of an item."""
        return item.model if item.source == self._source else named(item.source, item.model, self._source)

    def _serves(self, item: Item) -> bool:
        """Whether an item is what is served for its model, here or by caches of its source."""
        return (self.models if item.source == self._source else self._others).get(self._named(item)) is item

    def _admit(self, new: Mapping[str, Item], clock: int, asked: list[Asked]) -> None:
        """Tell the policy of what is served, and of requests by any process.

        Of what nobody is known to have asked for, the order of the last use is kept.
        """
        before, self._clock = self._clock, max(self._clock, clock)
        if not isinstance(self._policy, Worth):  # which know nothing of models that are not here
            for item in new.values():
                self._policy.admitted(self._resident(item))
            recall_order(self._policy, sorted(new, key=lambda name: new[name].used))
            return
        known = {each[0]: each for each in asked}
        unknown = [pair for pair in new.items() if pair[0] not in known]
        unknown.sort(key=lambda pair: pair[1].used)
        ranked = enumerate(unknown, before + 1 - len(unknown))
        self._policy.restore(
            ((name, item.bytes, item.fetch_seconds, 1, at, at) for at, (name, item) in ranked), self._clock
        )
        self._policy.restore(
            (
                (name, item.bytes, item.fetch_seconds, *known.pop(name)[1:])
                for name, item in new.items()
                if name in known
            ),
            self._clock,
        )
        self._policy.recall_all(sorted(known.values(), key=itemgetter(_LAST)), self._clock)

    def _resident(self, item: Item) -> Resident:
        return Resident(self._named(item), item.bytes, item.fetch_seconds)

    def doubt(self) -> None:
        """Have all be learned anew: something was learned that did not come about."""
        self._epoch = ""

    def become(self, item: Item, state: State) -> None:
        """Note what is to become of an item."""
        if item.state is not state:
            item.state = state
            self._place(item)

    def _place(self, item: Item) -> None:
        """Put an item where its state says that it belongs."""
        state, name = item.state, self._named(item)
        served = self.models if item.source == self._source else self._others
        present = served.get(name)
        for kind in (self._going, self._coming, self._old):
            if kind:
                kind.pop(item.name, None)
        if state in REMOVING:
            self._going[item.name] = item
        elif state is State.ARRIVING:
            self._coming[item.name] = item
        serves = state is State.PRESENT
        if serves and present is not item and (present is None or present.fetched <= item.fetched):
            if present is not None:
                self._old[present.name] = present
            served[name] = present = item
            self._policy.admitted(self._resident(item))
            self._hold(item)
        elif not serves and present is item:
            del served[name]
            self._policy.removed(name)
        if state is State.DOOMED or (state is State.PRESENT and present is not item):
            self._old[item.name] = item

    def of(self, model: str) -> list[Item]:
        """Return all versions of a model of this source; whatever is not served is in one of few, short lists."""
        present = self.models.get(model)
        others = [at for kind in (self._going, self._coming, self._old) for at in kind.values()]
        found = [at for at in others if at.model == model and at.source == self._source]
        return found if present is None else [present, *found]

    def forget(self, item: Item) -> None:
        """Drop an item whose files are gone, also where it was learned anew since, as a transaction had failed."""
        known = self.items.pop(item.name, None)
        if known is not None:
            self._bytes -= known.bytes
            known.state = State.GONE
            self._place(known)

    def pin(self, item: Item) -> None:
        """Book that this process reads an item."""
        item.pins += 1
        self._pinned.add(item)
        self._hold(item)

    def unpin(self, item: Item) -> None:
        """Book that one who read an item is done."""
        item.pins -= 1
        if not item.pins:
            self._pinned.discard(item)
            self._hold(item)

    def _hold(self, item: Item) -> None:
        """Tell the policy whether what is served may go; there may be many in memory, which it need not look at."""
        if isinstance(self._policy, Worth) and self._serves(item):
            self._policy.hold(self._named(item), held=item.pins > 0)

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

    def grounds(self) -> object:
        """Return what decisions rest on: another one is told where anything has moved since, here or elsewhere."""
        return self._epoch, self._seq, self._bytes, self.others, frozenset(self.stagings)

    def pressed(self) -> bool:
        """Whether a request lacks room."""
        return any(staging.lacking and staging.wish.urgent for staging in self.stagings)

    def choose(self, missing: int, spared: Collection[str] = ()) -> list[Item]:
        """Choose just enough to go, none ``spared``: what is no model's present artifact first, then by the policy."""
        chosen: list[Item] = []
        for item in sorted(filter(_idle, self._old.values()), key=attrgetter("used")):
            if missing <= 0:
                return chosen
            missing -= item.bytes
            chosen.append(item)
        if missing > 0:
            served = ChainMap(self.models, self._others) if self._others else self.models
            mine = self._source
            may = lambda item: _idle(item) and (item.model not in spared or item.source != mine)  # noqa: E731 - of this line
            for model in self._policy.victims(missing, Allowed(served, may)):
                missing -= served[model].bytes
                chosen.append(served[model])
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
        self.stagings, self.debris = set(), {}
        pinned, self._pinned = self._pinned, set()
        for item in pinned:
            item.pins = 0
            self._hold(item)


def _idle(item: Item) -> bool:
    return not item.pins and max(item.read_elsewhere, item.stuck) < time.monotonic()
