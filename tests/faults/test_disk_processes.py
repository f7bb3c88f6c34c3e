"""Faults of a disk folder that need several real processes, or a kernel that fails for one folder only, by number."""

import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from modelcache import NoRoom
from tests.support.children import finish, injecting, run, start
from tests.support.fakes import DictSource
from tests.support.mounts import small_disk
from tests.support.racing import allocated, small_cache

FORK = """
def forked(count, job):
    pids = []
    for number in range(count):
        if not (pid := os.fork()):
            code = 1
            try:
                job(number)
                code = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return not any([os.waitpid(pid, 0)[1] for pid in pids])

class Alone(DictSource):
    '''A source that fails where two processes read one model at once.'''
    def open(self, artifact, file):
        marker = Path(sys.argv[1]) / f"reading-{artifact.model}"
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        stream = super().open(artifact, file)
        class Stream(type(stream)):
            def close(self):
                if not self.closed: marker.unlink()
                super().close()
        stream.__class__ = Stream
        return stream
"""

ROUNDS = """
folder = Path(sys.argv[1])
with small_cache(folder, DictSource().add("a")) as cache: cache.get("a")  # all imports
def job(number):
    source = Alone().add("a", "b")
    with small_cache(folder, source, retry_after=0) as cache:
        for turn in range(20):
            name = "ab"[(turn + number) % 2]
            assert cache.get(name, timeout=10).name == name
            cache.unload(name)
            cache.delete(name)
assert forked(8, job)
"""


def test_f023_never_two_holders(tmp_path: Path) -> None:
    """F023: eight processes that fetch and delete two models over and over never fetch one of them twice at once."""
    run(FORK + ROUNDS, tmp_path, watchdog=40, timeout=45)
    assert not list(tmp_path.glob("reading-*"))
    with small_cache(tmp_path, DictSource()) as cache:
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1


def test_f023_files_are_bounded_by_models(tmp_path: Path) -> None:
    """F023: 150 ids in turn, and as many that are missing, need no more inodes than the models that fit."""
    names = [f"m{number}" for number in range(150)]
    with small_disk(tmp_path / "disk", "size=8m,nr_inodes=60"):
        with small_cache(
            tmp_path, DictSource().add(*names), disk={"budget": 60_000}, memory={"max_models": 1}
        ) as cache:
            for name in names:
                assert cache.get(name).name == name
                with pytest.raises(LookupError):
                    cache.get(f"missing-{name}")
        assert len(list((tmp_path / "disk").rglob("*"))) < 40


SAME_ID = """
folder = Path(sys.argv[1])
def die():
    cache = small_cache(folder, DictSource().add("a", "b"), disk={"budget": 60_000})
    lease = cache.lease("a")
    lease.acquire()
    cache.prefetch(["b"])
    os.kill(os.getpid(), signal.SIGKILL)
def look():
    with small_cache(folder, DictSource().add("a", "b")) as cache:
        assert len(list((folder / "disk" / "tmp").iterdir())) == 1
        assert cache.delete("a") is True and cache.delete("b") is True
        assert cache.stats().disk_used == 0
    os._exit(0)
ids = []
for job in (die, look):
    if ids: Path("/proc/sys/kernel/ns_last_pid").write_text(str(ids[0] - 1))
    if not (pid := os.fork()): job()
    ids.append(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (0 if job is look else -signal.SIGKILL), code
print(len(set(ids)))
"""


def test_f024_same_id_as_the_dead(tmp_path: Path) -> None:
    """F024: a process that gets the id of one that died with leases does not take these for its own, nor for alive."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs leave to make a namespace of process ids")
    assert run(SAME_ID, tmp_path, under=unshare) == "1\n"


def test_f027_start_on_a_full_disk(tmp_path: Path) -> None:
    """F027: a start on a disk that others have filled serves what is there; a fetch is NoRoom, until there is room."""
    source = DictSource().add("a", "b", "c", size=50_000)
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        with small_cache(tmp_path, source) as cache:
            assert cache.prefetch(["a", "b"], tier="disk").wait(10)
        filler = disk / "filler"
        fill(filler)
        with small_cache(tmp_path, source, retry_after=0) as cache:
            assert [cache.get(name).name for name in "ab"] == ["a", "b"]
            fill(filler)
            with pytest.raises(NoRoom):
                cache.get("c", timeout=5)
            filler.unlink()
            assert cache.get("c").name == "c"
    assert sorted(set(source.opens[:2])) == ["a", "b"]


def fill(path: Path) -> None:
    """Write a file until the disk is full, to the last page."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)


MAPS = """
import mmap
def load(path):
    with (path / "model.txt").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
with small_cache(Path(sys.argv[1]), DictSource().add("a", size=50_000), load) as cache, cache.lease("a") as mapped:
    before = bytes(mapped)
    print("mapped", flush=True)
    sys.stdin.readline()
    assert bytes(mapped) == before
    gone = cache.refresh("a")
    assert bytes(mapped) == before
    print("same", flush=True)
"""


