"""``Book``: what the processes that share a disk folder agree on, as one transaction reads and writes it.

Published folders with their recency, and the bytes that are set aside for those on their way. Each change has a
number, so that a process reads only what is new to it. How a transaction comes about is ``disk.ledger``; what is
decided in one, ``disk.index`` and ``disk.reserving``.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import attrs

from modelcache.disk.layout import Record
from modelcache.disk.states import STATES, State
from modelcache.policies.worth import HALVED_ABOVE, REMEMBERED

_ASK = """
INSERT INTO requests VALUES (:source, :model, 1, :clock, :clock, :seq) ON CONFLICT(source, model) DO UPDATE SET
    n = CASE WHEN n + 1 > :most THEN (n + 1) / 2 ELSE n + 1 END,
    first = CASE WHEN n + 1 > :most THEN :clock - (:clock - first) / 2 ELSE first END,
    last = :clock, seq = :seq
"""
_FORGET = """
DELETE FROM requests WHERE seq <= (SELECT seq FROM requests ORDER BY seq DESC LIMIT 1 OFFSET :kept)
"""
_SELDOM = 256  # requests between two looks at how many models are remembered
_KEPT = 4096  # changes for which it is remembered what has gone

_COLUMNS = (
    "name, model, source, version, single, size, fetched, fetch_seconds, bytes, digest, used, state, owner, uses, by"
)

_FILL = f"INSERT INTO artifacts({_COLUMNS}) VALUES ({', '.join('?' * 15)})"  # noqa: S608 - no input

Row = tuple[str, str, str, str, str | None, int, float, float, int, str, float, int, str | None, int, str | None]
"""One published folder, as the table ``artifacts`` has it: name, record, used, state, owner, uses, by.

A plain tuple: there may be very many. Seconds since the epoch of its last use, what is to become of it (``State``, as a
number), the process that brings or removes it (None where nobody does), how often it was used, and the process that
used it last.
"""

USED: Final = 10
"""Where a ``Row`` tells of the last use."""


class Made(NamedTuple):
    """What was just written into a new ledger, so that who wrote it need not read it.

    Attributes:
        epoch: which ledger it is.
        seq: number of the change; while there is no later one, this is all there is.
        rows: the published folders.
    """

    epoch: str
    seq: int
    rows: list[Row]


@attrs.frozen
class Hold:
    """Bytes that are set aside: for an artifact on its way, or since its remains could not be deleted yet.

    Attributes:
        id: random.
        owner: the process.
        source: URL of the source; empty for remains.
        model: id of the model; empty for remains.
        reserved: bytes.
        charged: how many of these were written, when that was last told.
        wanted: bytes without which it can't go on; 0: it goes on.
        asked: when this was last told for a request that waits, by the machine's monotonic clock; 0: none waits.
    """

    id: str
    owner: str
    source: str
    model: str
    reserved: int
    charged: int
    wanted: int
    asked: float = 0.0


Asked = tuple[str, float, float, float]
"""How often a model was asked for; see ``policies.Standing``. A plain tuple, as ``Row``.

