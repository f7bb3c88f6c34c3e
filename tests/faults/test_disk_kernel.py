"""Faults that the kernel or the file system brings about, by number: real error codes, layers, mounts and users."""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import ConfigError, DiskTier, ModelCache, S3Source
from modelcache.disk import store as disk_store
from tests.support.archives import gz, tar_of, zip_of
from tests.support.children import injecting, run
from tests.support.fakes import DictSource
from tests.support.mounts import formatted, layered, leave_single_blocks, open_path, read_only, small_disk
from tests.support.racing import Call, allocated, small_cache
from tests.support.s3 import Store, noise

OPENS = """
source = DictSource().add("a")
try:
    cache = small_cache(Path(sys.argv[1]), source)
except ConfigError as error:
    found = [path for path in Path(sys.argv[1]).glob("disk/*/*")]
    print("refused", len(found), source.opens, error)
    sys.exit()
print(cache.get("a").name, flush=True)
assert cache.close()
"""


@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS", "EBADF", "EOPNOTSUPP", "EINVAL"])
@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_f022_no_locks(tmp_path: Path, kind: str, error: str) -> None:
    """F022: a file system that has no locks of one kind is refused at construction, before anything is fetched."""
    path = tmp_path / "disk" / "leases" if kind == "fcntl" else None
    said = run(OPENS, tmp_path, under=injecting(f"{kind}:error={error}", path=path))
    assert re.match(r"refused 0 \[\] disk folder .* has no file locks \(.*use a local file system", said)


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("ledger.sqlite3", "fcntl:error=EINVAL"),
        ("ledger.sqlite3-shm", "fcntl:error=ENOLCK"),
        ("ledger.sqlite3-shm", "mmap:error=ENODEV"),
        ("ledger.sqlite3-wal", "pwrite64:error=EIO"),
        ("ledger.sqlite3", "pread64:error=EIO"),
        ("ledger.sqlite3.lock", "flock:error=ENOLCK"),
        ("ledger.sqlite3.lock", "openat:error=EIO"),
    ],
)
def test_f040_ledger_that_can_not_work(tmp_path: Path, file: str, fault: str) -> None:
    """F022, F040, F045: where SQLite can't lock, map, read or write, that is said at construction, typed, at once."""
    said = run(OPENS, tmp_path, under=injecting(fault, path=tmp_path / "disk" / file))
    assert re.match(rf"refused 0 \[\] disk folder {tmp_path}/disk can't be used \(.*(ledger|No locks)", said)


@contextlib.contextmanager
def system(kind: str, folder: Path) -> Iterator[Path]:
    """Mount an ext4 with room in single blocks only, or a fresh XFS."""
    size, command = {"ext4": (2**26, ("mkfs.ext4", "-b", "4096")), "xfs": (2**29, ("mkfs.xfs",))}[kind]
    with formatted(folder, size, *command) as mounted:
        if kind == "ext4":
            leave_single_blocks(mounted, 12_000)
        yield mounted


def stat_of_file(path: Path) -> os.stat_result:
    """Load a model: what the system says of its one file."""
    return (path / "m.bin" if path.is_dir() else path).stat()


@pytest.mark.parametrize("name", ["m.tar.gz", "m.zip", "m.bin"])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_f036_what_a_file_system_adds(tmp_path: Path, kind: str, name: str) -> None:
    """F036: a file in many pieces takes blocks for their places, one that grows some ahead: at no moment uncounted."""
    data = noise(4 * 2**20)
    packed = {"m.tar.gz": lambda: gz(tar_of({"m.bin": data})), "m.zip": lambda: zip_of({"m.bin": data})}
    with system(kind, tmp_path / "mounted") as mounted:
        source = DictSource().add_file("m", name, packed.get(name, lambda: data)())
        with small_cache(mounted, source, stat_of_file) as cache:
            seen = []

            def look() -> None:
                os.sync()  # so that the places of all that was written are decided
                seen.append((allocated(mounted / "disk"), cache.stats().disk_used))

            source.gate = look
            status = cache.get("m")
            assert len(seen) > 10
            assert [pair for pair in seen if pair[0] > pair[1]] == []
            assert status.st_size == len(data)
            assert status.st_blocks * 512 > len(data) or kind == "xfs"  # or this shows nothing
            assert cache.stats().disk_used == allocated(mounted / "disk")


