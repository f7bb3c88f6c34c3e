"""What is fetched: a large file, an archive of float weights, and a folder of many small files; and the way there.

All of it is made once a run, below the served folder.
"""

import os
import tarfile
import zlib
from pathlib import Path

from benchmarks.fetch.server import BUCKET, list_files

MIB = 2**20
FILE = "model.bin"
ARCHIVE = "model.tar.gz"
FOLDER = "folder"
SMALL = 20_000
_MEMBER = 64 * MIB


def make(root: Path, *, file: int, archive: int, files: int) -> None:
    """Make all three: bytes of the file, about so many of the archive, number of small files; 0: without it."""
    folder = root / "data" / BUCKET
    folder.mkdir(parents=True)
    with (folder / FILE).open("wb") as out:
        for _ in range(file // MIB):
            out.write(os.urandom(MIB))
    if archive:
        _make_archive(folder, archive)
    (folder / FOLDER).mkdir()
    block = os.urandom(SMALL)
    for number in range(files):
        (folder / FOLDER / f"part-{number:05}.bin").write_bytes(number.to_bytes(8, "big") + block[8:])
    list_files(root, f"{FOLDER}/")


def _make_archive(folder: Path, size: int) -> None:
    """Write one gzip member that holds a tar of equal files, each deflated once: gzip -6 takes minutes for it."""
    body = _floats(min(_MEMBER, size))
    packed = _deflated(body)
    crc = total = 0
    with (folder / ARCHIVE).open("wb") as out:
        out.write(b"\x1f\x8b\x08\0\0\0\0\0\0\x03")
        for number in range(max(1, size // _MEMBER)):
            member = tarfile.TarInfo(f"weights/{number:03}.bin")
            member.size = len(body)
            head = member.tobuf()
            for plain, stored in ((head, _deflated(head)), (body, packed)):
                out.write(stored)
                crc = zlib.crc32(plain, crc)
                total += len(plain)
        end = bytes(2 * tarfile.BLOCKSIZE)
        out.write(_deflated(end, last=True))
        crc, total = zlib.crc32(end, crc), total + len(end)
        out.write(crc.to_bytes(4, "little") + (total % 2**32).to_bytes(4, "little"))


def _deflated(data: bytes, *, last: bool = False) -> bytes:
    """Return a stretch of a deflate stream that depends on nothing before it."""
    packer = zlib.compressobj(6, wbits=-15)
    return packer.compress(data) + packer.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)


def _floats(size: int) -> bytes:
    """Return bytes like those of trained weights, which gzip makes a fifth smaller: floats near zero, rounded."""
    import numpy as np  # noqa: PLC0415 - the parent only

    values = np.random.default_rng(7).normal(0, 0.02, size // 4).astype("float32")
    bits = values.view("uint32") & np.uint32(0xFFFFF000)
    return bits.tobytes()