def test_f035_refreshed_under_a_mapping_of_another_process(tmp_path: Path) -> None:
    """F035: what a process has mapped stays as it is while another brings in shorter versions and evicts them."""
    child = start(MAPS, tmp_path, stdin=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == "mapped\n"
    source = DictSource()
    with small_cache(tmp_path, source) as cache:
        for size in (10, 20_000, 40):
            source.add("a", size=size)
            assert cache.refresh("a")
        assert cache.delete("a") in {True, False}
        out, err = child.communicate("go\n", timeout=15)
        assert out == "same\n", err


FETCHES = """
folder, budget = Path(sys.argv[1]), int(sys.argv[2])
names = [f"m{number}" for number in range(12)]
def job(number):
    source = DictSource().add(*names, size=60_000)
    source.gate = lambda: threading.Event().wait(0.001)  # a slow network, so that the fetches overlap
    with small_cache(folder, source, disk={"budget": budget}, memory={"max_models": 2}, retry_after=0) as cache:
        for turn in range(12):
            wanted = names[(turn * 5 + number * 3) % 12]
            assert cache.get(wanted, timeout=15).name == wanted
assert forked(4, job)
"""


def test_f036_f037_budget_of_several_processes(tmp_path: Path) -> None:
    """F036, F037: at no sample is there more than the budget, archives included; no more goes than has to."""
    (tmp_path / "disk").mkdir()
    budget, samples = 400_000, list[int]()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            samples.append(allocated(tmp_path / "disk"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run(FORK + FETCHES, tmp_path, budget, watchdog=40, timeout=45)
    finally:
        stop.set()
        sampler.join()
    assert max(samples) <= budget
    with small_cache(tmp_path, DictSource(), disk={"budget": budget}) as cache:
        rows = cache.models()
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        assert cache.stats().disk_used > budget - 2 * max(row.bytes for row in rows)


BEGINS = """
def gate():
    print("inside", flush=True)
    sys.stdin.readline()
source = DictSource().add("a", size=40_000)
source.gate = gate
with small_cache(Path(sys.argv[1]), source) as cache:
    assert cache.get("a").name == "a"
    print("fetched", len(source.opens), flush=True)
"""


@pytest.mark.parametrize("lost", ["ledger", "rows"])
def test_f038_living_owner_is_left_alone(tmp_path: Path, lost: str) -> None:
    """F038: a start beside a fetch, with the ledger or all its rows lost, leaves that fetch and its bytes alone."""
    child = start(BEGINS, tmp_path, stdin=-1)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        for path in (tmp_path / "disk").glob("ledger*"):
            if lost == "ledger" or not path.name.endswith(".lock"):
                path.unlink()
        with small_cache(tmp_path, DictSource().add("b"), retry_after=0) as cache:
            assert cache.get("b").name == "b"
            assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 2
            out, err = child.communicate("\n" * 9, timeout=15)
            assert out.endswith("fetched 1\n"), err
            assert {row.model for row in cache.models()} == {"a", "b"}
            assert cache.stats().disk_used == allocated(tmp_path / "disk")
    finally:
        child.kill()
        child.communicate()


STANDS = """
cache = small_cache(Path(sys.argv[1]), DictSource())
def stop(book):
    book.names()
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return len(book.names())
print(cache.disk.store.ledger.look(stop))
assert cache.close()
"""


def test_f042_ledger_stays_small(tmp_path: Path) -> None:
    """F042: ten thousand uses, while a process stands still in the middle of a look, make it no larger than some MB."""
    disk = tmp_path / "disk"
    with small_cache(tmp_path, DictSource().add("a", "b")) as cache:
        assert cache.prefetch(["a", "b"], tier="disk").wait(10)
        child = start(STANDS, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        for _ in range(5000):
            for name in "ab":
                cache._parts.shelf.release(cache._parts.shelf.open(name))
        size = sum(path.stat().st_size for path in disk.glob("ledger*"))
        child.send_signal(signal.SIGCONT)
        assert finish(child) == "2\n"
    assert size < 4 * 2**20, size


STARTS = """
source = DictSource().add("a", "b", "c")
with small_cache(Path(sys.argv[1]), source, retry_after=0) as cache:
    assert {"a", "c"} <= {row.model for row in cache.models()}
    assert [cache.get(name).name for name in "ac"] == ["a", "c"]
    for name in "ac":
        cache.unload(name)
    try:
        assert cache.get("b").name == "b"
    except ModelCacheError as error:
        print(error, file=sys.stderr)
    assert [cache.get(name).name for name in "ac"] == ["a", "c"]
    print(*source.opens)
"""


@pytest.mark.parametrize("fault", ["openat:error=EIO", "openat:error=EBADMSG", "newfstatat:error=EIO"])
@pytest.mark.parametrize("file", ["", "record.json", "artifact", "artifact/model.txt"])
def test_f045_broken_folder_of_a_disk(tmp_path: Path, file: str, fault: str) -> None:
    """F045: a folder of which the disk can't read a part hides no other, and its model is fetched again."""
    with small_cache(tmp_path, DictSource().add("a", "b", "c")) as cache:
        assert cache.prefetch(["a", "b", "c"], tier="disk").wait(10)
    folder = next((tmp_path / "disk" / "models").glob("b-*"))
    assert run(STARTS, tmp_path, under=injecting(fault, path=folder / file)) in {"\n", "b\n"}
    with small_cache(tmp_path, DictSource().add("b")) as cache:
        assert cache.get("b").name == "b"
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
