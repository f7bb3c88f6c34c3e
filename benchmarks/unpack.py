"""From bytes in memory to a usable folder: ours, ``tarfile`` and ``zipfile``, the system's tar, and decoding alone.

    python -m benchmarks.unpack [--rounds 5] [--size 250] [--folder DIR]

One artifact of float weights and some small files, as tar.gz (gzip -6), as zip and as tar.zst. Rows are measured in
turns; the ratio is to decoding the same bytes and throwing the result away, by the same decoder, in the same round.
Processor time, which a busy
machine changes less, has a table of its own. Nothing is synced. Every folder is compared with what was packed, outside
the measured time.
"""

import argparse
import contextlib
import io
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, rounds, table
from modelcache.archives import codecs, unpack

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Works = Mapping[str, Callable[[Path], None]]
_READ = 2**18
_AHEAD = 4  # pieces, of the decoder thread that tarfile is given


def weights(size: int) -> dict[str, bytes]:
    """Return the files: ``size`` MiB of float32 drawn from a normal distribution, and 50 small ones."""
    draw = np.random.default_rng(7)
    part = size * 2**18 // 4
    files = {f"w{number}.bin": (draw.standard_normal(part) * 0.02).astype(np.float32).tobytes() for number in range(4)}
    return files | {f"tokens/{number}.json": draw.bytes(500) for number in range(50)}


def packed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the artifact in each format."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive_:
        for name, data in files.items():
            archive_.writestr(name, data)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return {
        "tar.gz": packer.compress(plain.getvalue()) + packer.flush(),
        "zip": zipped.getvalue(),
        "tar.zst": zstd.compress(plain.getvalue()),
    }


def inflate(module: Any, data: bytes, wbits: int = 31) -> None:
    """Decode and throw away."""
    for _ in inflated(module, data, wbits):
        pass


