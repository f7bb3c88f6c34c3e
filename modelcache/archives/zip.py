"""Unpacks a zip, which has its directory at the end and so is spooled to disk first.

Covers spooling, names, kinds and data of entries. The checks of the directory are in ``zipdir``, creation in
``writer``. Reads stored and deflated entries; encrypted ones and other methods are refused by name.
"""

import contextlib
import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from modelcache.archives.decode import Source
from modelcache.archives.job import CHUNK, Job, rounded
from modelcache.archives.names import split
from modelcache.archives.writer import Writer
from modelcache.archives.zipdir import check_extents, find_directory
from modelcache.errors import ModelCacheError

# what zipfile raises at damaged input, its documented error among them
_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
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
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bz2 and lzma have no bound on what one read gives
_OTHERS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz"}
_DRIVE = re.compile("[A-Za-z]:")
_DOS = 0


def unpack_zip(source: Source, writer: Writer, job: Job, spool: Path, grow: Callable[[int], None]) -> None:
    """Spool the zip, and write all entries; symbolic links are left to :meth:`Writer.finish`.

    Raises:
        ArtifactCorrupt: cut off, damaged, encrypted, or with more than zeros behind it.
        UnsafeArtifact: an entry that must not be made, or entries that overlap.
    """
    with _spooled(source, spool, grow) as file:
        directory = find_directory(file, os.fstat(file.fileno()).st_size, job)
        with _reading(job):
            archive = zipfile.ZipFile(file)
        with archive:
            entries = archive.infolist()
            check_extents(file, entries, directory, job)
            for entry in entries:
                _write(archive, entry, writer, job)


@contextlib.contextmanager
def _spooled(source: Source, spool: Path, grow: Callable[[int], None]) -> Iterator[BinaryIO]:
    charged = size = 0
    spool.unlink(missing_ok=True)
    handle = os.open(spool, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w+b") as file:
            while data := source.read(CHUNK):
                size += len(data)
                if size > charged:
                    more = rounded(size) - charged
                    grow(more)
                    charged += more
                file.write(data)
            file.flush()
            yield file
    finally:
        spool.unlink(missing_ok=True)
        if charged:
            grow(-charged)


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, writer: Writer, job: Job) -> None:
    name = _name(entry, job)
    _check_method(entry, name, job)
    mode = entry.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if name.endswith("/") or kind == stat.S_IFDIR:
        if entry.file_size:
            raise job.corrupt("a folder with data", name, entry.header_offset)
        writer.folder(name)
    elif kind == stat.S_IFLNK:
        if entry.file_size > job.limits.path:
            raise job.unsafe("a symbolic link whose goal is too long", name)
        writer.symlink(name, os.fsdecode(b"".join(_data(archive, entry, name, job))))
    elif kind in (0, stat.S_IFREG):
        with writer.file(name, program=bool(mode & 0o100)) as write:
            for data in _data(archive, entry, name, job):
                write(data)
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


def _check_method(entry: zipfile.ZipInfo, name: str, job: Job) -> None:
    if entry.flag_bits & _ENCRYPTED:
        raise job.corrupt("encrypted, and there is no password to give", name, entry.header_offset)
    if entry.compress_type not in _METHODS:
        method = _OTHERS.get(entry.compress_type, "unknown")
        what = f"compression method {entry.compress_type} ({method}), where we read stored and deflated"
        raise job.corrupt(what, name, entry.header_offset)


def _data(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, job: Job) -> Iterator[bytes]:
    """Give the data of an entry; ``zipfile`` checks the CRC at its end."""
    size = 0
    with _reading(job, name, entry.header_offset):
        member = archive.open(entry)
    with member:
        while True:
            with _reading(job, name, entry.header_offset):
                data = member.read(CHUNK)
            if not data:
                break
            size += len(data)
            job.count(len(data), name)
            yield data
    if size != entry.file_size:
        raise job.corrupt("less data than the directory says", name, entry.header_offset)


@contextlib.contextmanager
def _reading(job: Job, member: str | None = None, offset: int | None = None) -> Iterator[None]:
    try:
        yield
    except ModelCacheError:
        raise
    except _FAULTS as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk, not the zip
        raise job.corrupt(f"a damaged zip ({error})", member, offset) from error
