"""What is fetched: a large file, an archive of float weights, and a folder of many small files; and the way there.

All of it is made once a run, below the served folder.
"""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

from benchmarks.fetch.server import BUCKET, list_files

MIB = 2**20
FILE = "model.bin"
ARCHIVE = "model.tar.gz"
FOLDER = "folder"
SMALL = 20_000
_MEMBER = 64 * MIB


def make(root: Path, *, file: int, archive: int, files: int) -> None:
    """Make all three: bytes of the file, about so many of the archive, number of small files."""
    folder = root / "data" / BUCKET
    folder.mkdir(parents=True)
    with (folder / FILE).open("wb") as out:
        for _ in range(file // MIB):
            out.write(os.urandom(MIB))
    _make_archive(folder, archive)
    (folder / FOLDER).mkdir()
    block = os.urandom(SMALL)
    for number in range(files):
        (folder / FOLDER / f"part-{number:05}.bin").write_bytes(number.to_bytes(8, "big") + block[8:])
    list_files(root, f"{FOLDER}/")


def _make_archive(folder: Path, size: int) -> None:
    plain = folder / "model.tar"
    with tarfile.open(plain, "w") as archive:
        for number in range(max(1, size // _MEMBER)):
            body = _floats(min(_MEMBER, size))
            member = tarfile.TarInfo(f"weights/{number:03}.bin")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    packed = folder / ARCHIVE
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as out:
        shutil.copyfileobj(source, out, MIB)
    plain.unlink()


def _floats(size: int) -> bytes:
    """Return bytes like those of trained weights, which gzip makes a fifth smaller: floats near zero, rounded."""
    import numpy as np  # noqa: PLC0415 - the parent only

    values = np.random.default_rng(7).normal(0, 0.02, size // 4).astype("float32")
    bits = values.view("uint32") & np.uint32(0xFFFFF000)
    return bits.tobytes()
