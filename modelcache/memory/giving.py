"""Giving way to another process under the same memory limit: whoever has the least worthy model of all evicts it.

How one asks for that is ``memory.neighbours``.
"""

import time
from typing import Any, Generic, TypeVar

import attrs

from modelcache.disk.accounts import Account, read_accounts, write_account
from modelcache.disk.book import Book
from modelcache.events import Reason
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.neighbours import Neighbours, lowest
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import MemoryTier
from modelcache.telling import Teller

T = TypeVar("T")


@attrs.frozen
class _Promise:
    """What is given up for whom.

    Attributes:
        to: the process that asked.
        account: what it said.
        entry: the model.
    """

    to: str
    account: Account
    entry: Entry[Any]


class Giving(Generic[T]):
    """Answers other processes.

    Concurrency: any thread, without the guard; the bell's calls it.

    Args:
        tier: settings and gauge.
        residents: who is in memory.
        guard: the cache's lock.
        evictor: carries out evictions.
        neighbours: the other processes.
        teller: has kept what callbacks raised.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        guard: Guard,
        evictor: Evictor[T],
        neighbours: Neighbours[T],
        teller: Teller,
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._evictor = evictor
        self._neighbours = neighbours
        self._teller = teller
        self._answering = self._again = False
        neighbours.heard = self._heard

    def _heard(self) -> None:
        """Answer, on the bell's thread, on which nobody could catch what a callback raises."""
        self.answer()
        self._teller.drop()

    def reset_after_fork(self) -> None:
        """In a child: nobody has asked us yet."""
        self._answering = self._again = False

    def answer(self) -> None:
        """Say how this process stands, and evict its least worthy models as long as no other has a less worthy one."""
        with self._guard:
            self._again = True
            if self._answering:
                return  # whoever does looks again
            self._answering = True
        try:
            while self._go_on():
                self._answer()
        finally:
            with self._guard:
                self._answering = False

    def _go_on(self) -> bool:
        with self._guard:
            again, self._again = self._again, False
            self._answering = again
            return again

    def _answer(self) -> None:
        scope, owner = self._neighbours.joined
        while owner and self._neighbours.scope == scope:
            told = self._neighbours.change(lambda book: self._decide(book, scope, owner))
            promise, waiting = told or (None, [])
            if promise is None:
                for each in waiting:
                    self._neighbours.ring(each)
                return
            self._keep(promise, scope)

    def _decide(self, book: Book, scope: str, me: str) -> tuple[_Promise | None, list[str]]:
        """Say how this process stands; return what it is to give up, or else who waits for an answer."""
        before = read_accounts(book, scope)
        others = self._neighbours.living(before)
        asking = sorted((row.asked, owner) for owner, row in others.items() if row.wants > 0)
        rows = self._neighbours.tell(book, scope, answered=time.monotonic())
        with self._guard:
            account, entry = self._neighbours.account()
        mine, waiting = attrs.evolve(rows[me], model=account.model, rank=account.rank, bytes=account.bytes), []
        for asked, owner in asking:
            row = others[owner]
            rivals = {name: each for name, each in others.items() if name not in row.without}
            heard = all(each.answered >= asked for name, each in rivals.items() if name not in {me, owner})
            if heard and entry is not None and me not in row.without and lowest({**rivals, me: mine}) == me:
                write_account(book, scope, owner, attrs.evolve(row, wants=max(row.wants - entry.bytes, 0)))
                write_account(book, scope, me, attrs.evolve(mine, giving=max(entry.bytes, 1)))
                return _Promise(owner, row, entry), []
            last = before.get(me, Account())
            owed = last.answered < asked or lowest({**rivals, me: last}) == me
            if owed:  # else it knows, and two that wait would ring for ever
                waiting.append(owner)
        return None, waiting

    def _keep(self, promise: _Promise, scope: str) -> None:
        """Evict what was promised; what can't be, as it was leased meanwhile, is taken back."""
        kept = False
        try:
            kept = self._evict(promise)
        finally:
            self._neighbours.change(lambda book: self._kept(book, scope, promise, kept=kept))
            self._neighbours.ring(promise.to)

    def _evict(self, promise: _Promise) -> bool:
        row, limits = promise.account, self._tier.limits()
        shortage = Shortage(False, row.wants, 0, 0, Reason.NEIGHBOUR, row.figures)  # noqa: FBT003 - its first field
        with self._guard:
            entry = next((each for each in self._residents.entries() if each is promise.entry), None)
            victims = [entry] if entry is not None and self._residents.retire(entry, Reason.NEIGHBOUR) else []
            self._evictor.announce(victims, shortage, row.for_model)
        self._evictor.evict(list(victims), limits, Reason.NEIGHBOUR)
        return bool(victims)

    def _kept(self, book: Book, scope: str, promise: _Promise, *, kept: bool) -> None:
        self._neighbours.tell(book, scope, giving=0)
        row = read_accounts(book, scope).get(promise.to)
        if not kept and row is not None and row.asked == promise.account.asked:
            write_account(book, scope, promise.to, attrs.evolve(row, wants=row.wants + promise.entry.bytes))
