"""Small archives made in memory, honest ones and others, and a bench that unpacks them under watch.

Makers alone; what must happen to each is in ``behaviour/test_archives`` and ``property/test_archives``.
"""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from modelcache.archives import unpack

FILES = {"config.json": b"{}", "weights/model.bin": bytes(range(256)) * 20, "weights/empty": b""}


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return one tar member; ``fields`` are attributes of its ``TarInfo``."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def link(name: str, goal: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    """Return a tar member that is a link."""
    return member(name, kind=kind, linkname=goal)


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT, **options: Any) -> bytes:
    """Return a tar of these members, headers as they are, however wrong."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape", **options) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_of(files: Mapping[str, bytes] = FILES) -> bytes:
    """Return a tar of plain files."""
    return tar([member(name, data) for name, data in files.items()])


def gz(data: bytes) -> bytes:
    """Return ``data`` as one gzip member, the same each time."""
    return gzip.compress(data, mtime=0)


def header(name: bytes = b"m", size: bytes = b"00000000000", kind: bytes = b"0") -> bytes:
    """Return a raw v7 tar header with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def zip_of(files: Mapping[str, bytes] = FILES, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of plain files."""
    return zip_entries([(entry(name), data) for name, data in files.items()], method)


def entry(name: str, mode: int = stat.S_IFREG | 0o644, system: int = 3) -> zipfile.ZipInfo:
    """Return a zip entry of this mode, made on Unix unless told."""
    info = zipfile.ZipInfo(name)
    info.create_system = system
    info.external_attr = mode << 16
    return info


def zip_entries(entries: Iterable[tuple[zipfile.ZipInfo, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of these entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for info, data in entries:
            archive.writestr(info, data, method)
    return out.getvalue()


def overlapping_zip(copies: int, size: int) -> bytes:
    """Return a zip whose entries all point at the same local header and data."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bytes(size)
    packed = packer.compress(data) + packer.flush()
    fields = (20, 0, 8, 0, 33, zlib.crc32(data), len(packed), size, 1, 0)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields) + b"m" + packed
    central = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, 0) + b"m"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, copies, copies, len(central) * copies, len(local), 0)
    return local + central * copies + end


class Bytes:
    """A stream as a source gives it: short reads, and a note of whether it was read to its end."""

    def __init__(self, data: bytes, step: int = 1 << 20, error: Exception | None = None) -> None:
        self._data = io.BytesIO(data)
        self._step = step
        self._error = error
        self.ended = False

    def read(self, size: int, /) -> bytes:
        """Return up to ``step`` bytes; at the end raise ``error``, if there is one."""
        assert not self.ended, "read after its end"
        data = self._data.read(min(size, self._step))
        if not data:
            self.ended = True
            if self._error is not None:
                raise self._error
        return data


@attrs.define
class Bench:
    """A folder to unpack in, and what may not change around it.

    Attributes:
        folder: parent of everything; beside the target there is a file ``outside``.
        charged: bytes charged now.
        peak: the most that were charged at one time.
        stream: the last stream.
    """

    folder: Path
    charged: int = 0
    peak: int = 0
    stream: Bytes = attrs.field(factory=lambda: Bytes(b""))

    @property
    def target(self) -> Path:
        """The folder that is filled."""
        return self.folder / "target"

    @property
    def spool(self) -> Path:
        """The temporary file that may be used."""
        return self.folder / "spool"

    def grow(self, amount: int) -> None:
        """Add to what is charged."""
        self.charged += amount
        self.peak = max(self.peak, self.charged)

    def unpack(self, data: bytes, name: str = "m.tar.gz", **options: Any) -> Path:
        """Unpack ``data`` into a fresh target, and check that nothing else was touched, whatever came of it."""
        self.target.mkdir()
        outside = self.folder / "outside"
        outside.write_bytes(b"untouched")
        stream = options.pop("stream", None) or Bytes(data)
        self.stream = stream
        settings = {"name": name, "model": "fraud", "size": len(data), "grow": self.grow, "spool": self.spool}
        try:
            return unpack(stream, self.target, **{**settings, **options})
        finally:
            assert {path.name for path in self.folder.iterdir()} == {"target", "outside"}
            assert outside.read_bytes() == b"untouched"
            assert outside.stat().st_nlink == 1


def content(folder: Path) -> dict[str, bytes | None]:
    """Return what is below ``folder``: bytes of files, None for folders, ``b"-> goal"`` for symbolic links."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = b"-> " + str(path.readlink()).encode(errors="surrogateescape")
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Return the files below ``folder``."""
    return {name: data for name, data in content(folder).items() if data is not None}
