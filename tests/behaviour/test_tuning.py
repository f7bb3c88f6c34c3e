"""Live tuning: each setting is checked as in the constructor, and its effect is there when the assignment returns."""

import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from modelcache import ConfigError, Evicted, Lease, ModelCache, Reclaimed, heap
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache, allocated
from tests.support.waiting import WAIT, Gate, Spawn, eventually

NEVER = 1000.0  # seconds between two looks of a monitor that is to stay out of a test

BAD_SIZES: list[Any] = [-1, math.nan, 0.8, 1e9, "80", "12 parsecs", "101%", "0%", "", True, [1], b"1 GiB"]


def sizes(cache: ModelCache[Any]) -> tuple[Any, ...]:
    """Return all settings as they read back."""
    memory, disk = cache.memory, cache.disk
    return memory.high, memory.low, memory.budget, memory.max_models, disk.budget, disk.min_free


@pytest.mark.parametrize("value", BAD_SIZES, ids=repr)
@pytest.mark.parametrize("setting", ["memory.high", "memory.low", "memory.budget", "disk.budget", "disk.min_free"])
def test_bad_size_is_refused(make_cache: MakeCache, setting: str, value: Any) -> None:
    """A size that can't be one is refused at the assignment, and everything stays as it was."""
    cache = make_cache(memory={"high": 500, "low": 400, "budget": 300, "max_models": 2, "gauge": FakeGauge(0)})
    before = sizes(cache)
    tier, name = setting.split(".")
    with pytest.raises(ConfigError, match=name):
        setattr(getattr(cache, tier), name, value)
    assert sizes(cache) == before


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, math.nan])
def test_bad_count_is_refused(make_cache: MakeCache, value: Any) -> None:
    """``max_models`` is a whole number above 0, or None."""
    cache = make_cache(memory={"max_models": 2})
    with pytest.raises(ConfigError, match="max_models"):
        cache.memory.max_models = value
    assert cache.memory.max_models == 2


def test_zero_is_refused_where_it_would_keep_nothing(make_cache: MakeCache) -> None:
    """High, low and the budgets are above 0; min_free may be 0."""
    cache = make_cache()
    for tier, name in ((cache.memory, "high"), (cache.memory, "low"), (cache.memory, "budget"), (cache.disk, "budget")):
        with pytest.raises(ConfigError, match=name):
            setattr(tier, name, 0)
    cache.disk.min_free = 0
    assert cache.disk.min_free == 0


def test_none_is_refused_where_it_means_nothing(make_cache: MakeCache) -> None:
    """``high`` and ``min_free`` have no None; the other settings take it back off."""
    cache = make_cache(memory={"budget": 300, "max_models": 2, "low": "10%"}, disk={"budget": "1 GiB"})
    for tier, name in ((cache.memory, "high"), (cache.disk, "min_free")):
        with pytest.raises(ConfigError, match=name):
            setattr(tier, name, None)
    cache.memory.budget = None
    cache.memory.max_models = None
    cache.memory.low = None
    cache.disk.budget = None
    assert (cache.memory.budget, cache.memory.max_models, cache.disk.budget) == (None, None, None)


def test_low_above_high_is_refused(make_cache: MakeCache) -> None:
    """Neither watermark can be moved past the other."""
    cache = make_cache(memory={"high": 500, "low": 400, "gauge": FakeGauge(0)})
    with pytest.raises(ConfigError, match="low"):
        cache.memory.low = 501
    with pytest.raises(ConfigError, match="low"):
        cache.memory.high = 399
    assert (cache.memory.high, cache.memory.low) == (500, 400)


def test_low_follows_high_where_it_was_not_given(make_cache: MakeCache) -> None:
    """Without a ``low`` it is 7/8 of ``high``, also after ``high`` was moved."""
    cache = make_cache(memory={"high": 800, "gauge": FakeGauge(0)})
    assert cache.memory.low == 700
    cache.memory.high = 80
    assert cache.memory.low == 70
    cache.memory.low = 20
    assert cache.memory.low == 20
    cache.memory.low = None
    assert cache.memory.low == 70


