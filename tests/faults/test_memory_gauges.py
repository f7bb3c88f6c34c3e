"""Faults of measuring memory, by their number: real models in real memory cgroups, where a wrong reading kills.

Which files are read, and what in them counts, is in ``behaviour/test_gauges``.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modelcache import DiskTier
from modelcache.mounts import file_system
from tests.support.cgroups import MIB, Group, child_cgroup

CACHE = """
    from modelcache.gauges import ContainerGauge, HostGauge, ProcessGauge
    MIB, SIZE = 2**20, 30 * 10**6
    evicted, names = [], [f"m{number}" for number in range(20)]

    class Counting:
        def __init__(self, gauge):
            self.gauge, self.readings = gauge, 0
        @property
        def limit_source(self):
            return self.gauge.limit_source
        def read(self):
            self.readings += 1
            return self.gauge.read()
        def again(self, times=5):
            goal = self.readings + times
            eventually(lambda: self.readings >= goal)

    def load(path):
        assert not path.is_file() or path.stat().st_size
        return bytearray(os.urandom(1)) * SIZE

    def make(kind=None, source=None, disk=None, **settings):
        global cache, gauge
        gauge = Counting((kind or ProcessGauge)())
        memory = MemoryTier(interval=0.05, **({} if kind is None else {"gauge": gauge}))
        cache = ModelCache(source or DictSource().add(*names), load, memory=memory,
                           disk=disk or DiskTier(sys.argv[1], min_free=0), **settings)
        cache.on(Evicted, lambda event: evicted.append(event) if event.tier == "memory" else None)
        return cache

    def say(*words):
        print(*words, flush=True)
"""
HOLD = """
    held = bytearray(b"1") * int(sys.argv[1])
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def group() -> Iterator[Group]:
    """Give a memory cgroup of 256 MiB; nobody may be killed in it."""
    with child_cgroup(256 * MIB) as group:
        yield group
        assert not group.oom_kills


def test_f001_default_settings(tmp_path: Path, group: Group) -> None:
    """F001: with default settings 20 models of 30 MB pass through 256 MiB, twice; several stay, none is killed."""
    said = group.run_in(
        CACHE
        + """
    make()
    for name in names + names[::-1]:
        assert len(cache.get(name)) == SIZE
    say(cache.stats().memory_limit, len(evicted), sum(row.tier == "memory" for row in cache.models()))
    assert cache.close()
    """,
        tmp_path,
    )
    limit, evictions, kept = map(int, said.split())
    assert limit == 256 * MIB
    assert kept >= 3
    assert 20 <= evictions <= 40


NEIGHBOUR = (
    CACHE
    + """
    make({"ProcessGauge": ProcessGauge, "ContainerGauge": ContainerGauge}[sys.argv[2]])
    for name in names[:3]:
        cache.get(name)
    before = gauge.read()
    say("there")
    sys.stdin.readline()
    gauge.again()
    for name in names[:3]:
        cache.get(name)
    assert not evicted, evicted
    assert gauge.read().used - before.used < 8 * MIB
    say("done")
    """
)


def beside(folder: Path, group: Group, gauge: str, size: int, watchdog: int = 60) -> None:
    """Let another cgroup take memory while a cache with three models looks on; nothing may be evicted."""
    with child_cgroup(None) as other:
        cache = group.start(NEIGHBOUR, folder, gauge, watchdog=watchdog)
        assert cache.stdout is not None
        assert cache.stdout.readline() == "there\n", cache.communicate()
        neighbour = other.start(HOLD, size, watchdog=watchdog)
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "\n", neighbour.communicate()
        out, err = cache.communicate("\n", timeout=watchdog)
        neighbour.communicate()
    assert out == "done\n", err


@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
def test_f001_neighbour(tmp_path: Path, group: Group, gauge: str) -> None:
    """F001: memory that another cgroup takes, more than our limit, evicts nothing."""
    beside(tmp_path, group, gauge, 512 * MIB)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
def test_f001_large_neighbour(tmp_path: Path, group: Group, gauge: str) -> None:
    """F001: not even where another cgroup takes 60 percent of the machine."""
    memory = psutil.virtual_memory()
    size = memory.total * 6 // 10
    if size > memory.available - 2048 * MIB:
        pytest.skip("others use too much of this machine's memory now")
    beside(tmp_path, group, gauge, size, watchdog=240)  # a busy machine touches 14 GiB in a minute


