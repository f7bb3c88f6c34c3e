"""The directory of a zip, checked before and after the standard library reads it.

Covers where the directory is, how many entries it has, and that no two entries share bytes: checks that
``zipfile`` has only in part, depending on its patch release. The entries themselves are in ``zip``.
"""

import struct
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import attrs

from modelcache.archives.job import CHUNK, Job
from modelcache.archives.sniff import describe

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s24x3H12x")
_LOCAL = struct.Struct("<4s22x2H")
_HEAD = 512
_UTF8 = 0x800  # a flag: the name is no CP437
_COMMENT_MAX = 2**16 - 1


@attrs.frozen
class Directory:
    """Where the directory of a zip lies.

    Attributes:
        start: its offset.
        size: its bytes.
        entries: how many entries it says it has.
        prefix: bytes in front of the archive that its offsets don't count (a self-extractor).
    """

    start: int
    size: int
    entries: int
    prefix: int


def find_directory(file: BinaryIO, length: int, job: Job) -> Directory:
    """Return the directory of the zip in ``file``, found as ``zipfile`` finds it, and check its extent.

    Raises:
        ArtifactCorrupt: there is none, it is cut off, or something else than zeros follows it.
        UnsafeArtifact: more members, or a bigger directory, than we take.
    """
    at, end = _find_end(file, length, job)
    _, disk, first_disk, _, entries, size, offset, comment = end
    _check_tail(file, at + _END.size + comment, job)
    start64 = at - _LOCATOR.size - _END64.size
    if start64 >= 0 and _read(file, at - _LOCATOR.size, 4) == b"PK\x06\x07":
        signature, _, _, _, disk, first_disk, _, entries, size, offset = _END64.unpack(
            _read(file, start64, _END64.size)
        )
        if signature != b"PK\x06\x06":
            raise job.corrupt("a damaged zip64 directory", offset=start64)
        at = start64
    if disk or first_disk:
        raise job.corrupt("one part of a zip in several parts", offset=at)
    directory = Directory(start=at - size, size=size, entries=entries, prefix=at - size - offset)
    if directory.start < 0 or directory.prefix < 0:
        raise job.corrupt("a damaged zip directory, or one whose file was cut off at the front", offset=at)
    if directory.prefix and _read(file, 0, 4) == b"PK\x03\x04":
        # cut off behind a zip that is itself a member: its directory passes for this one's
        raise job.corrupt("cut off: the zip has no directory of its own", offset=length)
    _check_entries(file, directory, job)
    return directory


def find_data(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], directory: Directory, job: Job) -> dict[int, int]:
    """Return where the data of each entry begins, by the offset of its header.

    Raises:
        UnsafeArtifact: two entries overlap (a bomb that reuses its data), or one reaches past its place.
        ArtifactCorrupt: an entry's data isn't where the directory says.
    """
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [*(min(entry.header_offset, directory.start) for entry in ordered[1:]), directory.start]
    found: dict[int, int] = {}
    for entry, end in zip(ordered, ends, strict=True):
        if not 0 <= entry.header_offset <= end - _LOCAL.size:
            raise job.unsafe("a zip entry that overlaps another", entry.filename)
        signature, name, extra = _LOCAL.unpack(_read(file, entry.header_offset, _LOCAL.size))
        if signature != b"PK\x03\x04":
            raise job.corrupt("no zip entry where one must be: damaged", entry.filename, entry.header_offset)
        start = entry.header_offset + _LOCAL.size + name + extra
        if start + entry.compress_size > end:
            raise job.unsafe("a zip entry that overlaps another", entry.filename)
        if _decoded_name(file.read(name), entry) != entry.orig_filename:
            raise job.corrupt("another name than in the directory: damaged", entry.filename, entry.header_offset)
        found[entry.header_offset] = start
    return found


def _decoded_name(name: bytes, entry: zipfile.ZipInfo) -> str:
    return name.decode("utf-8" if entry.flag_bits & _UTF8 else "cp437", "replace")


def _find_end(file: BinaryIO, length: int, job: Job) -> tuple[int, tuple[bytes, int, int, int, int, int, int, int]]:
    start = max(0, length - _END.size - _COMMENT_MAX)
    tail = _read(file, start, length - start)
    at = len(tail) - _END.size
    if not (tail[at:].startswith(b"PK\x05\x06") and tail.endswith(b"\0\0")):
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        looks = describe(_read(file, 0, _HEAD))
        raise job.corrupt(f"it {looks}, and has no zip directory at its end: cut off?", offset=length)
    return start + at, _END.unpack_from(tail, at)


def _check_tail(file: BinaryIO, end: int, job: Job) -> None:
    file.seek(end)
    while data := file.read(CHUNK):
        if data.strip(b"\0"):
            raise job.corrupt(f"{data.lstrip(bytes(1))[:16]!a} follows the end of the zip", offset=end)


def _check_entries(file: BinaryIO, directory: Directory, job: Job) -> None:
    """Count the entries before ``zipfile`` makes an object of each; it doesn't look at the number itself."""
    if directory.size > job.limits.directory:
        raise job.unsafe(f"a zip directory over {job.limits.directory} bytes")
    data = _read(file, directory.start, directory.size)
    at = count = 0
    while at + _ENTRY.size <= len(data):
        signature, name, extra, comment = _ENTRY.unpack_from(data, at)
        if signature != b"PK\x01\x02":
            raise job.corrupt("a damaged zip directory", offset=directory.start + at)
        at += _ENTRY.size + name + extra + comment
        count += 1
        if count > job.limits.members:
            raise job.unsafe(f"more than {job.limits.members} members")
    if not count:
        raise job.corrupt("a zip without entries", offset=directory.start)
    if at != len(data) or count % 2**16 != directory.entries % 2**16:
        raise job.corrupt("a damaged zip directory: its entries don't add up", offset=directory.start + at)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
