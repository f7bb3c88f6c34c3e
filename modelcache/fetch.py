"""From a source to a staged folder: one artifact's bytes, streamed, charged to the disk tier, unpacked or written.

The source verifies and resumes (``sources``), ``archives`` unpacks safely, the disk tier reserves and publishes
(``disk.shelf``). Here they meet, for one artifact.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from modelcache.archives import Job, Writer, unpack
from modelcache.sources.base import Artifact, Source, Stream

_CHUNK = 2**18


class Destination(Protocol):
    """Where an artifact is built.

    Attributes:
        target: an empty folder.
        spool: path of a temporary file, for what can't be unpacked as it streams.
    """

    @property
    def target(self) -> Path:
        """An empty folder."""
        ...

    @property
    def spool(self) -> Path:
        """Path of a temporary file."""
        ...


class _Watched:
    """A stream that stops between two reads once it is told to, and whose bytes are counted."""

    def __init__(self, stream: Stream, check: Callable[[], None], count: Callable[[int], None]) -> None:
        self._stream = stream
        self._check = check
        self._count = count

    def read(self, size: int, /) -> bytes:
        self._check()
        data = self._stream.read(size)
        self._count(len(data))
        return data


def fetch(
    source: Source,
    artifact: Artifact,
    staging: Destination,
    *,
    grow: Callable[[int], None],
    check: Callable[[], None],
    count: Callable[[int], None],
    mode: int,
) -> Path:
    """Bring one artifact into a staged folder; return what the loader gets, still inside that folder.

    Args:
        source: where it comes from.
        artifact: what ``source.find`` gave.
        staging: where it goes; ``artifact/`` in its folder exists and is empty.
        grow: charges bytes about to be written (negative: given back); raises where there is no room.
        check: called between two reads; raises to stop.
        count: called with the number of stored bytes that have arrived, after each read.
        mode: permissions of folders; files get the same without the execute bits.

    Raises:
        ModelCacheError: as ``Source.open``, ``Stream.read`` and ``archives.unpack``.
        OSError: the disk is full, or broken.
    """
    if not artifact.folder:
        (file,) = artifact.files
        with source.open(artifact, file) as stream:
            return unpack(
                _Watched(stream, check, count),
                staging.target,
                name=file.name.rpartition("/")[2] or artifact.model,
                model=artifact.model,
                size=file.size,
                grow=grow,
                spool=staging.spool,
                mode=mode,
            )
    writer = Writer(staging.target, Job(artifact.model, artifact.size), grow, mode)
    _fetch_folder(source, artifact, writer, check, count)
    return staging.target


def _fetch_folder(
    source: Source, artifact: Artifact, writer: Writer, check: Callable[[], None], count: Callable[[int], None]
) -> None:
    for file in artifact.files:
        with source.open(artifact, file) as stream, writer.file(file.name) as write:
            watched = _Watched(stream, check, count)
            while chunk := watched.read(_CHUNK):
                write(chunk)
    writer.finish()
