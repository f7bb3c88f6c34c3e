"""Valid archives of many makes, and a mutator that damages them: at random, and at the fields that matter.

Each input is made by a seed and a number alone, so that one that failed can be made again. What must happen to it
is in ``fuzz``.
"""

import contextlib
import gzip
import io
import random
import stat
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from tests.support.archives import FILES, entry, gz, link, member, overlapping_zip, tar, zip_entries, zip_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    zstd = pytest.importorskip("backports.zstd")

_SMALL = {"m.json": b"{}", "d/w.bin": bytes(range(256)) * 3, "d/empty": b"", "z": bytes(3000)}
_NUMBERS = (0, 1, 7, 255, 256, 511, 512, 513, 4095, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**33, 2**63 - 1, 2**63)
_NAMES = (b"../x", b"/etc/x", b"a/../../x", b"", b".", b"..", b"d", b"d/w.bin", b"m.json", b"l", b"l/x", b"x" * 300)
_NAMES += (b"\xff\xfe", b"a\0b", b"C:\\x", b"..\\x", b"a\nb", "\u00e9".encode(), b"d/./w.bin", b"d//w.bin", b"d/")
_PAX = (
    b"path=../x",
    b"size=5",
    b"size=-1",
    b"size=99999999999999",
    b"linkpath=/etc",
    b"path=d/y",
    b"GNU.sparse.major=1",
)
_PAX += (b"hdrcharset=BINARY", b"size=1_0", b"path=", b"mtime=1.5", b"size=" + b"9" * 400)


@attrs.frozen
class Input:
    """One archive, damaged or not.

    Attributes:
        kind: ``"tar"``, ``"tar.gz"``, ``"tar.zst"`` or ``"zip"``: what it was made from.
        data: its bytes.
    """

    kind: str
    data: bytes


def _tars() -> list[bytes]:
    plain = [member(name, data) for name, data in _SMALL.items()]
    rich = [
        member("./", kind=tarfile.DIRTYPE),
        member("d", kind=tarfile.DIRTYPE, mode=0),
        *plain,
        member("run.sh", b"#!", mode=0o755),
        link("l", "d"),
        link("h", "m.json", tarfile.LNKTYPE),
        member("long-" * 25 + "/m", b"long"),
        member("m.json", b"again"),
        member("\u00fc\udce9", b"odd"),
        member("p", b"pax", pax_headers={"mtime": "1.5", "LIBARCHIVE.xattr.x": "AA"}),
    ]
    forms = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    made = [tar(rich, form) for form in forms] + [tar(plain, tarfile.USTAR_FORMAT)]
    return [*made, tar(plain, pax_headers={"comment": "all"})]


def _zips() -> list[bytes]:
    mode = stat.S_IFLNK | 0o777
    entries = [(entry("l", mode), b"d"), (entry("d/", stat.S_IFDIR), b""), (entry("d/run", stat.S_IFREG | 0o755), b"#")]
    wide = io.BytesIO()
    with zipfile.ZipFile(wide, "w") as archive, archive.open("m", "w", force_zip64=True) as file:
        file.write(b"big")
    noted = io.BytesIO(zip_of(_SMALL))
    with zipfile.ZipFile(noted, "a") as archive:
        archive.comment = b"a comment"
    return [
        zip_of(_SMALL),
        zip_of(_SMALL, zipfile.ZIP_STORED),
        zip_entries([*entries, *((entry(name), data) for name, data in FILES.items())]),
        zip_entries([(entry("a\\b", system=0), b"1"), (entry("\u00e9"), b"2")]),
        piped_zip(_SMALL),
        zstd_zip(_SMALL),
        wide.getvalue(),
        noted.getvalue(),
        b"#!/bin/sh\n" + zip_of(_SMALL),
        overlapping_zip(3, 1000),
    ]


