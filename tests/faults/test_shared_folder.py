"""Faults of several processes that share a disk folder and a budget, by number: real processes, real signals."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess  # noqa: TC003 - annotations that a reader may evaluate
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import ConfigError, DiskTier, MemoryTier, ModelCache, SourceUnavailable
from modelcache.disk import pins
from modelcache.disk.book import Book
from modelcache.disk.states import State
from modelcache.disk.store import Store
from modelcache.disk.sweeping import sweep
from modelcache.policies import Standing, Worth
from tests.support.children import finish, run, start
from tests.support.fakes import DictSource
from tests.support.racing import Call, Gate, allocated, load_model, small_cache

# A process that brings one model in; the source stops at each read until it is let go by a line on its standard input.
FETCHES = """
folder, wanted, stops = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
source = DictSource().add("a", "b", "c", size=40_000)
once = []
def gate():
    if stops == "stops" and not once:
        once.append(True)
        print("inside", flush=True)
        sys.stdin.readline()
source.gate = gate
with small_cache(folder, source, retry_after=0) as cache:
    for name in wanted:
        with cache.lease(name, timeout=20) as model:
            assert model.name == name
    print("fetched", len(source.opens), flush=True)
"""


@pytest.fixture
def children() -> Iterator[list["subprocess.Popen[str]"]]:
    """Give a list of processes that are killed at the end."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGCONT)
        child.kill()
        if child.stdout is not None and not child.stdout.closed:
            child.communicate()


def begin(children: "list[subprocess.Popen[str]]", folder: Path, wanted: str, stops: str = "stops") -> Any:
    """Start a process that fetches, and wait until it is in the middle of that."""
    child = start(FETCHES, folder, wanted, stops, watchdog=40, stdin=-1)
    children.append(child)
    if stops == "stops":
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n", child.communicate()
    return child


def test_one_fetch_for_all_processes(tmp_path: Path, children: "list[subprocess.Popen[str]]") -> None:
    """A model that one process is fetching is fetched by no other: they wait for it, and load it."""
    first = begin(children, tmp_path, "a")
    others = [begin(children, tmp_path, "a", "goes") for _ in range(3)]
    with small_cache(tmp_path, DictSource().add("b")) as cache:
        assert cache.get("b").name == "b"  # nobody is in the way of another model
        assert not any(other.poll() is not None for other in others)
    out, err = first.communicate("go\n", timeout=30)
    assert out == "fetched 1\n", err
    for other in others:
        assert finish(other, timeout=30) == "fetched 0\n"


def test_f021_killed_holder_hands_over(tmp_path: Path, children: "list[subprocess.Popen[str]]") -> None:
    """F021: where the process that fetches is killed, one of those that wait fetches, within seconds."""
    first = begin(children, tmp_path, "a")
    others = [begin(children, tmp_path, "a", "goes") for _ in range(3)]
    first.kill()
    assert sorted(finish(other, timeout=15) for other in others) == ["fetched 0\n", "fetched 0\n", "fetched 1\n"]
    assert len(list((tmp_path / "disk" / "models").iterdir())) == 1


def test_f021_paused_holder_is_not_robbed(tmp_path: Path, children: "list[subprocess.Popen[str]]") -> None:
    """F021: a process that is only paused keeps its fetch; those that wait have their own timeouts."""
    first = begin(children, tmp_path, "a")
    first.send_signal(signal.SIGSTOP)
    source = DictSource().add("a", "b", size=40_000)
    with small_cache(tmp_path, source) as cache:
        with pytest.raises(TimeoutError, match="fetching"):
            cache.get("a", timeout=2.5)
        assert cache.get("b").name == "b"
        first.send_signal(signal.SIGCONT)
        out, err = first.communicate("go\n", timeout=30)
        assert out == "fetched 1\n", err
        assert cache.get("a").name == "a"
    assert source.opens == ["b"]


