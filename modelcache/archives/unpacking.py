"""Decides what a file is, has it unpacked, and says where the loader finds it.

Covers the decision by name and content; the work is in ``tar``, ``zip`` and ``writer``.
"""

import io
from collections.abc import Callable
from pathlib import Path

from modelcache.archives.codecs import codec_of
from modelcache.archives.decode import Decoded, Readable, Source
from modelcache.archives.job import CHUNK, Job, Limits
from modelcache.archives.names import archive_suffix, has_suffix, single_name
from modelcache.archives.sniff import HEADER, Kind, describe, is_tar, sniff
from modelcache.archives.tar import unpack_tar
from modelcache.archives.writer import Writer
from modelcache.archives.zip import unpack_zip
from modelcache.blocks import USUAL, Blocks
from modelcache.errors import ArtifactCorrupt, UnsafeArtifact

LIMITS = Limits()
"""The limits in force."""
_HEAD = 256 * 1024  # the first zstd block may be 128 KiB before it gives its first byte


def unpack(
    stream: Readable,
    target: Path,
    *,
    name: str,
    model: str,
    size: int,
    grow: Callable[[int], None],
    spool: Path,
    mode: int = 0o700,
    blocks: Blocks = USUAL,
) -> Path:
    """Make a folder or a file of the bytes of one file; the package's docstring has the rules.

    Nothing is synced. After an error ``target`` holds junk; ``spool`` is gone in any case. The stream is read to
    its end before success, and before the bytes are called corrupt or unsafe, so that the source has checked them.

    Concurrency: blocks on ``stream`` and on the disk; touches only ``target`` and ``spool``.

    Args:
        stream: the bytes as stored.
        target: an empty folder to fill, which nobody else writes to.
        name: the file's name at the source; its last part decides with the content, and names a single file.
        model: id of the model, for errors.
        size: bytes of the stream as stored, for the limit on bombs.
        grow: called with the bytes of disk about to be allocated, a little more rather than less, before they are
            written; negative for bytes given back. What it raises passes through.
        spool: path for a temporary file, charged through ``grow`` while it exists.
        mode: mode of folders. Files get its read and write bits, programs its execute bits too.
        blocks: how the file system allocates.

    Returns:
        What the loader is given: ``target`` for an archive, the file inside it for a single file.

    Raises:
        ArtifactCorrupt: no archive though its name says so, cut off, or damaged anywhere.
        UnsafeArtifact: it would reach outside the folder, make a device, or pass a limit.
        ConfigError: zstd, which this Python can't read without ``modelcache[zstd]``.
        OSError: the disk is full or broken.
    """
    job = Job(model=model, size=size, limits=LIMITS)
    source = Source(stream)
    writer = Writer(target, job, grow, mode, blocks)
    try:
        kind = _kind(source, job, name.rpartition("/")[2])
        if kind is None:
            return target / _write_single(source, writer, single_name(name), size)
        if kind is Kind.ZIP:
            unpack_zip(source, writer, job, spool, grow)
        else:
            codec = codec_of(kind, model)
            with Decoded(source, job, codec, size) as decoded:
                unpack_tar(decoded, writer, job)
        writer.finish()
    except (ArtifactCorrupt, UnsafeArtifact):
        source.drain()  # bytes damaged on the way are the source's error, and the better one
        raise
    return target


def _kind(source: Source, job: Job, name: str) -> Kind | None:
    """Return what archive it is; None for a single file."""
    suffix = archive_suffix(name)
    if suffix is None and has_suffix(name):
        return None
    head = source.peek(_HEAD)
    kind = sniff(head)
    if kind in (Kind.GZIP, Kind.ZSTD):
        begin = _begin(head, job, kind, must=suffix is None)
        if begin is not None and not is_tar(begin):
            if suffix is not None:
                raise job.corrupt(f"named {suffix}, but it is {kind.value} that holds no tar: it {describe(begin)}")
            return None
    if kind is None and suffix == ".zip" and head.strip(b"\0"):
        return Kind.ZIP  # perhaps a self-extractor, which only the end of the file can tell
    if kind is None and suffix is not None:
        raise job.corrupt(f"named {suffix}, but no archive: it {describe(head)}", offset=0)
    return kind


def _begin(head: bytes, job: Job, kind: Kind, *, must: bool) -> bytes | None:
    """Return the first decoded bytes of ``head``; None where it is damaged, which unpacking will tell in full."""
    decoded = Decoded(Source(io.BytesIO(head)), Job(job.model, len(head), job.limits), codec_of(kind, job.model), 0)
    begin = b""
    try:
        while len(begin) < HEADER and (piece := decoded.read()):
            begin += piece
    except ArtifactCorrupt:
        if must:
            raise
        return None
    return begin[:HEADER]


def _write_single(source: Source, writer: Writer, name: str, size: int) -> str:
    with writer.file(name, size=size) as write:
        while data := source.read(CHUNK):
            write(data)
    return name
