"""The stored bytes of one file, counted, and their decoded content: gzip and zstd undone as it streams.

Covers multi-member gzip and zstd, padding between and after them, damage, and bounded memory: a read gives at
most what was asked for, whatever the compression ratio. What the content means is in ``tar``; the rule for
bytes after the end is in the package's docstring.
"""

import io
import sys
import zlib
from typing import Any, Protocol

from modelcache.archives.job import Job, shown
from modelcache.archives.sniff import GZIP_MAGIC, ZSTD_MAGIC, Kind
from modelcache.errors import ConfigError

_READ = 64 * 1024
_PIECE = 1024  # of zstd input: 1 KiB makes at most 32 MiB of output, and zstandard can't be told to stop earlier
_MAGIC_SIZE = 4


class Readable(Protocol):
    """Bytes in order; a source's ``Stream`` is one."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, ``b""`` at the end; raises the library's own errors."""
        ...


class Source:
    """The stored bytes, with a look ahead.

    Attributes:
        offset: bytes given out so far.
    """

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._head = b""
        self._ended = False
        self.offset = 0

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end, without giving them out."""
        pieces = [self._head]
        missing = size - len(self._head)
        while missing > 0 and (piece := self._pull(missing)):
            pieces.append(piece)
            missing -= len(piece)
        self._head = b"".join(pieces)
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; ``b""`` only once the stream itself has ended."""
        if self._head:
            piece, self._head = self._head[:size], self._head[size:]
        else:
            piece = self._pull(size)
        self.offset += len(piece)
        return piece

    def drain(self) -> None:
        """Read on to the end, so that the source checks the bytes; nothing where it already raised."""
        self._head = b""
        while self._pull(_READ):
            pass

    def _pull(self, size: int) -> bytes:
        if self._ended:
            return b""
        self._ended = True  # stays so if read raises: a stream that gave up isn't asked again
        piece = self._stream.read(size)
        self._ended = not piece
        return piece


class Engine(Protocol):
    """The decoder of one gzip member or zstd frame."""

    @property
    def ended(self) -> bool:
        """Whether the end was reached and its checksum found right."""
        ...

    @property
    def rest(self) -> bytes:
        """Input that was fed but not used; after the end, what follows it."""
        ...

    def feed(self, data: bytes, /) -> None:
        """Take more input; only once ``decode`` gave nothing."""
        ...

    def decode(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; ``b""`` where there is no more without more input."""
        ...


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # 31: a gzip header, and its CRC and length at the end
        self._data = b""

    @property
    def ended(self) -> bool:
        return self._zlib.eof

    @property
    def rest(self) -> bytes:
        return self._zlib.unused_data if self._zlib.eof else self._data

    def feed(self, data: bytes) -> None:
        self._data += data

    def decode(self, size: int) -> bytes:
        if self._zlib.eof:
            return b""
        out = self._zlib.decompress(self._data, size)
        self._data = self._zlib.unconsumed_tail
        return out


class _Zstd:
    """By the standard library (3.14 and later) or the ``zstandard`` package, which can't limit its output."""

    def __init__(self, decompressor: Any, *, bounded: bool) -> None:
        self._zstd = decompressor
        self._bounded = bounded
        self._data = b""
        self._at = 0
        self._out = memoryview(b"")

    @property
    def ended(self) -> bool:
        return bool(self._zstd.eof) and not self._out

    @property
    def rest(self) -> bytes:
        return bytes(self._zstd.unused_data) + self._data[self._at :]

    def feed(self, data: bytes) -> None:
        self._data, self._at = self._data[self._at :] + data, 0

    def decode(self, size: int) -> bytes:
        while not self._out and not self._zstd.eof and (self._at < len(self._data) or self._more()):
            piece = self._data[self._at :] if self._bounded else self._data[self._at : self._at + _PIECE]
            self._at += len(piece)
            limit = (size,) if self._bounded else ()
            self._out = memoryview(self._zstd.decompress(piece, *limit))
        out = bytes(self._out[:size])
        self._out = self._out[size:]
        return out

    def _more(self) -> bool:
        """Whether output is waiting that an earlier limit held back."""
        return self._bounded and not self._zstd.needs_input


def _load_zstd(model: str) -> tuple[Any, type[Exception]]:
    """Return a maker of zstd engines and the error they raise."""
    if sys.version_info >= (3, 14):
        try:
            from compression import zstd  # noqa: PLC0415 - Python may be built without it
        except ImportError:
            pass
        else:
            return lambda: _Zstd(zstd.ZstdDecompressor(), bounded=True), zstd.ZstdError
    try:
        import zstandard  # noqa: PLC0415 - an extra
    except ImportError as error:
        text = f"model {shown(model)} is zstd-compressed, which this Python can't read: install modelcache[zstd]"
        raise ConfigError(text, model=model, setting="zstd") from error
    decompressor = zstandard.ZstdDecompressor()
    return lambda: _Zstd(decompressor.decompressobj(), bounded=False), zstandard.ZstdError


class Decoded(io.RawIOBase):
    """The decoded content of a source, as a raw file to be read once.

    Attributes:
        member: what is being read, for errors.
    """

    def __init__(self, source: Source, job: Job, kind: Kind) -> None:
        self.member: str | None = None
        self._source = source
        self._job = job
        self._kind = kind
        self._rest = b""
        self._engine: Engine | None = None
        self._make: Any = _Gzip
        self._errors: tuple[type[Exception], ...] = (zlib.error,)
        self._magic = GZIP_MAGIC
        if kind is Kind.ZSTD:
            self._make, error = _load_zstd(job.model)
            self._errors, self._magic = (error,), ZSTD_MAGIC

    @property
    def plain(self) -> bool:
        """Whether there is nothing to undo."""
        return self._kind is Kind.TAR

    @property
    def offset(self) -> int:
        """Stored bytes used so far: where damage is, or a little after it."""
        return self._source.offset - len(self._rest if self._engine is None else self._engine.rest)

    def readable(self) -> bool:
        """Return True, as files do."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with decoded bytes; 0 once both content and stored bytes have ended.

        Raises:
            ArtifactCorrupt: cut off, damaged, or followed by something else than zeros.
            UnsafeArtifact: a decompression bomb.
        """
        data = self._source.read(len(buffer)) if self.plain else self._decode(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _decode(self, size: int) -> bytes:
        while (engine := self._engine or self._start()) is not None:
            try:
                data = engine.decode(size)
            except self._errors as error:
                raise self._corrupt(f"damaged {self._kind.value} data") from error
            if data:
                self._job.count(len(data), self.member)
                return data
            if engine.ended:
                self._rest, self._engine = engine.rest, None
            elif more := self._source.read(_READ):
                engine.feed(more)
            else:
                raise self._corrupt(f"cut off: the {self._kind.value} data has no end") from EOFError("end of stream")
        return b""

    def _start(self) -> Engine | None:
        """Begin the next gzip member or zstd frame; None at the end of the stored bytes."""
        self._rest = self._rest.lstrip(b"\0")
        while len(self._rest) < _MAGIC_SIZE and (more := self._source.read(_READ)):
            self._rest = (self._rest + more).lstrip(b"\0")
        if not self._rest:
            return None
        if not self._magic.match(self._rest):
            raise self._corrupt(f"{self._rest[:16]!a} follows the end of the {self._kind.value} data")
        engine: Engine = self._make()
        engine.feed(self._rest)
        self._engine, self._rest = engine, b""
        return engine

    def _corrupt(self, what: str) -> Exception:
        return self._job.corrupt(what, self.member, self.offset)