def test_one_budget_for_all_processes(tmp_path: Path, children: "list[subprocess.Popen[str]]") -> None:
    """What another process has set aside counts: a fetch that does not fit beside it waits, and the budget holds."""
    first = begin(children, tmp_path, "a")
    source = DictSource().add("b", size=40_000)
    budget = 70_000
    with small_cache(tmp_path, source, disk={"budget": budget}, retry_after=0) as cache:
        assert cache.stats().disk_used > 0
        waiting = cache.prefetch(["b"], tier="disk")
        assert not waiting.wait(1.5)
        first.kill()
        assert waiting.wait(10), waiting.progress
        assert not waiting.errors
        assert cache.stats().disk_used == allocated(tmp_path / "disk") <= budget


def test_bytes_count_until_their_remover_has_deleted_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who wants to read an artifact that another is removing goes on counting its bytes until these are gone."""
    source = DictSource().add("a", size=40_000)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source, retry_after=0) as two:
        one.get("a")
        one.unload("a")
        ours, theirs = two._parts.shelf._store, one._parts.shelf._store
        read, delete, pin, discard = Gate(), Gate(), ours.pin, theirs.discard
        monkeypatch.setattr(ours, "pin", lambda name: (read(), pin(name))[1])
        monkeypatch.setattr(theirs, "discard", lambda folder: (delete(), discard(folder))[1])
        reading = Call(two.get, "a")
        read.wait()
        removing = Call(one.delete, "a")
        delete.wait()
        source.down = SourceUnavailable("down", model="a", source=source.url)
        read.open()
        assert isinstance(reading.error(), SourceUnavailable)
        assert two.stats().disk_used == allocated(tmp_path / "disk") > 0
        delete.open()
        assert removing.result() is True
        assert two.stats().disk_used == 0


DIES_PUBLISHING = """
cache = small_cache(Path(sys.argv[1]), DictSource().add("a", size=40_000))
store = cache._parts.shelf._store
publish = store.publish
store.publish = lambda staged, name: (publish(staged, name), os._exit(0))
cache.get("a")
"""


def test_one_of_two_that_bury_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead process left is given to all once: who is late does not call gone what a third removes by then."""
    run(DIES_PUBLISHING, tmp_path)
    late = Store(tmp_path / "disk", 0o700)
    delete, removing = Gate(), []
    with contextlib.ExitStack() as stack:

        def is_there(name: str) -> bool:
            cache = stack.enter_context(small_cache(tmp_path, DictSource()))
            discard = cache.disk.store.discard
            monkeypatch.setattr(cache.disk.store, "discard", lambda folder: (delete(), discard(folder))[1])
            removing.append(Call(cache.delete, "a"))
            delete.wait()
            return (tmp_path / "disk" / "models" / name).exists()

        monkeypatch.setattr(late, "exists", is_there)
        sweep(late)
        assert list(late.ledger.look(Book.names).values()) == [State.LEAVING]
        delete.open()
        assert removing[0].result() is True
    assert late.ledger.look(Book.names) == {}
    late.close()


def test_f024_liveness_is_no_process_id(tmp_path: Path) -> None:
    """F024: what a dead process left is known as such though another process has its id."""
    disk = tmp_path / "disk"
    run("small_cache(Path(sys.argv[1]), DictSource().add('a')).get('a')\nos._exit(0)", tmp_path)
    (left,) = (disk / "tmp").iterdir()
    assert str(os.getpid()) not in left.name
    with small_cache(tmp_path, DictSource()) as cache:
        assert not left.exists()
        assert [row.model for row in cache.models()] == ["a"]


