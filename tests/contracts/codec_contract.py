"""What every decoder of compressed data must do: inherit, give ``codec`` and ``pack``, and pytest runs it."""

import itertools
import os
import tracemalloc

import pytest

from modelcache.archives.codecs import Codec, Engine

TEXT = b"".join(b"%d bottles of beer on the wall\n" % number for number in range(3000)) + bytes(range(256)) * 40


def drained(engine: Engine, size: int = 2**16) -> bytes:
    """Return all that there is without more input."""
    return b"".join(iter(lambda: engine.decode(size), b""))


class CodecContract:
    """The contract.

    Attributes:
        checked: whether the format has a checksum of its own.
    """

    checked = True

    def codec(self) -> Codec:
        """Return what is tried."""
        raise NotImplementedError

    def pack(self, data: bytes) -> bytes:
        """Return ``data`` compressed, as one member or frame."""
        raise NotImplementedError

    def undone(self, data: bytes, step: int = 2**16) -> bytes | None:
        """Return the content of one whole member; None where it is damaged or cut off."""
        engine, out = self.codec().start(), b""
        try:
            for at in range(0, len(data), step):
                engine.feed(data[at : at + step])
                out += drained(engine)
        except self.codec().errors:
            return None
        return out if engine.ended else None

    @pytest.mark.parametrize("data", [b"", b"x", TEXT, os.urandom(100_000), bytes(300_000)])
    @pytest.mark.parametrize("step", [1, 7, 1000, 2**20])
    def test_whole(self, data: bytes, step: int) -> None:
        """It gives back what was packed, in whatever pieces the input comes."""
        packed = self.pack(data)
        if len(packed) / step < 5000:
            assert self.undone(packed, step) == data

    @pytest.mark.parametrize("size", [1, 100, 2**14, 2**18])
    def test_output_is_bounded(self, size: int) -> None:
        """A decode gives at most what was asked for, though 100 KB of input may hold 20 MB."""
        engine = self.codec().start()
        engine.feed(self.pack(bytes(20 << 20)))
        pieces = list(itertools.islice(iter(lambda: engine.decode(size), b""), 300))
        assert {len(piece) for piece in pieces[:-1]} == {size}
        assert len(pieces) == (300 if size * 300 < 20 << 20 else (20 << 20) // size)

    def test_memory_is_bounded(self) -> None:
        """Decoding a bomb piece by piece takes some pieces' memory, not the bomb's."""
        packed = self.pack(bytes(64 << 20))
        tracemalloc.start()
        try:
            engine = self.codec().start()
            engine.feed(packed)
            while engine.decode(2**18):
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert engine.ended
        assert peak < 4 << 20

    @pytest.mark.parametrize("tail", [b"", b"x", b"\0" * 700, TEXT])
    def test_rest(self, tail: bytes) -> None:
        """What follows the end is handed back, every byte of it, however small the pieces of output are."""
        for size in (1000, 2**18):
            engine = self.codec().start()
            engine.feed(self.pack(TEXT) + tail)
            assert b"".join(iter(lambda: engine.decode(size), b"")) == TEXT  # noqa: B023 - used at once
            assert engine.ended
            assert engine.rest == tail

    def test_nothing_after_the_end(self) -> None:
        """After the end there is nothing more, whatever is fed."""
        engine = self.codec().start()
        engine.feed(self.pack(b"content"))
        assert drained(engine) == b"content"
        assert engine.decode(100) == b""

    def test_hungry(self) -> None:
        """Without input there is no output, and no error."""
        assert self.codec().start().decode(100) == b""

    def test_every_cut(self) -> None:
        """Cut anywhere, it has not ended; no error before the missing bytes could come."""
        packed = self.pack(TEXT)
        for cut in range(0, len(packed), max(1, len(packed) // 200)):
            engine = self.codec().start()
            engine.feed(packed[:cut])
            assert TEXT.startswith(drained(engine))
            assert not engine.ended

    def test_every_flip(self) -> None:
        """A flipped bit is an error or a missing end, or has changed nothing; with a checksum never the content."""
        packed = self.pack(TEXT[:2000] + os.urandom(300))
        whole = self.undone(packed)
        for at, bit in itertools.product(range(len(packed)), (0, 3, 7)):
            flipped = bytearray(packed)
            flipped[at] ^= 1 << bit
            found = self.undone(bytes(flipped))
            if self.checked:
                assert found in (None, whole), at

    def test_garbage(self) -> None:
        """Bytes of any kind are an error, or want more."""
        for number in range(200):
            assert self.undone(bytes([number]) + os.urandom(200)) is None or not self.checked