@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
@pytest.mark.parametrize("prefix", [(), ("unshare", "-C")], ids=["plain", "namespaced"])
def test_f002_f003_limit_of_an_ancestor(tmp_path: Path, gauge: str, prefix: tuple[str, ...]) -> None:
    """F002, F003: a limit of 200 MiB in the parent holds, also where a namespace hides the path to it."""
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("needs the program unshare (util-linux)")
    with child_cgroup(200 * MIB) as parent, parent.child() as group:
        said = group.run_in(
            CACHE
            + """
    make({"ProcessGauge": ProcessGauge, "ContainerGauge": ContainerGauge}[sys.argv[2]])
    for name in names[:12]:
        cache.get(name)
    assert f"(set by {gauge.limit_source})" in cache.explain(names[11]), cache.explain(names[11])
    say(cache.stats().memory_limit, gauge.limit_source)
    """,
            tmp_path,
            gauge,
            prefix=prefix,
        )
        assert said.split() == [str(200 * MIB), f"{parent.path}/memory.limit_in_bytes"]
        assert not parent.oom_kills


@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
def test_f005_page_cache(tmp_path: Path, group: Group, gauge: str) -> None:
    """F005: writing and reading a file of 1 GiB in a group of 256 MiB, beside 60 MB of models, evicts nothing."""
    group.run_in(
        CACHE
        + """
    make({"ProcessGauge": ProcessGauge, "ContainerGauge": ContainerGauge}[sys.argv[2]])
    for name in names[:2]:
        cache.get(name)
    before, block = gauge.read().used, os.urandom(4 * MIB)
    with open(Path(sys.argv[1], "file"), "wb") as file:
        for _ in range(256):
            file.write(block)
    with open(Path(sys.argv[1], "file"), "rb") as file:
        while file.read(4 * MIB):
            pass
    gauge.again()
    stat = dict(line.split() for line in Path(sys.argv[3], "memory.stat").read_text().splitlines())
    assert int(stat["total_cache"]) > 100 * MIB, stat
    assert gauge.read().used - before < 16 * MIB, (before, gauge.read())
    cache.get(names[2])
    assert not evicted, evicted
    """,
        tmp_path,
        gauge,
        group.path,
    )
    assert group.max_usage > 240 * MIB


@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
def test_f005_fetch(tmp_path: Path, group: Group, gauge: str) -> None:
    """F005: fetching an artifact of 600 MB in a group of 256 MiB, beside 60 MB of models, evicts nothing."""
    big = tmp_path / "source" / "big" / "weights.bin"
    big.parent.mkdir(parents=True)
    with big.open("wb") as file:
        file.truncate(600 * 10**6)
    for number in range(3):
        small = tmp_path / "source" / f"m{number}" / "weights.bin"
        small.parent.mkdir()
        small.write_bytes(b"1")
    group.run_in(
        CACHE
        + """
    kind = {"ProcessGauge": ProcessGauge, "ContainerGauge": ContainerGauge}[sys.argv[2]]
    make(kind, LocalSource(sys.argv[3]))
    for name in names[:2]:
        cache.get(name)
    before = gauge.read().used
    fetch = cache.prefetch(["big"], tier="disk")
    assert fetch.wait(12) and not fetch.errors, fetch.errors
    gauge.again()
    assert gauge.read().used - before < 24 * MIB, (before, gauge.read())
    cache.get(names[2])
    assert not evicted, evicted
    """,
        tmp_path / "disk",
        gauge,
        tmp_path / "source",
    )
    assert group.max_usage > 200 * MIB


@pytest.mark.parametrize("gauge", ["ProcessGauge", "ContainerGauge"])
def test_f006_active_pages(tmp_path: Path, group: Group, gauge: str) -> None:
    """F006: artifacts that are read again and again, active page cache, evict nothing when a model is loaded."""
    group.run_in(
        CACHE
        + """
    source = DictSource()
    for name in names[:4]:
        source.add_file(name, name + ".bin", os.urandom(SIZE))
    make({"ProcessGauge": ProcessGauge, "ContainerGauge": ContainerGauge}[sys.argv[2]], source)
    cache.prefetch(names[:4], tier="disk").wait(10)
    source.artifacts.clear()
    gc.collect()
    files = [file for file in Path(sys.argv[1]).rglob("*") if file.is_file() and file.stat().st_size >= SIZE]
    assert len(files) == 4, files
    for _ in range(3):
        for file in files:
            with open(file, "rb") as opened:
                while opened.read(MIB):
                    pass
    stat = dict(line.split() for line in Path(sys.argv[3], "memory.stat").read_text().splitlines())
    assert int(stat["total_active_file"]) > 60 * MIB, stat
    for name in names[:4]:
        cache.get(name)
    gauge.again()
    assert not evicted, evicted
    """,
        tmp_path,
        gauge,
        group.path,
    )