def piped_zip(files: dict[str, bytes]) -> bytes:
    """Return a zip as written to a pipe: sizes and CRC of each entry stand behind its data."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return pipe.getvalue()


def zstd_zip(files: dict[str, bytes]) -> bytes:
    """Return a zip whose entries are zstd, which ``zipfile`` writes from Python 3.14 only."""
    local, central = b"", b""
    for name, data in files.items():
        packed, raw = zstd.compress(data), name.encode()
        fields = (20, 0, 93, 0, 33, zlib.crc32(data), len(packed), len(data), len(raw), 0)
        central += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, len(local)) + raw
        local += struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields) + raw + packed
    count = len(files)
    return local + central + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(central), len(local), 0)


def zst(data: bytes) -> bytes:
    """Return ``data`` as one zstd frame, with a checksum."""
    return bytes(zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}))


class Mutator:
    """Makes inputs; the same seed and number give the same one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names that are there twice
            self._tars, self._zips = _tars(), _zips()

    def make(self, number: int) -> Input:
        """Return one input."""
        dice = random.Random(f"{self._seed}:{number}")  # noqa: S311 - reproducible, not secret
        kind = dice.choice(("tar", "tar.gz", "tar.zst", "zip"))
        if kind == "zip":
            data = dice.choice(self._zips)
            if dice.random() < 0.6:
                data = _zip_fields(dice, data)
            return Input(kind, _bytes(dice, data) if dice.random() < 0.6 else data)
        data = dice.choice(self._tars)
        if dice.random() < 0.6:
            data = _tar_fields(dice, data)
        if kind == "tar" or dice.random() < 0.3:
            data = _bytes(dice, data)
        if kind != "tar":
            data = _packed(dice, data, gz if kind == "tar.gz" else zst)
            data = _bytes(dice, data) if dice.random() < 0.6 else data
        return Input(kind, data)


def _packed(dice: random.Random, data: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    """Compress in one member or several, with what may stand between them."""
    cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.choice((0, 0, 1, 3))))
    pad = dice.choice((b"", b"", bytes(7), b"\0x"))
    return pad.join(pack(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))


def _bytes(dice: random.Random, data: bytes) -> bytes:
    """Damage bytes anywhere."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(changed)) if changed else 0
        size = dice.choice((1, 2, 4, 16, 100, 512))
        match dice.randrange(9):
            case 0 | 1 | 2 if changed:
                changed[at] ^= 1 << dice.randrange(8)
            case 3:
                changed[at : at + size] = dice.randbytes(size)
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = changed[at : at + size]
            case 6:
                del changed[at:]
            case 7:
                width = dice.choice((1, 2, 4, 8))
                number = dice.choice(_NUMBERS) & (2 ** (8 * width) - 1)
                changed[at : at + width] = number.to_bytes(width, dice.choice(("little", "big")))
            case _:
                changed += dice.choice((bytes(600), b"tail", data[: dice.randrange(len(data))]))
    return bytes(changed)


def _tar_fields(dice: random.Random, data: bytes) -> bytes:
    """Change fields of headers, put headers in or take them out; checksums are right again afterwards."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    heads = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(dice.choice((1, 1, 2, 4))):
        at, what = dice.choice(heads), dice.randrange(8)
        if what == 1:
            at = dice.choice([number for number in heads if blocks[number][156:157] in (b"1", b"2")] or heads)
        block = bytearray(blocks[at].ljust(512, b"\0"))
        match what:
            case 0 | 7:
                block[0:100] = dice.choice(_NAMES)[:100].ljust(100, b"\0")
            case 1:
                block[157:257] = dice.choice(_NAMES)[:100].ljust(100, b"\0")
            case 2:
                block[156] = dice.choice(b"0123456789LKxgXSDVNMA\0")
            case 3:
                block[124:136] = _size(dice)
            case 4:
                block[345:500] = dice.choice(_NAMES)[:155].ljust(155, b"\0")
            case 5:
                blocks.insert(at, dice.choice((bytes(512), blocks[dice.choice(heads)], _pax(dice))))
                continue
            case _:
                del blocks[at : at + dice.choice((1, 2))]
                heads = [number for number, one in enumerate(blocks) if one[257:262] == b"ustar"] or [0]
                if not blocks:
                    return b""
                continue
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        blocks[at] = bytes(block)
    return b"".join(blocks)


def _size(dice: random.Random) -> bytes:
    number = dice.choice(_NUMBERS)
    if dice.random() < 0.2:
        return b"\x80" + number.to_bytes(11, "big")
    return dice.choice((b"%011o\0" % (number % 2**33), b"-0000000001\0", b" 7 \0".ljust(12, b"\0"), b"x" * 12))


