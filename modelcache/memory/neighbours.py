"""The processes that share a memory limit, as this one knows them, and what it tells them of itself.

They share a gauge's limit (``Gauge.shared``) and a disk folder, in whose ledger each has its account. Nothing is looked
at there but by a load, and where memory is short. Asking the others for room is ``memory.asking``, giving way to them
``memory.giving``.
"""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import attrs

from modelcache.disk.accounts import Account, erase_accounts, read_accounts, write_account
from modelcache.disk.book import Book
from modelcache.disk.ledger import patience
from modelcache.disk.store import Store
from modelcache.guard import Guard
from modelcache.memory.bell import Bell, lives, ring
from modelcache.memory.choosing import Choosing
from modelcache.memory.entries import Entry
from modelcache.memory.evicting import Evictor
from modelcache.memory.residents import Residents
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import MemoryTier
from modelcache.memory.worthiness import Worthiness, kind_of_policy
from modelcache.telling import complain

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 1.0  # seconds that the ledger is waited for while another process is in the middle of a change
_REST = 5.0  # seconds for which each process is for itself after the ledger could not be had


class Neighbours(Generic[T]):
    """The other processes under the same memory limit.

    Concurrency: any thread, without the guard, unless it says otherwise.

    Args:
        tier: the gauge, and how long to wait.
        residents: what is in memory here.
        choosing: who would go next.
        guard: the cache's lock.
        evictor: whether evictions rest.
        store: the folder whose ledger they agree in.

    Attributes:
        looks: how often the ledger was looked at or written to.
        others: what those that live have said, at the last look.
        heard: what is done when somebody rings; set once.
        rings: how often somebody has rung, as counted under the guard once it was heard.
    """

    def __init__(
        self,
        tier: MemoryTier,
        residents: Residents[T],
        choosing: Choosing[T],
        guard: Guard,
        evictor: Evictor[T],
        store: Store,
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._choosing = choosing
        self._guard = guard
        self._evictor = evictor
        self._store = store
        self._worthiness = Worthiness(tier.policy, residents)
        self._bell = Bell(self._ring_heard)
        self.heard: Callable[[], None] = lambda: None
        self.looks = 0
        self._closed = False
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """In a child: what the parent has told is not ours; it joins with its own first load."""
        self._bell.reset_after_fork()
        self._joined = ("", "")  # scope, and owner under which the others know this process
        self.rings = 0
        self._told = 0
        self._resting = 0.0
        self._forget()

    def _forget(self) -> None:
        self.others: dict[str, Account] = {}
        self.deficit = 0
        self._choosing.elsewhere = 0

    @property
    def scope(self) -> str | None:
        """Under what those who can agree know one another; None: there is nobody to agree with."""
        if self._closed or not self._store.writable or time.monotonic() < self._resting or self._store.ledger.busy:
            return None
        shared = self._tier.shared
        return None if shared is None else f"{shared} {kind_of_policy(self._tier.policy)}"

    @property
    def joined(self) -> tuple[str, str]:
        """Scope, and the name under which the others know this process; empty: they do not."""
        return self._joined

    def bell_of(self, owner: str) -> Path:
        """Return where a process's bell hangs."""
        return self._store.path / "tmp" / owner / "bell"

    def change(self, decide: Callable[[Book], R]) -> R | None:
        """Run a transaction of the ledger; None where that can't be done soon: then each process is for itself."""
        return self._run(lambda: self._store.ledger.change(decide, patience(_PATIENCE)))

    def _run(self, transact: Callable[[], R]) -> R | None:
        if self._closed or time.monotonic() < self._resting:
            return None
        self.looks += 1
        try:
            return transact()
        except (OSError, sqlite3.Error, RuntimeError) as error:  # RuntimeError: no thread for the bell
            self._resting = time.monotonic() + _REST
            self._forget()
            complain("the ledger in %s can't be written: no agreement on memory now", self._store.path, error=error)
            return None

    def look(self) -> dict[str, Account]:
        """Learn what the others have said, and join them; nothing is looked at where no limit is shared."""
        scope = self.scope
        if scope is None:
            self._leave()
            return {}
        if self._joined != (scope, self._store.owner) and not self._join(scope):
            return {}
        rows = self.read(scope)
        return {} if rows is None else self._take(rows)

    def read(self, scope: str) -> dict[str, Account] | None:
        """Return what all have said, the dead too; None where that can't be had."""
        return self._run(lambda: self._store.ledger.look(lambda book: read_accounts(book, scope)))

    def _join(self, scope: str) -> bool:
        self._leave()
        owner = self._store.owner

        def join() -> bool:
            self._bell.hang(self.bell_of(owner), self._store.mode)
            self._joined = (scope, owner)
            self._store.ledger.change(lambda book: self.tell(book, scope), patience(_PATIENCE))
            return True

        joined = bool(self._run(join))
        if not joined:
            self._joined = ("", "")
        return joined

    def _leave(self) -> None:
        """Be for itself: the gauge has come to stand under another limit, or under none."""
        _, owner = self._joined
        if not owner or self._store.ledger.busy or time.monotonic() < self._resting:
            return
        self._forget()
        self._bell.take_down()
        self._run(lambda: self._store.ledger.change(lambda book: erase_accounts(book, [owner]), patience()))
        self._joined = ("", "")

    def close(self) -> None:
        """Leave for good; the others hear nothing of this process any more."""
        self._leave()
        self._closed = True
        self._bell.take_down()

    def _take(self, rows: dict[str, Account]) -> dict[str, Account]:
        """Keep what those who live have said, and return it."""
        others = self.living(rows)
        with self._guard:
            self.others = others
            self.deficit = sum(account.deficit for account in others.values())
            self._choosing.elsewhere = sum(account.reserved for account in others.values())
        return others

    def living(self, rows: dict[str, Account]) -> dict[str, Account]:
        """Return what those others said that live."""
        _, mine = self._joined
        return {owner: row for owner, row in rows.items() if owner != mine and lives(self.bell_of(owner))}

    def ring(self, owner: str) -> None:
        """Wake another process."""
        ring(self.bell_of(owner))

    def _ring_heard(self) -> None:
        try:
            self.heard()
        finally:
            with self._guard:
                self.rings += 1
                self._guard.notify()

    def account(self) -> tuple[Account, Entry[T] | None]:
        """Return what is to be said of this process now, and its least worthy model; the guard is held."""
        residents = self._residents
        residents.drain()
        entry = None if self._evictor.stopped() else self._choosing.least()
        idle = [each for each in residents.entries() if not (each.held() or each.inherited)] if entry else []
        account = Account(
            held=residents.occupied(),
            idle=sum(each.bytes for each in idle),
            guessed=any(not each.sure for each in idle),
            reserved=sum(plan.peak for plan in residents.reserved.values()),
            moves=residents.churn,
            deficit=residents.deficit,
            model=entry.model if entry else None,
            rank=self._worthiness.rate(entry) if entry else None,
            bytes=entry.bytes if entry else 0,
        )
        return account, entry

    def tell(self, book: Book, scope: str, **fields: Any) -> dict[str, Account]:
        """Say how this process stands now, and ``fields``; return what all have said. Drops those that are dead."""
        rows, (_, owner) = read_accounts(book, scope), self._joined
        with self._guard:
            account, _ = self.account()
        others = self.living(rows)
        erase_accounts(book, rows.keys() - others.keys() - {owner})
        before = rows.get(owner, Account())
        kept = {name: getattr(before, name) for name in _ASKING}
        rows = {**others, owner: attrs.evolve(account, **{**kept, **fields})}
        write_account(book, scope, owner, rows[owner])
        self._told = account.reserved
        return rows

    def claim(self, known: dict[str, Account]) -> bool:
        """Tell the others what was just set aside here; False: they have set aside more since they were looked at.

        So that two processes do not both count on the same free memory. What they have loaded since counts likewise: it
        is perhaps not in the reading yet.

        Args:
            known: what ``look`` returned before the gauge was read.
        """
        scope, owner = self._joined
        if not owner:
            return True
        most = sum(each.reserved for each in known.values())

        def decide(book: Book) -> bool:
            others = self.living(read_accounts(book, scope))
            new = others.keys() - known.keys()
            if new or any(each.moves != known[name].moves for name, each in others.items()):
                return False
            if sum(each.reserved for each in others.values()) > most:
                return False
            self.tell(book, scope)
            return True

        return self.change(decide) is not False

    def settle(self) -> None:
        """Tell the others that a load has ended, however it did."""
        scope, owner = self._joined
        if not owner:
            return
        with self._guard:
            reserved = sum(plan.peak for plan in self._residents.reserved.values())
            if reserved == self._told == 0:
                return
        self.change(lambda book: self.tell(book, scope))

    def apply(self, shortage: Shortage) -> bool:
        """Whether others can help: what lacks is the limit's, not a budget's of this process; the guard is held."""
        return bool(self.others) and shortage.over_high > 0 and shortage.over_budget <= 0 and shortage.over_count <= 0

    def hopeful(self, shortage: Shortage) -> bool:
        """Whether the others have, or load, so much that what lacks may come from them in time; the guard is held."""
        return self.apply(shortage) and shortage.over_high <= sum(
            account.held + account.reserved + account.giving for account in self.others.values()
        )


_ASKING = ("answered", "giving", "asked", "wants", "common", "for_model", "without", "figures")


def lowest(rows: dict[str, Account]) -> str | None:
    """Return who has the least worthy model; None where nobody has one that may go."""
    ranked = [(row.rank, name) for name, row in rows.items() if row.rank is not None]
    return min(ranked)[1] if ranked else None
