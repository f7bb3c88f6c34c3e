"""From a source to a staged folder: one artifact's bytes, streamed, charged to the disk tier, unpacked or written.

The source verifies and resumes (``sources``), and writes plain files itself where it can; ``archives`` unpacks
safely, the disk tier reserves and publishes (``disk.shelf``). Here they meet, for one artifact.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from modelcache.archives import Job, Writer, unpack
from modelcache.archives.names import archive_suffix, has_suffix, single_name
from modelcache.blocks import USUAL, Blocks
from modelcache.sources.base import Artifact, Saving, Source, Stream, Watchable

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
    """A stream that stops between two reads once it is told to, and tells what has come."""

    def __init__(self, stream: Stream, check: Callable[[], None], count: Callable[[int], None]) -> None:
        self._stream = stream
        self._check = check
        self._count = count
        if isinstance(stream, Watchable):
            stream.watch(check)

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
    blocks: Blocks = USUAL,
) -> Path:
    """Bring one artifact into a staged folder; return what the loader gets, still inside that folder.

    Args:
        source: where it comes from.
        artifact: what ``source.find`` gave.
        staging: where it goes; ``artifact/`` in its folder exists and is empty.
        grow: charges bytes about to be written (negative: given back); raises where there is no room.
        check: called between two reads, and now and then while bytes are waited for; raises to stop.
        mode: permissions of folders; files get the same without the execute bits.
        blocks: how the file system allocates.
        count: called with the number of stored bytes that have arrived since the last time.

    Raises:
        ModelCacheError: as ``Source.open``, ``Stream.read`` and ``archives.unpack``.
        OSError: the disk is full, or broken.
    """
    writer = Writer(staging.target, Job(artifact.model, artifact.size), grow, mode, blocks)
    if artifact.folder:
        _fetch_files(source, artifact, writer, check, count)
        writer.finish()
        return staging.target
    (file,) = artifact.files
    name = file.name.rpartition("/")[2] or artifact.model
    if isinstance(source, Saving) and archive_suffix(name) is None and has_suffix(name):
        name = single_name(name)
        source.save(artifact, lambda file: writer.reserve(name, file.size), count=count, check=check)
        return staging.target / name
    with source.open(artifact, file) as stream:
        return unpack(
            _Watched(stream, check, count),
            staging.target,
            name=name,
            model=artifact.model,
            size=file.size,
            grow=grow,
            spool=staging.spool,
            mode=mode,
            blocks=blocks,
        )


def _fetch_files(
    source: Source, artifact: Artifact, writer: Writer, check: Callable[[], None], count: Callable[[int], None]
) -> None:
    if isinstance(source, Saving):
        source.save(artifact, lambda file: writer.reserve(file.name, file.size), count=count, check=check)
        return
    for file in artifact.files:
        with source.open(artifact, file) as stream, writer.file(file.name, size=file.size) as write:
            watched = _Watched(stream, check, count)
            while chunk := watched.read(_CHUNK):
                write(chunk)
