"""The decoders of gzip, deflate and zstd data: bytes in, at most so many bytes out, whatever the ratio.

Covers one gzip member, one zstd frame or one raw deflate stream, and which library does it: ISA-L where the extra
``fast`` is installed, the fastest there is (``benchmarks.unpack``), else the standard zlib; zstd from the standard
library (3.14 and later) or its backport, the extra ``zstd``. They give the same bytes and refuse the same input; where
one says that damaged data is damaged, another may want more of it, and say in the end that it is cut off. Several
members after one another are in ``decode``, zip entries in ``zip``.
"""

import re
import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import attrs

from modelcache.archives.job import shown
from modelcache.archives.sniff import GZIP_MAGIC, ZSTD_MAGIC, Kind
from modelcache.errors import ConfigError

_GZIP = 31  # wbits: a gzip header, and its CRC and length at the end
_RAW = -15  # wbits: neither
_NEVER = re.compile(b"(?!)")
_GZIP_HEAD = re.compile(rb"(?s)(?!\x1f\x8b.[\x20-\xff])")  # without a reserved flag (RFC 1952, 2.3.1.2)


class Engine(Protocol):
    """The decoder of one gzip member, zstd frame or deflate stream.

    Concurrency: one thread at a time; other threads run while it decodes.
    """

    @property
    def ended(self) -> bool:
        """Whether the end was reached and its checksum found right."""
        ...

    @property
    def rest(self) -> bytes:
        """After the end: input that was fed and follows it."""
        ...

    def feed(self, data: bytes, /) -> None:
        """Take more input."""
        ...

    def decode(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; ``b""`` where there is no more without more input."""
        ...


@attrs.frozen
class Codec:
    """How one kind of compressed data is undone.

    Attributes:
        name: for errors.
        start: makes the decoder of the next member or frame.
        errors: what it raises at damaged data.
        damage: what that means, for errors.
        magic: what a further member or frame begins with.
        head: what each begins with that is not damaged, as far as the decoders do not all look at it.
    """

    name: str
    start: Callable[[], Engine]
    errors: type[Exception]
    damage: str
    magic: re.Pattern[bytes]
    head: re.Pattern[bytes] = re.compile(b"")


class _Inflate:
    """By ``zlib``, or a module with the same decompression object."""

    def __init__(self, module: Any, wbits: int) -> None:
        self._zlib = module.decompressobj(wbits=wbits)
        self._data = b""

    @property
    def ended(self) -> bool:
        return bool(self._zlib.eof)

    @property
    def rest(self) -> bytes:
        return bytes(self._zlib.unused_data)

    def feed(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data

    def decode(self, size: int) -> bytes:
        if self._zlib.eof:
            return b""
        out = self._zlib.decompress(self._data, size)
        self._data = self._zlib.unconsumed_tail
        return bytes(out)


class _Zstd:
    """By ``compression.zstd`` or its backport."""

    def __init__(self, module: Any) -> None:
        self._zstd = module.ZstdDecompressor()
        self._data = b""

    @property
    def ended(self) -> bool:
        return bool(self._zstd.eof)

    @property
    def rest(self) -> bytes:
        return bytes(self._zstd.unused_data)

    def feed(self, data: bytes) -> None:
        self._data = self._data + data if self._data else data

    def decode(self, size: int) -> bytes:
        if self._zstd.eof or (self._zstd.needs_input and not self._data):
            return b""
        data, self._data = self._data, b""  # it keeps what it does not use yet
        return bytes(self._zstd.decompress(data, size))


def zlib_module() -> Any:
    """Return ISA-L's where it is installed, else the standard library's ``zlib``; both have ``crc32``."""
    try:
        from isal import isal_zlib  # noqa: PLC0415 - an extra
    except ImportError:
        return zlib
    return isal_zlib


def codec_of(kind: Kind, model: str) -> Codec | None:
    """Return how an archive of this kind is undone before it is read; None where it isn't compressed as a whole.

    Raises:
        ConfigError: zstd, which this Python can't read without an extra.
    """
    if kind is Kind.GZIP:
        return gzip_codec()
    return zstd_codec(model) if kind is Kind.ZSTD else None


def gzip_codec() -> Codec:
    """Return how gzip is undone."""
    module = zlib_module()
    return Codec("gzip", lambda: _Inflate(module, _GZIP), module.error, "damaged gzip data", GZIP_MAGIC, _GZIP_HEAD)


def deflate_codec() -> Codec:
    """Return how the data of a zip entry is undone; it has no checksum of its own."""
    module = zlib_module()
    return Codec("deflate", lambda: _Inflate(module, _RAW), module.error, "damaged deflate data", _NEVER)


def zstd_codec(model: str) -> Codec:
    """Return how zstd is undone.

    Raises:
        ConfigError: this Python can't, and the extra is missing.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415 - Python may be built without it
        else:
            from backports import zstd  # noqa: PLC0415 - an extra
    except ImportError as error:
        text = f"model {shown(model)} is zstd-compressed, which this Python can't read: install modelcache[zstd]"
        raise ConfigError(text, model=model, setting="zstd") from error
    damage = "damaged zstd data, or packed with a window over 128 MiB (--long)"
    return Codec("zstd", lambda: _Zstd(zstd), zstd.ZstdError, damage, ZSTD_MAGIC)