def test_settings_read_back_in_bytes(make_cache: MakeCache) -> None:
    """Whatever way a size is given, it reads back as an int of bytes; a percentage as its share at this moment."""
    gauge = FakeGauge(0, 1000)
    cache = make_cache(memory={"gauge": gauge, "interval": NEVER})
    cache.memory.high = "50%"
    cache.memory.low = "25%"
    cache.memory.budget = "10%"
    cache.memory.max_models = 7
    cache.disk.budget = "1.5 GiB"
    cache.disk.min_free = "1 MB"
    assert sizes(cache) == (500, 250, 100, 7, 3 * 2**29, 10**6)
    assert all(type(value) is int for value in sizes(cache))
    gauge.limit = 2000
    assert sizes(cache)[:3] == (1000, 500, 200)
    cache.disk.budget = "50%"
    assert isinstance(cache.disk.budget, int)
    assert cache.disk.budget > 2**20


def fill(make_cache: MakeCache, book: Book, **settings: Any) -> ModelCache[Any]:
    """Return a cache with eight models of 100 bytes in memory, whose gauge follows them."""
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"high": 1000, "gauge": book.gauge(), "interval": NEVER}, **settings)
    for model in "abcdefgh":
        cache.get(model)
    return cache


LOWER: dict[str, Callable[[ModelCache[Any]], None]] = {
    "high": lambda cache: setattr(cache.memory, "high", 300),
    "high as a percentage": lambda cache: setattr(cache.memory, "high", "30%"),
    "budget": lambda cache: setattr(cache.memory, "budget", 300),
    "max_models": lambda cache: setattr(cache.memory, "max_models", 3),
}
lower = pytest.mark.parametrize("change", LOWER.values(), ids=LOWER.keys())


@lower
@pytest.mark.parametrize("known", [False, True], ids=["guessed sizes", "known sizes"])
def test_effect_is_complete_when_the_assignment_returns(
    make_cache: MakeCache, change: Callable[[ModelCache[Any]], None], known: bool
) -> None:
    """Before the assignment returns all that must go is evicted, its ``unload=`` has run, and it was told."""
    book = Book()
    cache = fill(make_cache, book, size_of=(lambda model, path: 100) if known else None)
    change(cache)
    assert book.alive == list("fgh")
    assert cache.stats().models == 3
    events = cache.history()
    assert [event.model for event in events if isinstance(event, Evicted)] == list("abcde")
    batches = [event for event in events if isinstance(event, Reclaimed)]
    assert sum(event.models for event in batches) == 5
    assert str(batches[-1]).endswith(f"used 300 B of {cache.memory.high} B")


def test_each_batch_tells_the_reading_that_decided_it(make_cache: MakeCache) -> None:
    """Where models leave step by step, each event has what was in use before its step, not before all of them."""
    book = Book()
    cache = fill(make_cache, book)
    cache.memory.high = 300
    told = [event for event in cache.history() if isinstance(event, Evicted)]
    assert [(event.model, event.used) for event in told] == [("a", 800), ("b", 700), ("c", 700), ("d", 500), ("e", 500)]


@lower
def test_leases_are_looked_at_again_at_their_release(
    make_cache: MakeCache, change: Callable[[ModelCache[Any]], None]
) -> None:
    """Leased models stay when a limit is lowered; each release looks again, and evicts before it returns."""
    book = Book()
    cache = fill(make_cache, book)
    leases = [cache.lease(model) for model in "abcdefgh"]
    for lease in leases:
        lease.acquire()
    change(cache)
    assert len(book.alive) == 8
    for number, lease in enumerate(leases[:5], 1):
        lease.release()
        assert len(book.alive) == 8 - number
    for lease in leases[5:]:
        lease.release()
    assert len(book.alive) == 3


@lower
def test_leases_are_never_marked(make_cache: MakeCache, change: Callable[[ModelCache[Any]], None]) -> None:
    """A limit that is raised again before the leases end costs nobody: leased models were not marked."""
    book = Book()
    cache = fill(make_cache, book)
    leases = [cache.lease(model) for model in "abcdefgh"]
    for lease in leases:
        lease.acquire()
    change(cache)
    cache.memory.high, cache.memory.budget, cache.memory.max_models = 1000, None, None
    for lease in leases:
        lease.release()
    assert len(book.alive) == 8


@lower
def test_loads_under_way_are_looked_at_when_released(
    make_cache: MakeCache, spawn: Spawn, change: Callable[[ModelCache[Any]], None]
) -> None:
    """A limit lowered while models are loading is met once they were loaded and released."""
    book = Book()
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"high": 1000, "gauge": book.gauge(), "interval": NEVER}, loaders=8)
    with Gate() as gate:
        book.gate = gate
        futures = [spawn(cache.get, model) for model in "abcdefgh"]
        eventually(lambda: [row.state for row in cache.models()].count("loading") == 8)
        change(cache)
    for future in futures:
        future.result(WAIT)
    assert len(book.alive) <= 3


