"""The stored bytes of one file, counted, and their decoded content: gzip and zstd undone as it streams.

Covers multi-member gzip and zstd, padding between and after them, damage, bounded memory, and decoding on a thread
of its own beside reading and writing. What the content means is in ``tar``, one member's decoder in ``codecs``;
the rule for bytes after the end is in the package's docstring.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import attrs

from modelcache.archives.codecs import Codec, Engine
from modelcache.archives.job import Job

READ = 256 * 1024
"""Stored bytes read at a time."""
PIECE = 256 * 1024
"""Decoded bytes made at a time, at most: more would be mapped anew each time, which costs more than decoding."""
_STEP = 1024 * 1024  # decoded bytes of one step on the thread, at most
_AHEAD = 3  # steps under way or waiting to be used
ALONE = 1024 * 1024
"""Stored bytes below which a thread of its own brings nothing."""
_BITE = 4096  # stored bytes given to a new decoder first, which may end at once and hand them back
_MAGIC_SIZE = 4
_SMALL = 1024  # stored bytes of a gzip member or zstd frame; no packer makes them smaller throughout
_SHOWN = 16


class Readable(Protocol):
    """Bytes in order; a source's ``Stream`` is one."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, ``b""`` at the end; raises the library's own errors."""
        ...


class Source:
    """The stored bytes, with a look ahead."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._head = b""
        self._ended = False

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
        if not self._head:
            return self._pull(size)
        piece, self._head = self._head[:size], self._head[size:]
        return piece

    def drain(self) -> None:
        """Read on to the end, so that the source checks the bytes; nothing where it already raised."""
        self._head = b""
        while self._pull(READ):
            pass

    def _pull(self, size: int) -> bytes:
        if self._ended:
            return b""
        self._ended = True  # stays so if read raises: a stream that gave up isn't asked again
        piece = self._stream.read(size)
        self._ended = not piece
        return piece


class _Damage(Exception):
    """What is wrong with the data; its cause is what the decoder raised."""


class _TooMany(_Damage):
    """Nothing is wrong but that it would take for ever."""


@attrs.frozen
class _Step:
    """What one step of decoding gave.

    Attributes:
        pieces: decoded bytes, in order.
        used: stored bytes used so far.
        hungry: whether there is no more without more input; with all input there, whether this is the end.
        damage: what is wrong behind the pieces.
    """

    pieces: list[bytes]
    used: int
    hungry: bool
    damage: _Damage | None


_Pending = Callable[[], _Step]


class _Undoing:
    """Gzip members or zstd frames, one after the other: stored bytes in, decoded bytes out, no I/O."""

    def __init__(self, codec: Codec, limit: int) -> None:
        self._codec = codec
        self._limit = limit
        self._engine: Engine | None = None
        self._started = 0
        self._data = b""
        self._at = 0  # of the first byte in it that is not fed to an engine yet
        self._all = False
        self._used = 0
        self._bite = _BITE
        self._damage: _Damage | None = None

    def step(self, more: bytes | None, size: int) -> _Step:
        """Decode at most ``size`` bytes, and one piece beyond.

        Args:
            more: further input, ``b""`` at its end; None where there is enough.
            size: in bytes.
        """
        if more is not None:
            self._all = not more
            self._data, self._at = self._data[self._at :] + more, 0
        pieces: list[bytes] = []
        made, hungry = 0, False
        try:
            while made < size and not hungry:
                if piece := self._decode():
                    pieces.append(piece)
                    made += len(piece)
                else:
                    hungry = True
        except _Damage as damage:
            self._damage = damage
        return _Step(pieces, self._used, hungry, self._damage)

    def _decode(self) -> bytes:
        """Return the next piece; ``b""`` where there is none without more input."""
        if self._damage is not None:
            raise self._damage
        while (engine := self._engine or self._start()) is not None:
            try:
                piece = engine.decode(PIECE)
            except self._codec.errors as error:
                raise _Damage(self._codec.damage) from error
            if piece:
                return piece
            if engine.ended:
                self._end(engine.rest)
            elif self._at < len(self._data):
                engine.feed(self._take(self._bite))
                self._bite = min(8 * self._bite, READ)
            elif self._all:
                raise _Damage(f"cut off: the {self._codec.name} data has no end") from EOFError("end of stream")
            else:
                break
        return b""

    def _start(self) -> Engine | None:
        """Begin the next gzip member or zstd frame; None where there is none, or none yet."""
        if self._started:
            self._skip_zeros()
        left = len(self._data) - self._at
        if not left or (left < _MAGIC_SIZE and not self._all):
            return None
        if self._started and not self._codec.magic.match(self._data, self._at):
            found = self._data[self._at : self._at + _SHOWN]
            raise _Damage(f"{found!a} follows the end of the {self._codec.name} data")
        if not self._codec.head.match(self._data, self._at):
            raise _Damage(self._codec.damage)
        self._started += 1
        if self._started > self._limit and self._started * _SMALL > self._used:
            raise _TooMany(f"more than {self._limit} {self._codec.name} members of less than {_SMALL} bytes")
        self._bite = _BITE
        self._engine = self._codec.start()
        return self._engine

    def _end(self, rest: bytes) -> None:
        """Leave the engine, and take back what it did not use."""
        self._engine = None
        self._used -= len(rest)
        if len(rest) <= self._at:
            self._at -= len(rest)
        else:
            self._data, self._at = rest + self._data[self._at :], 0

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        self._at += len(data)
        self._used += len(data)
        return data

    def _skip_zeros(self) -> None:
        while bite := self._take(_BITE):
            if kept := len(bite.lstrip(b"\0")):
                self._at -= kept
                self._used -= kept
                break


