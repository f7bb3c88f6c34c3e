"""Unpacks a zip, which has its directory at the end and so is spooled to disk first.

Covers spooling, names, kinds and data of entries. The checks of the directory are in ``zipdir``, creation in
``writer``. Reads stored, deflated and zstd entries; encrypted ones and other methods are refused by name.
"""

import contextlib
import errno
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from modelcache.archives.codecs import Codec, deflate_codec, zlib_module, zstd_codec
from modelcache.archives.decode import Decoded, Source
from modelcache.archives.job import CHUNK, Job
from modelcache.archives.names import split
from modelcache.archives.writer import Writer
from modelcache.archives.zipdir import find_data, find_directory
from modelcache.blocks import Blocks, set_length
from modelcache.errors import ModelCacheError
from modelcache.openfiles import NewFile

# what zipfile raises at damaged input, its documented error among them
_FAULTS = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
)
_ENCRYPTED = 0x1 | 0x40  # by password, by strong encryption
_ZSTD = 93
_OTHERS = {9: "deflate64", 12: "bzip2", 14: "lzma", 95: "xz"}
_DRIVE = re.compile("[A-Za-z]:")
_DOS = 0


def unpack_zip(source: Source, writer: Writer, job: Job, spool: Path, grow: Callable[[int], None]) -> None:
    """Spool the zip, and write all entries; symbolic links are left to :meth:`Writer.finish`.

    Raises:
        ArtifactCorrupt: cut off, damaged, encrypted, or with more than zeros behind it.
        UnsafeArtifact: an entry that must not be made, or entries that overlap.
    """
    with _spooled(source, spool, job, grow, writer.blocks) as file:
        directory = find_directory(file, os.fstat(file.fileno()).st_size, job)
        with _reading(job):
            archive = zipfile.ZipFile(file)
        with archive:
            entries = archive.infolist()
            data = _Data(file, find_data(file, entries, directory, job), job)
            for entry in entries:
                _write(entry, data, writer, job)


@contextlib.contextmanager
def _spooled(source: Source, spool: Path, job: Job, grow: Callable[[int], None], blocks: Blocks) -> Iterator[BinaryIO]:
    taken = size = 0
    spool.unlink(missing_ok=True)
    if blocks.beside:
        grow(taken := blocks.beside)
    try:
        held = NewFile(spool)
        with held, os.fdopen(held.descriptor, "w+b", closefd=False) as file:
            set_length(held.descriptor, job.size)
            while data := source.read(CHUNK):
                size += len(data)
                if (more := blocks.charged(size) - taken) > 0:
                    grow(more)
                    taken += more
                file.write(data)
            file.truncate()
            yield file
    finally:
        spool.unlink(missing_ok=True)
        if taken:
            grow(-taken)


def _write(entry: zipfile.ZipInfo, data: "_Data", writer: Writer, job: Job) -> None:
    name = _name(entry, job)
    mode = entry.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if name.endswith("/") or kind == stat.S_IFDIR:
        if entry.file_size:
            raise job.corrupt("a folder with data", name, entry.header_offset)
        writer.folder(name)
    elif kind == stat.S_IFLNK:
        if entry.file_size > job.limits.path:
            raise job.unsafe("a symbolic link whose goal is too long", name)
        writer.symlink(name, os.fsdecode(b"".join(data.of(entry, name))))
    elif kind in (0, stat.S_IFREG):
        with writer.file(name, program=bool(mode & 0o100), size=entry.file_size) as write:
            for piece in data.of(entry, name):
                write(piece)
    else:
        raise job.unsafe("a device, FIFO or socket", name)


def _name(entry: zipfile.ZipInfo, job: Job) -> str:
    r"""Return the path of an entry; ``\`` is a separator where it was packed on Windows, and never a way out."""
    name = entry.filename
    if "\0" in entry.orig_filename:
        raise job.unsafe("a NUL in a name", entry.orig_filename)
    if _DRIVE.match(name):
        raise job.unsafe("a name with a drive letter", name)
    slashed = name.replace("\\", "/")
    split(slashed, job, name)
    return slashed if entry.create_system == _DOS else name


class _Data:
    """Reads the data of entries.

    Args:
        file: the spooled zip.
        starts: where the data begins, by the offset of the entry's header.
        job: for limits and errors.
    """

    def __init__(self, file: BinaryIO, starts: dict[int, int], job: Job) -> None:
        self._file = file
        self._starts = starts
        self._job = job
        self._crc32 = zlib_module().crc32

    def of(self, entry: zipfile.ZipInfo, name: str) -> Iterator[bytes]:
        """Give the data of an entry, and check its size and CRC."""
        start = self._starts[entry.header_offset]
        crc = size = 0
        codec = self._codec(entry, name)
        if entry.compress_size or entry.file_size:
            slice_ = Source(_Slice(self._file, start, entry.compress_size))
            with Decoded(slice_, self._job, codec, entry.compress_size, start) as decoded:
                decoded.member = name
                while data := decoded.read():
                    size += len(data)
                    if size > entry.file_size:
                        raise self._job.corrupt("more data than the directory says", name, decoded.offset)
                    crc = self._crc32(data, crc)
                    yield data
        if size < entry.file_size:
            raise self._job.corrupt("less data than the directory says", name, entry.header_offset)
        if crc != entry.CRC:
            raise self._job.corrupt("damaged: its CRC is another", name, entry.header_offset)

    def _codec(self, entry: zipfile.ZipInfo, name: str) -> Codec | None:
        if entry.flag_bits & _ENCRYPTED:
            raise self._job.corrupt("encrypted, and there is no password to give", name, entry.header_offset)
        if entry.compress_type == zipfile.ZIP_STORED:
            return None
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            return deflate_codec()
        if entry.compress_type == _ZSTD:
            return zstd_codec(self._job.model)
        method = _OTHERS.get(entry.compress_type, "unknown")
        what = f"compression method {entry.compress_type} ({method}), where we read stored, deflated and zstd"
        raise self._job.corrupt(what, name, entry.header_offset)


class _Slice:
    """Part of a file, as a stream."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._at = start
        self._left = size

    def read(self, size: int, /) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(min(size, self._left))
        self._at += len(data)
        self._left -= len(data)
        return data


@contextlib.contextmanager
def _reading(job: Job) -> Iterator[None]:
    try:
        yield
    except ModelCacheError:
        raise
    except _FAULTS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk, not the zip
        raise job.corrupt(f"a damaged zip ({error})") from error
