"""Faults of archives, by their number: packed wrongly, on purpose or not, and asked for through a whole cache.

After each the bytes counted are those on disk, and no temporary folder is left. Cases in detail are in
``behaviour/test_archives``, random damage is in ``fuzz``.
"""

import functools
import gzip
import io
import os
import shutil
import stat
import struct
import subprocess
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from modelcache import ArtifactCorrupt, ModelCache, ModelCacheError, NoRoom, TooLarge, UnsafeArtifact
from tests.support import mutating
from tests.support.archives import (
    FILES,
    content,
    entry,
    gz,
    link,
    member,
    overlapping_zip,
    tar,
    tar_of,
    zip_entries,
    zip_of,
)
from tests.support.children import run
from tests.support.fakes import DictSource, allocated
from tests.support.racing import allocated as at_one_moment
from tests.support.racing import small_cache


@attrs.define
class Shop:
    """A cache over archives whose models are what lies in the folder that the loader gets.

    Attributes:
        source: its artifacts.
        cache: the cache.
        around: the folder in which the cache has its own.
    """

    source: DictSource
    cache: ModelCache[dict[str, bytes | None]]
    around: Path

    def get(self, data: bytes, name: str = "m.tar.gz", model: str = "m") -> dict[str, bytes | None]:
        """Return what becomes of an archive; whatever that is, nothing outside the cache's own folder changes."""
        self.source.add_file(model, name, data)
        before = self._outside()
        try:
            return self.cache.get(model)
        finally:
            assert self._outside() == before

    def refused(self, data: bytes, kind: type[ModelCacheError] = UnsafeArtifact, name: str = "m.tar.gz") -> str:
        """Check that an archive is refused, publishes nothing and holds no disk; return the words."""
        with pytest.raises(kind) as caught:
            self.get(data, name, "bad")
        assert caught.value.model == "bad"
        assert "bad" not in [row.model for row in self.cache.models()]
        assert not list((self.cache.disk.path / "models").glob("bad*"))
        left = [path for path in (self.cache.disk.path / "tmp").rglob("*") if path.is_file() and path.stat().st_size]
        assert not left
        self.source.artifacts.pop("bad")
        self.cache.delete("bad")
        return str(caught.value)

    def _outside(self) -> dict[str, bytes | None]:
        return {name: data for name, data in content(self.around).items() if not name.startswith("disk")}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """Return a shop, with a file beside the cache's folder; check in the end that its books are right."""
    (tmp_path / "precious").write_bytes(b"untouched")
    source = DictSource()
    with small_cache(tmp_path, source, content, retry_after=0) as cache:
        yield Shop(source, cache, tmp_path)
        assert cache.stats().disk_used == allocated(cache.disk.path)
    assert not list((cache.disk.path / "tmp").iterdir())


def test_f064_escapes(shop: Shop) -> None:
    """F064: names and links that lead outside, and a member written through a link, are refused as a whole."""
    up = "../" * 5
    for bad in (member(up + "precious", b"x"), member(str(shop.around / "precious"), b"x"), link("l", up + "precious")):
        shop.refused(tar([member("ok", b"1"), bad]))
    through = [link("d", up), member("d/precious", b"x")]
    shop.refused(tar(through))
    shop.refused(tar([link("h", up + "precious", tarfile.LNKTYPE), member("h", b"x")]))
    shop.refused(tar([member("a/b", b"1"), link("s", "a"), link("t", "s/../../../precious")]))


