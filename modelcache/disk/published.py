"""What a published folder says of itself, read from it; there may be very many, so with as few calls as that takes.

What is made of it is ``disk.store``.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from modelcache.disk.files import read_dated
from modelcache.disk.layout import ARTIFACT, RECORD, Record

_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Published(NamedTuple):
    """One published folder, as found.

    Attributes:
        name: of the folder.
        record: what it says of itself.
        used: seconds since the epoch of its last use.
    """

    name: str
    record: Record
    used: float


def read_records(models: str, names: Iterable[str]) -> Iterator[Published]:
    """Yield published folders, by their records alone; what is gone, damaged or a link is passed over.

    Raises:
        OSError: this process has no descriptor or memory left to look.
    """
    try:
        with os.scandir(models) as entries:
            links = {entry.name for entry in entries if entry.is_symlink()}
        at = os.open(models, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # so the system need not find it for each
    except OSError as error:
        raise_short(error)
        return
    try:
        for name in names:
            if name not in links and (found := _read_record(name, name, at)) is not None:
                yield found
    finally:
        os.close(at)


def _read_record(folder: str, name: str, at: int | None) -> Published | None:
    try:
        text, used = read_dated(f"{folder}/{RECORD}", at)
    except (OSError, UnicodeDecodeError) as error:
        raise_short(error)
        return None
    record = Record.from_json(text)
    return None if record is None else Published(name, record, used)


def read_whole(models: str, name: str) -> Published | None:
    """Return a published folder whose artifact is there; None where it is gone, damaged or not ours to trust.

    Raises:
        OSError: this process has no descriptor or memory left to look.
    """
    folder = f"{models}/{name}"  # a Path would take longer than the system does
    found = _read_record(folder, name, None)
    if found is None or os.path.islink(folder):  # noqa: PTH114 - no Paths
        return None
    single = found.record.single
    there = os.path.lexists(f"{folder}/{ARTIFACT}" + (f"/{single}" if single is not None else ""))
    return found if there else None


def raise_short(error: Exception) -> None:
    """Raise what says something of this process, and nothing of the file that it wanted to read."""
    if isinstance(error, OSError) and error.errno in _SHORT:
        raise error