def test_f007_disk_tier_in_memory(group: Group) -> None:
    """F007: a disk tier on a tmpfs counts as used: budget and models stay below the limit, after a restart too."""
    shared = Path("/dev/shm")  # noqa: S108 - a tmpfs, which is the point
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        pytest.skip("no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared, prefix="modelcache-") as folder:
        script = (
            CACHE
            + """
    source, zeros = DictSource(), bytes(10 * MIB)
    for name in names:
        source.add_file(name, name + ".bin", zeros)
    before = ContainerGauge().read().used
    assert (before > 80 * MIB) is (sys.argv[2] == "again"), before  # what the first process left counts from the start
    make(ContainerGauge, source, DiskTier(sys.argv[1], budget=100 * MIB, min_free=0))
    assert cache.prefetch(names[:8], tier="disk").wait(10)
    grown = ContainerGauge().read().used - before
    assert 80 * MIB < grown < 100 * MIB if sys.argv[2] == "first" else grown < 20 * MIB, grown
    for name in names + names:
        assert len(cache.get(name)) == SIZE
        kept = sum(row.tier == "memory" for row in cache.models())
    assert kept >= 1 and len(evicted) >= 30, (kept, len(evicted))
    assert cache.close()
    """
        )
        for start in ("first", "again"):
            group.run_in(script, folder, start)


def preload(name: str) -> str:
    """Return the path of an allocator's library."""
    found = sorted(Path("/usr/lib").glob(f"*/lib{name}.so*"))
    if not found:
        pytest.skip(f"lib{name} is not installed here")
    return str(found[0])


@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc_minimal", "mimalloc", "no malloc_trim"])
def test_f010_other_allocators(tmp_path: Path, group: Group, name: str) -> None:
    """F010: under other allocators, and where none can be asked, models come and go without a kill or a crash."""
    env = {} if name.startswith("no ") else {"LD_PRELOAD": preload(name)}
    said = group.run_in(
        CACHE
        + """
    from modelcache import heap
    if sys.argv[2].startswith("no "):
        heap._search, SIZE = lambda: ("unknown", None, None), 40 * 10**6  # which glibc maps, and unmaps, one by one
    make()
    for name in names + names:
        assert len(cache.get(name)) == SIZE
    say(heap.allocator(), len(evicted), sum(row.tier == "memory" for row in cache.models()))
    assert cache.close()
    """,
        tmp_path,
        name,
        **env,
    )
    allocator, evictions, kept = said.split()
    assert allocator == ("unknown" if name.startswith("no ") else name.removesuffix("_minimal"))
    assert int(kept) >= 3
    assert 20 <= int(evictions) <= 40


@pytest.mark.slow
def test_container_never_reads_less_than_this_process_holds() -> None:
    """However the kernel's figures lag, the container's use is at least this process's own anonymous memory."""
    with child_cgroup(400 * MIB) as parent, parent.child() as group:
        group.run_in(
            """
            from modelcache.gauges import ContainerGauge
            gauge, kept = ContainerGauge(), []

            def anonymous():
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

            def work():
                kept.append(bytearray(b"1") * 30_000_000)
                if len(kept) > 5:
                    del kept[0]

            for number in range(1500):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                used, real = gauge.read().used, anonymous()
                assert used > real - 8 * 2**20, (number, used >> 20, real >> 20)
            """,
            watchdog=40,
            timeout=50.0,
        )


def test_f007_tmpfs_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """F007: a disk tier on a tmpfs, whose files take memory, says so where it is made; one on a disk does not."""
    shared = Path("/dev/shm")  # noqa: S108 - a tmpfs, which is the point
    if not os.access(shared, os.W_OK) or file_system(shared) != "tmpfs" or file_system(tmp_path) == "tmpfs":
        pytest.skip("needs a tmpfs at /dev/shm and a disk at the temporary folder")
    DiskTier(tmp_path / "disk")
    assert not caplog.records
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        DiskTier(folder, min_free=0)
        (record,) = caplog.records
    assert "lies on a tmpfs" in record.getMessage()


def test_file_system_of_a_folder_with_odd_letters(tmp_path: Path) -> None:
    """Blanks, backslashes and letters of other scripts in the name of a mount point are understood."""
    if not (os.geteuid() == 0 and shutil.which("mount")):
        pytest.skip("needs root, to mount")
    folder = tmp_path / "a b\\c ü"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        assert file_system(folder) == "tmpfs"
        assert file_system(tmp_path) != "tmpfs"
    finally:
        subprocess.run(["umount", folder], check=True)
