"""The checksums that S3 tells of an object, and computing them while its bytes pass by.

When they are compared is decided by ``s3_stream`` and ``s3_saving``. A composite one (a checksum of the checksums
of an upload's parts) can be compared once the size of the parts is known; ``s3`` asks for that.
"""

import base64
import binascii
import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import attrs

_DIGEST_BYTES = {
    "CRC32": 4,
    "CRC32C": 4,
    "CRC64NVME": 8,
    "MD5": 16,
    "SHA1": 20,
    "SHA256": 32,
    "SHA512": 64,
}
_TOLD_AS = {f"Checksum{name}": (name.lower(), size) for name, size in _DIGEST_BYTES.items()}
_MD5 = re.compile(r'"?([0-9a-f]{32})"?', re.ASCII)
_COMPOSITE = re.compile(r'"?([0-9a-f]{32}-[0-9]{1,5})"?', re.ASCII)
_NOT_TOLD = re.compile(r"Checksum(?!Type$)[A-Z0-9]+")


Bytes = bytes | memoryview


class _Digest(Protocol):
    def update(self, data: Bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc:
    """A CRC in the manner of :mod:`hashlib`."""

    def __init__(self, function: Callable[[Bytes, int], int], size: int) -> None:
        self._function = function
        self._size = size
        self._value = 0

    def update(self, data: Bytes, /) -> None:
        self._value = self._function(data, self._value)

    def hexdigest(self) -> str:
        return self._value.to_bytes(self._size, "big").hex()


class _OfParts:
    """A checksum of the checksums of parts of one size, the last one perhaps smaller."""

    def __init__(self, make: Callable[[], _Digest], size: int) -> None:
        self._make = make
        self._size = size
        self._whole = make()
        self._part = make()
        self._left = size
        self._count = 0

    def update(self, data: Bytes, /) -> None:
        view = memoryview(data)
        while view:
            piece = view[: self._left]
            self._part.update(piece)
            self._left -= len(piece)
            view = view[len(piece) :]
            if not self._left:
                self._end_part()

    def hexdigest(self) -> str:
        if self._left < self._size:
            self._end_part()
        return f"{self._whole.hexdigest()}-{self._count}"

    def _end_part(self) -> None:
        self._whole.update(bytes.fromhex(self._part.hexdigest()))
        self._part = self._make()
        self._left = self._size
        self._count += 1


def of_parts(algorithm: str, size: int) -> str:
    """Return the name of the checksum of the checksums of parts of so many bytes."""
    return f"{algorithm}/{size}"


def _digest(name: str) -> _Digest | None:
    """Return what computes a checksum (of parts, too), or None where nothing installed here can."""
    algorithm, _, size = name.partition("/")
    if size:
        return _OfParts(lambda: cast("_Digest", _digest(algorithm)), int(size)) if _digest(algorithm) else None
    if algorithm == "crc32":
        return _Crc(zlib.crc32, 4)
    if algorithm in ("crc32c", "crc64nvme"):
        function = _from_crt(algorithm)
        return _Crc(function, _DIGEST_BYTES[algorithm.upper()]) if function else None
    if algorithm in ("md5", "sha1", "sha256", "sha512"):
        return hashlib.new(algorithm, usedforsecurity=False)
    return None


@functools.cache  # a module that is not there is looked for in all folders, each time
def _from_crt(algorithm: str) -> Callable[[Bytes, int], int] | None:
    try:
        from awscrt import checksums as crt  # noqa: PLC0415 - an extra, and only these two need it
    except ImportError:
        return None
    function: Callable[[Bytes, int], int] | None = getattr(crt, algorithm, None)
    return function


@attrs.frozen
class Known:
    """What S3 told of an object's checksums.

    Attributes:
        checksums: algorithm in lower case to hex digest of the whole object.
        unchecked: why none of them can be compared here; None where one can.
        composite: algorithm, and hex digest of the parts' digests with their number (``...-7``), that can be
            compared once the size of the parts is known; None where there is none, or no need of it.
    """

    checksums: dict[str, str]
    unchecked: str | None
    composite: tuple[str, str] | None = None


def told_by(answer: Mapping[str, Any], *, directory_bucket: bool) -> Known:
    """Read the checksums from an answer to HeadObject or GetObject.

    The ETag serves as MD5 only where nothing better can be compared, and where it is one: not of a multipart
    upload, not encrypted with SSE-KMS or SSE-C, not in a directory bucket.

    Args:
        answer: what the client returned.
        directory_bucket: whether the object is in one (``--x-s3``).
    """
    found: dict[str, str] = {}
    of_parts = "-" in str(answer.get("ETag", ""))
    composite = answer.get("ChecksumType", "COMPOSITE" if of_parts else "FULL_OBJECT") != "FULL_OBJECT"
    told = [(*_TOLD_AS[name], value) for name, value in answer.items() if name in _TOLD_AS]
    for algorithm, size, value in told:
        if isinstance(value, str) and not composite and (digest := _to_hex(value, size)):
            found[algorithm] = digest
    if computable(found):
        return Known(found, None)
    etag = _MD5.fullmatch(str(answer.get("ETag", "")))
    encrypted = answer.get("SSECustomerAlgorithm") or str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    if etag and not encrypted and not directory_bucket:
        return Known({**found, "md5": etag[1]}, None)
    parts = None if encrypted or directory_bucket else _COMPOSITE.fullmatch(str(answer.get("ETag", "")))
    mixed = _composite(told) or (("md5", parts[1]) if parts else None)
    if found:
        return Known(found, f"{', '.join(found).upper()} needs the extra modelcache[crt]", mixed)
    if any(_NOT_TOLD.fullmatch(name) for name in answer):
        why = "its checksum is of the parts of a multipart upload, or of a kind that is not known here"
        return Known(found, why, mixed)
    return Known(found, "the store tells no checksum of it", mixed)


def _composite(told: Sequence[tuple[str, int, object]]) -> tuple[str, str] | None:
    """Return a composite checksum that can be computed here: algorithm, hex digest and number of parts."""
    for algorithm, size, whole in told:
        value, dash, count = str(whole).rpartition("-")
        digest = _to_hex(value, size) if dash and count.isdecimal() else None
        if digest and _digest(algorithm):
            return algorithm, f"{digest}-{count}"
    return None


def _to_hex(value: str, size: int) -> str | None:
    """Return a base64 digest as hex; None for a composite one (``...-7``) or one that is no digest."""
    try:
        raw = base64.b64decode(value, validate=True)
    except binascii.Error:
        return None
    return raw.hex() if len(raw) == size else None


def computable(checksums: Mapping[str, str]) -> bool:
    """Whether any of these can be compared here."""
    return any(_digest(algorithm) for algorithm in checksums)


class Digests:
    """Computes all checksums of one object that can be computed here, as its bytes pass by.

    Args:
        expected: algorithm to hex digest, as :class:`Known` has them.
    """

    def __init__(self, expected: Mapping[str, str]) -> None:
        digests = ((algorithm, value, _digest(algorithm)) for algorithm, value in expected.items())
        self._all = tuple((name, value.lower(), digest) for name, value, digest in digests if digest is not None)

    @property
    def any(self) -> bool:
        """Whether anything is computed at all."""
        return bool(self._all)

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""
        for _, _, digest in self._all:
            digest.update(data)

    def problem(self) -> str | None:
        """Return what differs, or None where all is as expected."""
        for name, value, digest in self._all:
            if digest.hexdigest() != value:
                return f"{name.upper()} is {digest.hexdigest()}, not {value}"
        return None