class Decoded:
    """The decoded content of a source, to be read once, piece by piece.

    Concurrency: one thread reads. Of all but small files the decoding runs on a thread of its own, some steps ahead.
    That thread only computes: the source is read, and all errors raised, on the reading thread, and :meth:`close`
    waits for one step, some milliseconds.

    Args:
        source: the stored bytes.
        job: for limits and errors.
        codec: how they are undone; None where there is nothing to undo.
        size: how many stored bytes there are, about.
        base: where in the stored file they begin.

    Attributes:
        member: what is being read, for errors.
        offset: where in the stored file we are, or a little further: where damage is.
    """

    def __init__(self, source: Source, job: Job, codec: Codec | None, size: int, base: int = 0) -> None:
        self.member: str | None = None
        self.offset = self._base = base
        self._source = source
        self._job = job
        self._pieces: deque[bytes] = deque()
        self._steps: deque[_Pending] = deque()
        self._hungry = True
        self._all = False
        self._undoing = None if codec is None else _Undoing(codec, job.limits.frames)
        threaded = codec is not None and size >= ALONE
        self._pool = ThreadPoolExecutor(1, "modelcache-decoder") if threaded else None

    @property
    def compressed(self) -> bool:
        """Whether there is something to undo."""
        return self._undoing is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; steps that have not begun are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self) -> bytes:
        """Return the next decoded bytes; ``b""`` once both content and stored bytes have ended.

        Raises:
            ArtifactCorrupt: cut off, damaged, or followed by something else than zeros.
            UnsafeArtifact: a decompression bomb, or more in all than we take.
        """
        if self._undoing is None:
            data = self._source.read(READ)
            self.offset += len(data)
        else:
            while not self._pieces and self._advance(self._undoing):
                pass
            data = self._pieces.popleft() if self._pieces else b""
        self._job.count(len(data), self.member)
        return data

    def _advance(self, undoing: _Undoing) -> bool:
        """Take what the next step gave; False at the end."""
        self._send(undoing)
        if not self._steps:
            return False
        step = self._steps.popleft()()
        self.offset, self._hungry = self._base + step.used, step.hungry
        self._pieces.extend(step.pieces)
        if isinstance(step.damage, _TooMany):
            raise self._job.unsafe(str(step.damage), self.member)
        if step.damage is not None and not step.pieces:
            raise self._job.corrupt(str(step.damage), self.member, self.offset) from step.damage.__cause__
        return True

    def _send(self, undoing: _Undoing) -> None:
        """Start further steps; once all input is there, one at a time, and none after the last."""
        depth = 1 if self._pool is None else _AHEAD
        while len(self._steps) < depth and not (self._all and (self._steps or self._hungry)):
            more = self._source.read(READ) if self._hungry else None
            self._all = self._all or more == b""
            self._steps.append(self._submit(undoing, more))

    def _submit(self, undoing: _Undoing, more: bytes | None) -> _Pending:
        if self._pool is None:
            return partial(undoing.step, more, PIECE)
        try:
            return self._pool.submit(undoing.step, more, _STEP).result
        except RuntimeError:  # no thread to be had, or none any more since the interpreter is about to end
            if not self._steps:
                self._pool.shutdown(cancel_futures=True)  # it may have kept this step, to run it later
            return partial(undoing.step, more, _STEP)