def test_f036_what_a_file_system_adds_to_parts(tmp_path: Path, s3_moto: Store) -> None:
    """F036: nor where the parts of a file come side by side, each to its place."""
    bucket, data, seen = s3_moto.bucket(), noise(40 * 2**20), []
    bucket.put("m.bin", data)
    source = S3Source(bucket.url, key="{model}.bin", session=s3_moto.session(), endpoint_url=s3_moto.endpoint)
    with (
        system("xfs", tmp_path / "mounted") as mounted,
        ModelCache(source, stat_of_file, disk=DiskTier(mounted / "disk", min_free=0)) as cache,
    ):
        call = Call(cache.get, "m")
        while not call.over:
            seen.append((allocated(mounted / "disk"), cache.stats().disk_used))
        assert call.result().st_size == len(data)
        assert max(seen)[0] > len(data) / 2  # or it has not looked while they came
        assert [pair for pair in seen if pair[0] > pair[1]] == []


def access_list() -> bytes:
    """Return an access list that does not fit into an inode, as <linux>/include/uapi/linux/posix_acl_xattr.h has it."""
    nobody = 0xFFFFFFFF
    named = [(0x02, 7, uid) for uid in range(1000, 1012)]
    entries = [(0x01, 7, nobody), *named, (0x04, 0, nobody), (0x10, 7, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@contextlib.contextmanager
def greedy(kind: str, folder: Path) -> Iterator[Path]:
    """Mount a file system that takes more for a small file, or a folder of many, than whole blocks."""
    if kind == "huge pages":
        with small_disk(folder, "size=1g,huge=always") as mounted:
            yield mounted
        return
    size, command = {
        "clusters": (2**30, ("mkfs.ext4", "-O", "bigalloc", "-C", "65536")),
        "access list": (2**27, ("mkfs.ext4", "-b", "4096")),
        "index": (2**29, ("mkfs.xfs",)),
    }[kind]
    with formatted(folder, size, *command) as mounted:
        if kind == "access list":
            os.setxattr(mounted, "system.posix_acl_default", access_list())
        yield mounted


@pytest.mark.parametrize("names", [(400, 3), (15, 255)], ids=["many", "long"])
@pytest.mark.parametrize("kind", ["clusters", "access list", "huge pages", "index"])
def test_f036_small_files_that_take_much(tmp_path: Path, kind: str, names: tuple[int, int]) -> None:
    """F036: where a small file, or a folder of many, takes more than blocks of 4 KiB, that is reserved, too."""
    count, length = names if kind != "huge pages" else (5, 3)
    files = {f"{part}/{str(number).rjust(length, 'n')}": b"small" for part in range(6) for number in range(count)}
    with greedy(kind, tmp_path / "mounted") as mounted:
        source = DictSource().add_file("m", "m.tar", tar_of(files))
        seal, seen = disk_store.Store.seal, []

        def look(store: disk_store.Store, *arguments: Any) -> Any:
            seen.append((allocated(mounted / "disk"), cache.stats().disk_used))
            sealed = seal(store, *arguments)
            seen.append((allocated(mounted / "disk"), cache.stats().disk_used))
            return sealed

        with small_cache(mounted, source, lambda path: len(list(path.glob("*/*")))) as cache:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(disk_store.Store, "seal", look)
                assert cache.get("m") == len(files)
            assert [pair for pair in seen if pair[0] > pair[1]] == []
            assert seen[0][0] > 4096 * len(files) + 8 * 4096 or kind == "index"  # or this shows nothing
            assert cache.stats().disk_used == allocated(mounted / "disk")


def test_f036_file_system_that_says_later_what_it_has_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F036: on ZFS, which shows the blocks of a file seconds after it was synced, a file counts with its size."""
    seal = disk_store.Store.seal

    def with_hole(store: disk_store.Store, staged: Path, record: Any) -> Any:
        os.truncate(staged / "artifact" / "model.txt", 0)
        os.truncate(staged / "artifact" / "model.txt", 100_000)  # of which no block is shown
        return seal(store, staged, record)

    monkeypatch.setattr("modelcache.blocks._taken_with", lambda data, path: path.touch() or 512)
    monkeypatch.setattr(disk_store.Store, "seal", with_hole)
    with small_cache(tmp_path, DictSource().add("m", size=100_000)) as cache:
        cache.get("m")
        assert cache.stats().disk_used >= 100_000 > allocated(tmp_path / "disk")
        assert cache.delete("m")
        assert cache.stats().disk_used == 0


STANDS_STILL = """
import modelcache.disk.ledger as module
module.OPENING = 0.3
for name in ("tier", "shelf"):
    __import__(f"modelcache.disk.{name}")
    setattr(sys.modules[f"modelcache.disk.{name}"], "OPENING", 0.3)
"""


@pytest.mark.parametrize("error", ["ENOLCK", "EAGAIN"])
def test_f021_ledger_that_somebody_holds_for_ever(tmp_path: Path, error: str) -> None:
    """F021, F022: a start does not wait for ever for whoever opens the ledger, nor for locks that never come."""
    path = tmp_path / "disk" / ("ledger.sqlite3" if error == "ENOLCK" else "ledger.sqlite3.lock")
    call = "fcntl" if error == "ENOLCK" else "flock"
    said = run(STANDS_STILL + OPENS, tmp_path, under=injecting(f"{call}:error={error}", path=path))
    assert "another process is in the middle of a change" in said


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs", "fuse.sshfs", "fuse.juicefs"]
)
def test_f040_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """F040: a network file system is known by the system's list of mounts, and refused before anything is written."""
    listed = tmp_path / "mountinfo"
    place = str(tmp_path / "the cache").replace(" ", r"\040")
    listed.write_text(
        "24 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        f"36 24 0:31 / {place} rw,relatime shared:9 - autofs systemd-1 rw,fd=51\n"
        f"44 36 0:52 /export {place} rw,relatime shared:12 - {kind} host:/export rw,vers=4.2\n"
    )
    monkeypatch.setattr("modelcache.mounts.MOUNTINFO", str(listed).lstrip("/"))
    with pytest.raises(ConfigError, match=rf"network file system \({kind}\).*LocalSource"):
        DiskTier(tmp_path / "the cache" / "disk")
    assert list((tmp_path / "the cache" / "disk").iterdir()) == []


def test_f028_temporary_files_of_others_lie_elsewhere(tmp_path: Path) -> None:
    """F028: a download larger than all of TMPDIR works: what is staged lies in the cache's own file system."""
    script = """
    source = DictSource()
    from tests.support.fakes import tar
    source.artifacts["a"] = tar({"model.txt": b"a", "weights": os.urandom(3_000_000)})
    with small_cache(Path(sys.argv[1]), source) as cache:
        assert cache.get("a").name == "a"
        print(len(os.listdir(os.environ["TMPDIR"])))
    """
    with small_disk(tmp_path / "tmp", "size=1m") as small:
        assert run(script, tmp_path, env={"TMPDIR": str(small), "SQLITE_TMPDIR": str(small)}) == "0\n"


def test_f028_models_of_an_image(tmp_path: Path) -> None:
    """F028: models in a lower layer, whose folders can't be renamed, are served, replaced, evicted and swept."""
    image = tmp_path / "image"
    image.mkdir()
    source = DictSource().add("a", "b", "c", size=20_000)
    with small_cache(image, source) as cache:
        assert cache.prefetch(["a", "b", "c"], tier="disk").wait(10)
    before = sorted(str(path) for path in image.rglob("*"))
    with layered(image, tmp_path / "container") as folder:
        with small_cache(folder, source) as cache:
            assert {row.model for row in cache.models()} == {"a", "b", "c"}
            assert [cache.get(name).name for name in "abc"] == ["a", "b", "c"]
            assert sorted(source.opens) == ["a", "b", "c"]
            for name in "abc":
                cache.unload(name)
            assert cache.delete("a") is True
            assert cache.get("a").name == "a"
            source.add("b", size=30_000)
            assert cache.refresh("b")
            cache.disk.budget = 4096 * 8
            assert len(cache.models()) < 3
            assert cache.stats().disk_used == allocated(folder / "disk") <= 4096 * 8
        with small_cache(folder, source) as cache:
            assert len(list((folder / "disk" / "tmp").iterdir())) == 1
            assert cache.stats().disk_used == allocated(folder / "disk")
    assert sorted(str(path) for path in image.rglob("*")) == before


READS = """
source = DictSource().add("a", "b", "c")
with small_cache(Path(sys.argv[1]), source, retry_after=0) as cache:
    assert [cache.get(name).name for name in "ab"] == ["a", "b"]
    try:
        cache.get("c")
    except AccessDenied as error:
        assert "can only be read" in str(error)
    source.add("a", size=5000)
    try:
        cache.refresh("a")
    except AccessDenied as error:
        assert "can only be read" in str(error)
        print("told", len(source.opens))
    assert cache.get("a").name == "a"
"""


def test_f029_several_processes_on_a_read_only_mount(tmp_path: Path) -> None:
    """F029: processes serve hits from a read-only mount; a miss, and a version that can't be brought in, is told."""
    with small_cache(tmp_path, DictSource().add("a", "b")) as cache:
        assert cache.prefetch(["a", "b"], tier="disk").wait(10)
    with read_only(tmp_path / "disk"):
        assert [run(READS, tmp_path), run(READS, tmp_path)] == ["told 0\n"] * 2


SHARES = """
import tempfile
folder, umask, group = Path(sys.argv[1]), int(sys.argv[2], 8), sys.argv[3]
with tempfile.TemporaryDirectory() as other, small_cache(Path(other), DictSource().add("a")) as cache:
    cache.get("a")  # all imports, as root

def use(uid):
    os.setgroups([20000]), os.setgid(20000 if group == "main" else uid), os.setuid(uid)
    os.umask(umask)
    source = DictSource().add("a", "b", f"own{uid}", size=9000)
    with small_cache(folder, source, disk={"mode": 0o770}, retry_after=0) as cache:
        for name in ("a", "b", f"own{uid}"):
            assert cache.get(name).name == name
        assert cache.unload("b")
        assert cache.delete("b") is True
        assert cache.get("b").name == "b"
        for row in cache.models():
            cache.unload(row.model)
        for row in cache.models():
            assert cache.delete(row.model) is True, row
        assert cache.get("a").name == "a"
        cache.refresh("a")
        print(len(source.opens), flush=True)

for uid in (10001, 10002, 10001):
    if not (pid := os.fork()):
        use(uid)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("umask", ["002", "022", "077"])
@pytest.mark.parametrize("group", ["main", "further"])
def test_f030_two_users_in_one_group(tmp_path: Path, umask: str, group: str) -> None:
    """F030: users of one group share a setgid folder with ``mode=``, whatever their umask and their main group."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two users")
    folder = open_path(tmp_path) / "shared"
    folder.mkdir()
    os.chown(folder, 0, 20000)
    folder.chmod(0o2770)
    counts = run(SHARES, folder, umask, group).split()
    assert counts == ["5", "4", "4"]  # each but the first finds what the one before has left
