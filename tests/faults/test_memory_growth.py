"""Faults of memory that show only over time, by their number: growth, models that give way in turns, many versions.

Real memory of real processes. What a single load or eviction does wrong is ``faults/test_memory_faults``.
"""

from pathlib import Path

from tests.support.real import run_real


def test_f018_memory_that_grows_while_models_leave(tmp_path: Path) -> None:
    """F018: while a thread takes more than leaving models give back, evicting rests, that is told once, hits go on."""
    run_real(
        """
        pause, growing, grown, told, left = threading.Event(), threading.Event(), [], [], []
        def load(path):
            return Weights(bytearray(b"1") * (10 * MIB))
        def tell(event):
            left.append(in_memory())
            told.append(event)
        def in_memory():
            return sum(row.tier == "memory" for row in cache.models())
        def unload(model):
            pause.wait(0.12)  # meanwhile more is taken than it will give back
        def grow():
            while growing.is_set():
                grown.append(bytearray(b"1") * (10 * MIB))
                pause.wait(0.05)
        names, high = models(20, 10 * MIB), rss() + 260 * MIB
        with cache_of(load, high, unload=unload) as cache:
            cache.on(Pressure, tell)
            for name in names:
                with cache.lease(name):
                    pass
            growing.set()
            grower = Call(grow)
            longest, ended, goal = 0, time.monotonic(), None
            while goal is None or len(grown) < goal:
                pause.wait(0.002)
                with cache.lease(names[-1], timeout=1):
                    pass
                began, ended = ended, time.monotonic()
                longest = max(longest, ended - began)
                goal = goal or (len(grown) + 20 if told else None)  # another second
            stayed = in_memory()
            growing.clear()
            grower.result()
            assert stayed >= 8, stayed
            assert left[0] - stayed <= 4, (left, stayed)  # evicting rests for 0.4 s, tries once more, then for 0.8 s
            assert longest < 0.5, longest
            (event,) = told
            assert event.freed < 0 < event.promised <= 100 * MIB, event
            grown.clear()
            eventually(lambda: rss() < high - 60 * MIB)
            here = {row.model for row in cache.models() if row.tier == "memory"}
            with cache.lease(next(name for name in names if name not in here), timeout=5):
                pass
            assert cache.stats().loads == 21 and len(told) == 1
        """,
        tmp_path,
    )


def test_f020_four_threads_and_two_models_in_room_for_one(tmp_path: Path) -> None:
    """F020: a load serves all who wait for its model, never are two in memory, and the swapping is told once."""
    run_real(
        """
        pause, highest, turns, told = threading.Event(), [], [], []
        def load(path):
            pause.wait(0.03)
            value = Weights(bytearray(b"1") * (100 * MIB))
            highest.append(rss())
            return value
        def ask(number):
            for turn in range(20):
                with cache.lease(names[(turn + number) % 2]) as model:
                    assert len(model.value) == 100 * MIB
                    turns.append(number)
                    pause.wait(0.001)
                del model  # or it would take its room for as long as this thread waits for the other one
        names = models(2, 100 * MIB)
        high = rss() + 160 * MIB
        with cache_of(load, high, memory={"request_seconds": 0.001}) as cache:
            cache.on(Thrashing, told.append)
            threads = [Call(ask, number) for number in range(4)]
            for thread in threads:
                thread.result(15)
            assert max(highest) <= high, (max(highest) - high) / MIB
            assert len(highest) <= 30, len(highest)  # of 80 requests, in turns of two
            assert all(abs(turns[:40].count(number) - 10) <= 4 for number in range(4)), turns
            eventually(lambda: told)
            (event,) = told
            assert {model for model, _ in event.worst} == set(names)
            assert event.share > 0.5, event
        """,
        tmp_path,
    )


VERSIONS = """
import weakref
from tests.support.fakes import tar

def load(path):
    model = Weights((bytearray(b"1") * (4 * MIB), [bytes(1000) for _ in range(1000)]))
    model.version = int((path / "model.txt").read_text())
    traces.append(weakref.ref(model))
    return model

def upload(version):
    source.artifacts["a"] = tar({"model.txt": str(version).encode()})

def alive():
    return sum(trace() is not None for trace in traces)

traces, unloaded, source = [], [], DictSource()
upload(0)
cache = ModelCache(source, load, unload=lambda model: unloaded.append(model.version),
                   disk=DiskTier(folder / "disk", min_free=0), memory=MemoryTier(high=2**40, interval=0.05))
"""


def test_f098_a_hundred_versions_under_load(tmp_path: Path) -> None:
    """F098: through 100 refreshes under load each old version goes with its last lease, and memory stays flat."""
    run_real(
        """
        def serve():
            while not stop.is_set():
                least = current[0]
                with cache.lease("a") as model:
                    if model.version < least or model.version in unloaded:
                        wrong.append((model.version, least))
                    stop.wait(0.001)
                del model
        current, wrong, sizes, stop = [0], [], [], threading.Event()
        with cache:
            threads = [Call(serve) for _ in range(3)]
            eventually(lambda: traces)
            for version in range(1, 101):
                upload(version)
                assert cache.refresh("a")
                current[0] = version
                assert alive() <= 4, alive()  # the present one, and those that the three hold
                sizes.append(rss())
            stop.set()
            for thread in threads:
                thread.result()
            assert not wrong, wrong
            assert sorted(unloaded) == list(range(100)) and alive() == cache.stats().models == 1
            assert [(row.model, row.tier) for row in cache.models()] == [("a", "memory")]
            assert max(sizes[10:]) < min(sizes[10:]) + 16 * MIB, [size // MIB for size in sizes]
        assert alive() == 0 and len(unloaded) == 101
        """,
        tmp_path,
        prelude=VERSIONS,
    )


def test_f098_hundreds_of_loads_and_unloads(tmp_path: Path) -> None:
    """F098: memory stays flat over 240 loads, however their models leave."""
    run_real(
        """
        def refresh():
            upload(len(traces))
            assert cache.refresh("a")
        def evict():
            cache.memory.max_models = 1
            with cache.lease("b"):
                pass
            cache.memory.max_models = None
            cache.unload("b")
        source.artifacts["b"] = source.artifacts["a"]
        ways = [lambda: cache.unload("a"), lambda: cache.delete("a"), refresh, evict]
        sizes = []
        with cache:
            for number in range(240):
                with cache.lease("a"):
                    pass
                ways[number % 4]()
                assert alive() == cache.stats().models == (number % 4 == 2)
                sizes.append(rss())
            assert max(sizes[20:]) < min(sizes[20:]) + 16 * MIB, [size // MIB for size in sizes]
        assert alive() == 0 and len(unloaded) == len(traces)
        """,
        tmp_path,
        prelude=VERSIONS,
    )
