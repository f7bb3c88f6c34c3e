"""Archives with damage anywhere and names of any kind: never outside, never untyped, never less than was packed.

Cases made by hand are in ``behaviour/test_archives``.
"""

import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.archives import Limits, unpacking
from modelcache.errors import ArtifactCorrupt, ModelCacheError, UnsafeArtifact
from tests.support.archives import FILES, Bench, Bytes, files, gz, link, member, tar, tar_of, zip_of

QUICK = settings(max_examples=150, deadline=None)
MIXED = tar(
    [
        member("d/", kind=tarfile.DIRTYPE),
        *(member(name, data) for name, data in FILES.items()),
        member("long/" * 30 + "m", b"long"),
        link("l", "config.json"),
        link("h", "config.json", tarfile.LNKTYPE),
    ]
)
ARCHIVES = {"gz": gz(tar_of()), "zip": zip_of(), "stored": zip_of(method=zipfile.ZIP_STORED), "tar": MIXED}
PARTS = st.sampled_from(["a", "b", "..", ".", "", "outside", "target", "C:", "\x00", "é", "p" * 256, "\\..", "\n"])
NAMES = st.one_of(st.lists(PARTS, max_size=5).map("/".join), st.text(max_size=8))
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.AREGTYPE])
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lying size must not make a test write a gigabyte."""
    monkeypatch.setattr(unpacking, "LIMITS", Limits(floor=2**22))


def attempt(data: bytes, name: str) -> dict[str, bytes] | None:
    """Return the files that came out; None where the archive was refused with one of the two errors it may have."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        error: ModelCacheError | None = None
        try:
            made = bench.unpack(data, name, stream=Bytes(data))
        except (ArtifactCorrupt, UnsafeArtifact) as refused:
            made, error = None, refused
        assert error is None or (error.model == "fraud" and str(error).isprintable())
        assert bench.stream.ended
        for path in bench.target.rglob("*"):
            assert path.resolve().is_relative_to(bench.target.resolve())
            assert path.is_file() or path.is_dir() or path.is_symlink()
        return None if made is None else files(bench.target)


def plain(name: str) -> str:
    """Return a member's path as it is on disk."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


@QUICK
@given(st.sampled_from(sorted(ARCHIVES)), FLIPS)
def test_flipped(kind: str, flips: list[tuple[float, int]]) -> None:
    """Bytes flipped anywhere are refused, or the checksums show that no content changed."""
    data = bytearray(ARCHIVES[kind])
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    found = attempt(bytes(data), "m.tar")
    if found is not None and kind == "gz":
        assert found == FILES
    elif found is not None and kind != "tar":  # names and modes of a zip have no checksum, contents have
        assert set(found.values()) <= {*FILES.values(), *(b"-> " + data for data in FILES.values())}


@QUICK
@given(st.sampled_from(sorted(ARCHIVES)), st.floats(0, 1, exclude_max=True), st.binary(max_size=20))
def test_cut(kind: str, place: float, tail: bytes) -> None:
    """An archive cut off anywhere is refused, whatever follows the cut; or only its padding was cut."""
    whole = attempt(ARCHIVES[kind], "m.zip")
    assert attempt(ARCHIVES[kind][: int(place * len(ARCHIVES[kind]))] + tail, "m.zip") in (None, whole)


@QUICK
@given(st.lists(st.tuples(NAMES, KINDS, NAMES, st.binary(max_size=600)), max_size=6), st.sampled_from([0, 1, 2]))
def test_any_tar(members: list[tuple[str, bytes, str, bytes]], form: int) -> None:
    """Members of any name, kind and goal stay inside; what is not refused has every file, the last one of its name."""
    packed = []
    for name, kind, goal, data in members:
        body = data if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else b""
        packed.append(member(name, body, kind, linkname=goal))
    try:
        data = tar(packed, form)
    except (ValueError, UnicodeError):  # this format can't say it
        return
    found = attempt(data, "m.tar")
    if found is not None:
        names = [plain(info.name) for info, _ in packed]
        for at, (info, body) in enumerate(packed):
            ends = "\0" in info.name  # the name does: "a/\0" is a folder to who reads it
            if info.type == tarfile.REGTYPE and names[at] not in names[at + 1 :] and not ends:
                assert found[names[at]] == body


@QUICK
@given(
    st.lists(st.tuples(NAMES, st.integers(0, 2**16 - 1), st.sampled_from([0, 3]), st.binary(max_size=60)), max_size=6)
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_any_zip(entries: list[tuple[str, int, int, bytes]]) -> None:
    """Entries of any name and mode stay inside, or are refused."""
    packed = []
    for name, mode, system, data in entries:
        info = zipfile.ZipInfo("x")
        info.filename, info.create_system, info.external_attr = name, system, mode << 16
        packed.append((info, data))
    with tempfile.TemporaryFile() as file:
        try:
            with zipfile.ZipFile(file, "w") as archive:
                for info, data in packed:
                    archive.writestr(info, data)
        except (ValueError, UnicodeError):
            return
        file.seek(0)
        attempt(file.read(), "m.zip")


@QUICK
@given(st.binary(max_size=2000), st.sampled_from(["m", "m.zip", "m.tar.gz", "m.pt", "", "../m", "a/\x00"]))
def test_any_bytes(data: bytes, name: str) -> None:
    """Any bytes under any name become one file inside the folder, or are refused."""
    found = attempt(data, name)
    assert found is None or list(found.values()) in ([data], [])