@pytest.mark.parametrize("threaded", [False, True])
def test_f065_damaged_gzip(shop: Shop, threaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """F065: cut at every hundredth of its length or with a byte flipped, it is one typed error with the model."""
    if threaded:
        monkeypatch.setattr("modelcache.archives.decode.ALONE", 0)
    data = gz(tar_of())
    for cut in range(0, len(data), max(1, len(data) // 100)):
        assert "bad" in shop.refused(data[:cut], ArtifactCorrupt)
    for at in range(10, len(data), max(1, len(data) // 50)):
        shop.refused(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], ArtifactCorrupt)


def test_f066_many_streams(shop: Shop) -> None:
    """F066: gzip members one after the other, cut in the middle of a file, are unpacked whole."""
    data = tar_of()
    assert shop.get(gz(data[:1500]) + gz(data[1500:])) == {**FILES, "weights": None}


def test_f067_trailing(shop: Shop) -> None:
    """F067: zeros after the archive are padding, anything else is refused, in the compressed data and behind it."""
    assert shop.get(gz(tar_of()) + bytes(512)) == {**FILES, "weights": None}
    shop.refused(gz(tar_of()) + b"text", ArtifactCorrupt)
    shop.refused(gz(tar_of() + b"text".ljust(512)), ArtifactCorrupt)


FORMATS: dict[str, Callable[[], bytes]] = {
    ".tar": tar_of,
    ".tar.gz": lambda: gz(tar_of()),
    ".tar.zst": lambda: mutating.zst(tar_of()),
    ".zip": zip_of,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_f068_name_lies(shop: Shop, suffix: str) -> None:
    """F068: every format is unpacked under every archive's suffix; what is none is named by its first bytes."""
    for number, make in enumerate(FORMATS.values()):
        assert shop.get(make(), f"m{suffix}", f"m{number}") == {**FILES, "weights": None}
    for data, meaning in (
        (b"\x80\x04\x95", "pickle"),
        (b"<html>", "HTML"),
        (b'<?xml version="1.0"?><Error>', "error document"),
    ):
        assert meaning in shop.refused(data, ArtifactCorrupt, f"m{suffix}")


def test_f069_dot_and_wrapper(shop: Shop) -> None:
    """F069: './' is the same as none, also as an entry of mode 0700 or 0000; a wrapper folder is kept."""
    for number, mode in enumerate((0o700, 0)):
        dot = [member("./", kind=tarfile.DIRTYPE, mode=mode), member("./model", b"1")]
        assert shop.get(tar(dot), "m.tar", f"dot{number}") == {"model": b"1"}
    assert shop.get(tar([member("top/model", b"1")]), "m.tar", "wrapped") == {"top": None, "top/model": b"1"}


def test_f070_macos(shop: Shop) -> None:
    """F070: AppleDouble twins stay files of their own, and unknown PAX records don't matter."""
    pax = {"LIBARCHIVE.xattr.com.apple.provenance": "AQA=", "SCHILY.fflags": "hidden"}
    data = tar([member("._m.json", b"\0\5\x16\7", pax_headers=pax), member("m.json", b"{}", pax_headers=pax)])
    assert shop.get(gz(data)) == {"._m.json": b"\0\5\x16\7", "m.json": b"{}"}


def test_f071_inner_archive(shop: Shop) -> None:
    """F071: an archive inside an archive stays a file, and is counted as one."""
    inner = gz(tar_of({"w": os.urandom(5 << 20)}))
    assert shop.get(gz(tar_of({"inner.tar.gz": inner}))) == {"inner.tar.gz": inner}
    assert shop.cache.stats().disk_used >= len(inner)


def test_f072_links(shop: Shop) -> None:
    """F072: relative inner links work where the folder is in the end; others are refused, naming the member."""
    data = tar([member("blobs/abc", b"w"), link("snapshots/1/m", "../../blobs/abc"), link("refs", "snapshots")])
    assert shop.get(gz(data))["snapshots/1/m"] == b"-> ../../blobs/abc"
    folder = next((shop.cache.disk.path / "models").rglob("refs")).parent
    assert (folder / "refs/1/m").read_bytes() == b"w"
    assert "'out'" in shop.refused(tar([link("out", "/etc/passwd")]))
    assert "'lost'" in shop.refused(tar([link("lost", "nothing")]), ArtifactCorrupt)


def test_f073_closed_folders(tmp_path: Path) -> None:
    """F073: folders of mode 0555 and 0000, full or empty, are unpacked, read and deleted by a user who isn't root."""
    folder = tmp_path / "open"
    folder.mkdir()
    for above in (folder, *folder.parents):
        if above.owner() == Path.home().owner() and above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o111)
    folder.chmod(0o777)
    run(
        """
        import tarfile
        from tests.support.archives import gz, member, tar, content
        folder = Path(sys.argv[1])
        with small_cache(folder / "first", DictSource().add("a")) as cache:  # all imports, as root
            cache.get("a")
        if os.geteuid() == 0:
            os.setegid(65534), os.seteuid(65534)
        made = [member("d", kind=tarfile.DIRTYPE, mode=0o555), member("d/m", b"1", mode=0)]
        made += [member("e", kind=tarfile.DIRTYPE, mode=0), member("e/f", kind=tarfile.DIRTYPE, mode=0)]
        source = DictSource({"a": gz(tar(made))}).add("b")
        with small_cache(folder / "second", source, content) as cache:
            assert cache.get("a") == {"d": None, "d/m": b"1", "e": None, "e/f": None}, cache.get("a")
            assert cache.delete("a")
            cache.get("b")
            assert [model.model for model in cache.models()] == ["b"]
            assert len(list((folder / "second/disk/models").iterdir())) == 1
        """,
        folder,
    )


@functools.cache
def _zeros(size: int = 64 << 20) -> dict[str, bytes]:
    """Return a tar.gz, tar.zst and zip of one file of zeros; made piece by piece."""
    head = tarfile.TarInfo("m")
    head.size = size
    raw = head.tobuf(tarfile.USTAR_FORMAT)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    inner = zlib.compressobj(9, zlib.DEFLATED, -15)
    block, gzipped, deflated, crc = bytes(2**20), packer.compress(raw), b"", 0
    for _ in range(size // len(block)):
        gzipped += packer.compress(block)
        deflated += inner.compress(block)
        crc = zlib.crc32(block, crc)
    gzipped += packer.compress(bytes(1024)) + packer.flush()
    deflated += inner.flush()
    fields = (20, 0, 8, 0, 33, crc, len(deflated), size, 1, 0)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", *fields) + b"m" + deflated
    central = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, 0) + b"m"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local), 0)
    zstandard = mutating.zst(raw + bytes(size) + bytes(1024))
    return {"m.tar.gz": gzipped, "m.tar.zst": zstandard, "m.zip": local + central + end}


@pytest.mark.parametrize("name", ["m.tar.gz", "m.tar.zst", "m.zip"])
def test_f074_bomb_meets_the_budget(tmp_path: Path, name: str) -> None:
    """F074: a bomb of 64 MiB in some 100 KB stops where the budget ends, which holds at every moment."""
    data = _zeros()[name]
    assert len(data) < 200_000
    source = DictSource().add_file("bomb", name, data).add("a")
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, at_one_moment(tmp_path / "disk"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with small_cache(tmp_path, source, content, disk={"budget": "8 MiB"}) as cache:
            with pytest.raises((NoRoom, TooLarge)) as caught:
                cache.get("bomb")
            assert cache.get("a")
    finally:
        over.set()
        thread.join()
    assert caught.value.tier == "disk"
    assert 0 < most <= 8 << 20


def test_f074_bomb_without_a_budget(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """F074: without a budget a bomb stops at 1 GiB (here 16 MiB) and 200 times its stored size, as UnsafeArtifact."""
    from modelcache.archives import Limits, unpacking  # noqa: PLC0415 - what it is by default is the subject

    assert (unpacking.LIMITS.floor, unpacking.LIMITS.ratio) == (2**30, 200)
    monkeypatch.setattr(unpacking, "LIMITS", Limits(floor=16 << 20))
    for name, data in _zeros().items():
        assert "bomb" in shop.refused(data, name=name)


def test_f075_zips(shop: Shop) -> None:
    """F075: a bomb of overlapping entries is refused; streamed, zip64 and self-extracting zips are honest."""
    assert "overlaps" in shop.refused(overlapping_zip(1000, 100_000), name="m.zip")
    honest = {"streamed": mutating.piped_zip(FILES), "prefix": b"MZ" + bytes(70_000) + zip_of()}
    wide = io.BytesIO()
    with zipfile.ZipFile(wide, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    for model, data in {**honest, "wide": wide.getvalue()}.items():
        assert shop.get(data, "m.zip", model) == {**FILES, "weights": None}


@pytest.mark.skipif(shutil.which("zip") is None, reason="no zip here")
def test_f075_zip_from_a_pipe(shop: Shop, tmp_path: Path) -> None:
    """F075: what Info-ZIP writes to a pipe, with data descriptors, is honest."""
    made = subprocess.run(["zip", "-fd", "-", "precious"], cwd=tmp_path, check=True, capture_output=True)
    assert shop.get(made.stdout, "m.zip") == {"precious": b"untouched"}


@pytest.mark.timeout(60)
def test_f076_a_million_members(shop: Shop) -> None:
    """F076: more than 100,000 members are refused by default, within seconds; a zip's before one is written."""
    block = bytearray(tar([link(" " * 6, "l")], tarfile.USTAR_FORMAT)[:512])
    total = sum(block) - sum(block[148:156]) + 8 * 32 - 6 * 32
    blocks = []
    for number in range(100_001):  # links cost no disk before all are there
        name = b"%06d" % number
        block[:6], block[148:156] = name, b"%06o\0 " % (total + sum(name))
        blocks.append(bytes(block))
    assert "more than 100000 members" in shop.refused(gzip.compress(b"".join(blocks) + bytes(1024), 1))
    many = io.BytesIO()
    central = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"m"
    many.write(central * 100_001 + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 34465, 34465, 47 * 100_001, 0, 0))
    assert "more than 100000 members" in shop.refused(many.getvalue(), name="m.zip")


def test_f076_no_inodes(tmp_path: Path) -> None:
    """F076: where the inodes end before the members do it is NoRoom for the disk, and all are given back."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m,nr_inodes=1000"]
    if mount is None or subprocess.run([mount, *options, "none", disk], check=False, capture_output=True).returncode:
        pytest.skip("can't mount a tmpfs here")
    try:
        source = DictSource({"many": gz(tar_of({str(number): b"" for number in range(2000)}))}).add("a")
        with small_cache(disk, source, content) as cache:
            free = os.statvfs(disk).f_ffree
            with pytest.raises(NoRoom) as caught:
                cache.get("many")
            assert caught.value.tier == "disk"
            assert os.statvfs(disk).f_ffree >= free - 5
            assert cache.get("a")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_f077_clashes(shop: Shop) -> None:
    """F077: of a member that is there twice the last counts, as for tar; a file that is also a folder is refused."""
    assert shop.get(tar([member("m", b"1"), member("m", b"2")]), "m.tar") == {"m": b"2"}
    shop.refused(tar([member("m", b"1"), member("m/x", b"2")]), ArtifactCorrupt)
    case = shop.get(tar([member("m", b"1"), member("M", b"2")]), "m.tar", "case")
    assert case == {"m": b"1", "M": b"2"}  # on a file system that keeps them apart


def test_f078_special(shop: Shop) -> None:
    """F078: devices and FIFOs are refused, as root too; setuid goes, owner and time are this process's."""
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        shop.refused(tar([member("ok", b"1"), member("bad", kind=kind, devmajor=1, devminor=3)]))
    shop.refused(zip_entries([(entry("bad", stat.S_IFSOCK | 0o666), b"")]), name="m.zip")
    shop.get(tar([member("run", b"#!", mode=0o6755, uid=12345, gid=12345, mtime=2**33)]), "m.tar")
    found = next((shop.cache.disk.path / "models").rglob("run")).stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7000) == (os.geteuid(), os.getegid(), 0)
    assert found.st_mode & 0o100
    assert found.st_mtime < 2**32


def test_f079_names(shop: Shop) -> None:
    """F079: a part of 300 bytes is refused before anything is published; 3 KB paths and odd characters work."""
    shop.refused(tar([member("ok", b"1"), member("p" * 300, b"2")]))
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        deep = "/".join(["d" * 60] * 50)
        odd = ["a\nb", "a\x1b[31mb", "caf\udce9"]
        made = [member(deep, b"deep"), *(member(name, b"x") for name in odd)]
        found = shop.get(tar(made, form), "m.tar", f"m{number}")
        assert {name: data for name, data in found.items() if data is not None} == {
            deep: b"deep",
            **dict.fromkeys(odd, b"x"),
        }
    text = shop.refused(tar([member("a\n\x1b]0;x\x07", kind=tarfile.FIFOTYPE)]))
    assert text.isprintable()
    assert text.isascii()


def test_f080_zip_names_and_modes(shop: Shop) -> None:
    """F080: a zip's escaping names are refused, not renamed; execute bits are kept, links treated as in a tar."""
    for name in ("../model.bin", "/model.bin", "..\\model.bin"):
        shop.refused(zip_entries([(entry("model.bin"), b"1"), (entry(name), b"2")]), name="m.zip")
    made = [(entry("run.sh", stat.S_IFREG | 0o755), b"#!"), (entry("l", stat.S_IFLNK | 0o777), b"run.sh")]
    assert shop.get(zip_entries(made), "m.zip") == {"run.sh": b"#!", "l": b"-> run.sh"}
    script = next((shop.cache.disk.path / "models").rglob("run.sh"))
    assert os.access(script, os.X_OK)
    shop.refused(zip_entries([(entry("l", stat.S_IFLNK | 0o777), b"../../precious")]), name="m.zip")
