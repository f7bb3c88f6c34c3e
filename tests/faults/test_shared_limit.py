"""Faults of several processes under one memory limit: who gives way to whom. Real processes, real signals.

The limit is a gauge's that adds up what each process has written down; a real cgroup's is in ``test_memory_gauges``.
"""

import contextlib
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cgroups import MIB, child_cgroup
from tests.support.children import run, start
from tests.support.waiting import eventually

# A process that does what it is told, line by line. Models are of 100 bytes, of 1,000 that all may use together.
WORKER = """
    import fcntl, json, random
    INTERVAL = 0.4
    folder, name, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    use, alive = folder / "use", {}
    from modelcache.gauges import Reading

    class Together:
        shared, reads = settings.pop("shared", "all"), 0
        def read(self):
            self.reads += 1
            total = 0
            for each in ("one", "two", "three"):  # a listing may miss one that is being replaced
                try:
                    total += int((use / each).read_text())
                except FileNotFoundError:
                    pass
            return Reading(total, 1000, own())

    def own():
        return sum(list(alive.values()))

    booking = threading.Lock()  # guards what is written down

    def book():
        with booking:
            draft = use / ("." + name)
            draft.write_text(str(own()))
            draft.rename(use / name)

    def count(change):
        # add to what all have in memory, at one instant for all, and note the highest
        with (folder / "total").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            total, most = map(int, (file.read() or "0 0").split())
            file.truncate(0)
            file.write(f"{total + change} {max(most, total + change)}")

    class Model:
        def __init__(self, model):
            self.model = model
            count(100)
            alive[id(self)] = 100
            book()
        def drop(self):
            count(-100)
            del alive[id(self)]
            book()

    use.mkdir(exist_ok=True)
    book()
    gauge, evicted, stuck = Together(), [], settings.pop("stuck", None)
    memory = {"high": "100%", "interval": INTERVAL, "policy": "lru", "idle_after": None, **settings}
    source = DictSource().add(*[f"{who}{number}" for who in "abcx" for number in range(20)])
    def load(path, model):
        if model == stuck:
            print('["stuck", 0]', flush=True)
            threading.Event().wait()
        if (folder / "gate").exists():
            with (folder / "gate").open() as gate:
                fcntl.flock(gate, fcntl.LOCK_SH)  # until whoever has locked it lets go
        return Model(model)
    cache = ModelCache(source, load, unload=Model.drop, size_of=lambda model, path: 100,
        disk=DiskTier(folder / "disk", min_free=0), memory=MemoryTier(gauge=gauge, **memory))
    cache.on(Evicted, lambda event: evicted.append(event.to_dict()))
    leases = {}

    def get(*models):
        for model in models:
            with cache.lease(model, timeout=float(os.environ.get("PATIENCE", "10"))):
                pass

    def hold(model):
        leases[model] = cache.lease(model)
        leases[model].acquire()

    def fork():
        pid = os.fork()
        if not pid:
            for number in (0, 1, 2):
                os.close(number)
            signal.pause()
        return pid

    def crowd(many):
        chance = random.Random(name)
        asked = [f"{chance.choice('abc')}{chance.randrange(6)}" for _ in range(many)]
        threads = [threading.Thread(target=get, args=asked[first::3]) for first in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def quiet(looks):
        before, reads = cache._parts.neighbours.looks, gauge.reads
        eventually(lambda: gauge.reads >= reads + looks)
        return cache._parts.neighbours.looks - before

    verbs = {
        "get": get,
        "hold": hold,
        "grow": lambda more: (alive.__setitem__("more", int(more)), book()),
        "evicted": lambda: evicted,
        "models": lambda: [row.model for row in cache.models() if row.tier == "memory"],
        "explain": cache.explain,
        "quiet": lambda looks: quiet(int(looks)),
        "others": lambda: (cache._parts.neighbours.look(), len(cache._parts.neighbours.others))[1],
        "looks": lambda: cache._parts.neighbours.looks,
        "release": lambda model: leases.pop(model).release(),
        "fork": fork,
        "threads": lambda: [thread.name for thread in threading.enumerate()],
        "crowd": lambda many: crowd(int(many)),
        "close": cache.close,
    }
    for line in sys.stdin:
        verb, *words = line.split()
        began = time.monotonic()
        try:
            answer = verbs[verb](*words)
        except ModelCacheError as error:
            answer = type(error).__name__
        print(json.dumps([answer, time.monotonic() - began]), flush=True)
    os._exit(0)
"""


