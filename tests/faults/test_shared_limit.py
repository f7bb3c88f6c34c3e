"""Faults of several processes under one memory limit: who gives way to whom. Real processes, real signals.

The limit is a gauge's that adds up what each process has written down; a real cgroup's is in ``test_memory_gauges``.
"""

import contextlib
import json
import os
import signal
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
    import json
    folder, name, settings = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    use, alive = folder / "use", {}
    from modelcache.gauges import Reading

    class Together:
        shared, reads = settings.pop("shared", "all"), 0
        def read(self):
            self.reads += 1
            total = 0
            for file in use.iterdir():
                if not file.name.startswith("."):
                    total += int(file.read_text())
            return Reading(total, 1000, own())

    def own():
        return sum(alive.values())

    def book():
        draft = use / ("." + name)
        draft.write_text(str(own()))
        draft.rename(use / name)

    class Model:
        def __init__(self, model):
            self.model = model
            alive[id(self)] = 100
            book()
        def drop(self):
            del alive[id(self)]
            book()

    use.mkdir(exist_ok=True)
    book()
    gauge, evicted, failed = Together(), [], []
    memory = {"high": "100%", "interval": 0.2, "policy": "lru", "idle_after": None, **settings}
    source = DictSource().add(*[f"{who}{number}" for who in "abcx" for number in range(20)])
    cache = ModelCache(source, lambda path, model: Model(model), unload=Model.drop, size_of=lambda model, path: 100,
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
    assert "to make room for 'x1', giving way for another process under the same limit" in two("explain", "b0")
    assert "1.0 kB would have passed its memory.high" in two("explain", "b0").replace("1.1 kB", "1.0 kB")
    assert three("evicted") == []