Its id, requests (halved now and then together with the time since the first), and the numbers of the requests that
count as its first and its last, among all to the folder.
"""


class Book:
    """The ledger within one transaction.

    Args:
        connection: where it runs.

    Attributes:
        undo: what is called, under the guard, where the transaction fails.
        ahead: whether changes of this very transaction were read: others give their numbers again where it fails.
        sql: runs a statement; for tables that another module knows.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._sql = self.sql = connection.execute
        self._many = connection.executemany
        self._seq: int | None = None
        self.undo: list[Callable[[], object]] = []
        self.ahead = False

    def _meta(self, key: str) -> str | int:
        (value,) = self._sql("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return value  # type: ignore[no-any-return]

    @property
    def epoch(self) -> str:
        """Which ledger this is: one that is made anew has another one."""
        return str(self._meta("epoch"))

    def _tick(self) -> int:
        """Return the number of the changes of this transaction since it last read what has changed."""
        if self._seq is None:
            self._sql("UPDATE meta SET value = value + 1 WHERE key = 'seq'")
            self._seq = int(self._meta("seq"))
        return self._seq

    def changes(self, since: int, made: Made | None = None) -> tuple[list[Row], int, bool]:
        """Return what has changed since a change, up to which one, and whether that is all there is.

        Args:
            since: number of the last change that is known; 0: none.
            made: what this process has written into a new ledger, perhaps this one.
        """
        self.ahead |= self._seq is not None
        self._seq = None
        seq = int(self._meta("seq"))
        if seq == since:
            return [], since, False
        whole = since < int(self._meta("horizon")) or since == 0
        if whole and made is not None and (made.epoch, made.seq) == (self.epoch, seq):
            return made.rows, seq, whole
        query = f"SELECT {_COLUMNS} FROM artifacts WHERE"  # noqa: S608 - no input
        if whole:
            found = self._sql(f"{query} state != ?", (State.GONE,))
        else:
            found = self._sql(f"{query} seq > ? ORDER BY seq", (since,))
        return found.fetchall(), seq, whole

    def names(self) -> dict[str, State]:
        """Return the names of all folders that are on record and not gone, and what is to become of them."""
        found = self._sql("SELECT name, state FROM artifacts WHERE state != ?", (State.GONE,))
        return {name: STATES[state] for name, state in found}

    def add(self, found: Iterable[tuple[str, Record, float]], state: State, owner: str | None) -> None:
        """Take folders in: name, record, and seconds since the epoch of the last use of each."""
        seq = self._tick()
        self._many(
            "INSERT OR REPLACE INTO artifacts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?)",
            ((name, *record, state, owner, used, owner, seq) for name, record, used in found),
        )

    def fill(self, found: Iterable[tuple[str, Record, float]]) -> Made:
        """Take in all that a new ledger begins with, as ``add`` does, but fast: without a number for each."""
        rest = (int(State.PRESENT), None, 1, None)
        rows: list[Row] = [(name, *record, used, *rest) for name, record, used in found]
        self._many(_FILL, rows)
        return Made(self.epoch, self._tick(), rows)

    def mark(self, names: Iterable[str], state: State, owner: str | None) -> None:
        """Say what is to become of folders."""
        seq = self._tick()
        self._many(
            "UPDATE artifacts SET state = ?, owner = ?, seq = ? WHERE name = ? AND state != ?",
            [(state, owner, seq, name, State.GONE) for name in names],
        )

    def expel(self, names: Iterable[str]) -> None:
        """Say of folders that somebody is removing that they are not to stay in any case; they stay that one's."""
        seq = self._tick()
        self._many(
            "UPDATE artifacts SET state = ?, seq = ? WHERE name = ? AND state = ?",
            [(State.EXPELLED, seq, name, State.LEAVING) for name in names],
        )

    def gone(self, names: Iterable[str]) -> None:
        """Say that folders are no more."""
        self.mark(names, State.GONE, None)
        seq = self._tick()
        horizon = int(self._meta("horizon"))
        if seq - horizon > 2 * _KEPT:
            self._sql("DELETE FROM artifacts WHERE state = ? AND seq < ?", (State.GONE, seq - _KEPT))
            self._sql("UPDATE meta SET value = ? WHERE key = 'horizon'", (seq - _KEPT,))

    def missing(self, name: str, taker: str | None) -> None:
        """Say that a folder is not where it should be: it is no more, or ``taker`` has moved it aside to remove it."""
        if taker is None:
            self.gone([name])
        else:
            self.mark([name], State.LEAVING, taker)

    def touch(self, uses: Iterable[tuple[str, float, int]], by: str) -> None:
        """Book uses: name, seconds since the epoch of the last one, how many."""
        seq = self._tick()
        self._many(
            "UPDATE artifacts SET used = min(max(used, ?), ?), uses = uses + ?, by = ?, seq = ? WHERE name = ?",
            [(used, time.time(), times, by, seq, name) for name, used, times in uses],  # none in the future
        )

    def ask(self, source: str, models: Iterable[str]) -> None:
        """Count memory misses, in their order; of models that nobody asks for any more only the latest are kept."""
        seq, clock = self._tick(), int(self._meta("clock"))
        before = clock
        for clock, model in enumerate(models, clock + 1):  # noqa: B020 - it goes on from there
            self._sql(_ASK, {"source": source, "model": model, "clock": clock, "seq": seq, "most": HALVED_ABOVE})
        self._sql("UPDATE meta SET value = ? WHERE key = 'clock'", (clock,))
        if before // _SELDOM != clock // _SELDOM:
            self._sql(_FORGET, {"kept": REMEMBERED})

    def asked(self, source: str, since: int) -> tuple[int, list[Asked]]:
        """Return how many requests there were, and the models that were asked for since a change.

        Models of any but the given source are named as ``named`` does.
        """
        name = "CASE source WHEN :source THEN model ELSE source || char(10) || model END"
        later = "WHERE seq > :since" if since else ""  # whose index would lead to all, one by one
        query = f"SELECT {name}, n, first, last FROM requests {later}"  # noqa: S608 - no input
        return int(self._meta("clock")), self._sql(query, {"source": source, "since": since}).fetchall()

    def holds(self) -> list[Hold]:
        """Return all that is set aside, by any process."""
        found = self._sql("SELECT id, owner, source, model, reserved, charged, wanted, asked FROM holds")
        return [Hold(*at) for at in found]

    def hold(self, hold: Hold) -> None:
        """Set bytes aside, or more or fewer of them."""
        self._sql("INSERT OR REPLACE INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?)", attrs.astuple(hold))

    def let_go(self, ids: Iterable[str]) -> None:
        """Set bytes aside no longer."""
        self._many("DELETE FROM holds WHERE id = ?", [(each,) for each in ids])

    def owners(self) -> set[str]:
        """Return all processes that have said that they use the folder, or for whom something is set aside."""
        query = "SELECT owner FROM processes UNION SELECT owner FROM holds UNION SELECT owner FROM artifacts"
        return {owner for (owner,) in self._sql(f"{query} WHERE owner IS NOT NULL")}

    def register(self, owner: str, settings: str) -> None:
        """Note a process; what is set aside for its fetches, it tells anew."""
        self._sql("INSERT OR REPLACE INTO processes VALUES (?, ?)", (owner, settings))
        self._sql("DELETE FROM holds WHERE owner = ? AND source != ''", (owner,))

    def leave(self, owner: str) -> None:
        """Forget that a process uses the folder, but nothing that is set aside for it."""
        self._sql("DELETE FROM processes WHERE owner = ?", (owner,))

    def settings(self) -> dict[str, str]:
        """Return what each process has said of itself, as JSON."""
        return dict(self._sql("SELECT owner, settings FROM processes").fetchall())

    def owned(self, owner: str) -> list[tuple[str, State]]:
        """Return the folders that a process was bringing or removing."""
        found = self._sql("SELECT name, state FROM artifacts WHERE owner = ? AND state != ?", (owner, State.GONE))
        return [(name, State(state)) for name, state in found]

    def state(self, name: str) -> State | None:
        """Return what is to become of a folder; None where it is not on record."""
        found = self._sql("SELECT state FROM artifacts WHERE name = ?", (name,)).fetchone()
        return None if found is None else STATES[found[0]]

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Return the bytes of some folders."""
        query = "SELECT bytes FROM artifacts WHERE name = ?"
        return {name: size for name in names for (size,) in self._sql(query, (name,))}

    def arriving(self, source: str, model: str) -> set[str]:
        """Return the processes that are about to publish a model."""
        query = "SELECT owner FROM artifacts WHERE owner IS NOT NULL AND state = ? AND source = ? AND model = ?"
        return {owner for (owner,) in self._sql(query, (State.ARRIVING, source, model))}

    def bury(self, owner: str) -> None:
        """Forget a process that is dead, and all that was set aside for it."""
        self._sql("DELETE FROM holds WHERE owner = ?", (owner,))
        self._sql("DELETE FROM processes WHERE owner = ?", (owner,))
        self._sql("DELETE FROM memory WHERE owner = ?", (owner,))


def named(source: str, model: str, mine: str) -> str:
    """Return what a policy calls a model: its id where it is of our source; no id has a line break."""
    return model if source == mine else f"{source}\n{model}"
