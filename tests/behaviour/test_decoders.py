"""Every decoder that is there keeps the contract, and they agree; decoding ahead on a thread of its own.

What archives become is in ``test_archives``.
"""

import gzip
import io
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelcache.archives import Limits, codecs, decode
from modelcache.archives.codecs import Codec
from modelcache.archives.decode import Decoded, Source
from modelcache.archives.job import Job
from modelcache.errors import ArtifactCorrupt, SourceUnavailable, UnsafeArtifact
from tests.contracts.codec_contract import CodecContract
from tests.support.archives import FILES, Bench, Bytes, files, gz, tar_of, zip_of
from tests.support.fuzzing import decoders
from tests.support.waiting import WAIT

MODULES = decoders()


class Gzip(CodecContract):
    """Gzip, by a zlib module."""

    module: Any = zlib

    @pytest.fixture(autouse=True)
    def _module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(codecs, "zlib_module", lambda: self.module)

    def codec(self) -> Codec:
        """Return gzip's."""
        return codecs.gzip_codec()

    def pack(self, data: bytes) -> bytes:
        """Return one gzip member."""
        return gzip.compress(data, 6, mtime=0)

    def test_endless_header(self) -> None:
        """A name of megabytes in the header is passed over, not kept."""
        packed = bytearray(self.pack(b"content"))
        packed[3] |= 8
        name = b"n" * (8 << 20) + b"\0"
        assert self.undone(bytes(packed[:10]) + name + bytes(packed[10:])) == b"content"

    @pytest.mark.parametrize("at", [-8, -1])
    def test_trailer(self, at: int) -> None:
        """A wrong CRC and a wrong length are errors."""
        packed = bytearray(self.pack(b"content"))
        packed[at] ^= 1
        assert self.undone(bytes(packed)) is None


class Deflate(Gzip):
    """The data of zip entries, by a zlib module."""

    checked = False

    def codec(self) -> Codec:
        """Return deflate's."""
        return codecs.deflate_codec()

    def pack(self, data: bytes) -> bytes:
        """Return one raw deflate stream."""
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        return packer.compress(data) + packer.flush()

    test_endless_header = None  # type: ignore[assignment] # it has none
    test_trailer = None  # type: ignore[assignment] # nor this


class TestGzipByZlib(Gzip):
    """The standard library's."""


class TestDeflateByZlib(Deflate):
    """The standard library's."""


@pytest.mark.skipif("isal" not in MODULES, reason="isal is not installed")
class TestGzipByIsal(Gzip):
    """The extra's."""

    module = MODULES.get("isal")


@pytest.mark.skipif("isal" not in MODULES, reason="isal is not installed")
class TestDeflateByIsal(Deflate):
    """The extra's."""

    module = MODULES.get("isal")


class TestZstd(CodecContract):
    """Zstd, by the standard library or its backport."""

    def codec(self) -> Codec:
        """Return zstd's."""
        return codecs.zstd_codec("fraud")

    def pack(self, data: bytes) -> bytes:
        """Return one frame."""
        from tests.support.mutating import zst  # noqa: PLC0415 - needs the backport

        return zst(data)

    def test_window(self, tmp_path: Path) -> None:
        """A frame that wants a window over 128 MiB is refused, saying so."""
        frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(28 - 10) << 3]) + b"\x01\x00\x00"
        (tmp_path / "bench").mkdir()
        with pytest.raises(ArtifactCorrupt, match="window over 128 MiB"):
            Bench(tmp_path / "bench").unpack(frame, "m.tar.zst")


def test_which_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """ISA-L is used where it is installed, else the standard library's."""
    assert codecs.zlib_module() is MODULES.get("isal", zlib)
    monkeypatch.setitem(sys.modules, "isal", None)
    assert codecs.zlib_module() is zlib


