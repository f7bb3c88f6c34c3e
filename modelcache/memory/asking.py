"""Asking the other processes under a memory limit for room: the least worthy model of all is to go first.

Who they are, and what each says of itself, is ``memory.neighbours``; how they answer ``memory.giving``.
"""

import enum
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from modelcache.disk.accounts import Account, read_accounts
from modelcache.disk.book import Book
from modelcache.guard import Guard
from modelcache.memory.neighbours import Neighbours, lowest
from modelcache.memory.shortage import Shortage
from modelcache.memory.tier import MemoryTier

T = TypeVar("T")

_INTERVALS = 2  # of the monitor: the others are waited for no longer than that
_NOTHING: dict[str, Any] = {"asked": 0.0, "wants": 0, "common": False, "for_model": None, "without": (), "figures": {}}


class Verdict(enum.Enum):
    """What came of asking the others."""

    LOOK = enum.auto()
    """They have given way: look at the gauge again."""
    HELPED = enum.auto()
    """Another process had asked for the same, and was answered."""
    OWN = enum.auto()
    """The least worthy model is this process's own."""
    LATE = enum.auto()
    """They did not answer in time: each for itself."""
    WAIT = enum.auto()
    """All that may go, here and there, does not suffice."""


class Appeal(Generic[T]):
    """Asks on behalf of one cache, one question at a time.

    Concurrency: any thread, without the guard.

    Args:
        neighbours: the other processes.
        tier: how long to wait.
        guard: the cache's lock.
        answer: answers what another process has asked; see ``Giving``.

    Attributes:
        neighbours: as given.
    """

    def __init__(self, neighbours: Neighbours[T], tier: MemoryTier, guard: Guard, answer: Callable[[], None]) -> None:
        self.neighbours = neighbours
        self._tier = tier
        self._guard = guard
        self._answer = answer
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """In a child: nobody asks."""
        self._asking = False
        self._silent: dict[str, float] = {}  # who did not answer in time, and when it last had

    def ask(
        self, shortage: Shortage, for_model: str | None, check: Callable[[], None], *, common: bool = False
    ) -> Verdict:
        """Ask the others for room, and wait until the least worthy model of all has left, or is known to be ours.

        Args:
            shortage: what is lacking.
            for_model: what would be loaded.
            check: raises to stop; called with the guard held.
            common: all use is too much: then only one process asks, and the others help.
        """
        scope, owner = self.neighbours.joined
        with self._guard:
            if self._asking or not owner:
                return Verdict.OWN
            self._asking = True
        asked = time.monotonic()
        fields = {"asked": asked, "wants": shortage.over_high, "common": common, "for_model": for_model}
        try:
            rows = self.neighbours.change(lambda book: self._post(book, scope, {**fields, "figures": shortage.figures}))
            if rows is None:
                return Verdict.LATE
            if not rows[owner].wants:
                self._answer()
                return Verdict.HELPED
            try:
                for name in rows.keys() - {owner}:
                    self.neighbours.ring(name)
                return self._await(scope, asked, check)
            finally:
                self.neighbours.change(lambda book: self.neighbours.tell(book, scope, **_NOTHING))
        finally:
            with self._guard:
                self._asking = False

    def _post(self, book: Book, scope: str, fields: dict[str, Any]) -> dict[str, Account]:
        """Ask, unless somebody has asked for the same."""
        others = self.neighbours.living(read_accounts(book, scope))
        if fields["common"] and any(row.common and row.wants > 0 for row in others.values()):
            return self.neighbours.tell(book, scope)
        self._silent = {name: at for name, at in self._silent.items() if name in others and others[name].answered == at}
        return self.neighbours.tell(book, scope, **fields, without=tuple(self._silent))

    def _await(self, scope: str, asked: float, check: Callable[[], None]) -> Verdict:
        until, rung = asked + _INTERVALS * self._tier.interval, set[tuple[str, float]]()
        _, owner = self.neighbours.joined
        while True:
            with self._guard:
                seen = self.neighbours.rings
            rows = self.neighbours.read(scope)
            if rows is None:
                return Verdict.LATE
            heard = {
                name: row
                for name, row in self.neighbours.living(rows).items()
                if self._silent.get(name) != row.answered
            }
            verdict = weigh(rows.get(owner), heard, asked, owner)
            if verdict is not None:
                return verdict
            if time.monotonic() >= until:
                self._silent |= {name: row.answered for name, row in heard.items() if _owes(row, asked)}
                return Verdict.LATE
            best = lowest(heard)
            if (
                best
                and not any(_owes(row, asked) for row in heard.values())
                and (best, heard[best].answered) not in rung
            ):
                rung.add((best, heard[best].answered))  # it had left it to another one, whose worth has changed since
                self.neighbours.ring(best)
            with self._guard:
                while self.neighbours.rings == seen and (left := until - time.monotonic()) > 0:
                    check()
                    self._guard.wait(left)


def _owes(row: Account, asked: float) -> bool:
    """Whether an answer is still to come."""
    return row.answered < asked or row.giving > 0


def weigh(mine: Account | None, others: dict[str, Account], asked: float, owner: str) -> Verdict | None:
    """Return what the answers so far come to; None: more are to come.

    Args:
        mine: what this process has said, less what it was promised; None: it is not known any more.
        others: what those said that answer.
        asked: when they were asked.
        owner: this process.
    """
    if mine is None:
        return Verdict.LATE
    if any(row.giving for row in others.values()) or (
        mine.wants > 0 and any(_owes(row, asked) for row in others.values())
    ):
        return None
    if mine.wants <= 0:
        return Verdict.LOOK
    best = lowest({**others, owner: mine})
    known = [mine, *others.values()]
    enough = mine.common or any(row.guessed for row in known) or mine.wants <= sum(row.idle for row in known)
    if best is None or not enough:
        return Verdict.WAIT
    return Verdict.OWN if best == owner else None