def test_assignment_never_waits_for_another_threads_unload(make_cache: MakeCache, spawn: Spawn) -> None:
    """While another thread's ``unload=`` runs, an assignment that counts on it returns."""
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(book=book, memory={"interval": NEVER})
        cache.get("a")
        cache.get("b")
        dropped = spawn(cache.unload, "a")
        gate.wait()
        assignment = spawn(setattr, cache.memory, "max_models", 1)
        assert assignment.result(3) is None
        assert cache.stats().models == 1
        assert not dropped.done()
    assert dropped.result(WAIT)
    assert book.alive == ["b"]


def test_raised_limit_lets_a_waiter_in(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lookup that waits for room goes on as soon as the limit is raised."""
    cache = make_cache(memory={"max_models": 1, "interval": NEVER}, timeout=None)
    lease = cache.lease("a")
    lease.acquire()
    waiting = spawn(cache.get, "b")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    cache.memory.max_models = 2
    assert waiting.result(3).model == "b"
    lease.release()


def test_assignments_from_many_threads(make_cache: MakeCache, spawn: Spawn) -> None:
    """Settings may be assigned from any thread while others look up; the last one holds in the end."""
    book = Book()
    cache = make_cache(book=book, memory={"interval": 0.01}, timeout=None)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for model in "abcdefgh":
                with cache.lease(model) as value:
                    assert value.model == model

    def tune() -> None:
        for number in range(60):
            cache.memory.max_models = 1 + number % 6
            cache.memory.budget = None if number % 2 else 1000
            cache.disk.budget = None if number % 2 else "1 MiB"

    lookers = [spawn(look) for _ in range(2)]
    for tuner in [spawn(tune) for _ in range(2)]:
        tuner.result(WAIT)
    stop.set()
    for looker in lookers:
        looker.result(WAIT)
    cache.memory.max_models = 2
    assert cache.stats().models <= 2
    eventually(lambda: len(book.alive) <= 2)  # the monitor may be at it already: nobody waits for its unload=


def test_tuning_within_a_loader_or_callback(make_cache: MakeCache) -> None:
    """A loader may tune the cache it is called by."""

    def load(path: Any, model: str) -> str:
        cache.memory.max_models = 2 if model == "c" else 8
        return model

    book = Book(load)
    cache = make_cache(book=book, memory={"interval": NEVER})
    for model in "abc":
        assert cache.get(model) == model
    assert len(book.alive) <= 2


# The disk tier


def test_disk_budget_is_met_when_the_assignment_returns(make_cache: MakeCache) -> None:
    """Before an assignment of ``disk.budget`` returns the files that must go are gone, the coldest first."""
    cache = make_cache()
    for model in "abcd":
        assert cache.prefetch([model], tier="disk").wait(WAIT)
    cache.prefetch(["a"], tier="disk").wait(WAIT)
    one = cache.stats().disk_used // 4
    cache.disk.budget = 2 * one
    assert len(cache.models()) == 2
    assert allocated(cache.disk.path) == cache.stats().disk_used == 2 * one
    assert [event.reason for event in cache.history() if isinstance(event, Evicted)] == ["disk budget"] * 2


def test_disk_budget_takes_models_out_of_memory(make_cache: MakeCache) -> None:
    """Where models in memory keep their files, a lowered disk budget evicts from both tiers before it returns."""
    book = Book()
    cache = make_cache(book=book)
    for model in "abcd":
        cache.get(model)
    cache.disk.budget = cache.stats().disk_used // 2
    assert book.alive == ["c", "d"]
    assert [row.model for row in cache.models()] == ["c", "d"]
    gone = [(event.model, event.tier) for event in cache.history() if isinstance(event, Evicted)]
    assert gone == [("a", "memory"), ("a", "disk"), ("b", "memory"), ("b", "disk")]


def test_disk_budget_is_looked_at_again_at_a_release(make_cache: MakeCache) -> None:
    """A leased model keeps its files over a lowered disk budget; its release looks again."""
    cache = make_cache()
    with cache.lease("a"):
        cache.disk.budget = 4096
        assert [row.model for row in cache.models()] == ["a"]
    assert cache.models() == []
    assert allocated(cache.disk.path) == 0


def test_a_release_that_frees_nothing_looks_at_nothing(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where limits can't be met, hits on a model that somebody holds go on as ever: no gauge, no heap, no disk."""
    gauge, looks = FakeGauge(900, limit=1000), Counter[str]()

    def read() -> int:
        looks["gauge"] += 1
        return 900

    give_back, statvfs = heap.give_back, os.statvfs
    monkeypatch.setattr(heap, "give_back", lambda: looks.update(["heap"]) or give_back())
    monkeypatch.setattr(os, "statvfs", lambda path: looks.update(["disk"]) or statvfs(path))
    cache = make_cache(
        DictSource().add("a", "b"), memory={"gauge": gauge, "high": 950, "interval": NEVER}, disk={"min_free": 0}
    )
    gauge.used = read
    with cache.lease("a"), cache.lease("b"):
        cache.memory.high, cache.disk.budget = 500, 1
        assert set(looks) == {"gauge", "heap", "disk"}
        looks.clear()
        for _ in range(100):
            with cache.lease("a"):
                pass
        assert not looks
    assert cache.models() == []


def lease_forty(make_cache: MakeCache, book: Book) -> tuple[ModelCache[Any], list[Lease[Any]]]:
    """Lease forty models, which give no memory back when they leave."""
    names = [f"m{number}" for number in range(40)]
    gauge = FakeGauge(700, 1000)
    cache = make_cache(DictSource().add(*names), book, memory={"high": 900, "gauge": gauge, "interval": NEVER})
    leases = [cache.lease(name) for name in names]
    for lease in leases:
        lease.acquire()
    return cache, leases


def test_releases_do_not_empty_a_cache_in_vain(make_cache: MakeCache) -> None:
    """Where memory does not come back, models that are released one after the other stay, but for the first few."""
    book = Book()
    cache, leases = lease_forty(make_cache, book)
    cache.memory.high = 600
    assert len(book.alive) == 40
    for lease in leases:
        lease.release()
    assert len(book.alive) > 20


@pytest.mark.parametrize("limit", ["budget", "max_models"])
def test_other_limits_hold_where_the_watermark_rests(make_cache: MakeCache, limit: str) -> None:
    """Where memory does not come back, budget and ``max_models`` are met all the same, release by release."""
    book = Book()
    cache, leases = lease_forty(make_cache, book)
    each = {"budget": sum(row.bytes for row in cache.models()) // 40, "max_models": 1}
    cache.memory.high = 600
    setattr(cache.memory, limit, 10 * each[limit])
    for number, lease in enumerate(leases):
        lease.release()
        assert len(book.alive) <= max(39 - number, 10)
    assert len(book.alive) == 10


def test_disk_budget_is_looked_at_again_by_the_monitor(make_cache: MakeCache) -> None:
    """A lease that is forgotten, not released, lets the disk tier meet its budget all the same."""
    cache = make_cache(DictSource().add("a", "b"), memory={"interval": 0.05})
    with cache.lease("b"):
        lease = cache.lease("a")
        lease.acquire()
        cache.disk.budget = 8 * 4096
        assert {row.model for row in cache.models()} == {"a", "b"}
        with pytest.warns(ResourceWarning, match="collected unreleased"):
            del lease
        eventually(lambda: [row.model for row in cache.models()] == ["b"])


def test_min_free_is_met_when_the_assignment_returns(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raised ``min_free`` evicts what the file system lacks."""
    cache = make_cache()
    for model in "abcd":
        assert cache.prefetch([model], tier="disk").wait(WAIT)
    one = cache.stats().disk_used // 4
    store = cache.disk.store
    monkeypatch.setattr(store, "free", lambda: 100 * one - allocated(store.path))
    cache.disk.min_free = 98 * one
    assert [row.model for row in cache.models()] == ["c", "d"]
    assert [event.reason for event in cache.history() if isinstance(event, Evicted)] == ["min_free"] * 2


def test_raised_disk_budget_lets_a_waiter_in(make_cache: MakeCache, spawn: Spawn) -> None:
    """A fetch that waits for room on disk goes on as soon as the budget is raised."""
    cache = make_cache(timeout=None)
    lease = cache.lease("a")
    lease.acquire()
    cache.disk.budget = cache.stats().disk_used
    waiting = spawn(cache.get, "b")
    eventually(lambda: cache.stats().waiters == 1)
    cache.disk.budget = None
    assert waiting.result(WAIT).model == "b"
    lease.release()