def _pax(dice: random.Random) -> bytes:
    """Return a PAX header with one record, right or a little wrong."""
    text = dice.choice(_PAX)
    length = len(text) + 2
    length += len(str(length + len(str(length)))) + dice.choice((0, 0, 0, 1, -1, 10**9))
    record = b"%d %s\n" % (length, text)
    info = tarfile.TarInfo("pax")
    info.type, info.size = dice.choice((b"x", b"g", b"L", b"K")), len(record)
    head = info.tobuf(tarfile.USTAR_FORMAT)
    return head + record.ljust(-(-len(record) // 512) * 512, b"\0")


_FIELDS = {
    b"PK\x01\x02": (("H", 4), ("H", 6), ("H", 8), ("H", 10), ("L", 16), ("L", 20), ("L", 24), ("H", 28), ("H", 30)),
    b"PK\x03\x04": (("H", 6), ("H", 8), ("L", 14), ("L", 18), ("L", 22), ("H", 26), ("H", 28)),
    b"PK\x05\x06": (("H", 4), ("H", 8), ("H", 10), ("L", 12), ("L", 16), ("H", 20)),
    b"PK\x06\x06": (("Q", 4), ("Q", 24), ("Q", 32), ("Q", 40), ("Q", 48)),
    b"PK\x06\x07": (("L", 4), ("Q", 8), ("L", 16)),
}
_MORE = {b"PK\x01\x02": (("H", 32), ("H", 34), ("L", 38), ("L", 42))}


def _zip_fields(dice: random.Random, data: bytes) -> bytes:
    """Change fields of the directory, of entries or of the end; or names, all of one kind alike."""
    changed = bytearray(data)
    if dice.random() < 0.2:
        name = dice.choice((b"m.json", b"d/w.bin", b"d/empty"))
        other = dice.choice(_NAMES)[: len(name)].ljust(len(name), b"x")
        return bytes(changed.replace(name, other))
    for _ in range(dice.choice((1, 1, 2, 3))):
        signature = dice.choice(list(_FIELDS))
        places = _places(changed, signature)
        if not places:
            continue
        form, offset = dice.choice(_FIELDS[signature] + _MORE.get(signature, ()))
        at = dice.choice(places) + offset
        with contextlib.suppress(struct.error):
            old = struct.unpack_from("<" + form, changed, at)[0]
            number = dice.choice((*_NUMBERS, old + 1, old - 1, old ^ 0x800, 93, 8, stat.S_IFLNK << 16))
            struct.pack_into("<" + form, changed, at, number & (2 ** (8 * struct.calcsize(form)) - 1))
    return bytes(changed)


def _places(data: bytearray, signature: bytes) -> list[int]:
    places, at = [], data.find(signature)
    while at >= 0:
        places.append(at)
        at = data.find(signature, at + 4)
    return places


def reference(made: Input) -> dict[str, bytes] | None:
    """Return the files that the standard library reads; None where it refuses, or can't say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _zip_reference(made.data) if made.kind == "zip" else _tar_reference(made)
    except Exception:  # noqa: BLE001 - whatever it says, it has not read it
        return None


def _tar_reference(made: Input) -> dict[str, bytes]:
    decode: dict[str, Callable[[bytes], Any]] = {"tar": bytes, "tar.gz": gzip.decompress, "tar.zst": zstd.decompress}
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(decode[made.kind](made.data)), mode="r:") as archive:
        for info in archive:
            if not info.name:
                raise ValueError("an empty PAX record: it is none, but not to tarfile")
            if info.isreg() and (file := archive.extractfile(info)) is not None:
                found[_path(info.name)] = file.read()
            else:
                found.pop(_path(info.name), None)
    return found


def _zip_reference(data: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/") if info.create_system == 0 else info.filename
            if name.endswith("/") or stat.S_IFMT(info.external_attr >> 16) == stat.S_IFDIR:
                continue
            if stat.S_IFMT(info.external_attr >> 16) == stat.S_IFLNK:
                found.pop(_path(name), None)
            else:
                found[_path(name)] = archive.read(info)
    return found


def _path(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
