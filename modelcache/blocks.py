"""What a file takes on disk, before it is written: whole blocks, and those in which a file system notes where they lie.

What it has taken in the end is measured (``disk.files``).
"""

import contextlib
import os
from pathlib import Path

import attrs

from modelcache.openfiles import OpenFile

BLOCK = 4096
"""Bytes that most file systems allocate at a time."""
_INSIDE = 4  # pieces of a file whose places ext4 keeps in the inode: <linux>/Documentation/filesystems/ext4/ifork.rst
_MAPPED = 128  # pieces noted in a block, half filled: ext4 has room for 340, XFS for 254
_UNSTRETCHED = 64 * 1024  # bytes of a file for which XFS takes nothing beyond its end: xfs(5), allocsize
_SAMPLE = 2 * BLOCK  # bytes that can't be compressed, and that no inode has room for


@attrs.frozen
class Blocks:
    """How a file system allocates.

    Attributes:
        unit: bytes that it allocates at a time: more than a block on ext4 with bigalloc, or a tmpfs with huge pages.
        beside: bytes that each file takes beside its content, such as those of a long access list.
        folder: bytes that a new folder takes.
        prompt: whether it says at once what it has allocated; ZFS does so later: github.com/openzfs/zfs/issues/13991.
    """

    unit: int = BLOCK
    beside: int = 0
    folder: int = BLOCK
    prompt: bool = True

    def charged(self, size: int) -> int:
        """Return the bytes that a file of ``size`` bytes may take, wherever its blocks lie."""
        blocks = -(-size // self.unit)
        notes = -(-blocks // _MAPPED) if blocks > _INSIDE else 0
        return (blocks + notes) * self.unit + self.beside


USUAL = Blocks()
"""How most file systems do."""


def look_at(path: Path) -> Blocks:
    """Find out how a file system allocates, by a file and a folder at ``path``, which are removed again.

    What can't be found out, on a full disk, say, is as it mostly is; never raises.
    """
    beside = first = sample = folder = 0
    with contextlib.suppress(OSError):
        try:
            beside = _taken_with(b"", path)
            first = _taken_with(b"1", path)
            sample = _taken_with(os.urandom(_SAMPLE), path)
        finally:
            path.unlink()
        path.mkdir()
        try:
            folder = path.stat().st_blocks * 512
        finally:
            path.rmdir()
    prompt = sample == 0 or sample - beside >= _SAMPLE
    return Blocks(max(BLOCK, first - beside), beside, max(BLOCK + beside, folder), prompt)


def _taken_with(data: bytes, path: Path) -> int:
    """Add to a file, and return what it takes once it is closed: XFS may hold more ready until then."""
    with OpenFile(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
        file.write(data)
    return path.stat().st_blocks * 512


def set_length(descriptor: int, size: int) -> None:
    """Give a new, empty file the length that it is said to have, as a hole; never raises.

    Else XFS would take up to twice as much as was written, until the file is closed: it expects more to come. A file
    system that knows no holes is left alone.
    """
    if size > _UNSTRETCHED:
        with contextlib.suppress(OSError):  # no file can be as long as a damaged archive may say
            before = os.fstat(descriptor).st_blocks
            os.ftruncate(descriptor, BLOCK)
            os.ftruncate(descriptor, size if os.fstat(descriptor).st_blocks == before else 0)
