"""The digest of a published artifact: whether its files are still what was unpacked, to the byte.

It finds damage (a bad disk, a file that somebody changed in place), not forgery: who can write to the folder can change
the record too.
"""

import hashlib
import os
import zlib
from pathlib import Path

from modelcache.disk.files import walk

_CHUNK = 2**20


def digest_of(artifact: Path) -> str:
    """Return the digest of a folder: SHA-256 over each file's path, size and CRC-32, and each link's goal.

    Raises:
        OSError: something can't be read.
    """
    buffer = memoryview(bytearray(_CHUNK))
    lines = []
    for entry in walk(artifact):
        name = os.path.relpath(entry.path, artifact)
        if entry.is_symlink():
            lines.append(f"{name}\0link\0{os.readlink(entry.path)}")  # noqa: PTH115 - a str
        elif entry.is_dir(follow_symlinks=False):
            lines.append(f"{name}\0folder")
        else:
            size, crc = _read(entry.path, buffer)
            lines.append(f"{name}\0file\0{size}\0{crc:08x}")
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _read(path: str, buffer: memoryview) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a str, of very many
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            size += count
    return size, crc
