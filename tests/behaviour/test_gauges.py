"""Gauges: what counts as the limit, on copied trees and in a real cgroup, and readings that can't be trusted."""

import math
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import modelcache.gauges
from modelcache.errors import ConfigError
from modelcache.gauges import Gauge, ProcessGauge, Reading, SafeGauge, check_reading
from tests.contracts.gauge_contract import GaugeContract

MIB = 1 << 20
HOST = 8192 * MIB
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
MACHINE = "memory of the machine"


class Tree:
    """A copied ``/proc`` and ``/sys``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {HOST // 1024} kB\nMemFree:        1 kB\n")

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


# The real thing

SAY = "from modelcache.gauges import ProcessGauge; g = ProcessGauge(); print(g.read().limit, g.limit_source)"
JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Give a real v1 memory group of 256 MiB with a child that has no limit of its own."""
    outer = Path("/sys/fs/cgroup/memory") / f"modelcache-test-{uuid.uuid4().hex}"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"no writable cgroup v1 memory hierarchy here: {error}")
    inner = outer / "inner"
    try:
        inner.mkdir()
        (outer / "memory.limit_in_bytes").write_text(str(256 * MIB))
        yield outer
    finally:
        inner.rmdir()
        outer.rmdir()


def _read_inside(group: Path, *prefix: str) -> tuple[int, str]:
    """Return what a process that joined the group reads as its limit, and where."""
    package = Path(modelcache.gauges.__file__).parents[1]
    done = subprocess.run(
        ["sh", "-c", JOIN, str(group), *prefix, sys.executable, "-c", SAY],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(package)},
        timeout=15,
    )
    assert done.returncode == 0, done.stderr
    limit, source = done.stdout.strip().split(" ", 1)
    return int(limit), source


def test_real_cgroup(cgroup: Path) -> None:
    """A process in a real v1 group reads the group's limit."""
    assert _read_inside(cgroup) == (256 * MIB, f"{cgroup}/memory.limit_in_bytes")


def test_real_cgroup_ancestor(cgroup: Path) -> None:
    """A process in a group without a limit reads that of the group above."""
    assert _read_inside(cgroup / "inner")[0] == 256 * MIB


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the program unshare (util-linux)")
def test_real_cgroup_namespace(cgroup: Path) -> None:
    """A process that was given a cgroup namespace of its own, but the old mounts, reads its limit all the same."""
    assert _read_inside(cgroup / "inner", "unshare", "-C")[0] == 256 * MIB


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
