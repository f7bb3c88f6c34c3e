"""The headers of a tar: one member with its long name, PAX records and checks put together.

Covers v7, ustar, GNU and PAX headers. The data between them, and the end of the archive, are in ``tar``.

The standard library parses the 512 bytes (``TarInfo.frombuf``) and nothing more: ``tarfile.open`` takes a damaged
header for the end of the archive, reads a PAX header of any claimed size into memory, and differs in its checks
from one patch release to the next.
"""

import tarfile
from collections.abc import Callable, Mapping
from enum import Enum

import attrs

from modelcache.archives.job import Job
from modelcache.archives.sniff import HEADER

_PAX = (b"x", b"X")
_GLOBAL = b"g"
_LONG = {b"L": "path", b"K": "linkpath"}
_KNOWN = ("path", "linkpath", "size")
_REFUSED = {
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file: pack it without --sparse",
}


class What(Enum):
    """What a member is."""

    FILE = "file"
    FOLDER = "folder"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"


_TYPES = {
    b"0": What.FILE,
    b"\0": What.FILE,
    b"7": What.FILE,
    b"5": What.FOLDER,
    b"2": What.SYMLINK,
    b"1": What.HARDLINK,
}


@attrs.frozen
class Member:
    """One member.

    Attributes:
        name: its path, untrusted.
        what: what it is.
        size: bytes of data that follow; 0 for anything but a file.
        goal: where a link points; empty for anything else.
        program: whether its owner may execute it.
    """

    name: str
    what: What
    size: int
    goal: str
    program: bool


class Headers:
    """Reads members off a decoded tar, one after the other.

    Args:
        job: for limits and errors.
        take: returns exactly so many decoded bytes, or raises.
        offset: returns the stored bytes used so far.
    """

    def __init__(self, job: Job, take: Callable[[int], bytes], offset: Callable[[], int]) -> None:
        self._job = job
        self._take = take
        self._offset = offset
        self._long = 0

    def next(self, block: bytes) -> Member:
        """Return the member whose first header is ``block``.

        Raises:
            ArtifactCorrupt: no valid header.
            UnsafeArtifact: a kind of member that we don't make, or a header too big.
        """
        records: dict[str, str] = {}
        info = self._parse(block)
        while (kind := block[156:157]) in _LONG or kind in _PAX or kind == _GLOBAL:
            payload = self._payload(info)
            if kind == _GLOBAL:
                if any(self._records(payload, info.name).values()):  # readers disagree on what that means
                    raise self._corrupt("a PAX header that gives all members one name or size", info.name)
            else:
                found = self._records(payload, info.name) if kind in _PAX else self._long_name(kind, payload)
                if records.keys() & found.keys():  # GNU tar believes the last, others the first
                    raise self._corrupt("two headers that say different things of one member", info.name)
                records.update(found)
            block = self._take(HEADER)
            info = self._parse(block)
        return self._member(info, kind, records)

    def _parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise self._corrupt("no tar header where one must be: damaged") from error
        if info.size < 0:
            raise self._corrupt("a negative size", info.name)
        return info

    def _payload(self, info: tarfile.TarInfo) -> bytes:
        if info.size > self._job.limits.header:
            raise self._job.unsafe(f"a tar header over {self._job.limits.header} bytes", info.name)
        self._long += HEADER + info.size
        if self._long > self._job.limits.headers:
            raise self._job.unsafe(f"tar headers over {self._job.limits.headers} bytes in all", info.name)
        blocks = self._take(-(-info.size // HEADER) * HEADER)
        if blocks[info.size :].strip(b"\0"):  # a size that lies: some would read on
            raise self._corrupt("a long header that does not end where it says", info.name)
        return blocks[: info.size]

    def _long_name(self, kind: bytes, payload: bytes) -> dict[str, str]:
        name = payload.rstrip(b"\0")
        if not name or b"\0" in name:
            raise self._corrupt("a damaged long name")
        return {_LONG[kind]: name.decode("utf-8", "surrogateescape")}

    def _records(self, payload: bytes, member: str) -> dict[str, str]:
        """Return the records we know of a PAX header; others (times, macOS attributes) are passed over."""
        known: dict[str, str] = {}
        at = 0
        payload = payload.rstrip(b"\0")
        while at < len(payload):
            length = payload[at : at + 9].partition(b" ")[0]
            end = at + int(length) if length.isdigit() else 0
            key, equals, value = payload[at + len(length) + 1 : end - 1].partition(b"=")
            if not equals or end > len(payload) or payload[end - 1 : end] != b"\n":
                raise self._corrupt("a damaged PAX header", member)
            at = end
            name = key.decode("utf-8", "replace")
            if name.startswith("GNU.sparse."):
                raise self._job.unsafe(_REFUSED[b"S"], member)
            if name in _KNOWN:
                known[name] = value.decode("utf-8", "surrogateescape")
        return known

    def _member(self, info: tarfile.TarInfo, kind: bytes, records: Mapping[str, str]) -> Member:
        long = records.get("path")  # an empty record is none
        name = long or info.name
        what = _TYPES.get(kind)
        if what is None:
            raise self._job.unsafe(_REFUSED.get(kind, f"a member of unknown type {kind!r}"), name)
        if kind == b"\0" and (long.endswith("/") if long else info.isdir()):
            what = What.FOLDER  # as v7 wrote folders; a cut-off name must not decide it
        size = records.get("size") or str(info.size)
        if not (size.isascii() and size.isdigit() and len(size) < 20):  # noqa: PLR2004 - digits of 2**63
            raise self._corrupt("a damaged size", name)
        return Member(
            name=name,
            what=what,
            size=int(size) if what is What.FILE else 0,
            goal=(records.get("linkpath") or info.linkname) if what in (What.SYMLINK, What.HARDLINK) else "",
            program=bool(info.mode & 0o100),
        )

    def _corrupt(self, what: str, member: str | None = None) -> Exception:
        return self._job.corrupt(what, member, self._offset())
