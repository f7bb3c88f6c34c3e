"""What the disk tier decides about: published folders, stagings, limits, and what is lacking.

Who decides is ``disk.index``.
"""

import secrets
from pathlib import Path
from typing import Protocol

import attrs

from modelcache.disk.layout import ARTIFACT, Record
from modelcache.disk.states import State
from modelcache.errors import NoRoom
from modelcache.events import Reason

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
    """One published folder, as this process knows it; there may be very many, so it is one object.

    Attributes:
        name: of the folder.
        model: as all that follows, what its record says.
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
    model: str
    source: str
    version: str
    single: str | None
    size: int
    fetched: float
    fetch_seconds: float
    bytes: int
    digest: str
    used: float
    uses: int = 0
    state: State = State.PRESENT
    was: State = State.PRESENT
    pins: int = 0
    verified: bool = False
    read_elsewhere: float = 0.0
    stuck: float = 0.0

    @property
    def record(self) -> Record:
        """What it says of itself."""
        return Record(
            self.model,
            self.source,
            self.version,
            self.single,
            self.size,
            self.fetched,
            self.fetch_seconds,
            self.bytes,
            self.digest,
        )


@attrs.define(eq=False)
class Staging:
    """A folder in which an artifact is built, with the bytes reserved for it.

    Attributes:
        wish: for whom.
        folder: where; it becomes the published folder.
        id: under which the ledger knows it.
        reserved: bytes set aside in the budget.
        charged: bytes of these that were written or are about to be.
        recorded: how many of these are for the record.
        told: how many of these the ledger knows of.
        waiting: it can't go on before others give room.
        wanted: bytes that others were told it waits for.
        listed: whether the ledger knows of it.
        beside: bytes of the version on disk that stays until this one is published.
        known: name of the folder of that version; empty where there is none.
        lacking: it has asked for room that is not there yet.
        asked: monotonic time at which others were last told that a request waits for what it wants; 0: none does.
    """

    wish: Wish
    folder: Path
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    reserved: int = 0
    charged: int = 0
    recorded: int = 0
    told: int = 0
    waiting: bool = False
    wanted: int = 0
    listed: bool = False
    beside: int = 0
    known: str = ""
    lacking: bool = False
    asked: float = 0.0

    def note(self, reserved: int, told: int) -> None:
        """Take note of what the ledger has for it; the guard is held."""
        self.reserved, self.told, self.listed = reserved, told, True

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
        pressed: whether a request in another process lacks some of these.
    """

    reserved: int = 0
    unwritten: int = 0
    sharing: bool = False
    moving: bool = False
    wanted: int = 0
    pressed: bool = False