INTERVAL = 0.4
"""Seconds between two looks of a monitor there."""


class Worker:
    """One such process."""

    def __init__(self, folder: Path, name: str, **settings: Any) -> None:
        self.folder, self.name = folder, name
        self.process = start(WORKER, folder, name, json.dumps(settings), watchdog=60, stdin=subprocess.PIPE)
        self.seconds = 0.0

    def begin(self, *words: Any) -> None:
        """Tell it something."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for its answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()
        said, self.seconds = json.loads(line)
        return said

    def __call__(self, *words: Any) -> Any:
        """Tell it something, and wait for its answer."""
        self.begin(*words)
        return self.answer()

    def kill(self) -> None:
        """Kill it; its memory is free at once."""
        self.process.kill()
        self.process.communicate()
        (self.folder / "use" / self.name).unlink()


Start = Callable[..., Worker]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Start]:
    """Give a function that starts a process, which is killed at the end."""
    started: list[Worker] = []

    def begin(name: str, **settings: Any) -> Worker:
        started.append(Worker(tmp_path, name, **settings))
        return started[-1]

    yield begin
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.process.pid, signal.SIGCONT)
        each.process.kill()
        if each.process.stdout is not None and not each.process.stdout.closed:
            each.process.communicate()


def names(who: str, count: int, first: int = 0) -> list[str]:
    """Return the ids of some models."""
    return [f"{who}{number}" for number in range(first, first + count)]


def test_the_least_worthy_of_all_gives_way(worker: Start) -> None:
    """A load in one process evicts the model that nobody has used for longest, in whichever process that is."""
    one, two, three = worker("one"), worker("two"), worker("three")
    one("get", *names("a", 3))
    two("get", *names("b", 4))
    three("get", *names("c", 3))
    one("get", *names("a", 2))  # only a2 is older than what two has
    three("get", "x0", "x1")
    assert one("models") == ["a0", "a1"]
    assert two("models") == ["b1", "b2", "b3"]
    assert three("models") == ["c0", "c1", "c2", "x0", "x1"]
    (event,) = two("evicted")
    assert (event["model"], event["reason"], event["for_model"]) == ("b0", "another process", "x1")
    assert (event["used"], event["need"], event["high"], event["limit"]) == (1000, 100, 1000, 1000)
    told = two("explain", "b0")
    assert "to make room for 'x1', giving way for another process under the same limit" in told
    assert "with 1000 B in use and 100 B needed, 1.1 KiB would have passed its memory.high = 1000 B" in told
    assert "2 other processes share that limit" in three("explain", "x1")
    assert three("evicted") == []


def test_own_model_goes_where_it_is_the_least_worthy(worker: Start) -> None:
    """A process in need whose own model is the least worthy of all evicts that, and nobody else anything."""
    one, two = worker("one"), worker("two")
    one("get", *names("a", 5))
    two("get", *names("b", 5))
    one("get", "x0")
    assert one("models") == ["a1", "a2", "a3", "a4", "x0"]
    assert two("evicted") == []
    assert one("evicted")[0]["reason"] == "watermark"
    assert one.seconds < INTERVAL


def test_paused_process_is_waited_for_two_intervals_once(worker: Start) -> None:
    """Where the process that should give way is stopped, the one in need waits two intervals, then evicts its own."""
    one, two = worker("one"), worker("two")
    two("get", *names("b", 5))
    one("get", *names("a", 5))
    two.process.send_signal(signal.SIGSTOP)
    one("get", "x0")
    assert 2 * INTERVAL <= one.seconds < 2 * INTERVAL + 3
    assert one("evicted")[0]["model"] == "a0"
    one("get", "x1")
    assert one.seconds < 2 * INTERVAL, "it waited again for one that is known to be silent"
    two.process.send_signal(signal.SIGCONT)
    assert eventually(lambda: two("models")) == names("b", 5)
    two("get", "b0")  # it speaks again
    one("get", "x2")
    assert eventually(lambda: two("evicted"))[0]["model"] == "b1"


def test_who_waits_does_not_ring_back_for_ever(worker: Start) -> None:
    """Two that wait for a third, which is stopped, answer each other once; then each evicts its own."""
    interval = 1.0  # so that who is not stopped answers in time, however busy the machine
    one, two, three = (worker(name, interval=interval) for name in ("one", "two", "three"))
    three("get", "c0")
    one("get", *names("a", 5))
    two("get", *names("b", 4))
    three.process.send_signal(signal.SIGSTOP)
    before = one("looks")
    with (one.folder / "gate").open("w") as gate:  # a load that ends while the other one looks would count twice there
        fcntl.flock(gate, fcntl.LOCK_EX)
        one.begin("get", "x0")
        two.begin("get", "x1")
        eventually(lambda: (one.folder / "total").read_text().startswith("800 "))
    assert [one.answer(), two.answer()] == [None, None]
    assert max(one.seconds, two.seconds) < 2 * 2 * interval + 3
    assert one("looks") - before < 50
    assert len(one("models")) + len(two("models")) == 9


def test_process_stopped_in_the_middle_of_a_change(tmp_path: Path, worker: Start) -> None:
    """Where the ledger can't be written for now, what is on disk is loaded all the same: each evicts its own."""
    one, two = worker("one"), worker("two")
    two("get", *names("b", 5))
    one("get", *names("a", 5))
    one("get", "x0")  # in place of b0
    one("get", *names("a", 5))
    two("get", "b0")  # in place of b1, which is on disk from now on
    with contextlib.closing(sqlite3.connect(tmp_path / "disk" / "ledger.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert one("get", "b1") is None
        assert one.seconds < 8
        other.execute("ROLLBACK")
    assert "x0" not in one("models")
    assert "b1" in one("models")


def test_dead_process_counts_for_nothing(worker: Start) -> None:
    """What a killed process had set aside, and what it had in memory, is nobody's: not its bell, not its account."""
    one, two = worker("one"), worker("two", stuck="b1")
    two("get", "b0")
    two.begin("get", "b1")  # which it never ends
    assert two.answer() == "stuck"
    one("get", *names("a", 8))
    assert one("evicted") == []
    one("get", "a8")  # beside what two has, and has set aside, nothing is free
    assert len(one("evicted")) + len(one("models")) == 9
    (before,) = one("evicted") or [{"model": "b0"}]
    two.kill()
    assert one("others") == 0
    one("get", *names("a", 10))
    assert len(one("models")) == 10
    assert one("evicted") in ([], [before])


def test_what_others_set_aside_counts(worker: Start) -> None:
    """Bytes that another process has set aside for a load under way are not free, though no gauge shows them yet."""
    one, two = worker("one"), worker("two", stuck="b0")
    two.begin("get", "b0")
    assert two.answer() == "stuck"
    one("get", *names("a", 10))
    assert len(one("models")) == 9


def test_no_two_processes_count_on_the_same_room(tmp_path: Path, worker: Start) -> None:
    """However many load at once in however many processes, they never have more in memory together than is allowed."""
    workers = [worker(name) for name in ("one", "two", "three")]
    for each in workers:
        each.begin("crowd", 60)
    for each in workers:
        assert each.answer() is None
    _, most = map(int, (tmp_path / "total").read_text().split())
    assert most == 1000


def test_forked_child_does_not_keep_its_parent_alive(worker: Start) -> None:
    """A child that a process has forked, and that does nothing, does not stand for its dead parent."""
    one, two = worker("one"), worker("two")
    one("get", "a0")
    two("get", "b0")
    child = two("fork")
    try:
        assert one("others") == 1
        two.process.kill()
        two.process.wait()
        assert eventually(lambda: one("others") == 0)  # the child may not have come to itself yet
    finally:
        os.kill(child, signal.SIGKILL)


FORKS = """
    class Shared(FakeGauge):
        shared = "all"
    cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"), memory={"gauge": Shared()})
    neighbours = cache._parts.neighbours
    def others():
        neighbours.look()
        return len(neighbours.others)
    cache.get("a")
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        cache.get("b")
        os.write(tell, str(others()).encode())
        signal.pause()
    assert os.read(told, 9) == b"1"
    assert others() == 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert others() == 0
    assert cache.get("b").name == "b"
    assert cache.close()
    print("apart")
"""


def test_forked_worker_is_a_neighbour_of_its_own(tmp_path: Path) -> None:
    """A worker forked after its parent has loaded joins under its own name, with a bell of its own."""
    assert run(FORKS, tmp_path) == "apart\n"


def test_growth_from_outside_is_answered_once(worker: Start) -> None:
    """When all use is too much, the least worthy models of all go, down to ``low``: not that much in each process."""
    workers = [worker(name, low="90%") for name in ("one", "two", "three")]
    for who, count, each in zip("abc", (4, 2, 2), workers, strict=True):
        each("get", *names(who, count))
    workers[1]("grow", 320)  # 1,120 of 1,000 in use; 900 is low
    eventually(lambda: sum(len(each("evicted")) for each in workers) >= 3)
    for each in workers:
        each("quiet", 5)
    gone = [event["model"] for each in workers for event in each("evicted")]
    assert sorted(gone) == ["a0", "a1", "a2"]


def test_leases_of_others_are_waited_for(worker: Start) -> None:
    """Where all that could give way is leased, in other processes too, a load waits for that rather than fail."""
    one, two = worker("one"), worker("two")
    for model in names("a", 10):
        one("hold", model)
    two.begin("get", "b0")
    assert one("quiet", 3) >= 0
    assert one("evicted") == []
    one("release", "a3")
    assert two.answer() is None
    assert [event["model"] for event in one("evicted")] == ["a3"]


def test_nobody_looks_while_nothing_is_short(worker: Start) -> None:
    """Below ``high`` the monitor reads the gauge, and nobody the accounts of the others."""
    one, two = worker("one"), worker("two")
    one("get", *names("a", 3))
    two("get", *names("b", 3))
    assert one("quiet", 10) == 0
    assert two("quiet", 10) == 0


def test_gauge_of_a_process_alone_agrees_with_nobody(tmp_path: Path, worker: Start) -> None:
    """With a gauge whose limit nobody shares there is no bell, no account, no look; each evicts its own."""
    one, two = worker("one", shared=None), worker("two", shared=None)
    two("get", *names("b", 5))
    one("get", *names("a", 7))
    assert two("evicted") == []
    assert len(one("evicted")) == 2
    assert one("looks") == two("looks") == 0
    assert not list((tmp_path / "disk" / "tmp").glob("*/bell"))


def test_processes_under_different_limits_do_not_meet(worker: Start) -> None:
    """Who shares the disk folder but not the limit is no neighbour."""
    one, two = worker("one", shared="here"), worker("two", shared="there")
    one("get", "a0")
    two("get", "b0")
    assert one("others") == two("others") == 0


def test_closing_leaves_nothing(tmp_path: Path, worker: Start) -> None:
    """After ``close()`` a process is no neighbour any more, and its bell's thread has ended."""
    one, two = worker("one"), worker("two")
    one("get", "a0")
    two("get", "b0")
    assert two("close") is True
    assert "modelcache-bell" not in two("threads")
    assert one("others") == 0
    assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1


GAUGE = """
    from modelcache.gauges import ContainerGauge
    with ModelCache(DictSource().add("a"), lambda path: 1, disk=DiskTier(sys.argv[1], min_free=0)) as cache:
        cache.get("a")
        print(type(cache.memory._gauge.gauge).__name__, cache.stats().memory_limit, flush=True)
        if len(sys.argv) > 2:
            sys.stdin.readline()
            cache._parts.neighbours.look()
            print(len(cache._parts.neighbours.others))
"""


def test_default_gauge_is_the_container_s_where_it_has_a_limit(tmp_path: Path) -> None:
    """Under a cgroup with a limit all its processes are seen, and are neighbours; without one, this process alone."""
    with child_cgroup(256 * MIB) as group:
        first, second = (group.start(GAUGE, tmp_path, "stays") for _ in range(2))
        assert [_line(first), _line(second)] == [f"ContainerGauge {256 * MIB}\n"] * 2
        assert first.communicate("\n", timeout=20)[0] == "1\n"
        second.communicate("\n", timeout=20)
    with child_cgroup(None) as group:
        assert group.run_in(GAUGE, tmp_path).startswith("ProcessGauge ") or _limited()


def _line(process: Any) -> str:
    line: str = process.stdout.readline()
    return line


def _limited() -> bool:
    """Whether the tests themselves run under a limit, so that nothing here is without one."""
    return run("from modelcache.gauges import ContainerGauge\nprint(ContainerGauge().limited)") == "True\n"
