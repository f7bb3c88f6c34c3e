"""Gauges: what is the limit and what counts as used, on copied trees and in a real cgroup; what can't be trusted.

What a cache makes of it is in ``faults/test_memory_gauges``.
"""

import contextlib
import errno
import gc
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelcache.errors import ConfigError
from modelcache.gauges import (
    ContainerGauge,
    Gauge,
    HostGauge,
    ProcessGauge,
    Reading,
    SafeGauge,
    check_reading,
    default_gauge,
)
from tests.contracts.gauge_contract import GaugeContract
from tests.support.cgroups import Group, child_cgroup
from tests.support.children import run
from tests.support.waiting import eventually

MIB = 1 << 20
HOST = 8192 * MIB
HOST_USED = 3000 * MIB
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
MACHINE = "memory of the machine"


class Tree:
    """A copied ``/proc`` and ``/sys``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        free = (HOST - HOST_USED) // 1024
        self.write("proc/meminfo", f"MemTotal:  {HOST // 1024} kB\nMemFree:   1 kB\nMemAvailable:   {free} kB\n")

    def write(self, path: str, text: str | bytes) -> Path:
        """Write one file."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    def process(self, *memberships: str, mounts: tuple[str, ...] = ()) -> None:
        """Write what the process knows about itself."""
        self.write("proc/self/cgroup", "\n".join(memberships) + "\n")
        if mounts:
            self.write("proc/self/mountinfo", "\n".join(("22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts)) + "\n")

    def v1(self, folder: str, limit: object) -> None:
        """Write a limit below the usual mount."""
        self.write(f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes", f"{limit}\n")

    def v2(self, folder: str, limit: object, high: object = "max") -> None:
        """Write both limits below the usual mount."""
        self.write(f"sys/fs/cgroup/{folder}/memory.max", f"{limit}\n")
        self.write(f"sys/fs/cgroup/{folder}/memory.high", f"{high}\n")

    def stat(self, folder: str, **figures: object) -> None:
        """Write ``memory.stat`` of a group, its path below ``sys/fs/cgroup``."""
        lines = (f"{name} {value}\n" for name, value in figures.items())
        self.write(f"sys/fs/cgroup/{folder}/memory.stat", "".join(lines))

    def resident(self, size: int, shared: int = 300 * mmap.PAGESIZE) -> None:
        """Write what the process has resident, and what of it is shared."""
        pages, files = size // mmap.PAGESIZE, shared // mmap.PAGESIZE
        self.write("proc/self/statm", f"999999 {pages} {files} 5 0 123 0\n")

    def limit(self) -> tuple[int, str]:
        """Return what a new gauge says, and which file decided, below the root."""
        gauge = ProcessGauge(self.root)
        return gauge.read().limit, gauge.limit_source.removeprefix(f"{self.root}/")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Give an empty tree of a machine with 8 GiB."""
    return Tree(tmp_path)


class TestProcessGauge(GaugeContract):
    """The gauge of this process keeps the contract."""

    def make(self) -> Gauge:
        """Make one."""
        return ProcessGauge()


class TestProcessGaugeWithChildren(GaugeContract):
    """So it does with children."""

    def make(self) -> Gauge:
        """Make one."""
        return ProcessGauge(children=True)


class TestContainerGauge(GaugeContract):
    """The gauge of the container keeps the contract."""

    def make(self) -> Gauge:
        """Make one."""
        return ContainerGauge()


class _OnTree(GaugeContract):
    """On a copied tree."""

    version = ""

    @pytest.fixture(autouse=True)
    def _limited(self, tree: Tree) -> None:
        self.tree = tree
        tree.process("4:memory:/app", "0::/app")
        getattr(tree, self.version)("app", 300 * MIB)
        tree.stat("memory/app", total_rss=MIB)
        tree.stat("app", anon=MIB)

    def make(self) -> Gauge:
        """Make one."""
        gauge = ContainerGauge(self.tree.root)
        assert gauge.read() == Reading(MIB, 300 * MIB)
        return gauge


class TestContainerGaugeV1(_OnTree):
    """So it does in a v1 group."""

    version = "v1"


class TestContainerGaugeV2(_OnTree):
    """So it does in a v2 group."""

    version = "v2"


class TestHostGauge(GaugeContract):
    """The gauge of the machine keeps the contract."""

    def make(self) -> Gauge:
        """Make one."""
        return HostGauge()


# Which limit


def test_no_cgroup(tree: Tree) -> None:
    """Without cgroups the limit is the machine's memory."""
    assert tree.limit() == (HOST, MACHINE)


def test_no_proc_at_all(tmp_path: Path) -> None:
    """Without any file the machine's memory comes from the system."""
    gauge = ProcessGauge(tmp_path / "nowhere")
    assert gauge.read().limit == psutil.virtual_memory().total
    assert gauge.limit_source == MACHINE


def test_v1_own_group(tree: Tree) -> None:
    """Under v1 the process's own group sets the limit."""
    tree.process("4:memory:/app", mounts=(V1_MOUNT.format(top="/"),))
    tree.v1("app", 200 * MIB)
    assert tree.limit() == (200 * MIB, "sys/fs/cgroup/memory/app/memory.limit_in_bytes")


def test_v2_own_group(tree: Tree) -> None:
    """Under v2 the process's own group sets the limit."""
    tree.process("0::/app", mounts=(V2_MOUNT.format(top="/"),))
    tree.v2("app", 200 * MIB)
    assert tree.limit() == (200 * MIB, "sys/fs/cgroup/app/memory.max")


def test_v2_high_counts(tree: Tree) -> None:
    """memory.high below memory.max is the limit: above it the kernel stalls the process."""
    tree.process("0::/app")
    tree.v2("app", 200 * MIB, high=150 * MIB)
    assert tree.limit() == (150 * MIB, "sys/fs/cgroup/app/memory.high")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_tightest_ancestor_counts(tree: Tree, version: str) -> None:
    """The smallest limit up the tree counts, wherever it stands."""
    tree.process("4:cpu,memory:/a/b/c", "0::/a/b/c")
    write = getattr(tree, version)
    write("a", 300 * MIB)
    write("a/b", 200 * MIB)
    write("a/b/c", 400 * MIB)
    limit, source = tree.limit()
    assert limit == 200 * MIB
    assert "/a/b/memory." in source


def test_v1_ancestor_outside_the_mount(tree: Tree) -> None:
    """A v1 group knows the limit of ancestors that are not mounted here."""
    tree.process("4:memory:/docker/abc", mounts=(V1_MOUNT.format(top="/docker/abc"),))
    tree.v1("", 400 * MIB)
    tree.write("sys/fs/cgroup/memory/memory.stat", f"cache 0\nhierarchical_memory_limit {200 * MIB}\ntotal_cache 0\n")
    assert tree.limit() == (200 * MIB, "sys/fs/cgroup/memory/memory.stat")


def test_hybrid(tree: Tree) -> None:
    """With v1 and v2 mounted at once both are read, and the smallest counts."""
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    tree.process("4:memory:/one", "0::/two", mounts=(V1_MOUNT.format(top="/"), unified))
    tree.v1("one", 300 * MIB)
    assert tree.limit()[0] == 300 * MIB
    tree.v2("unified/two", 250 * MIB)
    assert tree.limit() == (250 * MIB, "sys/fs/cgroup/unified/two/memory.max")


def test_unified_group_of_v1_process_is_not_mistaken(tree: Tree) -> None:
    """The v2 path is not looked for in the v1 hierarchy, nor the other way round."""
    tree.process("4:memory:/one", "0::/two")
    tree.v1("two", 100 * MIB)
    tree.v1("one", 300 * MIB)
    assert tree.limit()[0] == 300 * MIB


@pytest.mark.parametrize("top", [None, "/docker/abc"], ids=["no mountinfo", "mountinfo"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_path_of_the_host_in_a_container(tree: Tree, version: str, top: str | None) -> None:
    """Where the group's path is the host's and does not exist here, the top of the mount is the group."""
    mounts = (V1_MOUNT.format(top=top), V2_MOUNT.format(top=top)) if top else ()
    tree.process("4:memory:/docker/abc", "0::/docker/abc", mounts=mounts)
    getattr(tree, version)("", 256 * MIB)
    assert tree.limit()[0] == 256 * MIB


def test_child_group_in_a_container(tree: Tree) -> None:
    """A group below the one that is mounted is found, though its path is the host's."""
    tree.process("4:memory:/docker/abc/job", mounts=(V1_MOUNT.format(top="/docker/abc"),))
    tree.v1("", 256 * MIB)
    tree.v1("job", 128 * MIB)
    assert tree.limit() == (128 * MIB, "sys/fs/cgroup/memory/job/memory.limit_in_bytes")


def test_mount_elsewhere(tree: Tree) -> None:
    """A hierarchy mounted at an unusual place, with a space in it, is found by mountinfo."""
    tree.process("0::/app", mounts=(r"41 31 0:38 / /odd\040place rw - cgroup2 none rw",))
    tree.write("odd place/app/memory.max", str(128 * MIB))
    assert tree.limit() == (128 * MIB, "odd place/app/memory.max")


def test_group_of_strangers_is_not_ours(tree: Tree) -> None:
    """Another container's group that happens to be mounted here does not limit us."""
    stranger = "90 31 0:32 /docker/other /var/lib/other rw - cgroup cgroup rw,memory"
    tree.process("4:memory:/docker/abc", mounts=(V1_MOUNT.format(top="/docker/abc"), stranger))
    tree.v1("", 256 * MIB)
    tree.write("var/lib/other/memory.limit_in_bytes", str(MIB))
    assert tree.limit()[0] == 256 * MIB


def test_sibling_is_not_ours(tree: Tree) -> None:
    """Limits of groups beside ours do not count."""
    tree.process("0::/a/us")
    tree.v2("a/us", 300 * MIB)
    tree.v2("a/them", 100 * MIB)
    assert tree.limit()[0] == 300 * MIB


def test_mount_made_outside_our_namespace(tree: Tree) -> None:
    """Where a mount starts above our cgroup namespace, under names nobody tells, we find ourselves by our pid."""
    tree.process("4:memory:/in", mounts=(V1_MOUNT.format(top="/../.."),))
    for name, pid in (("them", 1), ("us", os.getpid())):
        tree.v1(f"slice/{name}", 300 * MIB)
        tree.v1(f"slice/{name}/in", 64 * MIB if name == "them" else 128 * MIB)
        tree.write(f"sys/fs/cgroup/memory/slice/{name}/in/cgroup.procs", f"7\n{pid}\n")
    assert tree.limit() == (128 * MIB, "sys/fs/cgroup/memory/slice/us/in/memory.limit_in_bytes")


def test_group_that_is_found_nowhere(tree: Tree) -> None:
    """Where we can't find ourselves, the top of the mount counts, since it is an ancestor."""
    tree.process("4:memory:/", mounts=(V1_MOUNT.format(top="/.."),))
    tree.v1("", 500 * MIB)
    tree.v1("them", 100 * MIB)
    assert tree.limit()[0] == 500 * MIB


def test_group_outside_our_namespace(tree: Tree) -> None:
    """A path that leads out of the namespace is not followed out of the mount."""
    tree.process("0::/../../../../proc")
    tree.v2("", 400 * MIB)
    tree.write("proc/memory.max", str(MIB))
    assert tree.limit()[0] == 400 * MIB


# What is no limit


@pytest.mark.parametrize(
    "text",
    [
        "9223372036854771712",
        "9223372036854775807",
        "18446744073709551615",
        "max",
        str(HOST),
        str(HOST * 2),
        "",
        "\n",
        "0",
        "-1",
        "lots",
        "1_000",
        "1e6",
        "9" * 5000,
        "\u0663\u0664",
        b"\xff\xfe\x00",
        b"\x00" * 100,
    ],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sentinels_and_nonsense_mean_the_machine(tree: Tree, version: str, text: str | bytes) -> None:
    """Each way to say "no limit", values above the machine's memory, and nonsense give the machine's memory."""
    tree.process("4:memory:/app", "0::/app")
    folder = "sys/fs/cgroup/memory/app" if version == "v1" else "sys/fs/cgroup/app"
    for name in ("memory.limit_in_bytes", "memory.max", "memory.high"):
        tree.write(f"{folder}/{name}", text)
    tree.write(
        f"{folder}/memory.stat", b"hierarchical_memory_limit " + (text.encode() if isinstance(text, str) else text)
    )
    assert tree.limit() == (HOST, MACHINE)


@pytest.mark.parametrize(
    "text", ["", "\n\n", "4:memory", "::::", "memory", "4:memory:no slash", "\x00", b"\xff:\xff:\xff"]
)
def test_garbled_memberships(tree: Tree, text: str | bytes) -> None:
    """Where the process's own groups can't be told, the top of each mount counts."""
    tree.write("proc/self/cgroup", text)
    tree.v1("", 400 * MIB)
    assert tree.limit()[0] == 400 * MIB


@pytest.mark.parametrize(
    "text", ["", "-", " - cgroup2", "1 2 3 4 - cgroup2 a b", "1 2 3 / /x - cgroup", b"\xff - \xff"]
)
def test_garbled_mountinfo(tree: Tree, text: str | bytes) -> None:
    """Where mountinfo is of no use, the usual places count."""
    tree.process("4:memory:/app")
    tree.write("proc/self/mountinfo", text)
    tree.v1("app", 300 * MIB)
    assert tree.limit()[0] == 300 * MIB


@pytest.mark.parametrize("text", ["", "MemTotal:", "MemTotal: many kB", "MemTotal: 12"])
def test_garbled_meminfo(tree: Tree, text: str) -> None:
    """Where meminfo is of no use, the system is asked."""
    tree.write("proc/meminfo", text)
    assert tree.limit() == (psutil.virtual_memory().total, MACHINE)


def test_folder_in_place_of_a_file(tree: Tree) -> None:
    """A folder where a file should be is no limit."""
    tree.process("0::/app")
    (tree.root / "sys/fs/cgroup/app/memory.max").mkdir(parents=True)
    assert tree.limit() == (HOST, MACHINE)


def test_no_permission(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read is no limit."""
    tree.process("0::/app")
    tree.v2("app", 100 * MIB)
    tree.v2("", 300 * MIB)
    secret, plain = tree.root / "sys/fs/cgroup/app/memory.max", Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert tree.limit()[0] == 300 * MIB


# When it is read


def test_limit_is_read_again_at_most_once_a_second(tree: Tree) -> None:
    """A limit that changes is seen a second later, not before."""
    now = [100.0]
    gauge = ProcessGauge(tree.root, clock=lambda: now[0])
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    assert gauge.read().limit == 300 * MIB
    tree.v2("app", 200 * MIB)
    now[0] = 100.9
    assert gauge.read().limit == 300 * MIB
    now[0] = 101.0
    assert gauge.read().limit == 200 * MIB


def test_process_moved_to_another_group(tree: Tree) -> None:
    """A process that is moved to another group has that group's limit."""
    now = [0.0]
    gauge = ProcessGauge(tree.root, clock=lambda: now[0])
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    tree.v2("job", 100 * MIB)
    assert gauge.read().limit == 300 * MIB
    tree.process("0::/job")
    now[0] = 2.0
    assert gauge.read().limit == 100 * MIB
    assert gauge.limit_source.endswith("job/memory.max")


def test_source_is_told_before_the_first_reading(tree: Tree) -> None:
    """limit_source may be asked first."""
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    assert ProcessGauge(tree.root).limit_source.endswith("app/memory.max")


def test_out_of_descriptors_is_not_out_of_limits(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no descriptor is left to read the limit again, the last one stays; it does not become the machine's."""
    now = [0.0]
    gauge = ProcessGauge(tree.root, clock=lambda: now[0])
    tree.process("0::/app")
    tree.resident(MIB)
    tree.v2("app", 300 * MIB)
    assert gauge.read().limit == 300 * MIB

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        now[0] = 2.0
        assert gauge.read().limit == 300 * MIB
        with pytest.raises(OSError, match="Too many"):
            ProcessGauge(tree.root).read()
    tree.v2("app", 200 * MIB)
    now[0] = 4.0
    assert gauge.read().limit == 200 * MIB


# What counts as used, on copied trees


def test_resident_pages(tree: Tree) -> None:
    """Used by the process are its resident pages, of whatever size pages are here."""
    tree.resident(77 * mmap.PAGESIZE)
    assert ProcessGauge(tree.root).read().used == 77 * mmap.PAGESIZE


@pytest.mark.parametrize("text", ["", "1", "1 2", "size resident shared", b"\xff\x00 \xff \xff"])
def test_garbled_statm(tree: Tree, text: str | bytes) -> None:
    """Where statm is of no use, the system is asked in another way."""
    tree.write("proc/self/statm", text)
    assert ProcessGauge(tree.root).read().used > 5 * MIB


def container(tree: Tree) -> tuple[int, int, str]:
    """Return what a new gauge of the container says, and which file decided, below the root."""
    gauge = ContainerGauge(tree.root)
    reading = gauge.read()
    return reading.used, reading.limit, gauge.limit_source.removeprefix(f"{tree.root}/")


V1_STAT = {
    "cache": 800 * MIB,
    "rss": 1 * MIB,
    "active_file": 300 * MIB,
    "total_cache": 900 * MIB,
    "total_rss": 100 * MIB,
    "total_shmem": 20 * MIB,
    "total_mapped_file": 30 * MIB,
    "total_active_file": 400 * MIB,
}
V2_STAT = {
    "anon": 100 * MIB,
    "file": 900 * MIB,
    "kernel": 60 * MIB,
    "kernel_stack": 2 * MIB,
    "pagetables": 3 * MIB,
    "sec_pagetables": 1 * MIB,
    "percpu": 4 * MIB,
    "sock": 7 * MIB,
    "vmalloc": 5 * MIB,
    "shmem": 20 * MIB,
    "file_mapped": 30 * MIB,
    "active_file": 400 * MIB,
    "slab_reclaimable": 45 * MIB,
    "slab_unreclaimable": 6 * MIB,
    "slab": 51 * MIB,
}


def test_v1_used(tree: Tree) -> None:
    """A v1 group uses its anonymous memory and mapped file pages; no page cache, and no kernel memory."""
    tree.process("4:memory:/app")
    tree.v1("app", 300 * MIB)
    tree.stat("memory/app", **V1_STAT)
    tree.write("sys/fs/cgroup/memory/app/memory.kmem.usage_in_bytes", str(70 * MIB))
    assert container(tree) == (130 * MIB, 300 * MIB, "sys/fs/cgroup/memory/app/memory.limit_in_bytes")


def test_v2_used(tree: Tree) -> None:
    """A v2 group uses anonymous memory, mapped file pages, sockets and kernel memory but what can be reclaimed."""
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    tree.stat("app", **V2_STAT)
    assert container(tree) == ((100 + 30 + 7 + 15) * MIB, 300 * MIB, "sys/fs/cgroup/app/memory.max")


def test_what_a_container_s_processes_share(tree: Tree) -> None:
    """All under one limit name it alike, whatever group below it they are in; those under another name that."""
    named = []
    for group in ("app/one", "app/two", "other"):
        tree.process(f"0::/{group}")
        tree.v2("app", 300 * MIB)
        tree.v2("other", 300 * MIB)
        (tree.root / "sys/fs/cgroup" / group).mkdir(exist_ok=True)
        named.append(ContainerGauge(tree.root).shared)
    assert named[0] == named[1] != named[2]
    assert None not in named
    assert getattr(ProcessGauge(tree.root), "shared", None) is None


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_default_gauge_by_whether_a_limit_is_real(tree: Tree, version: str) -> None:
    """The container's gauge is the default where its limit is one; without, or above the machine's, the process's."""
    tree.process("4:memory:/app", "0::/app")
    limit = tree.v1 if version == "v1" else tree.v2
    assert isinstance(default_gauge(tree.root), ProcessGauge)
    limit("app", 300 * MIB)
    assert isinstance(default_gauge(tree.root), ContainerGauge)
    limit("app", HOST * 2)
    assert isinstance(default_gauge(tree.root), ProcessGauge)
    limit("app", "max")
    assert isinstance(default_gauge(tree.root), ProcessGauge)


def test_reading_tells_what_is_the_process_s_own(tree: Tree) -> None:
    """Of what a container uses, the reading says what this process has, by which its loads are weighed."""
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    tree.stat("app", **V2_STAT)
    tree.resident(20 * MIB)
    reading = ContainerGauge(tree.root).read()
    assert (reading.used, reading.own, reading.mine) == (152 * MIB, 20 * MIB, 20 * MIB)
    assert Reading(5, 10).mine == 5


def test_v2_used_on_older_kernels(tree: Tree) -> None:
    """Where the kernel's part is not summed up, its parts that can't be reclaimed count."""
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    tree.stat("app", **{name: size for name, size in V2_STAT.items() if name != "kernel"})
    assert container(tree)[0] == (100 + 30 + 7 + 2 + 3 + 1 + 4 + 5 + 6) * MIB


@pytest.mark.parametrize(("version", "prefix"), [("v1", "memory/"), ("v2", "")])
def test_shared_memory_is_used(tree: Tree, version: str, prefix: str) -> None:
    """Shared memory, which a tmpfs is as well, counts; mapped as well it counts once."""
    tree.process("4:memory:/app", "0::/app")
    getattr(tree, version)("app", 300 * MIB)
    tree.stat(f"{prefix}app", **{**(V1_STAT if prefix else V2_STAT), "shmem": 80 * MIB, "total_shmem": 80 * MIB})
    assert container(tree)[0] == (100 + 80 + (0 if prefix else 22)) * MIB


@pytest.mark.parametrize(("version", "prefix"), [("v1", "memory/"), ("v2", "")])
def test_used_and_limit_are_of_one_group(tree: Tree, version: str, prefix: str) -> None:
    """Use is read where the smallest limit stands: in the ancestor that has it, or the outermost of equals."""
    tree.process("4:memory:/a/b/c", "0::/a/b/c")
    write = getattr(tree, version)
    for folder, limit, used in (("a", 400, 50), ("a/b", 200, 40), ("a/b/c", 200, 30)):
        write(folder, limit * MIB)
        tree.stat(prefix + folder, anon=used * MIB, total_rss=used * MIB, hierarchical_memory_limit=200 * MIB)
    assert container(tree)[:2] == (40 * MIB, 200 * MIB)
    write("a", 100 * MIB)
    assert container(tree)[:2] == (50 * MIB, 100 * MIB)
    write("a/b/c", 90 * MIB)
    assert container(tree)[:2] == (30 * MIB, 90 * MIB)


def test_used_where_the_limit_is_further_up(tree: Tree) -> None:
    """Where an ancestor that is not mounted here has the limit, the nearest group to it that is seen is read."""
    tree.process("4:memory:/docker/abc/in", mounts=(V1_MOUNT.format(top="/docker/abc"),))
    for folder, used in (("", 50), ("in", 40)):
        tree.v1(folder, "9223372036854771712")
        tree.stat(f"memory/{folder}", total_rss=used * MIB, hierarchical_memory_limit=200 * MIB)
    assert container(tree) == (50 * MIB, 200 * MIB, "sys/fs/cgroup/memory/memory.stat")


def test_used_by_both_versions_at_once(tree: Tree) -> None:
    """With v1 and v2 mounted at once, use is read in the version whose limit is the smallest."""
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    tree.process("4:memory:/one", "0::/two", mounts=(V1_MOUNT.format(top="/"), unified))
    tree.v1("one", 300 * MIB)
    tree.stat("memory/one", total_rss=10 * MIB)
    tree.v2("unified/two", 400 * MIB)
    tree.stat("unified/two", anon=20 * MIB)
    assert container(tree)[:2] == (10 * MIB, 300 * MIB)
    tree.v2("unified/two", 200 * MIB)
    assert container(tree)[:2] == (20 * MIB, 200 * MIB)


def test_container_without_a_limit(tree: Tree) -> None:
    """Where no limit is below the machine's memory, the container reads as the machine does."""
    tree.process("0::/app")
    tree.v2("app", "max")
    tree.stat("app", **V2_STAT)
    assert container(tree) == (HOST_USED, HOST, MACHINE)
    assert HostGauge(tree.root).read() == Reading(HOST_USED, HOST)
    assert HostGauge(tree.root).limit_source == MACHINE


def test_container_whose_limit_moves(tree: Tree) -> None:
    """A limit that is set in another group than before takes the use along, within a second."""
    now = [0.0]
    gauge = ContainerGauge(tree.root, clock=lambda: now[0])
    tree.process("0::/a/b")
    for folder, limit, used in (("a", "max", 50), ("a/b", 200 * MIB, 40)):
        tree.v2(folder, limit)
        tree.stat(folder, anon=used * MIB)
    assert gauge.read() == Reading(40 * MIB, 200 * MIB)
    tree.v2("a", 100 * MIB)
    assert gauge.read() == Reading(40 * MIB, 200 * MIB)
    now[0] = 1.0
    assert gauge.read() == Reading(50 * MIB, 100 * MIB)


STATS = [
    "",
    "\n\n",
    "anon",
    "anon many\ntotal_rss lots\n",
    "file 5\ncache 5\n",
    b"\xff\xfe\x00",
    "anon -5\ntotal_rss -5",
]


@pytest.mark.parametrize("text", [None, *STATS])
@pytest.mark.parametrize(("version", "prefix"), [("v1", "memory/"), ("v2", "")])
def test_use_that_is_not_told(tree: Tree, version: str, prefix: str, text: str | bytes | None) -> None:
    """Where the group's use is missing or garbled, this process alone counts, against the group's limit."""
    tree.process("4:memory:/app", "0::/app")
    tree.resident(55 * MIB)
    getattr(tree, version)("app", 300 * MIB)
    if text is not None:
        tree.write(f"sys/fs/cgroup/{prefix}app/memory.stat", text)
    assert container(tree)[:2] == (55 * MIB, 300 * MIB)


@pytest.mark.parametrize(
    "text",
    [None, "", "MemTotal: 5 kB\n", "MemAvailable: 5 kB\n", "MemTotal: 0 kB\nMemAvailable: 0 kB\n", b"\xff\n\xff"],
)
def test_machine_that_is_not_told(tree: Tree, text: str | bytes | None) -> None:
    """Where meminfo is missing or garbled, the system is asked in another way."""
    if text is None:
        (tree.root / "proc/meminfo").unlink()
    else:
        tree.write("proc/meminfo", text)
    reading = HostGauge(tree.root).read()
    assert reading.limit == psutil.virtual_memory().total
    assert 0 < reading.used < reading.limit


# What counts as used, for real


def test_used_is_what_is_resident() -> None:
    """Used is the resident set of this process, and grows with what it holds."""
    gauge = ProcessGauge()
    before = gauge.read().used
    held = bytearray(os.urandom(32 * MIB))
    after = gauge.read().used
    assert after - before > 24 * MIB
    assert len(held) == 32 * MIB


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_reads_the_child() -> None:
    """In a forked child the child's own resident set is read."""
    gauge = ProcessGauge()
    gauge.read()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(10)
            before = gauge.read().used
            held = bytearray(os.urandom(32 * MIB))
            os._exit(0 if gauge.read().used - before > 24 * MIB and held else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(shutil.which("sleep") is None, reason="needs the program sleep")
def test_children_count_where_they_are_asked_for() -> None:
    """With children, what processes below this one have resident is added; found, and forgotten, after a second."""
    now = [0.0]
    alone, family = ProcessGauge(), ProcessGauge(children=True, clock=lambda: now[0])
    assert abs(family.read().used - alone.read().used) < 20 * MIB
    hold = "import sys; x = bytearray(b'1') * (64 << 20); print('there', flush=True); sys.stdin.read()"
    shell = 'trap "" TERM; "$0" -c "$1"; :'  # a grandchild
    with subprocess.Popen(
        ["sh", "-c", shell, sys.executable, hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        assert family.read().used - alone.read().used < 20 * MIB
        now[0] = 1.0
        assert family.read().used - alone.read().used > 64 * MIB
        child.communicate()
    assert abs(family.read().used - alone.read().used) < 20 * MIB  # still listed, and gone


def test_machine_for_real() -> None:
    """The machine's reading grows with what anybody holds."""
    gauge = HostGauge()

    def grown() -> bool:
        before = gauge.read()
        held = bytearray(os.urandom(1)) * (256 * MIB)
        after = gauge.read()
        assert before.limit == after.limit == psutil.virtual_memory().total
        assert len(held) == 256 * MIB
        return after.used - before.used > 64 * MIB

    eventually(grown)  # others come and go meanwhile


def test_container_for_real(cgroup: Group) -> None:
    """In a real group, memory and mapped files of all its processes count; page cache, names and inodes do not."""
    cgroup.run_in(
        """
        import mmap, subprocess, tempfile
        from modelcache.gauges import ContainerGauge
        MIB = 2**20
        gauge = ContainerGauge()
        assert gauge.read().limit == 256 * MIB and gauge.limit_source.startswith(sys.argv[1]), gauge.limit_source
        start = gauge.read().used
        def grew(): return (gauge.read().used - start) / MIB
        held = bytearray(os.urandom(1)) * (50 * MIB)
        assert 45 < grew() < 60, grew()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            with file.open("wb") as out:
                for _ in range(64):
                    out.write(bytes(MIB))
                out.flush(); os.fsync(out.fileno())
            for _ in range(3):
                file.read_bytes()
            for number in range(10_000):
                Path(folder, str(number)).touch()
            stat = dict(line.split() for line in Path(sys.argv[1], "memory.stat").read_text().splitlines())
            assert int(stat["total_cache"]) > 60 * MIB, stat
            assert 45 < grew() < 60, grew()
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert not any(mapped[at] for at in range(0, 64 * MIB, 4096))
                assert 105 < grew() < 125, grew()
        del held
        with subprocess.Popen([sys.executable, "-c", "x = bytearray(b'1') * (60 << 20); print(1, flush=True); input()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            assert 60 < grew() < 80, grew()
            child.communicate(b"\\n")
        """,
        cgroup.path,
    )
    assert not cgroup.oom_kills


def test_siblings_count_where_the_limit_is_shared(cgroup: Group) -> None:
    """Where the limit stands above several groups, all of them count; a group beside that one does not."""
    say = "from modelcache.gauges import ContainerGauge; print(ContainerGauge().read().used)"
    hold = "x = bytearray(b'1') * (60 << 20); print(flush=True); sys.stdin.read()"
    with cgroup.child() as inner, child_cgroup(None) as beside:
        alone = int(inner.run_in(say))
        holding = [group.start(hold) for group in (cgroup, beside)]
        for holder in holding:
            assert holder.stdout is not None
            holder.stdout.readline()
        together = int(inner.run_in(say))
        for holder in holding:
            holder.communicate()
    assert 60 * MIB < together - alone < 110 * MIB


# The descriptors that are kept


def descriptors(file: Path) -> list[int]:
    """Return our descriptors of a file."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one of the listing itself
            found += [int(entry.name)] if entry.samefile(file) else []
    return found


def on_tree(kind: type[ContainerGauge | ProcessGauge | HostGauge], tree: Tree) -> Any:
    """Return a gauge on a tree with a v2 group; its first reading is 40 MiB but for the machine's."""
    tree.process("0::/app")
    tree.v2("app", 300 * MIB)
    tree.stat("app", anon=40 * MIB)
    tree.resident(40 * MIB)
    return kind(tree.root)


KEPT = [
    (ProcessGauge, "proc/self/statm"),
    (ContainerGauge, "sys/fs/cgroup/app/memory.stat"),
    (HostGauge, "proc/meminfo"),
]


@pytest.mark.parametrize(("kind", "name"), KEPT)
def test_one_descriptor_is_kept_and_closed(tree: Tree, kind: Any, name: str) -> None:
    """Many readings keep one descriptor open, and it is closed once the gauge is collected."""
    gauge = on_tree(kind, tree)
    for _ in range(100):
        gauge.read()
    assert len(descriptors(tree.root / name)) == 1
    del gauge
    gc.collect()
    assert not descriptors(tree.root / name)


@pytest.mark.parametrize(("kind", "name"), KEPT)
def test_descriptor_that_somebody_closed(tree: Tree, kind: Any, name: str) -> None:
    """Where a program closes all descriptors and opens others, theirs are neither read nor closed."""
    gauge = on_tree(kind, tree)
    expected = gauge.read()
    [number] = descriptors(tree.root / name)
    os.close(number)
    assert gauge.read() == expected
    [number] = descriptors(tree.root / name)
    with tree.write("other", "1 2 3 4 5 6 7\nanon 5\nMemTotal: 1 kB\nMemAvailable: 1 kB\n").open("rb") as other:
        os.dup2(other.fileno(), number)
        assert gauge.read() == expected
        del gauge
        gc.collect()
        assert os.fstat(number).st_ino == os.fstat(other.fileno()).st_ino
        os.close(number)


def test_group_that_is_made_anew(cgroup: Group, tree: Tree) -> None:
    """A group that was removed and made again, so that what is open is dead, is read again."""
    tree.process("4:memory:/child", mounts=("35 31 0:32 / /mount rw - cgroup cgroup rw,memory",))
    (tree.root / "mount").symlink_to(cgroup.path)
    tree.resident(55 * MIB, shared=55 * MIB)
    gauge = ContainerGauge(tree.root, clock=lambda: 0.0)
    for _ in range(2):
        with cgroup.child(100 * MIB):
            assert gauge.read().used < MIB
        assert gauge.read() == Reading(55 * MIB, 100 * MIB)  # the limit is looked up once a second


def test_kernel_that_is_late(cgroup: Group, tree: Tree) -> None:
    """Where the kernel has not gathered a group's figures yet, use is at least what this process has by itself."""
    tree.process("4:memory:/child", mounts=("35 31 0:32 / /mount rw - cgroup cgroup rw,memory",))
    (tree.root / "mount").symlink_to(cgroup.path)
    tree.resident(55 * MIB, shared=15 * MIB)
    with cgroup.child(100 * MIB):
        assert ContainerGauge(tree.root).read() == Reading(40 * MIB, 100 * MIB)


def test_program_that_becomes_a_daemon() -> None:
    """A program that forks, leaves its session and closes all descriptors goes on reading its own memory."""
    run(
        """
        from modelcache.gauges import ContainerGauge, HostGauge, ProcessGauge
        gauges = ProcessGauge(), ContainerGauge(), HostGauge(), ProcessGauge(children=True)
        for gauge in gauges:
            gauge.read()
        if pid := os.fork():
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.setsid()
        os.closerange(3, 256)
        pipes = [os.pipe() for _ in range(20)]
        before = gauges[0].read().used
        held = bytearray(os.urandom(1)) * (64 << 20)
        assert gauges[0].read().used - before > 60 << 20
        for gauge in gauges:
            assert gauge.read().used > 0
        del gauge, gauges
        gc.collect()
        for pipe in pipes:
            os.write(pipe[1], b"x"), os.read(pipe[0], 1)
        """
    )


# The limit, for real

SAY = "from modelcache.gauges import ProcessGauge; g = ProcessGauge(); print(g.read().limit, g.limit_source)"


@pytest.fixture
def cgroup() -> Iterator[Group]:
    """Give a real v1 memory group of 256 MiB."""
    with child_cgroup(256 * MIB) as group:
        yield group


def test_real_cgroup(cgroup: Group) -> None:
    """A process in a real v1 group reads the group's limit."""
    assert cgroup.run_in(SAY).split() == [str(256 * MIB), f"{cgroup.path}/memory.limit_in_bytes"]


def test_real_cgroup_ancestor(cgroup: Group) -> None:
    """A process in a group without a limit reads that of the group above."""
    with cgroup.child() as inner:
        assert inner.run_in(SAY).split() == [str(256 * MIB), f"{cgroup.path}/memory.limit_in_bytes"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the program unshare (util-linux)")
def test_real_cgroup_namespace(cgroup: Group) -> None:
    """A process that was given a cgroup namespace of its own, but the old mounts, reads its limit all the same."""
    with cgroup.child() as inner:
        assert inner.run_in(SAY, prefix=("unshare", "-C")).split()[0] == str(256 * MIB)


# Gauges that can't be trusted


class Scripted:
    """A gauge that plays a list of readings and errors."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)

    def read(self) -> Reading:
        """Play the next."""
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step  # type: ignore[no-any-return]


Pair = namedtuple("Pair", "used limit")  # noqa: PYI024 - what a user may hand in
GOOD = Reading(1, 2)


class TestScripted(GaugeContract):
    """A user's gauge keeps the contract."""

    def make(self) -> Gauge:
        """Make one."""
        return Scripted(*[GOOD] * 1000)


def test_last_good_reading_is_used() -> None:
    """While a gauge fails its last good reading is given, and the new one as soon as there is one."""
    safe = SafeGauge(Scripted(GOOD, OSError(), None, Reading(3, 4)))
    assert [safe.read() for _ in range(4)] == [GOOD, GOOD, GOOD, Reading(3, 4)]


def test_nothing_before_the_first_good_reading() -> None:
    """A gauge that never worked gives None."""
    safe = SafeGauge(Scripted(OSError(), OSError()))
    assert safe.read() is None
    assert safe.read() is None


def test_each_episode_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Failures in a row are logged once; after a good reading the next failure is logged again."""
    safe = SafeGauge(Scripted(OSError(), OSError(), GOOD, OSError(), OSError()))
    for _ in range(5):
        safe.read()
    assert [record.name for record in caplog.records] == ["modelcache"] * 2
    assert "Scripted" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit pass."""
    with pytest.raises(kind):
        SafeGauge(Scripted(kind())).read()


def test_odd_base_exceptions_do_not_pass() -> None:
    """Other errors that are no Exception are treated like any error."""
    assert SafeGauge(Scripted(type("Odd", (BaseException,), {})())).read() is None


@pytest.mark.parametrize(
    "bad", [None, 3, lambda: GOOD, Scripted, object()], ids=["None", "int", "function", "class", "object"]
)
def test_not_a_gauge_is_refused(bad: Any) -> None:
    """What has no read(), and a class instead of an instance, is refused."""
    with pytest.raises(ConfigError, match=r"read\(\)"):
        SafeGauge(bad)


@pytest.mark.parametrize("good", [Pair(1, 2), Pair(1.9, 2.0), Pair(0, 1)], ids=repr)
def test_readings_of_another_type(good: Any) -> None:
    """Anything with numbers used and limit will do; fractions of a byte are dropped."""
    reading = check_reading(good)
    assert reading == Reading(int(good.used), int(good.limit))
    assert type(reading.used) is type(reading.limit) is int


@pytest.mark.parametrize(
    "bad",
    [
        None,
        (1, 2),
        {"used": 1, "limit": 2},
        Pair(-1, 2),
        Pair(1, 0),
        Pair(1, -1),
        Pair("1", 2),
        Pair(1, None),
        Pair(True, 2),
        Pair(math.nan, 2),
        Pair(1, math.inf),
        Pair(1j, 2),
    ],
    ids=repr,
)
def test_readings_of_no_use(bad: Any) -> None:
    """Missing, negative, infinite or no numbers, and a limit of 0, are refused."""
    with pytest.raises(ConfigError, match="a gauge read"):
        check_reading(bad)


@pytest.mark.parametrize("make", [lambda: Pair(10, 5), lambda: Reading(10, 5)])
def test_used_may_be_above_limit(make: Callable[[], Any]) -> None:
    """More in use than there may be is a reading like any other."""
    assert check_reading(make()) == Reading(10, 5)
