"""Names and records of the disk tier: how a model id becomes a folder, and what each folder says of itself.

::

    <path>/modelcache.json                         {"format": 2}
    <path>/ledger.sqlite3                          what all processes agree on (``disk.ledger``)
    <path>/leases                                  locks on parts of it say who reads what (``disk.pins``)
    <path>/models/<readable>-<hash>.<generation>/  one published artifact, whole or not there
        record.json                                what it is (``Record``): the ledger can be rebuilt from these
        figures.json                               what it takes in memory (``disk.figures``)
        artifact/                                  what the loader gets, or the single file in it
    <path>/tmp/<process>/                          what one live process stages or removes: a folder as above, in whose
                                                   record.json there is a ``Draft`` until it is complete

A generation is never changed once it is published: a new version is a new folder. Reading and writing
these is ``disk.store``; which of them may stay is ``disk.tier``.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

FORMAT = 2
"""Version of this layout; a folder with a newer one is refused, an older one is fetched again."""

MARKER = "modelcache.json"
RECORD = "record.json"
ARTIFACT = "artifact"
UNSEALED = "0" * 64
"""Digest in a record whose artifact is being brought to the disk."""

_PUBLISHED = re.compile(r"[a-z0-9._]{1,40}-[0-9a-f]{32}\.[0-9a-f]{8}")
_DIGITS = 20  # room for any number of bytes
_UNREADABLE = re.compile(r"[^a-z0-9._]+")
_FAR = 2.0**63  # no number of ours comes there, nor can the ledger keep it
_decode = json.JSONDecoder().raw_decode  # half the time of json.loads


class Record(NamedTuple):
    """What is known of one published artifact; stored beside it. A tuple, since there may be very many.

    Attributes:
        model: its id.
        source: URL of the source it came from.
        version: the source's version of it.
        single: name of the single file under ``artifact/``; None where the folder itself is the artifact.
        size: bytes of its files as they read (not as allocated).
        fetched: seconds since the epoch at which it was published.
        fetch_seconds: how long fetch and unpacking took.
        bytes: what the file system allocated for the whole folder.
        digest: of the artifact (``disk.digests``).
    """

    model: str
    source: str
    version: str
    single: str | None
    size: int
    fetched: float
    fetch_seconds: float
    bytes: int = 0
    digest: str = ""

    def to_json(self) -> str:
        """Return the text of ``record.json``; its length does not depend on ``bytes``."""
        text = json.dumps({"format": FORMAT, **self._asdict()}, ensure_ascii=True)
        return text + " " * (_DIGITS - len(str(self.bytes)))

    @classmethod
    def from_json(cls, text: str) -> "Record | None":
        """Return the record in ``text``; None where it is damaged, or of another format."""
        try:
            fields: dict[str, Any]
            fields, end = _decode(text)
            if fields.pop("format") != FORMAT or text[end:].strip():
                return None
            record = cls._make(_values(fields)) if len(fields) == len(cls._fields) else cls(**fields)
            if "\\u" in text:
                "".join(map(str, record)).encode()  # a lone surrogate raises ValueError: the ledger could not keep it
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return record if _sound(record) else None

    def path(self, folder: Path) -> Path:
        """Return what the loader gets, for a record that lies in ``folder``."""
        return folder / ARTIFACT if self.single is None else folder / ARTIFACT / self.single


class Draft(NamedTuple):
    """What a folder says of itself while an artifact is staged in it, in the place of its record.

    Attributes:
        hold: under which id the ledger has set bytes aside for it.
        source: URL of its source.
        model: its id.
        reserved: bytes that were set aside at the beginning.
    """

    hold: str
    source: str
    model: str
    reserved: int

    def to_json(self) -> str:
        """Return the text."""
        return json.dumps({"draft": FORMAT, **self._asdict()}, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Draft | None":
        """Return the draft in ``text``; None where that is something else."""
        try:
            fields = json.loads(text)
            draft = cls(**fields) if fields.pop("draft") == FORMAT else None
            "".join(draft[:-1] if draft else ()).encode()  # what is no text, or a lone surrogate, raises
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return draft if draft and type(draft.reserved) is int and 0 <= draft.reserved < _FAR else None


_values = itemgetter(*Record._fields)
_TYPES = {
    (str, str, str, single, *numbers, str)
    for single in (str, NoneType)
    for numbers in itertools.product((int, float), repeat=4)
}


def _sound(record: Record) -> bool:  # with few looks: there may be very many
    if (*map(type, record),) not in _TYPES:
        return False
    _, _, _, single, size, fetched, seconds, allocated, _ = record
    if not (0 <= size < _FAR and -_FAR < fetched < _FAR and -_FAR < seconds < _FAR and 0 <= allocated < _FAR):
        return False
    return single is None or ("/" not in single and single not in {".", ".."})


def folder_prefix(source: str, model: str) -> str:
    """Return how every generation of one model's folder begins, ``.`` included.

    Readable, and injective whatever the file system does with case and Unicode: 128 bits of SHA-256 over
    source and id tell apart what the readable part does not.
    """
    digest = hashlib.sha256(f"{source}\0{model}".encode()).hexdigest()[:32]
    readable = _UNREADABLE.sub("_", model.lower())[-40:].strip("._") or "model"
    return f"{readable}-{digest}."


def published(names: Iterable[str]) -> list[str]:
    """Return which of the names under ``models/`` are ours."""
    match = _PUBLISHED.fullmatch
    return [name for name in names if match(name)]
