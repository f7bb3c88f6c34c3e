"""What a file takes on disk, before it is written: whole blocks, and those in which a file system notes where they lie.

What it has taken in the end is measured (``disk.files``).
"""

import contextlib
import os

BLOCK = 4096
"""Bytes that file systems allocate at a time; folders take one."""
_INSIDE = 4  # pieces of a file whose places ext4 keeps in the inode: <linux>/Documentation/filesystems/ext4/ifork.rst
_MAPPED = 128  # pieces noted in a block, half filled: ext4 has room for 340, XFS for 254
_UNSTRETCHED = 64 * 1024  # bytes of a file for which XFS takes nothing beyond its end: xfs(5), allocsize


def charged(size: int) -> int:
    """Return the bytes that a file of ``size`` bytes may take, wherever its blocks lie."""
    blocks = -(-size // BLOCK)
    notes = -(-blocks // _MAPPED) if blocks > _INSIDE else 0
    return (blocks + notes) * BLOCK


def set_length(descriptor: int, size: int) -> None:
    """Give a new, empty file the length that it is said to have, as a hole; never raises.

    Else XFS would take up to twice as much as was written, until the file is closed: it expects more to come. A file
    system that knows no holes is left alone.
    """
    if size > _UNSTRETCHED:
        with contextlib.suppress(OSError):  # no file can be as long as a damaged archive may say
            os.ftruncate(descriptor, BLOCK)
            os.ftruncate(descriptor, size if os.fstat(descriptor).st_blocks == 0 else 0)
