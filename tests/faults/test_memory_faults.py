"""Faults of memory that people met in production, brought about in real processes, or with a gauge that lies."""

import itertools
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelcache import Evicted, NoRoom, Pressure
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.real import run_real
from tests.support.waiting import Gate, Spawn, eventually


def test_f009_garbage_of_a_load_is_not_its_footprint(tmp_path: Path) -> None:
    """F009: a loader that builds and drops ten times as much leaves a footprint within a fifth of the real one."""
    run_real(
        """
        def load(path):
            kept, garbage = [], []
            for _ in range(300):  # side by side, so that only a trim gives back what lies between
                garbage += [bytes(1000) for _ in range(1000)]
                kept += [bytes(1000) for _ in range(100)]
            return Weights(kept)
        names = models(3, 30 * MIB)
        with cache_of(load, rss() + 1000 * MIB) as cache:
            for name in names:
                cache.get(name)
            real = 30_000 * (1000 + 33 + 8)
            for row in cache.models():
                assert row.in_use == "measured", row
                assert 0.8 * real < row.bytes < 1.2 * real, (row, real)
                assert row.peak > 1.5 * real, (row, real)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("arenas", ["1", "16"], ids=["one heap", "a heap a thread"])
def test_f008_unloaded_models_leave_the_heap(tmp_path: Path, arenas: str) -> None:
    """F008: of ten models that lie side by side in the heap just enough go for a lower limit, and their memory too."""
    run_real(
        """
        turn = threading.Barrier(10)
        def load(path):
            arrays = []
            for _ in range(400):
                arrays.append(bytearray(b"1") * 65_000)
                turn.wait(5)
            return Weights(arrays)
        names = models(10, 26_000_000)
        base = rss()
        with cache_of(load, base + 1000 * MIB, loaders=11) as cache:  # one is kept for requests
            assert cache.prefetch(names).wait(10)
            assert rss() > base + 240 * MIB
            evicted = []
            cache.on(Evicted, evicted.append)
            cache.memory.high = base + 150 * MIB
            assert 4 <= len(evicted) <= 5, len(evicted)
            assert base + 110 * MIB < rss() < base + 150 * MIB, (rss() - base) / MIB
            for name in names:
                cache.unload(name)
            assert rss() < base + 15 * MIB, (rss() - base) / MIB
        """,
        tmp_path,
        env={"MALLOC_ARENA_MAX": arenas},
    )


def test_f011_trims_hold_no_hit_up(tmp_path: Path) -> None:
    """F011: while 50 models leave 2 GB of fragmented heap, hits go on, and the few trims stand in the events.

    Of 500 hits no two were more than 5 to 33 ms apart here, beside four trims of 300 to 350 ms in all.
    """
    if psutil.virtual_memory().available < 4 << 30:
        pytest.skip("others use too much of this machine's memory now")
    run_real(
        """
        from modelcache import heap
        def load(path):
            weights = []
            for _ in range(600):
                weights.append(bytearray(b"1") * 65_000)
                kept.append(bytes(600))  # what requests keep lies between what models free
            return Weights(weights)
        def ask():
            began = time.perf_counter()
            asked = plain()
            trims.append(time.perf_counter() - began)
            return asked
        def hit():
            began = time.perf_counter()
            for number in range(len(hits)):
                if stop.is_set():
                    return
                time.sleep(0.0005)  # a part of what is measured, as a stall may begin there; a wait would call malloc
                with cache.lease("m0"):
                    pass
                began, before = time.perf_counter(), began
                hits[number] = began - before  # there is room: a list that grows waits for an arena that is trimmed
        kept, trims, hits, collections, told, stop = [], [], [0.0] * 100_000, [], [], threading.Event()
        names, base = models(51, 39_000_000), rss()
        with cache_of(load, 2**40) as cache, cache.lease("m0"):
            for name in names:
                cache.get(name)
            cache.on(Reclaimed, told.append)
            plain, heap._look()._ask = heap._look()._ask, ask
            gc.callbacks.append(lambda phase, info: collections.append(info["generation"]) if phase == "stop" else None)
            hitter = Call(hit)
            eventually(lambda: hits[100])
            cache.memory.high = base
            stop.set()
            hitter.result()
            assert sum(event.models for event in told) == 50
            assert rss() < base + 300 * MIB, (rss() - base) / MIB
        assert len(trims) <= 10, trims
        assert collections.count(2) <= 2, collections
        assert max(hits) < max(trims) / 2, (max(hits), max(trims))
        assert sum(event.duration for event in told) > sum(trims) / 2, (told, trims)
        """,
        tmp_path,
    )


def test_f013_part_of_each_load_is_leaked(tmp_path: Path) -> None:
    """F013: where each load leaks a fifth, models pass through until room is gone; what is leased is served on."""
    run_real(
        """
        leaked = []
        def load(path):
            leaked.append(bytearray(b"1") * (5 * MIB))
            return Weights(bytearray(b"1") * (20 * MIB))
        names = models(60, 20 * MIB)
        high = rss() + 200 * MIB
        refused, most = None, 0
        with cache_of(load, high) as cache, cache.lease("m0"):
            for name in names:
                try:
                    cache.get(name, timeout=5)
                except NoRoom as error:
                    refused = error
                    break
                most = max(most, rss())
            assert len(leaked) >= 25, len(leaked)
            assert most <= high + 8 * MIB, (most - high) / MIB
            assert refused.tier == "memory" and refused.used > 150 * MIB, refused
            for _ in range(100):
                assert cache.get("m0", timeout=0.1)
            leaked.clear()  # the framework mends its ways
            assert cache.get(refused.model, timeout=5)
        """,
        tmp_path,
    )


def test_f013_nothing_comes_back(tmp_path: Path) -> None:
    """F013: where the memory of no load ever comes back that is told once; the other models are served on."""
    run_real(
        """
        kept = []
        def load(path):
            weights = bytearray(b"1") * (20 * MIB)
            kept.append(weights)
            return Weights(weights)
        names = models(20, 20 * MIB)
        told = []
        with cache_of(load, rss() + 210 * MIB, memory={"interval": 0.2}) as cache:  # evicting rests for 1.6 s, then 3.2
            cache.on(Pressure, told.append)
            refused = []
            for name in names:
                try:
                    cache.get(name, timeout=5)
                except NoRoom as error:
                    refused.append(error)
            assert len(refused) >= 8
            assert all("evicting did not help" in str(error) for error in refused), refused[0]
            (event,) = told
            assert event.promised > 50 * MIB and event.freed < MIB, event
            stayed = [row.model for row in cache.models() if row.tier == "memory"]
            assert len(stayed) >= 6, stayed  # of 10: three rounds of one model, and one more after a rest
            assert all(cache.get(name, timeout=0.1) for name in stayed)
        """,
        tmp_path,
    )


def test_f015_loads_at_once_do_not_share_the_same_room(tmp_path: Path) -> None:
    """F015: eight loads that begin at once stay below ``high``, but for what the first ones were wrong by."""
    run_real(
        """
        barrier = threading.Barrier(8)
        names = models(8, 40 * MIB)
        top = []
        def load(path):
            value = Weights(bytearray(b"1") * (40 * MIB))
            top.append(rss())
            return value
        high = rss() + 150 * MIB
        with cache_of(load, high) as cache:
            threads = [threading.Thread(target=lambda name=name: (barrier.wait(), cache.get(name))) for name in names]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert len(top) == 8
            assert max(top) <= high + 8 * MIB, (max(top) - high) / MIB
            kept = sum(row.tier == "memory" for row in cache.models())
            assert 2 <= kept <= 3, kept  # 2: a load under way counts with its reservation and with what it has taken
        """,
        tmp_path,
    )


def test_f016_mapped_models_count_before_they_are_touched(tmp_path: Path) -> None:
    """F016: models that map their weights read small; they count in full, so that touching them all is no surprise."""
    run_real(
        """
        def load(path):
            file = (path / "weights.bin").open("rb")
            return Weights(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        names = models(6, 30 * MIB)
        high = rss() + 100 * MIB
        with cache_of(load, high) as cache:
            for name in names:
                cache.get(name)
            rows = [row for row in cache.models() if row.tier == "memory"]
            assert all(25 * MIB < row.bytes < 35 * MIB for row in rows), rows
            assert len(rows) == 3, rows  # a fourth would fit beside what is tracked, but not beside the process itself
            leases = [cache.lease(row.model) for row in rows]
            values = [lease.acquire().value for lease in leases]
            assert not any(any(value[::4096]) for value in values)
            assert 90 * MIB < rss() < high, (rss(), high)
            del values
            for lease in leases: lease.release()
            cache.memory.high = high  # which looks at once
            assert len([row for row in cache.models() if row.tier == "memory"]) == 3
        """,
        tmp_path,
    )


def test_f016_heap_beside_a_mapping(tmp_path: Path) -> None:
    """F016: a model that maps its weights, and has more on the heap than was expected of it, counts with both."""
    run_real(
        """
        def load(path):
            file = (path / "weights.bin").open("rb")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return Weights((mapped, bytearray(b"1") * (40 * MIB)))
        (name,) = models(1, 30 * MIB)
        with cache_of(load, rss() + 1000 * MIB) as cache:
            for _ in range(2):
                cache.get(name)
                (row,) = [row for row in cache.models() if row.tier == "memory"]
                assert 65 * MIB < row.bytes < 80 * MIB, row
                cache.unload(name)
        """,
        tmp_path,
    )


def test_f014_one_load_evicts_one(make_cache: MakeCache, spawn: Spawn) -> None:
    """F014: bytes of models that are being unloaded count as coming, so that nobody else goes for the same room."""
    gate = Gate()
    book = Book(unload=gate)
    names = [f"m{number}" for number in range(20)]
    cache = make_cache(
        DictSource().add(*names, "x", "y"),
        book,
        size_of=lambda model, path: 100,
        memory={"high": 2000, "low": 2000, "gauge": book.gauge(10_000), "interval": 0.02},
    )
    told: list[Any] = []
    cache.on(Evicted, told.append)
    for name in names:
        cache.get(name)
    with gate:
        loads = [spawn(cache.get, name) for name in "xy"]
        gate.wait()
        eventually(lambda: sum(row.state == "waiting for room" for row in cache.models()) >= 1 or len(told) == 2)
        assert len(told) <= 2
    for load in loads:
        load.result()
    assert len(told) == 2
    assert len(book.alive) == 20


def test_f018_growth_that_outruns_eviction(make_cache: MakeCache) -> None:
    """F018: where memory grows faster than evicting frees it, evicting stops, one event says so, hits go on."""
    book = Book()
    names = [f"m{number}" for number in range(60)]
    calm = FakeGauge(0, 10_000)
    cache = make_cache(
        DictSource().add(*names),
        book,
        size_of=lambda model, path: 50,
        memory={"high": 8000, "gauge": calm, "interval": 0.02},
    )
    told: list[Any] = []
    cache.on(Pressure, told.append)
    for name in names:
        cache.get(name)
    growth = itertools.count(8100, 60)
    calm.used = lambda: next(growth)
    eventually(lambda: told)
    alive = book.alive
    assert len(alive) > 20
    assert cache.get(alive[-1]).model == alive[-1]
    gone = next(name for name in names if name not in alive)
    try:
        cache.get(gone, timeout=5.0)
    except NoRoom as error:
        refusal = error
    assert refusal.tier == "memory"
    assert cache.get(alive[-1]).model == alive[-1]
    assert len(told) == 1


def test_f020_hits_go_on_while_another_model_loads(make_cache: MakeCache, spawn: Spawn) -> None:
    """F020: where two models do not fit together, the one that is leased serves on while the other waits, in turn."""
    book = Book()
    cache = make_cache(
        DictSource().add("a", "b"), book, size_of=lambda model, path: 600, memory={"budget": 1000, "gauge": FakeGauge()}
    )
    lease = cache.lease("a")
    lease.acquire()
    other = spawn(cache.get, "b")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    for _ in range(100):
        assert cache.get("a").model == "a"
    lease.release()
    assert other.result().model == "b"
    assert book.loads == ["a", "b"]
