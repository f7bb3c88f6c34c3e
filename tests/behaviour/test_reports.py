"""What a cache says of itself: rows of models(), figures of stats(), events of history()."""

import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from modelcache import Event, Loaded, ModelCache, ModelInfo, ModelNotFound, Stats
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache, allocated
from tests.support.waiting import WAIT, Gate, Spawn, eventually


def row(cache: ModelCache[Any], model: str) -> ModelInfo:
    """Return the row of a model."""
    return next(row for row in cache.models() if row.model == model)


def test_rows(make_cache: MakeCache) -> None:
    """A row says which model, in which tier, how large there, how often leased and hit, and when last used."""
    source = DictSource().add("a", "b", size=5000)
    cache = make_cache(source)
    cache.get("a")
    cache.prefetch(["b"], tier="disk").wait(WAIT)
    with cache.lease("a"), cache.lease("a"):
        first, second = cache.models()
    assert (first.model, first.tier, first.state, first.bytes) == ("a", "memory", "in memory", 5000)
    assert (first.leases, first.hits) == (2, 2)
    assert (second.model, second.tier, second.state) == ("b", "disk", "on disk")
    assert second.bytes == cache.stats().disk_used // 2
    assert (second.leases, second.hits) == (0, 0)
    for row in (first, second):
        assert type(row.tier) is str
        assert abs(row.last_used - time.time()) < 60


def test_rows_are_frozen(make_cache: MakeCache) -> None:
    """A row can't be changed, and does not change by itself."""
    cache = make_cache()
    cache.get("a")
    before = row(cache, "a")
    with pytest.raises(AttributeError):
        before.hits = 7  # type: ignore[misc]
    cache.get("a")
    assert before.hits == 0
    assert row(cache, "a").hits == 1


