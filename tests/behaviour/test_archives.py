"""Archives: what becomes a folder, what stays a file, and what is refused; each case small and made here.

Mutated and random archives are in ``property/test_archives``.
"""

import contextlib
import gzip
import io
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.archives import Limits, unpacking
from modelcache.archives.names import single_name
from modelcache.errors import (
    ArtifactCorrupt,
    ConfigError,
    ModelCacheError,
    NoRoom,
    SourceUnavailable,
    UnsafeArtifact,
)
from tests.support.archives import (
    FILES,
    Bench,
    Bytes,
    content,
    entry,
    files,
    gz,
    header,
    link,
    member,
    overlapping_zip,
    tar,
    tar_of,
    zip_entries,
    zip_of,
)
from tests.support.mutating import piped_zip, zstd_zip
from tests.support.mutating import zst as compress_zstd


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Return a bench, and check afterwards that what is on disk was charged."""
    folder = tmp_path / "bench"
    folder.mkdir()
    bench = Bench(folder)
    yield bench
    if bench.target.exists():
        found = {status.st_ino: status.st_blocks * 512 for status in map(Path.lstat, bench.target.rglob("*"))}
        assert bench.charged >= sum(found.values())


def small(monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    """Put other limits in force."""
    monkeypatch.setattr(unpacking, "LIMITS", Limits(**limits))


def refused(bench: Bench, data: bytes, kind: type[ModelCacheError] = UnsafeArtifact, name: str = "m.tar") -> str:
    """Check that ``data`` is refused as ``kind``, after the stream was read to its end; return the message."""
    with pytest.raises(kind) as caught:
        bench.unpack(data, name)
    assert caught.value.model == "fraud"
    assert "'fraud'" in str(caught.value)
    assert bench.stream.ended
    shutil.rmtree(bench.target)
    return str(caught.value)


PACKED: dict[str, Callable[[], bytes]] = {
    "tar": tar_of,
    "tar.gz": lambda: gz(tar_of()),
    "tar.zst": lambda: compress_zstd(tar_of()),
    "zip": zip_of,
}


class TestKinds:
    """What is unpacked, by name and content."""

    @pytest.mark.parametrize("made", PACKED)
    @pytest.mark.parametrize("name", ["m.tar", "m.tar.gz", "M.TGZ", "m.tar.zst", "m.tzst", "m.zip", "m"])
    def test_content_decides(self, bench: Bench, made: str, name: str) -> None:
        """An archive is unpacked as what it is, whichever archive suffix it has, or none."""
        assert bench.unpack(PACKED[made](), name) == bench.target
        assert files(bench.target) == FILES
        assert bench.stream.ended

    @pytest.mark.parametrize("made", PACKED)
    @pytest.mark.parametrize("name", ["m.joblib", "m.pt", "m.npz", "v1.2"])
    def test_other_suffixes_stay_files(self, bench: Bench, made: str, name: str) -> None:
        """A file of any other suffix stays as it is, whatever it holds."""
        data = PACKED[made]()
        assert bench.unpack(data, name) == bench.target / name
        assert content(bench.target) == {name: data}

    @pytest.mark.parametrize("data", [b"", b"plain", gz(b"no tar"), bytes(20_000)])
    def test_no_suffix_no_archive(self, bench: Bench, data: bytes) -> None:
        """Without suffix and without archive inside it is a single file."""
        assert bench.unpack(data, "m").read_bytes() == data

    @pytest.mark.parametrize(
        ("data", "meaning"),
        [
            (b"<!DOCTYPE html><html>", "'<!DOCTYPE html><': an HTML error page?"),
            (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "XML error document"),
            (pickle.dumps([1]), "a pickle"),
            (b"", "is empty"),
            (bytes(10_240), "nothing but zero bytes"),
            (b"\x89HDF\r\n\x1a\nxxx", "HDF5"),
            (b"\x08\x07\x12\x07pytorch", "bytes 08 07 12 07"),
            (gz(b"hello"), "gzip that holds no tar: it starts with 'hello'"),
            (compress_zstd(b"<html>"), "zstd that holds no tar: it starts with '<html>': an HTML"),
            (b"BZh91AY&SY", "bzip2"),
            (b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ],
    )
    @pytest.mark.parametrize("suffix", [".tar.gz", ".tar", ".tzst", ".zip"])
    def test_lying_suffix(self, bench: Bench, data: bytes, meaning: str, suffix: str) -> None:
        """No archive under an archive's name is refused, with what the first bytes look like."""
        assert meaning in refused(bench, data, ArtifactCorrupt, "m" + suffix)

    def test_inner_archive(self, bench: Bench) -> None:
        """An archive inside an archive stays a file."""
        inner = {"inner.tar.gz": gz(tar_of())}
        bench.unpack(gz(tar_of(inner)))
        assert files(bench.target) == inner

    def test_without_zstandard(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a zstd decoder the error says what to install."""
        monkeypatch.setitem(sys.modules, "backports", None)
        monkeypatch.setitem(sys.modules, "compression", None)
        with pytest.raises(ConfigError, match=r"modelcache\[zstd\]"):
            bench.unpack(PACKED["tar.zst"]())

    def test_v7(self, bench: Bench) -> None:
        """A tar older than ustar is known by its checksum, and its folders by their slash."""
        bench.unpack(
            header(b"d/", kind=b"\0") + header(b"d/m", b"00000000002") + b"ok".ljust(512, b"\0") + bytes(1024), "m"
        )
        assert content(bench.target) == {"d": None, "d/m": b"ok"}

    def test_short_reads(self, bench: Bench) -> None:
        """It makes no difference in what pieces the bytes arrive."""
        for data in (make() for make in PACKED.values()):
            bench.unpack(data, stream=Bytes(data, step=7))
            assert files(bench.target) == FILES
            shutil.rmtree(bench.target)


class TestNames:
    """Names of single files and of members."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("a/b/m.pt", "m.pt"),
            ("", "model"),
            ("..", "model"),
            ("a/..", "model"),
            ("x\0\n.pt", "x__.pt"),
            ("m" * 300 + ".onnx", "m" * 250 + ".onnx"),
            ("é" * 200 + ".h5", "é" * 126 + ".h5"),
            ("m." + "x" * 300, "m." + "x" * 253),
            ("\ud800.pt", "?.pt"),
            (".pt", ".pt"),
        ],
    )
    def test_single_name(self, name: str, expected: str) -> None:
        """A single file keeps its name as far as it is safe, and its suffix."""
        assert single_name(name) == expected

    @pytest.mark.parametrize("name", ["/abs", "../x", "a/../../x", "a/..", "..", "a/../b"])
    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
    def test_tar_escapes(self, bench: Bench, name: str, kind: bytes) -> None:
        """A name that is absolute or has '..' is refused, for members of any kind."""
        assert ascii(name) in refused(bench, tar([member("ok", b"x"), member(name, kind=kind, linkname="ok")]))

    @pytest.mark.parametrize("name", ["/abs", "../x", "a/../x", "..\\x", "\\x", "a\\..\\..\\x", "C:/x", "C:\\x", "c:x"])
    @pytest.mark.parametrize("system", [0, 3])
    def test_zip_escapes(self, bench: Bench, name: str, system: int) -> None:
        """Zip entries that would escape, read with either slash, are refused rather than renamed."""
        refused(bench, zip_entries([(entry("model.bin"), b"1"), (entry(name, system=system), b"2")]), name="m.zip")

    def test_zip_backslashes(self, bench: Bench) -> None:
        """A backslash separates folders in a zip from Windows, and is a character in one from Unix."""
        bench.unpack(zip_entries([(entry("a\\b", system=0), b"1"), (entry("c\\d"), b"2")]), "m.zip")
        assert files(bench.target) == {"a/b": b"1", "c\\d": b"2"}

    def test_nul(self, bench: Bench) -> None:
        """A NUL in a PAX or zip name is refused."""
        refused(bench, tar([member("x", pax_headers={"path": "a\0b"})]))
        refused(bench, zip_of({"aXb": b""}).replace(b"aXb", b"a\0b"), name="m.zip")

    @pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names(self, bench: Bench, form: int) -> None:
        """Long paths work in either format; a part over 255 bytes is refused."""
        name = "/".join(["d" * 200] * 15)
        bench.unpack(tar([member(name, b"deep")], form))
        assert files(bench.target) == {name: b"deep"}
        shutil.rmtree(bench.target)
        assert "255" in refused(bench, tar([member("p" * 300)], form))
        assert "4096" in refused(bench, tar([member("d/" * 3000)], form))
        assert "128" in refused(bench, tar([member("d/" * 200 + "f")], form))

    @pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "caf\udce9", "ü"])
    @pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_odd_characters(self, bench: Bench, name: str, form: int) -> None:
        """Control characters and bytes that aren't UTF-8 survive in names, and are escaped in messages."""
        bench.unpack(tar([member(name, b"x")], form))
        assert [os.fsencode(path.name) for path in bench.target.iterdir()] == [os.fsencode(name)]
        shutil.rmtree(bench.target)
        text = refused(bench, tar([member(name, kind=tarfile.FIFOTYPE)], form))
        assert text.isascii()
        assert text.isprintable()

    @pytest.mark.parametrize(
        "top", [[], [member(".", kind=tarfile.DIRTYPE, mode=0o700)], [member("./", kind=tarfile.DIRTYPE)]]
    )
    def test_dot(self, bench: Bench, top: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        """A leading './' is the same as none; a wrapper folder is kept."""
        bench.unpack(tar([*top, member("./m", b"1"), member("wrap//./n", b"2")]))
        assert files(bench.target) == {"m": b"1", "wrap/n": b"2"}

    def test_root_as_file(self, bench: Bench) -> None:
        """A file or link in place of the folder itself is refused."""
        refused(bench, tar([member(".", b"x")]))
        refused(bench, tar([link("./", "x")]))

    def test_macos(self, bench: Bench) -> None:
        """AppleDouble twins are files like others, and unknown PAX records are passed over."""
        pax = {"LIBARCHIVE.xattr.com.apple.x": "AAAA", "SCHILY.dev": "1", "mtime": "9999999999.5"}
        bench.unpack(tar([member("._m.pkl", b"\0"), member("m.pkl", b"1", pax_headers=pax)]))
        assert files(bench.target) == {"._m.pkl": b"\0", "m.pkl": b"1"}


class TestClashes:
    """Several members of one name."""

    def test_last_wins(self, bench: Bench) -> None:
        """Of a file that is there twice the last is kept, and the first is no longer charged."""
        bench.unpack(tar([member("m", b"1" * 9000), member("n"), member("m", b"2")]))
        assert files(bench.target) == {"m": b"2", "n": b""}
        assert bench.charged == 4096

    def test_last_wins_in_zip(self, bench: Bench) -> None:
        """A zip's later entry replaces the earlier one of the same name."""
        with pytest.warns(UserWarning, match="Duplicate"):
            data = zip_entries([(entry("m"), b"1"), (entry("m"), b"2")])
        bench.unpack(data, "m.zip")
        assert files(bench.target) == {"m": b"2"}

    def test_file_and_link(self, bench: Bench) -> None:
        """A link replaces a file of its name, a file a link, and nothing is written through either."""
        bench.unpack(tar([member("a", b"a"), member("m", b"1"), link("m", "a"), link("n", "a"), member("n", b"n")]))
        assert content(bench.target) == {"a": b"a", "m": b"-> a", "n": b"n"}

    @pytest.mark.parametrize(
        "members",
        [
            [member("m"), member("m/x")],
            [member("m/x"), member("m")],
            [member("m", kind=tarfile.DIRTYPE), member("m")],
            [member("m"), member("m", kind=tarfile.DIRTYPE)],
        ],
    )
    def test_file_and_folder(self, bench: Bench, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        """A file and a folder of one name are refused, in either order."""
        assert "a file and a folder" in refused(bench, tar(members), ArtifactCorrupt)

    def test_folded_case(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the file system takes two names for one, that is said."""
        real = os.open

        def folding(path: str, *rest: Any, **options: Any) -> int:
            return real(str(path).replace("/M", "/m"), *rest, **options)

        monkeypatch.setattr(os, "open", folding)
        assert "case" in refused(bench, tar([member("m"), member("M")]))


class TestLinks:
    """Symbolic and hard links."""

    def test_hub_cache(self, bench: Bench) -> None:
        """Inner relative links work after the folder has moved, whatever the order of members."""
        links = [link("snapshots/1/m.bin", "../../blobs/abc"), link("latest", "snapshots/1")]
        made = bench.unpack(tar([*links, link("again", "latest/m.bin"), member("blobs/abc", b"w")]))
        moved = made.rename(bench.folder / "moved")
        assert (moved / "latest/m.bin").read_bytes() == (moved / "again").read_bytes() == b"w"

    @pytest.mark.parametrize(
        "goal", ["/etc/passwd", "../outside", "a/../../outside", "up/../../../outside", "..", "", "x" * 5000]
    )
    def test_outer(self, bench: Bench, goal: str) -> None:
        """A link whose goal is absolute or outside, also by way of another link, is refused."""
        members = [member("a/b/c"), link("up", "a/b"), link("l", goal)]
        assert "symbolic link" in refused(bench, tar(members))

    def test_outer_by_another(self, bench: Bench) -> None:
        """What looks inside by its words alone, but leads outside through another link, is refused."""
        members = [member("a/b/m"), link("x/y/up", "../.."), link("out", "x/y/up/../m")]
        assert "leads outside" in refused(bench, tar(members))

    @pytest.mark.parametrize("goal", ["nothing", "m/", "m/x", "d/nothing", "a/b/../m"])
    def test_dangling(self, bench: Bench, goal: str) -> None:
        """A link to nothing is refused, naming the member."""
        members = [member("m"), member("d", kind=tarfile.DIRTYPE), link("a/lost", "../" + goal)]
        assert "'a/lost'" in refused(bench, tar(members), ArtifactCorrupt)

    @pytest.mark.parametrize("chain", [["a"], ["b", "a"], ["b", "c", "d", "a"]])
    def test_circle(self, bench: Bench, chain: list[str]) -> None:
        """Links in a circle are refused."""
        assert "circle" in refused(bench, tar([link(a, b) for a, b in zip(["a", *chain], chain, strict=False)]))

    @pytest.mark.parametrize("first", [True, False])
    def test_through_link(self, bench: Bench, first: bool) -> None:
        """A member below a link is refused, so nothing is ever written through one."""
        through = [link("d", ".."), member("d/outside", b"bad")]
        refused(bench, tar(through if first else through[::-1]), UnsafeArtifact if first else ArtifactCorrupt)

    def test_swapped_for_link(self, bench: Bench) -> None:
        """A folder can't be swapped for a link halfway."""
        refused(bench, tar([member("d/x"), link("d", ".."), member("d/outside", b"bad")]), ArtifactCorrupt)

    def test_hard(self, bench: Bench) -> None:
        """A hard link shares the bytes of an earlier file; replacing one leaves the other."""
        hard = tarfile.LNKTYPE
        members = [member("a/m", b"1" * 5000), link("n", "./a/m", hard), link("n", "n", hard), member("a/m", b"2")]
        bench.unpack(tar(members))
        assert files(bench.target) == {"a/m": b"2", "n": b"1" * 5000}
        assert bench.charged == 3 * 4096 + 4096

    @pytest.mark.parametrize("goal", ["later", "d", "s", "../outside", "/etc/passwd", "nothing", "."])
    def test_hard_elsewhere(self, bench: Bench, goal: str) -> None:
        """A hard link to anything but an earlier file of the archive is refused."""
        first = [member("d/x"), link("s", "d/x")]
        refused(bench, tar([*first, link("h", goal, tarfile.LNKTYPE), member("later")]))

    def test_hard_copied(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the file system has no hard links, the file is copied and charged."""

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        bench.unpack(tar([member("m", b"1" * 5000, mode=0o755), link("n", "m", tarfile.LNKTYPE)]))
        assert files(bench.target) == {"m": b"1" * 5000, "n": b"1" * 5000}
        assert (bench.target / "n").stat().st_mode & 0o100
        assert bench.charged == 4 * 4096

    def test_zip_links(self, bench: Bench) -> None:
        """Links in a zip are made, and refused, as in a tar."""
        mode = stat.S_IFLNK | 0o777
        bench.unpack(zip_entries([(entry("l", mode), b"d/m"), (entry("d/m"), b"1")]), "m.zip")
        assert content(bench.target) == {"d": None, "d/m": b"1", "l": b"-> d/m"}
        shutil.rmtree(bench.target)
        for goal, kind in ((b"../outside", UnsafeArtifact), (b"/etc", UnsafeArtifact), (b"no", ArtifactCorrupt)):
            refused(bench, zip_entries([(entry("l", mode), goal)]), kind, "m.zip")
        refused(bench, zip_entries([(entry("l", mode), b"x" * 5000)]), name="m.zip")
        refused(bench, zip_entries([(entry("l", mode), b"."), (entry("l/outside"), b"bad")]), name="m.zip")


class TestModes:
    """Modes, owners and special files."""

    def test_modes(self, bench: Bench) -> None:
        """Files and folders get the tier's mode whatever the umask; only the owner's exec bit is the archive's."""
        special = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
        members = [member("d", kind=tarfile.DIRTYPE, mode=0o000), member("e", kind=tarfile.DIRTYPE, mode=0o555)]
        members += [member("d/run", b"#!", mode=0o711 | special), member("d/m", mode=0o066), member("e/m", mode=0)]
        before = os.umask(0o077)
        try:
            bench.unpack(tar(members), mode=0o750)
        finally:
            os.umask(before)
        modes = {name: stat.S_IMODE((bench.target / name).stat().st_mode) for name in content(bench.target)}
        assert modes == {"d": 0o750, "d/run": 0o750, "d/m": 0o640, "e": 0o750, "e/m": 0o640}

    def test_owner_and_time(self, bench: Bench) -> None:
        """Owner and times of the archive are not taken over."""
        bench.unpack(tar([member("m", uid=1234, gid=1234, mtime=2**33)]))
        found = (bench.target / "m").stat()
        assert (found.st_uid, found.st_mtime < 2**32) == (os.geteuid(), True)

    def test_zip_modes(self, bench: Bench) -> None:
        """A zip's exec bit is kept, its setuid bit isn't, and its folders are ours."""
        entries = [
            (entry("d/", stat.S_IFDIR), b""),
            (entry("d/run.sh", stat.S_IFREG | 0o4755), b"#!"),
            (entry("m", 0), b""),
        ]
        bench.unpack(zip_entries(entries), "m.zip")
        modes = {name: stat.S_IMODE((bench.target / name).stat().st_mode) for name in content(bench.target)}
        assert modes == {"d": 0o700, "d/run.sh": 0o700, "m": 0o600}

    @pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"s", b"V", b"D", b"Z"])
    def test_special_files(self, bench: Bench, kind: bytes) -> None:
        """Devices, FIFOs and members of unknown type are refused, as root too."""
        refused(bench, tar([member("m"), member("bad", kind=kind)]))

    @pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
    def test_zip_special_files(self, bench: Bench, kind: int) -> None:
        """Zip entries whose mode says device, FIFO or socket are refused."""
        refused(bench, zip_entries([(entry("bad", kind | 0o644), b"")]), name="m.zip")

    @pytest.mark.parametrize("pax", [{"GNU.sparse.major": "1"}, {"GNU.sparse.map": "0,1"}])
    def test_sparse(self, bench: Bench, pax: dict[str, str]) -> None:
        """Sparse members are refused, saying how to pack instead."""
        assert "--sparse" in refused(bench, tar([member("m", b"x" * 512, pax_headers=pax)]))
        assert "--sparse" in refused(bench, tar([member("m", kind=tarfile.GNUTYPE_SPARSE)], tarfile.GNU_FORMAT))


class TestEnds:
    """Where an archive ends, and what may follow."""

    @pytest.mark.parametrize("made", PACKED)
    def test_zero_padding(self, bench: Bench, made: str) -> None:
        """Zeros after the end are accepted in every format."""
        bench.unpack(PACKED[made]() + bytes(600))
        assert files(bench.target) == FILES

    @pytest.mark.parametrize("made", PACKED)
    @pytest.mark.parametrize("tail", [b"garbage", bytes(600) + b"x"])
    def test_garbage(self, bench: Bench, made: str, tail: bytes) -> None:
        """Anything else after the end is refused in every format."""
        assert "follows the end" in refused(bench, PACKED[made]() + tail, ArtifactCorrupt, f"m.{made}")

    @pytest.mark.parametrize("pad", [b"", bytes(5)])
    @pytest.mark.parametrize("packer", [gz, compress_zstd])
    def test_many_members(self, bench: Bench, packer: Callable[[bytes], bytes], pad: bytes) -> None:
        """Halves compressed one by one are one archive, cut at any place, empty members and padding included."""
        data = tar_of()
        pieces = [data[:100], data[100:3000], b"", data[3000:]]
        bench.unpack(pad.join(packer(piece) for piece in pieces))
        assert files(bench.target) == FILES

    @pytest.mark.parametrize("made", PACKED)
    def test_every_cut(self, bench: Bench, made: str) -> None:
        """Cut anywhere, an archive is corrupt, with the model and the offset."""
        data = PACKED[made]()
        end = len(data) if made != "tar" else len(data.rstrip(b"\0")) + 512  # one end block is enough
        for cut in range(0, end - 511 if made == "tar" else end, max(1, end // 100)):
            with pytest.raises(ArtifactCorrupt) as caught:
                bench.unpack(data[:cut], f"m.{made}")
            assert caught.value.model == "fraud"
            assert 0 <= (caught.value.offset or 0) <= cut
            shutil.rmtree(bench.target)

    def test_cut_at_member(self, bench: Bench) -> None:
        """A tar cut between two members, or without its end marker, is corrupt."""
        data = tar([member("a", b"1"), member("b", b"2")])
        for cut in (1024, 2048):
            assert "end marker" in refused(bench, data[:cut], ArtifactCorrupt)
        bench.unpack(data[: 2048 + 512])
        assert files(bench.target) == {"a": b"1", "b": b"2"}

    def test_flipped_gzip(self, bench: Bench) -> None:
        """A flipped byte in compressed data is corrupt, from its cause, naming the member and the offset."""
        data = bytearray(gz(tar_of({"first": b"x", "weights": os.urandom(2_000_000)})))
        data[1_000_000] ^= 0xFF
        with pytest.raises(ArtifactCorrupt) as caught:
            bench.unpack(bytes(data))
        assert type(caught.value.__cause__).__name__ in ("error", "IsalError", "EOFError")  # of whichever zlib
        assert caught.value.member == "weights"
        assert caught.value.offset is not None
        assert bench.stream.ended

    def test_damaged_header(self, bench: Bench) -> None:
        """A header damaged in the middle is no end of the archive."""
        data = bytearray(tar([member("a"), member("b"), member("c")]))
        data[512 + 10] ^= 1
        with pytest.raises(ArtifactCorrupt) as caught:
            bench.unpack(bytes(data), "m.tar")
        assert caught.value.offset == 1024
        assert isinstance(caught.value.__cause__, tarfile.TarError)

    @pytest.mark.parametrize("size", [b"77777777777", b"-0000000001", b"\xff" * 12, b"\x80" + b"\xff" * 11])
    def test_lying_size(self, bench: Bench, size: bytes) -> None:
        """A size that is negative or beyond the archive is corrupt."""
        refused(bench, header(size=size) + bytes(2048), ArtifactCorrupt)

    @pytest.mark.parametrize("text", [b"x", b"99 path=x\n", b"5 path=x\n", b"9 pathxx\n", b"10 size=-1\n", b"9" * 30])
    def test_damaged_pax(self, bench: Bench, text: bytes) -> None:
        """A damaged PAX header is corrupt."""
        head = header(size=b"%011o" % len(text), kind=b"x") + text.ljust(512, b"\0")
        refused(bench, head + header() + bytes(1024), ArtifactCorrupt)

    def test_pax_size(self, bench: Bench) -> None:
        """A size in a PAX header counts, and an empty record is none."""
        members = header(size=b"%011o" % 10, kind=b"x") + b"10 size=3\n".ljust(512, b"\0")
        members += header(b"m") + b"abc".ljust(512, b"\0")
        members += header(size=b"%011o" % 8, kind=b"x") + b"8 path=\n".ljust(512, b"\0") + header(b"n")
        bench.unpack(members + bytes(512), "m.tar")
        assert files(bench.target) == {"m": b"abc", "n": b""}

    @pytest.mark.parametrize("text", [b"12 path=all\n", b"16 linkpath=all\n", b"10 size=3\n"])
    def test_pax_for_all(self, bench: Bench, text: bytes) -> None:
        """A header that gives all members one path, link or size is corrupt: no two readers agree on it."""
        everyone = header(size=b"%011o" % len(text), kind=b"g") + text.ljust(512, b"\0")
        refused(bench, everyone + header(b"m") + bytes(1024), ArtifactCorrupt)

    def test_sources_error_passes(self, bench: Bench) -> None:
        """What the stream raises passes through; where content looks corrupt, the source's word on the bytes wins."""
        error = SourceUnavailable("gone")
        for data in (gz(tar_of()), gz(tar_of())[:-20], tar_of()[:1000], zip_of(), b"<html>"):
            with pytest.raises(SourceUnavailable) as caught:
                bench.unpack(data, stream=Bytes(data, error=error))
            assert caught.value is error
            shutil.rmtree(bench.target)


class TestLimits:
    """Bombs, counts and room."""

    @pytest.mark.parametrize("made", ["tar.gz", "tar.zst", "zip"])
    def test_bomb(self, bench: Bench, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bomb is refused at the limit, before much more is written."""
        small(monkeypatch, floor=2**20)
        data = tar_of({"m": bytes(20 << 20)})
        packers: dict[str, Callable[[bytes], bytes]] = {
            "tar.gz": gz,
            "tar.zst": compress_zstd,
            "zip": lambda _: zip_of({"m": bytes(20 << 20)}),
        }
        assert "bomb" in refused(bench, packers[made](data))
        assert bench.peak < 2**20 + 200 * len(packers[made](data)) + 2**20

    def test_bomb_in_padding(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A bomb behind the end marker, or in a header, is one too."""
        small(monkeypatch, floor=2**20)
        assert "bomb" in refused(bench, gz(tar_of() + bytes(20 << 20)))

    def test_well_packed(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A small archive may unpack to many times its size below the floor."""
        small(monkeypatch, floor=8 << 20)
        bench.unpack(gz(tar_of({"m": bytes(4 << 20)})))

    @pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
    def test_huge_header(self, bench: Bench, kind: bytes) -> None:
        """A PAX or long-name header of huge claimed size is refused before it is read."""
        refused(bench, header(size=b"77777777777", kind=kind) + bytes(2048))

    @pytest.mark.parametrize("make", [tar_of, zip_of])
    def test_members(
        self, bench: Bench, make: Callable[[dict[str, bytes]], bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More members than the limit are refused; folders made on the way count."""
        small(monkeypatch, members=5)
        bench.unpack(make({str(i): b"" for i in range(5)}))
        shutil.rmtree(bench.target)
        assert "more than 5 members" in refused(bench, make({str(i): b"" for i in range(6)}))
        assert "more than 5 members" in refused(bench, make({"a/b/c/d/e/f": b""}))

    @pytest.mark.parametrize("make", [tar_of, zip_of])
    def test_file(
        self, bench: Bench, make: Callable[[dict[str, bytes]], bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file over the limit is refused as soon as its header claims it, whatever follows."""
        small(monkeypatch, file=5000)
        bench.unpack(make({"m": bytes(5000)}))
        shutil.rmtree(bench.target)
        bench.charged = bench.peak = 0
        assert "a file over" in refused(bench, make({"m": os.urandom(5001)}))
        assert bench.peak <= 4096 + (0 if make is tar_of else 8192)  # a zip is spooled before

    def test_file_of_unknown_size(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single file over the limit stops at it."""
        small(monkeypatch, file=2**20)
        assert "a file over" in refused(bench, bytes(3 << 20), name="m.bin")
        assert bench.peak <= 2**20 + 2**18

    @pytest.mark.parametrize("made", PACKED)
    def test_total(self, bench: Bench, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """More in all than the limit is refused, compressed or not, however many files it is in."""
        small(monkeypatch, total=2**20)
        many = {str(number): os.urandom(60_000) for number in range(30)}
        packers: dict[str, Callable[[bytes], bytes]] = {"tar": bytes, "tar.gz": gz, "tar.zst": compress_zstd}
        data = zip_of(many) if made == "zip" else packers[made](tar_of(many))
        assert "more than 1.0 MiB" in refused(bench, data)
        assert bench.peak < (2 << 20) + (len(data) if made == "zip" else 0)

    def test_total_of_copies(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hard links that have to be copied count as often as they are made."""
        small(monkeypatch, total=2**20)
        links = [link(str(number), "m", tarfile.LNKTYPE) for number in range(30)]

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
        assert "more than 1.0 MiB" in refused(bench, tar([member("m", bytes(100_000)), *links]))

    def test_headers(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long headers over the limit in all are refused, however small each of them, and whatever it is for."""
        small(monkeypatch, headers=20_000)
        for kind in (b"x", b"g"):
            head = header(size=b"%011o" % 10, kind=kind) + b"10 a=1234\n".ljust(512, b"\0")
            bench.unpack(head * 30 + header() + bytes(1024), "m.tar")
            shutil.rmtree(bench.target)
            assert "in all" in refused(bench, head * 50 + header() + bytes(1024))

    @pytest.mark.parametrize("made", PACKED)
    def test_no_room(self, bench: Bench, made: str) -> None:
        """What grow raises passes through, and nothing was written that it did not allow."""
        allowed = 4096

        def grow(amount: int) -> None:
            nonlocal allowed
            if amount > allowed:
                raise NoRoom("full", tier="disk")
            allowed -= amount
            bench.grow(amount)

        with pytest.raises(NoRoom):
            bench.unpack(PACKED[made](), grow=grow)
        assert sum(path.stat().st_size for path in bench.target.rglob("*") if path.is_file()) <= 4096

    @pytest.mark.parametrize("made", PACKED)
    def test_charged(self, bench: Bench, made: str) -> None:
        """What is charged at the end is what is on disk, the spool given back."""
        bench.unpack(PACKED[made]())
        assert bench.charged == 4096 * (1 + 1 + 2)
        assert (bench.peak > bench.charged) == (made == "zip")

    def test_big_folder(self, bench: Bench) -> None:
        """A folder of many names is charged for its own size too."""
        bench.unpack(tar_of({f"{i:0200}": b"" for i in range(1000)}))
        assert bench.charged >= 200 * 1000

    def test_full_disk(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk stays an OSError, for the tier to judge."""

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "mkdir", full)
        with pytest.raises(OSError, match="No space"):
            bench.unpack(tar_of())


class TestZip:
    """Zips of all makes."""

    def test_overlap(self, bench: Bench) -> None:
        """Entries that share their data are refused."""
        assert "overlaps" in refused(bench, overlapping_zip(10, 100_000), name="m.zip")
        bench.unpack(overlapping_zip(1, 1000), "m.zip")
        assert files(bench.target) == {"m": bytes(1000)}

    def test_quoted(self, bench: Bench) -> None:
        """An entry whose data reaches into the next entry is refused, as one that reaches into the directory."""
        data = zip_of({"a": b"1" * 50, "b": b"2" * 50}, zipfile.ZIP_STORED)
        for at in (data.index(b"PK\x01\x02"), data.rindex(b"PK\x01\x02")):
            changed = bytearray(data)
            struct.pack_into("<LL", changed, at + 20, 51, 51)
            assert "overlaps" in refused(bench, bytes(changed), name="m.zip")

    def test_streamed(self, bench: Bench) -> None:
        """A zip written to a pipe, with data descriptors, is honest."""
        data = piped_zip(FILES)
        assert b"PK\x07\x08" in data
        bench.unpack(data, "m.zip")
        assert files(bench.target) == FILES

    def test_zip64(self, bench: Bench) -> None:
        """A zip64, in its entries and in its directory, is honest."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive, archive.open("m", "w", force_zip64=True) as file:
            file.write(b"big")
        data = out.getvalue()
        _, _, _, count, _, size, offset, _ = struct.unpack("<4s4H2LH", data[-22:])
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        end64 += struct.pack("<4sLQL", b"PK\x06\x07", 0, len(data) - 22, 1)
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        bench.unpack(data[:-22] + end64 + end, "m.zip")
        assert files(bench.target) == {"m": b"big"}

    @pytest.mark.parametrize("prefix", [b"#!/bin/sh\nexec unzip $0\n", b"MZ" + bytes(300_000)])
    def test_prefix(self, bench: Bench, prefix: bytes) -> None:
        """A self-extractor's prefix is skipped, its offsets adjusted or not."""
        bench.unpack(prefix + zip_of(), "m.zip")
        assert files(bench.target) == FILES
        shutil.rmtree(bench.target)
        out = io.BytesIO(prefix)
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr("m", b"1")
        bench.unpack(out.getvalue(), "m.zip")
        assert files(bench.target) == {"m": b"1"}

    def test_comment(self, bench: Bench) -> None:
        """A comment belongs to the zip; what follows it doesn't."""
        out = io.BytesIO(zip_of())
        with zipfile.ZipFile(out, "a") as archive:
            archive.comment = b"made by hand"
        bench.unpack(out.getvalue(), "m.zip")
        shutil.rmtree(bench.target)
        refused(bench, out.getvalue() + b"more", ArtifactCorrupt, "m.zip")

    def test_cut_behind_inner_zip(self, bench: Bench) -> None:
        """A zip cut off right behind a stored inner zip does not pass for the inner one."""
        inner = zip_of()
        data = zip_of({"first": b"1", "inner.zip": inner, "last": b"3"}, zipfile.ZIP_STORED)
        cut = data.index(inner) + len(inner)
        refused(bench, data[:cut], ArtifactCorrupt, "m.zip")

    def test_encrypted(self, bench: Bench) -> None:
        """An encrypted entry is refused with a clear text."""
        data = bytearray(zip_of({"m": b"secret"}))
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
        assert "encrypted" in refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    def test_zstd(self, bench: Bench) -> None:
        """Zstd entries are read, and their CRC checked."""
        bench.unpack(zstd_zip(FILES), "m.zip")
        assert files(bench.target) == FILES
        shutil.rmtree(bench.target)
        data = bytearray(zstd_zip({"m": b"content"}))
        data[14] ^= 1  # of the header before the data, which nobody believes
        bench.unpack(bytes(data), "m.zip")
        shutil.rmtree(bench.target)
        data[data.index(b"PK\x01\x02") + 16] ^= 1
        assert "CRC" in refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    def test_other_name_inside(self, bench: Bench) -> None:
        """An entry whose own header has another name than the directory is corrupt."""
        data = zip_of({"model": b"1"}).replace(b"model", b"other", 1)
        assert "another name" in refused(bench, data, ArtifactCorrupt, "m.zip")

    @pytest.mark.parametrize("change", [-3, 3])
    def test_data_ends_elsewhere(self, bench: Bench, change: int) -> None:
        """Deflated data that ends before or after the place that the directory gives is corrupt."""
        data = bytearray(
            zip_of({"m": os.urandom(500)}, zipfile.ZIP_DEFLATED) if change < 0 else zip_of({"m": b"x" * 500})
        )
        at = data.index(b"PK\x01\x02")
        packed = struct.unpack_from("<L", data, at + 20)[0] + change
        struct.pack_into("<L", data, at + 20, packed)
        if change > 0:
            data[at:at] = b"abc"
            struct.pack_into("<L", data, len(data) - 6, at + change)
        refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_methods(self, bench: Bench, method: int) -> None:
        """Compression methods that we don't read are refused by name."""
        assert "stored, deflated and zstd" in refused(bench, zip_of(method=method), ArtifactCorrupt, "m.zip")

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_crc(self, bench: Bench, method: int) -> None:
        """A flipped byte of data is corrupt, naming the member."""
        payload = os.urandom(1000)
        data = bytearray(zip_of({"m": payload}, method))
        data[500] ^= 1
        assert "member 'm'" in refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    def test_lying_sizes(self, bench: Bench) -> None:
        """An entry that unpacks to less or more than it says is corrupt."""
        for size in (10, 10_000_000):
            data = bytearray(zip_of({"m": b"x" * 1000}))
            at = data.index(b"PK\x01\x02") + 24
            data[at : at + 4] = struct.pack("<L", size)
            refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    def test_empty(self, bench: Bench) -> None:
        """A zip without entries is no model."""
        assert "without entries" in refused(bench, zip_of({}), ArtifactCorrupt, "m.zip")

    def test_lying_count(self, bench: Bench) -> None:
        """A directory with fewer entries than it says is corrupt."""
        data = bytearray(zip_of())
        data[-12] += 1
        refused(bench, bytes(data), ArtifactCorrupt, "m.zip")

    def test_spool_left_over(self, bench: Bench) -> None:
        """A spool file of an earlier crash is replaced, and a link in its place is not followed."""
        outside = bench.folder.parent / "precious"
        outside.write_bytes(b"1")
        bench.spool.symlink_to(outside)
        bench.unpack(zip_of(), "m.zip")
        assert outside.read_bytes() == b"1"


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_real_tar(bench: Bench, tmp_path: Path) -> None:
    """What GNU tar and gzip make of a folder is unpacked as it was."""
    source = tmp_path / "model"
    (source / "d" / "empty").mkdir(parents=True)
    (source / "d" / ("n" * 150)).write_bytes(b"1" * 70_000)
    (source / "l").symlink_to("d")
    (source / "h").hardlink_to(source / "d" / ("n" * 150))
    for form in ("gnu", "posix", "ustar", "v7"):
        if form == "ustar":  # this one and v7 have no long names
            (source / "d" / ("n" * 150)).rename(source / "d" / "n")
        made = subprocess.run(
            ["tar", f"--format={form}", "-czf", "-", "-C", str(source), "."], check=True, capture_output=True
        )
        bench.unpack(made.stdout)
        assert content(bench.target) == content(source)
        shutil.rmtree(bench.target)


def test_nothing_left_open(bench: Bench) -> None:
    """No descriptor stays open, whatever happened."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("no /proc here")
    before = len(list(descriptors.iterdir()))
    for data in [make() for make in PACKED.values()] + [make()[:-30] for make in PACKED.values()]:
        with contextlib.suppress(ModelCacheError):
            bench.unpack(data)
        shutil.rmtree(bench.target)
    assert len(list(descriptors.iterdir())) == before


def test_errors_travel(bench: Bench) -> None:
    """The errors survive pickling with their facts."""
    with pytest.raises(ArtifactCorrupt) as caught:
        bench.unpack(gzip.compress(tar_of())[:-4])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.model, again.offset, str(again)) == ("fraud", caught.value.offset, str(caught.value))