def outcomes(folder: Path) -> dict[str, str]:
    """Return what comes of some archives, good and bad: ``"unpacked"`` or the words of the error."""
    data = gz(tar_of())
    cases = {"cut": data[:-9], "crc": data[:-8] + bytes(8), "tail": data + b"x", "junk": data[:30] * 9}
    cases |= {f"flag {flag}": data[:3] + bytes([flag]) + data[4:] for flag in (0x20, 0x40, 0x80)}  # of no format yet
    cases |= {"later flag": data + gz(b"")[:3] + b"\x20" + gz(b"")[4:]}
    cases |= {"whole": data, "zip": zip_of(), "inside": data[:100] + bytes(9) + data[109:]}
    said = {}
    for case, made in cases.items():
        bench = Bench(folder / case)
        bench.folder.mkdir(parents=True)
        try:
            bench.unpack(made)
            said[case] = "unpacked"
            assert files(bench.target) == FILES
        except ArtifactCorrupt as error:
            said[case] = str(error)
    return said


def test_same_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any decoder, on a thread or not, the same archives are unpacked and refused, in the same words."""
    said = []
    for name, module in MODULES.items():
        for alone in (0, 2**40):
            monkeypatch.setattr(codecs, "zlib_module", lambda module=module: module)
            monkeypatch.setattr(decode, "ALONE", alone)
            said.append(outcomes(tmp_path / f"{name}-{alone}"))
    assert [case for case, text in said[0].items() if text == "unpacked"] == ["whole", "zip"]
    assert all(other == said[0] for other in said)


class TestAhead:
    """Decoding on a thread."""

    @pytest.fixture(autouse=True)
    def _threaded(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(decode, "ALONE", 0)
        yield
        assert not running()

    def decoded(self, stream: decode.Readable, codec: Codec | None = None, **limits: int) -> Decoded:
        """Return the content of a stream."""
        job = Job("fraud", 2**20, Limits(**limits))
        return Decoded(Source(stream), job, codec or codecs.gzip_codec(), 2**20)

    def test_beside_the_reader(self) -> None:
        """While the reader uses one piece, the next are decoded."""
        second = threading.Event()

        @attrs.define
        class Engine:
            ended: bool = False
            rest: bytes = b""
            made: int = 0

            def feed(self, data: bytes) -> None:
                pass

            def decode(self, size: int) -> bytes:
                self.made += size
                if self.made > 2 * decode.PIECE + 2**20:
                    second.set()
                return bytes(size) if self.made < 8 << 20 else b""

        codec = attrs.evolve(codecs.gzip_codec(), start=Engine)
        with self.decoded(Bytes(b"x" * 100), codec) as content:
            assert len(content.read()) == decode.PIECE
            assert second.wait(WAIT)

    def test_not_far_ahead(self) -> None:
        """It decodes some steps ahead of the reader and reads no more than they need, however much there is."""
        made = 0

        class Engine:
            ended = False
            rest = b""

            def feed(self, data: bytes) -> None:
                pass

            def decode(self, size: int) -> bytes:
                nonlocal made
                made += size
                return bytes(size)

        codec = attrs.evolve(codecs.gzip_codec(), start=Engine)
        stream = io.BytesIO(bytes([1]) * (64 << 20))
        with self.decoded(stream, codec) as content:
            content.read()
        assert made <= 4 * (2**20 + decode.PIECE)
        assert stream.tell() <= 4 * decode.READ

    def test_small_needs_no_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A small file is decoded where it is read."""
        monkeypatch.setattr(decode, "ALONE", 2**21)
        with self.decoded(Bytes(gz(b"content"))) as content:
            assert content.read() == b"content"
            assert not running()

    def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no thread can be started, at first or any more, it is decoded by the reader."""

        def refuse(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        data = os.urandom(3 << 20)
        for late in (False, True):
            with self.decoded(Bytes(gz(data))) as content, monkeypatch.context() as patch:
                begin = content.read() if late else b""
                patch.setattr(ThreadPoolExecutor, "submit" if late else "_adjust_thread_count", refuse)
                assert begin + b"".join(iter(content.read, b"")) == data

    def test_no_thread_at_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a thread could be started a little later, no step is run twice."""
        start, tried = ThreadPoolExecutor._adjust_thread_count, 0

        def refuse_once(pool: ThreadPoolExecutor) -> None:
            nonlocal tried
            tried += 1
            if tried == 1:
                raise RuntimeError("can't start new thread")
            start(pool)

        monkeypatch.setattr(ThreadPoolExecutor, "_adjust_thread_count", refuse_once)
        data = os.urandom(3 << 20)
        with self.decoded(Bytes(gz(data))) as content:
            assert b"".join(iter(content.read, b"")) == data

    def test_member_ends_late(self) -> None:
        """Input that a decoder had for long before it ended, and did not use, goes to the next one."""
        long, short = bytes(3 << 20), os.urandom(5000)
        packed = gz(long)
        assert len(packed) < 4000
        with self.decoded(Bytes(packed + gz(short), step=4096)) as content:
            assert b"".join(iter(content.read, b"")) == long + short

    @pytest.mark.parametrize("error", [SourceUnavailable("gone"), KeyboardInterrupt(), ValueError("closed")])
    def test_source_fails(self, error: BaseException, bench: Bench) -> None:
        """What the source raises, a cancelled fetch included, ends the thread and passes through."""

        class Broken(Bytes):
            reads = 0

            def read(self, size: int, /) -> bytes:
                self.reads += 1
                if self.reads > 3:
                    raise error
                return super().read(size)

        data = gz(bytes(range(256)) * 4000)
        with pytest.raises(type(error)) as caught:
            bench.unpack(data, stream=Broken(gz(tar_of({"m": data})), step=100))
        assert caught.value is error
        assert not running()

    def test_writer_fails(self, bench: Bench) -> None:
        """What writing raises ends the thread and passes through."""

        def grow(amount: int) -> None:
            assert running()
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space"):
            bench.unpack(gz(tar_of({"m": bytes(2**20)})), grow=grow)

    def test_damage_comes_in_turn(self) -> None:
        """All content in front of the damage is given before the error is raised."""
        data = gz(bytes(3 << 20))[:-1]
        with self.decoded(Bytes(data)) as content:
            assert sum(len(content.read()) for _ in range(12)) == 3 << 20
            with pytest.raises(ArtifactCorrupt, match="cut off") as caught:
                content.read()
        assert caught.value.offset == len(data)
        assert isinstance(caught.value.__cause__, EOFError)

    def test_bomb(self) -> None:
        """A bomb is noticed by the reader, who counts what it takes."""
        bomb = Bytes(gz(bytes(40 << 20)))
        with self.decoded(bomb, floor=2**20, ratio=1) as content, pytest.raises(UnsafeArtifact, match="bomb"):
            list(iter(content.read, b""))

    @pytest.mark.parametrize("each", [b"", b"x"])
    def test_swarm_of_members(self, each: bytes) -> None:
        """Tiny gzip members without end are refused before they have taken long."""
        swarm, match = Bytes(gz(each) * 30_000), "more than 2000 gzip members"
        with self.decoded(swarm, frames=2000) as content, pytest.raises(UnsafeArtifact, match=match):
            list(iter(content.read, b""))

    def test_many_members(self) -> None:
        """Many members of a usual size, as bgzip writes them, are fine."""
        block = bytes(range(256)) * 40
        packed = gzip.compress(block, 0)
        with self.decoded(Bytes(packed * 300), frames=20) as content:
            assert b"".join(iter(content.read, b"")) == block * 300


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Return a bench."""
    folder = tmp_path / "bench"
    folder.mkdir()
    return Bench(folder)


def running() -> list[str]:
    """Return the decoding threads that run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("modelcache-decoder")]
