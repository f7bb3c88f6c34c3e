"""Making room on disk: evict, and wait where nothing may go.

It acts, outside the guard, on what ``disk.index`` decides under it; files are removed by ``disk.removing``.
"""

import functools
import time
from collections.abc import Iterable

import attrs

from modelcache.disk.agreeing import Agreement
from modelcache.disk.book import Book
from modelcache.disk.index import Index
from modelcache.disk.items import RECHECK, DiskLimits, DiskShortage, Item, Staging, Wish
from modelcache.disk.refusals import Contention, no_room, too_large
from modelcache.disk.removing import Remover
from modelcache.disk.states import State
from modelcache.disk.sweeping import sweep
from modelcache.disk.tier import DiskTier
from modelcache.disk.upstairs import Upstairs
from modelcache.events import Event, Evicted
from modelcache.guard import Guard
from modelcache.telling import Teller


@attrs.frozen
class _Decision:
    """What one transaction came to.

    Attributes:
        shortage: what is lacking.
        granted: whether the bytes are set aside.
        victims: who is to go.
        told: the events for that.
        grounds: what it rests on.
    """

    shortage: DiskShortage
    granted: bool
    victims: list[Item]
    told: list[Event]
    grounds: object


class DiskRoom:
    """The room of one disk tier.

    Args:
        tier: its settings and folder.
        index: the decisions.
        guard: the cache's lock.
        agreed: what all processes agree on.
        upstairs: the memory tier.
        teller: takes events, outside the guard.
        remover: removes who goes.
    """

    def __init__(
        self,
        tier: DiskTier,
        index: Index,
        guard: Guard,
        agreed: Agreement,
        upstairs: Upstairs,
        teller: Teller,
        remover: Remover,
    ) -> None:
        self._tier = tier
        self._store = tier.store
        self._index = index
        self._guard = guard
        self._agreed = agreed
        self._upstairs = upstairs
        self._teller = teller
        self._remover = remover
        self.evictions = 0

    def _read_limits(self) -> DiskLimits:
        return DiskLimits(self._tier.budget, self._tier.min_free, self._store.free(), self._store.total())

    def reserve(self, staging: Staging, amount: int) -> None:
        """Make a reservation larger, evicting or waiting where that is needed.

        Raises:
            TooLarge: it can never fit within the budget.
            NoRoom: what is in the way is leased, or not ours.
            FetchedElsewhere: another process is fetching it already.
            Contention: give up, and try again with more.
            OSError: the disk is full, or broken.
        """
        swept, looked = False, 0.0
        while True:
            limits = self._read_limits()
            if limits.budget is not None and staging.beside + staging.reserved + amount > limits.budget:
                raise too_large(staging.wish.model, staging.reserved + amount, staging.beside, limits.budget)
            decision = self._evict(staging, amount, limits, evict=swept)
            if decision.granted:
                return
            with self._guard:
                behind = self._behind(staging)
                pinned = self._others(staging)
            if not swept:  # what dead processes left goes before anything that can be served
                sweep(self._store)
                swept, looked = True, time.monotonic()
            elif decision.victims:
                continue
            elif (
                behind
                or decision.shortage.missing <= 0
                or not self._upstairs.give_up(
                    pinned, decision.shortage.reason, decision.shortage.figures, staging.wish.model
                )
            ):
                self._wait(staging, amount, decision)
                waits = self._index.others.sharing or self._index.moving()  # perhaps for one that has died since
                swept = not waits or time.monotonic() < looked + RECHECK

    def _evict(self, staging: Staging | None, amount: int, limits: DiskLimits, *, evict: bool) -> _Decision:
        """Set the bytes aside, or have just enough go, where that may be."""
        with self._remover.duty() as due:
            decision = self._decide(staging, amount, limits, due, evict=evict)
            if decision.victims:
                self._teller.tell(decision.told)
                self._remover.remove(decision.victims)
        return decision

    def _decide(
        self, staging: Staging | None, amount: int, limits: DiskLimits, victims: list[Item], *, evict: bool
    ) -> _Decision:
        """Set the bytes aside, or mark who is to go; what this process knows changes only if all do."""
        index, for_model = self._index, staging.wish.model if staging is not None else None

        def decide(book: Book) -> _Decision:
            self._agreed.learn(book)
            now = attrs.evolve(limits, budget=self._tier.budget, min_free=self._tier.min_free)  # as assigned meanwhile
            if staging is not None and not staging.reserved:
                self._agreed.check_single(book, staging)
            with self._guard:
                shortage = index.shortage(amount, now)
                behind = staging is not None and self._behind(staging)
                spared = staging.wish.spared() if staging is not None else ()
                able = evict and not behind and not shortage.fits
                victims[:] = index.choose(shortage.missing, spared) if able else []
                told = [self._evicted(item, shortage, for_model) for item in victims]
                for item in victims:
                    item.was = item.state
                    index.become(item, State.LEAVING)
                grounds = index.grounds()
            if victims:
                self._agreed.mark(book, victims, State.LEAVING)
            granted = shortage.fits and not behind
            if granted and staging is not None:
                staging.wanted = 0
                self._agreed.hold(book, staging, staging.reserved + amount)
            elif staging is not None and behind and staging.listed and not staging.reserved:
                self._agreed.withdraw(book, staging)  # others neither wait for it, nor for what it wants
            elif staging is not None and staging.wanted:
                self._agreed.ask(book, staging)
            return _Decision(shortage, granted, list(victims), told, grounds)

        check = None if staging is None else functools.partial(self._check, staging)
        decision = self._agreed.change(decide, check)
        if staging is not None:
            self._note(staging, granted=decision.granted)
        return decision

    def _note(self, staging: Staging, *, granted: bool) -> None:
        """Take note of what was agreed on."""
        with self._guard:
            if granted:
                staging.wish.refused(None)
            elif not staging.lacking:
                self._guard.notify()  # who gives way to it learns of it
            staging.lacking = not granted

    def _check(self, staging: Staging) -> None:
        with self._guard:
            staging.wish.check()

    def _others(self, staging: Staging) -> list[str]:
        """Return the models that could give up their files: not this one, whose old version stays until then."""
        spared = {staging.wish.model, *staging.wish.spared()}
        return [model for model in self._index.pinned() if model not in spared]

    def _behind(self, staging: Staging) -> bool:
        """Whether a request lacks room, here or elsewhere, and this is for none; the guard is held."""
        pressed = self._index.pressed() or self._index.others.pressed
        return pressed and not staging.wish.urgent and not staging.wish.nested

    def _wait(self, staging: Staging, amount: int, decision: _Decision) -> None:
        """Wait for something to change.

        Raises:
            NoRoom: nothing will.
            Cancelled: it was told to stop, or nobody waits for it any more.
            Contention: two fetches hold what the other needs.
        """
        wish, shortage = staging.wish, decision.shortage
        with self._guard:
            behind = self._behind(staging)
        if not behind and staging.wanted != amount and (self._index.others.sharing or self._index.read_elsewhere()):
            staging.wanted = amount  # or two processes would wait for one another
            self._agreed.change(lambda book: self._agreed.hold(book, staging, staging.reserved))
        with self._guard:
            others = self._index.stagings - {staging}
            moving = self._index.moving() or self._index.others.moving or any(not other.waiting for other in others)
            sharing = self._index.others.sharing or any(other.reserved for other in others)
            behind = self._behind(staging)
            state, wish.state = wish.state, "waiting for room"
            try:
                wish.check()
                if behind and staging.reserved:
                    raise Contention(staging.reserved + amount)
                if behind:
                    staging.waiting = True
                    self._stand_behind(staging)
                if behind or shortage.fits or decision.grounds != self._index.grounds():
                    return
                if shortage.missing > 0 and self._upstairs.idle(self._others(staging)):
                    return  # it became idle since it was asked for
                refusal = no_room(
                    wish.model, amount, shortage, self._store.path, self._upstairs.holders(self._index.pinned())
                )
                wish.refused(refusal)
                rivals = self._rivals(others, wish) or self._index.others.sharing
                if staging.reserved and rivals and not moving:
                    raise Contention(staging.reserved + amount)
                stays = moving or sharing or self._index.read_elsewhere() or wish.relieved()
                if not stays and wish.hopeless():
                    raise refusal
                staging.waiting = True
                self._guard.wait(RECHECK)
            finally:
                staging.waiting = False
                wish.state = state

    def _stand_behind(self, staging: Staging) -> None:
        """Wait for a moment, or until nothing goes before it any more; the guard is held."""
        until = time.monotonic() + RECHECK
        while self._behind(staging) and (left := until - time.monotonic()) > 0:
            staging.wish.check()
            self._guard.wait(left)

    @staticmethod
    def _rivals(others: Iterable[Staging], wish: Wish) -> bool:
        """Whether others hold a share and would not give it to this one of themselves; the guard is held."""
        urgent = wish.urgent
        return any(other.reserved and (other.wish.urgent or not urgent) for other in others)

    def _evicted(self, item: Item, shortage: DiskShortage, for_model: str | None) -> Event:
        self.evictions += 1
        return Evicted(
            seq=self._teller.number(),
            time=time.time(),
            model=item.model,
            tier="disk",
            reason=shortage.reason,
            bytes=item.bytes,
            for_model=for_model,
            **shortage.figures,
        )

    def help_others(self) -> None:
        """Evict the coldest idle model from memory where another process waits for the room that its files take.

        Raises:
            OSError: the disk is full, or broken.
        """
        with self._guard:
            pinned = self._index.pinned()
        if not pinned or not self._store.writable:
            return
        self._agreed.look_at_others()
        if not (wanted := self._index.others.wanted):
            return
        limits = self._read_limits()
        with self._guard:
            shortage = self._index.shortage(wanted, limits)
        if shortage.missing > 0:
            self._upstairs.give_up(pinned, shortage.reason, shortage.figures, "")

    def shrink(self) -> None:
        """Evict what a lowered budget or a raised ``min_free`` demands; returns once all that may go is gone.

        Raises:
            OSError: the disk is full, or broken.
        """
        self._remover.clear()
        while self._store.writable:
            decision = self._evict(None, 0, self._read_limits(), evict=True)
            shortage, victims = decision.shortage, decision.victims
            with self._guard:
                pinned = self._index.pinned()
                self._upstairs.unmet(over=shortage.missing > 0 and not victims and bool(pinned))
                self._guard.notify()  # a raised budget lets waiting fetches go on
            if victims:
                continue
            if shortage.missing <= 0 or not self._upstairs.give_up(pinned, shortage.reason, shortage.figures, ""):
                return