def test_only_models_in_a_tier_have_rows(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """A model that is being fetched for the first time, or that failed, has no row."""
    cache = make_cache(source)
    assert cache.models() == []
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    with Gate() as gate:
        source.gate = gate
        future = spawn(cache.get, "a")
        gate.wait()
        assert cache.models() == []
    future.result(WAIT)
    assert [row.model for row in cache.models()] == ["a"]


def test_states(make_cache: MakeCache, spawn: Spawn) -> None:
    """A row's state follows the model: on disk, loading, in memory, unloading, on disk."""
    with Gate() as loading, Gate() as unloading:
        book = Book(unload=unloading)
        book.gate = loading
        cache = make_cache(book=book)
        cache.prefetch(["a"], tier="disk").wait(WAIT)
        assert row(cache, "a").state == "on disk"
        future = spawn(cache.get, "a")
        loading.wait()
        assert (row(cache, "a").state, row(cache, "a").tier) == ("loading", "disk")
        loading.open()
        future.result(WAIT)
        assert (row(cache, "a").state, row(cache, "a").tier) == ("in memory", "memory")
        dropped = spawn(cache.unload, "a")
        unloading.wait()
        assert row(cache, "a").state == "unloading"
    dropped.result(WAIT)
    assert row(cache, "a").state == "on disk"


def test_state_while_waiting_for_room(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model that is fetched but finds no room in memory says that it waits for it."""
    cache = make_cache(memory={"max_models": 1, "interval": 0.02})
    lease = cache.lease("a")
    lease.acquire()
    future = spawn(cache.get, "b")
    eventually(lambda: [row.state for row in cache.models()] == ["in memory", "waiting for room"])
    lease.release()
    future.result(WAIT)


def test_rows_are_sorted_and_looking_is_no_use(make_cache: MakeCache) -> None:
    """Rows come sorted by id, and looking changes neither hits nor standing."""
    cache = make_cache(memory={"max_models": 3})
    for model in "cab":
        cache.get(model)
    for _ in range(5):
        assert [row.model for row in cache.models()] == ["a", "b", "c"]
        cache.stats()
    cache.get("d")
    assert row(cache, "c").tier == "disk"
    assert row(cache, "a").hits == 0


def test_hits_and_use_survive_an_unload(make_cache: MakeCache) -> None:
    """Hits count over all loads in this process."""
    cache = make_cache()
    for _ in range(4):
        cache.get("a")
    cache.unload("a")
    assert row(cache, "a").hits == 3
    cache.get("a")
    cache.get("a")
    assert row(cache, "a").hits == 4


def test_last_use_moves_on(make_cache: MakeCache) -> None:
    """last_used of a hit is the time at which it is booked."""
    cache = make_cache()
    cache.get("a")
    before = row(cache, "a").last_used
    cache.get("a")
    assert row(cache, "a").last_used >= before


def test_stats(make_cache: MakeCache) -> None:
    """The figures add up to what was done."""
    source = DictSource().add("a", "b", "c", size=100)
    book = Book()
    cache = make_cache(
        source, book, memory={"max_models": 2, "high": 900, "low": 800, "gauge": book.gauge(), "interval": 1000.0}
    )
    before = cache.stats()
    assert (before.hits, before.misses, before.loads, before.models, before.hit_ratio) == (0, 0, 0, 0, 0.0)
    for model in "aabbcc":
        cache.get(model)
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    with cache.lease("c"):
        stats = cache.stats()
    assert isinstance(stats, Stats)
    assert (stats.hits, stats.misses, stats.loads, stats.fetches, stats.failures) == (4, 4, 3, 3, 1)
    assert stats.hit_ratio == 0.5
    assert (stats.evictions, stats.disk_evictions, stats.models, stats.leases, stats.waiters) == (1, 0, 2, 1, 0)
    assert (stats.memory_used, stats.memory_limit, stats.memory_high, stats.memory_low) == (200, 1000, 900, 800)
    assert (stats.memory_models, stats.memory_reserved) == (200, 0)
    assert stats.fetched_bytes == sum(len(source.artifacts[model]) for model in "abc")
    assert stats.disk_used == allocated(cache.disk.path)
    assert stats.disk_budget is None
    assert stats.load_seconds > 0
    assert (stats.hook_errors, stats.events_dropped, stats.unload_errors) == (0, 0, 0)


def test_stats_are_frozen(make_cache: MakeCache) -> None:
    """Figures are those of one moment, and can't be changed."""
    stats = make_cache().stats()
    with pytest.raises(AttributeError):
        stats.hits = 1  # type: ignore[misc]


def test_stats_without_a_reading(make_cache: MakeCache) -> None:
    """Where the gauge can't read, used and limit are None and all else is told."""
    stats = make_cache(memory={"gauge": FakeGauge(0, -1)}).stats()
    assert stats.memory_used is None
    assert stats.memory_limit is None


def test_every_lookup_is_a_hit_or_a_miss(make_cache: MakeCache, spawn: Spawn) -> None:
    """Hits and misses add up to the lookups made, over threads."""
    cache = make_cache(memory={"max_models": 3, "interval": 0.02})

    def look() -> None:
        for number in range(200):
            with cache.lease("abcdefgh"[number % 5]):
                pass

    for future in [spawn(look) for _ in range(4)]:
        future.result(WAIT)
    stats = cache.stats()
    assert stats.hits + stats.misses == 800
    assert stats.loads <= stats.misses


def test_history(make_cache: MakeCache) -> None:
    """history() has the events in order, oldest first; history(id) those about a model."""
    cache = make_cache(memory={"max_models": 1})
    heard: list[Event] = []
    cache.on(Event, heard.append)
    cache.get("a")
    cache.get("b")
    assert cache.history() == heard
    assert [type(event).__name__ for event in cache.history("a")] == [
        "Missed",
        "Fetched",
        "Loaded",
        "Evicted",
        "Unloaded",
    ]
    assert cache.history("c") == []


def test_history_of_a_model_has_what_was_done_for_it(make_cache: MakeCache) -> None:
    """What was evicted to make room for a model is in its history too."""
    cache = make_cache(memory={"max_models": 1})
    cache.get("a")
    cache.get("b")
    assert ("Evicted", "a") in [(type(event).__name__, event.model) for event in cache.history("b")]


def test_history_is_bounded(make_cache: MakeCache) -> None:
    """history() keeps the last 1,000 events."""
    cache = make_cache(unload=None, load=lambda path: path.name)
    cache.get("a")
    for _ in range(600):
        cache.unload("a")
        cache.get("a")
    events = cache.history()
    assert len(events) == 1000
    assert events[-1].seq - events[0].seq >= 999
    assert isinstance(events[-1], Loaded)


def test_history_is_a_copy(make_cache: MakeCache) -> None:
    """What history() returns is the caller's own."""
    cache = make_cache()
    cache.get("a")
    cache.history().clear()
    assert cache.history()


def test_looking_while_others_work(make_cache: MakeCache, spawn: Spawn) -> None:
    """models(), stats() and history() may be called while other threads load and unload."""
    cache = make_cache(memory={"max_models": 2, "interval": 0.02}, timeout=None)

    def work(models: str) -> None:
        for _ in range(15):
            for model in models:
                with cache.lease(model):
                    pass
                cache.unload(model)

    workers = [spawn(work, "abcd"), spawn(work, "dcba")]
    while not all(worker.done() for worker in workers):
        rows = cache.models()
        assert len({row.model for row in rows}) == len(rows)
        assert cache.stats().models <= 2
        cache.history()
        wait(workers, timeout=0.001)  # or a look that never waits keeps the interpreter to itself
    for worker in workers:
        worker.result(WAIT)


def test_repr(make_cache: MakeCache) -> None:
    """The repr says what is served, and from where."""
    cache = make_cache()
    cache.get("a")
    assert "dict://tests" in repr(cache)
    assert "1 model" in repr(cache)
    assert "'b'" in repr(cache.lease("b"))


def test_loaded_in_place_has_no_files_on_disk(make_cache: MakeCache, tmp_path: Path) -> None:
    """A model that is loaded in place is in memory only: its row says so, and the disk tier is empty."""
    from modelcache import LocalSource  # noqa: PLC0415

    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "models" / "m" / "weights").write_bytes(b"x" * 10)
    cache = make_cache(LocalSource(tmp_path / "models", copy=False))
    assert cache.get("m").path == tmp_path / "models" / "m"
    assert row(cache, "m").tier == "memory"
    assert cache.stats().disk_used == 0
    cache.unload("m")
    assert cache.models() == []
