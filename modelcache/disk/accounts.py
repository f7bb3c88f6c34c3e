"""What each process that shares a memory limit says of its memory in the ledger, and what it asks of the others.

One row for each cache. What is done with them is ``memory.neighbours`` and ``memory.giving``; the ledger is a memory,
so a row may be of a process that has died: who reads it looks whether its bell is still there (``memory.bell``).
"""

import json
from collections.abc import Iterable

import attrs

from modelcache.disk.book import Book


@attrs.frozen(kw_only=True)
class Account:
    """What one process says; times are those of the machine's monotonic clock, which all its processes share.

    Attributes:
        held: bytes of the models that it has in memory.
        idle: of these, bytes that may go now.
        guessed: whether some of those were never measured, so that more may come back.
        reserved: bytes set aside for its loads under way.
        moves: how often something came or went there: what a load took is in every reading made after it has ended.
        deficit: bytes above ``high`` that its loads took beyond what was expected of them.
        model: its least worthy model; None: none may go.
        rank: what that one is worth, comparable between processes; None: none may go.
        bytes: what its going gives back.
        answered: when it last answered what the others ask.
        giving: bytes that it is giving up for another process just now.
        asked: when it asked the others for room.
        wants: bytes that it asks for, less what the others have promised; 0: it asks for nothing.
        common: whether it asks since all use is too much, rather than for a load of its own.
        for_model: the model that it would load.
        without: processes that it no longer waits for, as they did not answer.
        figures: the reading and threshold that say what it lacks, as fields of an event.
    """

    held: int = 0
    idle: int = 0
    guessed: bool = False
    reserved: int = 0
    moves: int = 0
    deficit: int = 0
    model: str | None = None
    rank: float | None = None
    bytes: int = 0
    answered: float = 0.0
    giving: int = 0
    asked: float = 0.0
    wants: int = 0
    common: bool = False
    for_model: str | None = None
    without: tuple[str, ...] = ()
    figures: dict[str, int] = attrs.Factory(dict)


def read_accounts(book: Book, scope: str) -> dict[str, Account]:
    """Return what all processes under one limit have said, by owner."""
    found = book.sql("SELECT owner, account FROM memory WHERE scope = ?", (scope,)).fetchall()
    return {owner: _parsed(text) for owner, text in found}


def write_account(book: Book, scope: str, owner: str, account: Account) -> None:
    """Say something in place of what a process said before."""
    text = json.dumps(attrs.asdict(account))
    book.sql("INSERT OR REPLACE INTO memory VALUES (?, ?, ?)", (owner, scope, text))


def erase_accounts(book: Book, owners: Iterable[str]) -> None:
    """Forget processes that are dead, or do not share a limit any more."""
    for owner in owners:
        book.sql("DELETE FROM memory WHERE owner = ?", (owner,))


def _parsed(text: str) -> Account:
    fields = json.loads(text)
    fields["without"] = tuple(fields["without"])
    return Account(**fields)
