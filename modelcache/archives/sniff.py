"""What a file is, by its first bytes: an archive we unpack, or something to name in an error.

Looks at bytes that are already there; reading and decoding them is in ``decode``, the decision in ``unpacking``.
"""

import re
import tarfile
from enum import Enum

HEADER = 512
"""Bytes of a tar header."""


class Kind(Enum):
    """An archive by its first bytes; gzip and zstd may still hold something else than a tar."""

    TAR = "tar"
    GZIP = "gzip"
    ZSTD = "zstd"
    ZIP = "zip"


GZIP_MAGIC = re.compile(rb"\x1f\x8b")
ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or a skippable one (pzstd)
_ZIP_MAGIC = re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08PK|00PK)")

_LOOKS = (
    (rb"\s*<!doctype html|\s*<html", "an HTML error page?"),
    (rb"(?s)\s*(<\?xml.{0,200})?<Error>", "an XML error document of the store?"),
    (rb"\s*<\?xml", "an XML document"),
    (rb"version https://git-lfs", "a git-lfs pointer instead of the file"),
    (rb"\s*[{\[]", "a JSON document?"),
    (rb"\x80[\x02-\x05]", "a pickle: name it .pkl or .joblib"),
    (rb"\x89HDF\r\n\x1a\n", "HDF5: name it .h5"),
    (rb"\x93NUMPY", "a NumPy array: name it .npy"),
    (rb"BZh[1-9]", "bzip2: pack it with gzip or zstd"),
    (rb"\xfd7zXZ\x00", "xz: pack it with gzip or zstd"),
    (rb"7z\xbc\xaf\x27\x1c", "7-Zip: pack it as tar.gz or zip"),
    (rb"Rar!\x1a\x07", "RAR: pack it as tar.gz or zip"),
    (rb"\x04\x22\x4d\x18", "lz4: pack it with gzip or zstd"),
    (rb"\x1f\x9d", "Unix compress: pack it with gzip or zstd"),
    (rb"\x7fELF", "a program or library (ELF)"),
    (rb"PAR1", "Parquet"),
    (_ZIP_MAGIC.pattern, "a zip"),
    (GZIP_MAGIC.pattern, "gzip"),
    (ZSTD_MAGIC.pattern, "zstd"),
)


def sniff(head: bytes) -> Kind | None:
    """Return what archive ``head`` begins, or None."""
    if GZIP_MAGIC.match(head):
        return Kind.GZIP
    if ZSTD_MAGIC.match(head):
        return Kind.ZSTD
    if _ZIP_MAGIC.match(head):
        return Kind.ZIP
    return Kind.TAR if is_tar(head) else None


def is_tar(head: bytes) -> bool:
    """Return whether ``head`` begins with a tar header: its checksum is right, or it says ``ustar``.

    The word alone is enough, so that a damaged header is told as damage. Archives older than ustar have only
    the checksum.
    """
    block = head[:HEADER]
    if block[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def describe(head: bytes) -> str:
    """Return what ``head`` looks like, for an error: ``"starts with '<!DOCTYPE html': an HTML error page?"``."""
    if not head:
        return "is empty"
    if not head.strip(b"\0"):
        return "starts with nothing but zero bytes: an empty tar, or a failed upload?"
    meaning = next((text for look, text in _LOOKS if re.match(look, head, re.IGNORECASE)), None)
    start = head[:16]
    if start.decode("ascii", "replace").isprintable() and start.isascii():
        begin = ascii(start.decode("ascii"))
    else:
        begin = f"bytes {start.hex(' ')}"
    return f"starts with {begin}: {meaning or 'nothing we know'}"