@pytest.mark.parametrize("damage", ["lost", "empty", "noise", "cut", "other version", "no version", "log lost"])
def test_f038_ledger_is_made_anew(tmp_path: Path, damage: str) -> None:
    """F038: a ledger that is damaged, lost or of another version is made anew from the folders, recency included."""
    source = DictSource().add("a", "b", "c")
    with small_cache(tmp_path, source, disk={"policy": "lru"}) as cache:
        for name in ("b", "c", "a", "b"):
            assert cache.get(name).name == name
            cache.unload(name)
        used = cache.stats().disk_used
    ledger = tmp_path / "disk" / "ledger.sqlite3"
    spoil(ledger, damage)
    with small_cache(tmp_path, source, disk={"budget": used, "policy": "lru"}) as cache:
        assert [row.model for row in cache.models()] == ["a", "b", "c"]
        assert cache.stats().disk_used == used == allocated(tmp_path / "disk")
        cache.disk.budget = used - 1
        assert [row.model for row in cache.models()] == ["a", "b"]
    assert source.opens == ["b", "c", "a"]


def spoil(ledger: Path, damage: str) -> None:
    """Damage a ledger that nobody has open."""
    if damage == "lost":
        for path in ledger.parent.glob("ledger*"):
            path.unlink()
    elif damage == "empty":
        ledger.write_bytes(b"")
    elif damage == "noise":
        ledger.write_bytes(os.urandom(20_000))
    elif damage == "cut":
        os.truncate(ledger, ledger.stat().st_size // 2)
    elif damage == "no version":  # its maker was killed after it had written all but that
        with contextlib.closing(sqlite3.connect(ledger)) as connection:
            connection.execute("PRAGMA user_version = 0")
    elif damage == "other version":
        with contextlib.closing(sqlite3.connect(ledger)) as connection:
            connection.execute("DROP TABLE artifacts")
            connection.execute("PRAGMA user_version = 99")
    else:
        ledger.with_name("ledger.sqlite3-wal").write_bytes(os.urandom(5000))


def test_f038_killed_while_the_ledger_is_made_anew(tmp_path: Path) -> None:
    """F038: a process that is killed after half of the ledger is written leaves nothing of it: the next begins anew."""
    script = """
    import modelcache.disk.book as module
    module.Made = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    DiskTier(sys.argv[1])
    """
    names = [f"m{number}" for number in range(30)]
    with small_cache(tmp_path, DictSource().add(*names)) as cache:
        cache.prefetch(names, tier="disk").wait(10)
    for path in (tmp_path / "disk" / "models").glob("*/record.json"):  # so much that SQLite writes before the end
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": "v" * 200_000}))
    ledger = tmp_path / "disk" / "ledger.sqlite3"
    spoil(ledger, "lost")
    run(script, tmp_path / "disk", code=-signal.SIGKILL)
    assert ledger.stat().st_size > 0
    with small_cache(tmp_path, DictSource()) as cache:
        assert [row.model for row in cache.models()] == sorted(names)
    with contextlib.closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


@pytest.mark.parametrize("by_hand", [False, True])
def test_f038_change_between_a_new_ledger_and_its_first_reader(tmp_path: Path, by_hand: bool) -> None:
    """F038: what others change after a tier has made the ledger anew is known to the cache that it gets."""
    source = DictSource().add("a", "b", "d")
    with small_cache(tmp_path, source) as cache:
        cache.prefetch(["a", "b", "d"], tier="disk").wait(10)
    models = tmp_path / "disk" / "models"
    spoil(tmp_path / "disk" / "ledger.sqlite3", "lost")
    os.utime(models, (1e9, 1e9))  # so that a change has a time of its own
    tier = DiskTier(tmp_path / "disk", min_free=0)
    if by_hand:
        for name in "ad":
            shutil.rmtree(next(models.glob(f"{name}-*")))
    else:
        with small_cache(tmp_path, source) as cache:
            assert cache.delete("a")
            assert cache.delete("d")
    with ModelCache(source, load_model, disk=tier, memory=MemoryTier("1 GiB")) as cache:
        assert [row.model for row in cache.models()] == ["b"]
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_f038_ledger_lost_under_running_caches(tmp_path: Path) -> None:
    """F038: two caches that lose their ledger go on, agree again, and count all that there is."""
    sources = [DictSource().add("a", "b", "c", "d", size=40_000) for _ in range(2)]
    with small_cache(tmp_path, sources[0]) as one, small_cache(tmp_path, sources[1]) as two:
        assert [one.get("a").name, two.get("b").name] == ["a", "b"]
        for path in (tmp_path / "disk").glob("ledger*"):
            path.unlink()
        assert two.get("c").name == "c"
        assert one.get("d").name == "d"
        assert two.get("d").name == "d"
        assert sources[1].opens.count("d") + sources[0].opens.count("d") == 1
        assert one.stats().disk_used <= allocated(tmp_path / "disk")
        assert two.stats().disk_used == allocated(tmp_path / "disk")


def test_f038_rows_and_folders_are_reconciled(tmp_path: Path) -> None:
    """F038: folders without a row are taken in, rows without a folder dropped, foreign files left alone."""
    source = DictSource().add("a", "b", "c")
    with small_cache(tmp_path, source) as cache:
        cache.prefetch(["a", "b", "c"], tier="disk").wait(10)
    models = tmp_path / "disk" / "models"
    foreign = [models / "README", models / "somebodys-folder"]
    foreign[0].write_text("mine")
    foreign[1].mkdir()
    shutil.rmtree(next(models.glob("a-*")))
    with contextlib.closing(sqlite3.connect(tmp_path / "disk" / "ledger.sqlite3")) as connection:
        connection.execute("DELETE FROM artifacts WHERE model = 'b'")
        connection.commit()
    with small_cache(tmp_path, source) as cache:
        assert [row.model for row in cache.models()] == ["b", "c"]
        assert cache.get("a").name == "a"
        cache.disk.budget = 4096
    assert all(path.exists() for path in foreign)
    assert source.opens.count("b") == source.opens.count("c") == 1


OPENS = """
with small_cache(Path(sys.argv[1]) / "first", DictSource().add("a")) as cache:
    cache.get("a")  # all imports
for turn in range(int(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(turn)
    folder.mkdir()
    wait, go = os.pipe()
    pids = []
    for number in range(16):
        if not (pid := os.fork()):
            os.close(go)
            os.read(wait, 1)  # its end comes for all at once
            with small_cache(folder, DictSource().add("a", f"m{number}"), retry_after=0) as cache:
                names = [cache.get(name).name for name in (f"m{number}", "a")]
            os._exit(names != [f"m{number}", "a"])
        pids.append(pid)
    os.close(go), os.close(wait)
    assert not any([os.waitpid(pid, 0)[1] for pid in pids])
    assert len(list((folder / "disk" / "models").iterdir())) == 17
print("opened")
"""


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_f039_many_open_a_new_folder_at_once(tmp_path: Path, rounds: int) -> None:
    """F039: sixteen processes that open a new folder at one moment all start, and fetch."""
    limit = 300 if rounds > 2 else 18
    assert run(OPENS, tmp_path, rounds, watchdog=limit, timeout=limit) == "opened\n"


FORKS = """
folder = Path(sys.argv[1])
source = DictSource().add(*[f"m{number}" for number in range(40)])
with small_cache(folder, source, disk={"budget": 400_000}, memory={"max_models": 2}) as cache:
    cache.get("m0")
    children = []
    for child in range(8):
        pid = os.fork()
        if pid == 0:
            for number in range(40):
                cache.get(f"m{(number * 7 + child) % 40}")
            os._exit(0 if cache.close() else 1)
        children.append(pid)
    for number in range(40):
        cache.get(f"m{number}")
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
print("done")
"""


def test_f041_ledger_over_a_fork(tmp_path: Path) -> None:
    """F041: eight children of a process with an open ledger all write to it, and it stays whole."""
    assert run(FORKS, tmp_path, watchdog=60, timeout=60) == "done\n"
    with contextlib.closing(sqlite3.connect(tmp_path / "disk" / "ledger.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with small_cache(tmp_path, DictSource()) as cache:
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_f039_start_beside_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F039: a process whose new temporary folder is swept before it has locked it starts all the same."""
    lock, swept = fcntl.flock, []

    def sweep_first(descriptor: int, operation: int) -> None:
        if not swept:
            swept.extend((tmp_path / "disk" / "tmp").iterdir())
            shutil.rmtree(swept[0])
        lock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", sweep_first)
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        assert cache.get("a").name == "a"
        (own,) = (tmp_path / "disk" / "tmp").iterdir()
    assert own not in swept


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="needs locks of an open file")
def test_f039_start_beside_a_start(tmp_path: Path) -> None:
    """F039: a process starts though another one is stopped in the middle of trying whether locks exclude."""
    with small_cache(tmp_path, DictSource().add("a")), (tmp_path / "disk" / "leases").open("rb+") as file:
        pins._set(file.fileno(), fcntl.F_WRLCK, 0)
        with small_cache(tmp_path, DictSource().add("a")) as cache:
            assert cache.get("a").name == "a"


def test_f022_locks_that_exclude_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F022: a file system whose locks exclude nobody is refused at construction, whichever locks these are."""
    for name in ("flock", "fcntl"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fcntl.{name}", lambda *arguments: 0)
            with pytest.raises(ConfigError, match=r"no file locks.*excludes nobody.*local file system"):
                DiskTier(tmp_path / name)


def test_few_descriptors_for_many_models(tmp_path: Path) -> None:
    """F046: a hundred models in memory, each with its files kept on disk, need no descriptor each."""
    said = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        names = [f"m{number}" for number in range(100)]
        with small_cache(Path(sys.argv[1]), DictSource().add(*names)) as cache:
            leases = [cache.lease(name) for name in names]
            for lease in leases: lease.acquire()
            print(cache.stats().models)
            for lease in leases: lease.release()
        """,
        tmp_path,
    )
    assert said == "100\n"


def test_damage_is_found_at_the_first_use(tmp_path: Path) -> None:
    """A flipped bit in a published file is found by the next process, told, and mended by a fetch."""
    source = DictSource().add("a")
    with small_cache(tmp_path, source) as cache:
        cache.get("a")
    (file,) = (tmp_path / "disk" / "models").glob("*/artifact/model.txt")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for verify, found in [("never", False), ("first_use", True)]:
        with small_cache(tmp_path, source, disk={"verify": verify}) as cache:
            assert cache.get("a").name == "a" or not found
            told = [event for event in cache.history() if event.reason == "damaged"]
            assert len(told) == found
    assert source.opens == ["a", "a"]
    assert told[0].model == "a"
    assert told[0].tier == "disk"


def test_always_verified(tmp_path: Path) -> None:
    """With ``verify="always"`` damage under a running cache is found at the next load, else at the next start."""
    for verify, found in [("first_use", 0), ("always", 1)]:
        source = DictSource().add("a")
        with small_cache(tmp_path / verify, source, disk={"verify": verify}) as cache:
            cache.get("a")
            cache.unload("a")
            (file,) = (tmp_path / verify / "disk" / "models").glob("*/artifact/model.txt")
            file.write_bytes(file.read_bytes() + b"\0")
            cache.get("a")
            assert len(source.opens) == 1 + found


def test_requests_of_all_processes_add_up(tmp_path: Path) -> None:
    """What ``worth`` knows of a model is what all caches on the folder were asked for, over restarts and evictions."""
    sources = [DictSource().add("a", "b") for _ in range(2)]
    with small_cache(tmp_path, sources[0]) as one, small_cache(tmp_path, sources[1]) as two:
        for cache in (one, two, one):
            cache.get("a")
            cache.unload("a")
        one.get("b")
        one.unload("b")
        one.delete("b")
    with small_cache(tmp_path, sources[0]) as cache:
        policy = cache.disk.policy
        assert isinstance(policy, Worth)
        assert policy.standing("a") == Standing(3, 3, 0)  # the second cache has told of its request at its end
        assert policy.standing("b") == Standing(1, 1, 1)
        cache.get("a")
        assert policy.standing("a") == Standing(4, 4, 0)