def inflated(module: Any, data: bytes, wbits: int = 31) -> Iterator[bytes]:
    """Give the content in pieces, as quickly as this decoder gives it."""
    decoder, view = module.decompressobj(wbits=wbits), memoryview(data)
    for at in range(0, len(data), _READ // 4):
        yield decoder.decompress(view[at : at + _READ // 4], _READ)
        while decoder.unconsumed_tail:
            yield decoder.decompress(decoder.unconsumed_tail, _READ)
    assert decoder.eof


def unzstd(data: bytes) -> None:
    """Decode and throw away."""
    decoder, view = zstd.ZstdDecompressor(), memoryview(data)
    for at in range(0, len(data), _READ // 4):
        decoder.decompress(view[at : at + _READ // 4], _READ)
        while not (decoder.needs_input or decoder.eof):
            decoder.decompress(b"", _READ)
    assert decoder.eof


def unzip(module: Any, data: bytes) -> None:
    """Decode all entries and throw them away."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + len(entry.filename.encode())
            inflate(module, data[start : start + entry.compress_size], -15)


class Ahead(io.RawIOBase):
    """Content decoded on a thread, as a file for ``tarfile``."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._queue: queue.Queue[bytes] = queue.Queue(_AHEAD)
        self._piece = memoryview(b"")
        self._ended = False
        self._thread = threading.Thread(target=self._run, args=(pieces,))
        self._thread.start()

    def _run(self, pieces: Iterator[bytes]) -> None:
        for piece in pieces:
            if piece:
                self._queue.put(piece)
        self._queue.put(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``."""
        if not self._piece and not self._ended:
            self._piece = memoryview(self._queue.get())
            self._ended = not self._piece
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def finish(self) -> None:
        """Read to the end, and end the thread."""
        while self.read(_READ):
            pass
        self._thread.join()


def by_tarfile(file: Any, mode: str, target: Path) -> None:
    """Unpack with ``tarfile``, its copy buffer as big as ours."""
    with tarfile.open(fileobj=file, mode=mode, bufsize=_READ) as archive:
        archive.copybufsize = 2**20
        archive.extractall(target, filter="data")


def by_thread(module: Any, data: bytes, target: Path) -> None:
    """Unpack with ``tarfile``, the decoder on a thread."""
    ahead = Ahead(inflated(module, data))
    by_tarfile(io.BufferedReader(ahead, _READ), "r|", target)
    ahead.finish()


def by_system(data: bytes, option: str, target: Path) -> None:
    """Unpack with the system's tar, from a pipe."""
    subprocess.run(["tar", option, "-xf", "-", "-C", str(target)], input=data, check=True)  # noqa: S607 - on PATH


def by_zipfile(data: bytes, target: Path) -> None:
    """Unpack with ``zipfile``."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(target)  # noqa: S202 - our own


def ours(module: Any, data: bytes, form: str, target: Path) -> None:
    """Unpack with the library, by this zlib."""
    stream, before, spool = io.BytesIO(data), codecs.zlib_module, Path(f"{target}.spool")
    codecs.zlib_module = lambda: module
    try:
        unpack(stream, target, name=f"m.{form}", model="m", size=len(data), grow=lambda _: None, spool=spool)
    finally:
        codecs.zlib_module = before


def timed(
    work: Callable[[Path], None], folder: Path, files: Mapping[str, bytes] | None, processors: list[float]
) -> float:
    """Return milliseconds of ``work`` into an empty folder; with ``files`` that is what must be there then.

    Milliseconds of processor time, children's included, are appended to ``processors``.
    """
    target = folder / "target"
    target.mkdir()
    begin, used = time.perf_counter(), _used()
    work(target)
    taken, used = time.perf_counter() - begin, _used() - used
    if files is not None:
        for name, data in files.items():
            assert (target / name).read_bytes() == data, name
    shutil.rmtree(target)
    processors.append(used * 1000)
    return taken * 1000


def _used() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def modules() -> dict[str, Any]:
    """Return the zlib modules that are there: standard, the extra's, and another for comparison."""
    found: dict[str, Any] = {"zlib": zlib}
    with contextlib.suppress(ImportError):
        from zlib_ng import zlib_ng  # noqa: PLC0415 - a peer

        found["zlib-ng"] = zlib_ng
    with contextlib.suppress(ImportError):
        from isal import isal_zlib  # noqa: PLC0415 - an extra

        found["isal"] = isal_zlib
    return found


def measure(title: str, files: Mapping[str, bytes], works: Works, count: int, folder: Path) -> None:
    """Print one table; rows called ``decode ...`` make no folder and are what the others are compared with."""
    used: dict[str, list[float]] = {name: [] for name in works}
    rows = {
        name: lambda name=name, work=work: timed(work, folder, None if name.startswith("decode") else files, used[name])
        for name, work in works.items()
    }
    peers = [name for name in works if name.startswith("decode")]
    table(title, rounds(rows, count), "ms", peers)
    table(f"{title}, processor time", {name: times[1:] for name, times in used.items()}, "ms", peers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the three formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=250, help="MiB of weights")
    parser.add_argument("--folder", type=Path, default=None, help="where to unpack; default: the temporary folder")
    options = parser.parse_args(arguments)
    files = weights(options.size)
    data = packed(files)
    zlibs = modules()
    used = {name: module for name, module in zlibs.items() if name != "zlib-ng"}
    fastest = zlibs.get("isal", zlib)
    gzipped, zipped, zstandard = data["tar.gz"], data["zip"], data["tar.zst"]
    works: dict[str, dict[str, Callable[[Path], None]]] = {"tar.gz": {}, "zip": {}, "tar.zst": {}}
    for name, module in zlibs.items():
        works["tar.gz"][f"decode {name}"] = lambda _, module=module: inflate(module, gzipped)
    for name, module in used.items():
        works["tar.gz"][f"ours, {name}"] = lambda target, module=module: ours(module, gzipped, "tar.gz", target)
        works["tar.gz"][f"tarfile r| over a thread of {name}"] = lambda target, module=module: by_thread(
            module, gzipped, target
        )
        works["zip"][f"decode {name}"] = lambda _, module=module: unzip(module, zipped)
        works["zip"][f"ours, {name}"] = lambda target, module=module: ours(module, zipped, "zip", target)
    works["tar.gz"]["tarfile r|gz"] = lambda target: by_tarfile(io.BytesIO(gzipped), "r|gz", target)
    works["zip"]["zipfile"] = lambda target: by_zipfile(zipped, target)
    works["tar.zst"] = {
        "decode zstd": lambda _: unzstd(zstandard),
        "ours": lambda target: ours(fastest, zstandard, "tar.zst", target),
    }
    if shutil.which("tar"):
        works["tar.gz"]["system tar"] = lambda target: by_system(gzipped, "-z", target)
        if shutil.which("zstd"):
            works["tar.zst"]["system tar"] = lambda target: by_system(zstandard, "--zstd", target)
    sys.stdout.write(f"{machine()}; load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for form, rows in works.items():
            measure(f"{form}, {len(data[form]) / 1e6:.0f} MB", files, rows, options.rounds, Path(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
