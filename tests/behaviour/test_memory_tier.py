"""The memory tier: how much is evicted, who goes, who may not, and what is said when nothing helps."""

import gc
import threading
import weakref
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest

from modelcache import Event, Evicted, Loaded, ModelCache, NoRoom, Reclaimed, TooLarge, Unloaded
from modelcache.policies import Resident
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually

NEVER = 1000.0  # seconds between two looks of a monitor that is to stay out of a test


def in_memory(cache: ModelCache[Any]) -> list[str]:
    """Return the ids in memory."""
    return [row.model for row in cache.models() if row.tier == "memory"]


def evicted(cache: ModelCache[Any]) -> list[str | None]:
    """Return the ids that the memory tier evicted, in order."""
    return [event.model for event in cache.history() if isinstance(event, Evicted) and event.tier == "memory"]


def sized(**sizes: int) -> DictSource:
    """Return a source with models of these sizes."""
    source = DictSource()
    for model, size in sizes.items():
        source.add(model, size=size)
    return source


# The watermark


def test_watermark_holds_at_every_moment(make_cache: MakeCache) -> None:
    """Used memory and what a newcomer needs stay at most ``high``, while the gauge follows the loaded models."""
    book, most = Book(), []
    book.gate = lambda model: most.append(book.bytes + 100)
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"high": 350, "gauge": book.gauge(), "interval": NEVER})
    for model in "abcdefghabcd":
        cache.get(model)
    assert max(most) == 300
    assert book.bytes == 300


def test_just_enough_is_evicted(make_cache: MakeCache) -> None:
    """Before a load just enough goes for it, not everything down to ``low``."""
    source = sized(a=100, b=100, c=100, d=100, big=150)
    book = Book()
    cache = make_cache(source, book, memory={"high": 400, "low": 100, "gauge": book.gauge(), "interval": NEVER})
    for model in "abcd":
        cache.get(model)
    assert evicted(cache) == []
    cache.get("big")
    assert evicted(cache) == ["a", "b"]
    assert book.bytes == 350


def test_exactly_high_fits(make_cache: MakeCache) -> None:
    """Used memory may reach ``high`` itself."""
    book = Book()
    cache = make_cache(sized(a=100, b=100), book, memory={"high": 200, "gauge": book.gauge(), "interval": NEVER})
    cache.get("a")
    cache.get("b")
    assert sorted(book.alive) == ["a", "b"]


def test_watermark_as_a_percentage_follows_the_limit(make_cache: MakeCache) -> None:
    """``high`` given as a percentage is evaluated at each reading: a limit that shrinks has it shrink too."""
    book = Book()
    gauge = book.gauge(1000)
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"high": "50%", "gauge": gauge, "interval": NEVER})
    for model in "abcde":
        cache.get(model)
    assert len(book.alive) == 5
    assert cache.memory.high == 500
    gauge.limit = 600
    assert (cache.memory.high, cache.memory.low) == (300, 262)
    cache.get("f")
    assert book.alive == ["d", "e", "f"]


def test_loads_in_flight_count(make_cache: MakeCache, spawn: Spawn) -> None:
    """Two loads at once do not both take the same room: what is loading is reserved."""
    with Gate("a") as gate:
        book = Book()
        book.gate = gate
        cache = make_cache(
            sized(a=100, b=100), book, memory={"high": 150, "gauge": book.gauge(), "interval": 0.05}, timeout=None
        )
        first = spawn(cache.get, "a")
        gate.wait()
        assert cache.stats().memory_reserved == 100
        second = spawn(cache.get, "b")
        eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    assert first.result(WAIT).model == "a"
    assert second.result(WAIT).model == "b"
    assert book.alive == ["b"]
    assert cache.stats().memory_reserved == 0


def test_nothing_is_evicted_for_a_model_that_is_not_there(make_cache: MakeCache) -> None:
    """A victim goes only when it is known to be needed: not for a model that the source lacks, or that is damaged."""
    source = DictSource({"broken": b"no archive"}).add("a")
    book = Book()
    cache = make_cache(source, book, memory={"max_models": 1})
    cache.get("a")
    for model in ("nope", "broken"):
        with pytest.raises(Exception, match=model):
            cache.get(model)
    assert book.alive == ["a"]


def test_gauge_that_does_not_fall_does_not_empty_the_cache(make_cache: MakeCache) -> None:
    """Where eviction frees nothing, what grew is not the cache's: it stops evicting and keeps serving."""
    book = Book()
    gauge = FakeGauge(0, 1000)
    source = DictSource().add(*(f"m{number}" for number in range(40)), size=10)
    cache = make_cache(source, book, memory={"high": 800, "gauge": gauge, "interval": 0.01})
    for number in range(40):
        cache.get(f"m{number}")
    gauge.used = 900
    eventually(lambda: cache.stats().evictions >= 3)
    for _ in range(5):
        cache.get(book.alive[-1])
    looks = threading.Event()
    looks.wait(0.2)
    assert len(book.alive) > 20


# Budget and count


def test_budget_bounds_the_footprints(make_cache: MakeCache) -> None:
    """``budget`` bounds what the models' footprints add up to, whatever the gauge reads."""
    book = Book()
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"budget": 250, "gauge": FakeGauge(0)})
    for model in "abcde":
        cache.get(model)
        assert cache.stats().memory_models <= 250
    assert book.alive == ["d", "e"]
    assert {event.reason for event in cache.history() if isinstance(event, Evicted)} == {"memory budget"}


def test_max_models_counts_loading_ones(make_cache: MakeCache, spawn: Spawn) -> None:
    """``max_models`` counts models in memory, loading and unloading: never more at any moment."""
    most: list[int] = []
    lock = threading.Lock()
    inside: set[str] = set()

    def load(path: Path, model: str) -> str:
        with lock:
            inside.add(model)
            most.append(len(inside))
        return model

    def unload(model: str) -> None:
        with lock:
            inside.remove(model)

    book = Book(load, unload)
    cache = make_cache(book=book, memory={"max_models": 2, "interval": 0.02}, timeout=None, loaders=4)
    futures = [spawn(lambda: [cache.get(model) for model in "abcdefgh"]) for _ in range(3)]
    futures += [spawn(lambda: [cache.get(model) for model in "hgfedcba"])]
    for future in futures:
        future.result(WAIT)
    assert max(most) == 2


def test_unloading_counts(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model whose ``unload=`` runs still takes its place: a newcomer waits for its end."""
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(book=book, memory={"max_models": 1, "interval": NEVER})
        cache.get("a")
        dropped = spawn(cache.unload, "a")
        gate.wait()
        newcomer = spawn(cache.get, "b")
        eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
        assert book.loads == ["a"]
    assert dropped.result(WAIT)
    assert newcomer.result(WAIT).model == "b"


def test_lookup_of_a_model_in_memory_needs_no_room(make_cache: MakeCache) -> None:
    """Whatever the limits, a model that is in memory is served."""
    book = Book()
    gauge = book.gauge()
    cache = make_cache(book=book, memory={"high": 800, "gauge": gauge, "interval": NEVER})
    cache.get("a")
    gauge.used = 990
    with cache.lease("a") as model:
        assert cache.get("a") is model


# Who goes


def test_lru(make_cache: MakeCache) -> None:
    """LRU, the default: the least recently used goes first, and hits count as use."""
    cache = make_cache(memory={"max_models": 3})
    for model in "abcab":
        cache.get(model)
    cache.get("d")
    with cache.lease("a"):
        pass
    cache.get("e")
    assert evicted(cache) == ["c", "b"]


def test_lfu(make_cache: MakeCache) -> None:
    """LFU: the least often used goes first."""
    cache = make_cache(memory={"max_models": 3, "policy": "lfu"})
    for model in "aaabbbcc":
        cache.get(model)
    cache.get("d")
    assert evicted(cache) == ["c"]
    cache.get("e")
    assert evicted(cache) == ["c", "d"]


def test_fifo(make_cache: MakeCache) -> None:
    """FIFO: the first to come goes first, however often it is used."""
    cache = make_cache(memory={"max_models": 3, "policy": "fifo"})
    for model in "abcaaaa":
        cache.get(model)
    cache.get("d")
    cache.get("e")
    assert evicted(cache) == ["a", "b"]


class Alphabetical:
    """A policy of the user's own: the first in the alphabet goes first."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def requested(self, model: str, clock: int) -> None:
        """Note it."""
        self.told.append(("requested", model))

    def admitted(self, resident: Resident) -> None:
        """Note it."""
        self.told.append(("admitted", resident.model))

    def removed(self, model: str) -> None:
        """Note it."""
        self.told.append(("removed", model))

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Return them in order."""
        return sorted(evictable)


def test_own_policy(make_cache: MakeCache) -> None:
    """A policy object decides, and hears of each request, arrival and departure."""
    policy = Alphabetical()
    cache = make_cache(memory={"max_models": 2, "policy": policy})
    for model in "cbbda":
        cache.get(model)
    assert evicted(cache) == ["b", "c"]
    cache.unload("d")
    assert in_memory(cache) == ["a"]
    assert [what for what in policy.told if what[1] == "b"] == [
        ("requested", "b"),
        ("admitted", "b"),
        ("requested", "b"),
        ("removed", "b"),
    ]
    assert ("removed", "d") in policy.told


def test_own_policy_that_raises(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """A policy that raises does not stop eviction: LRU fills the gap, and the log says so."""

    class Broken(Alphabetical):
        def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
            raise RuntimeError("no idea")

    cache = make_cache(memory={"max_models": 2, "policy": Broken(), "interval": 0.02})
    for model in "cab":
        cache.get(model)
    assert evicted(cache) == ["c"]
    eventually(lambda: "no idea" in caplog.text, 3)


def test_leased_models_are_passed_over_without_change_of_standing(make_cache: MakeCache) -> None:
    """A leased model is passed over and keeps its place: once released it is the next to go."""
    cache = make_cache(memory={"max_models": 3})
    for model in "abc":
        cache.get(model)
    lease = cache.lease("a")
    lease.acquire()
    for model in "bc":
        cache.get(model)
    cache.get("d")
    assert evicted(cache) == ["b"]
    lease.release()
    cache.get("e")
    assert evicted(cache) == ["b", "a"]


def test_a_model_just_loaded_is_no_victim_before_its_callers_have_it(make_cache: MakeCache, spawn: Spawn) -> None:
    """Each caller that waited gets its model, however tight the room: nobody finds it evicted before."""
    cache = make_cache(memory={"max_models": 1, "interval": 0.02}, timeout=None)

    def ask(model: str) -> bool:
        for _ in range(10):
            with cache.lease(model) as value:
                assert value.model == model
                assert model in in_memory(cache)
        return True

    assert all(future.result(WAIT) for future in [spawn(ask, model) for model in "abc"])


# Footprints


def test_size_of_is_the_footprint(make_cache: MakeCache) -> None:
    """``size_of(id, path)`` says what a model takes before its first load, and is what its row shows."""
    seen: list[tuple[str, bool]] = []

    def size_of(model: str, path: Path) -> int:
        seen.append((model, (path / "model.txt").exists()))
        return 100

    cache = make_cache(size_of=size_of, memory={"budget": 250})
    for model in "abc":
        cache.get(model)
    assert evicted(cache) == ["a"]
    assert seen == [("a", True), ("b", True), ("c", True)]
    assert [row.bytes for row in cache.models() if row.tier == "memory"] == [100, 100]
    assert {event.bytes for event in cache.history() if isinstance(event, Loaded)} == {100}


def test_size_of_nothing_is_a_size(make_cache: MakeCache) -> None:
    """``size_of`` may say 0."""
    cache = make_cache(size_of=lambda model, path: 0, memory={"budget": 1})
    assert cache.get("a").model == "a"
    assert cache.get("b").model == "b"


def test_footprint_is_measured(make_cache: MakeCache) -> None:
    """What the gauge grows by during a load that runs alone is the model's footprint, where that is more."""
    mib = 2**20
    gauge = FakeGauge(0, 1000 * mib)

    def load(path: Path, model: str) -> str:
        gauge.used = 300 * mib
        return model

    cache = make_cache(book=Book(load), memory={"gauge": gauge, "interval": NEVER})
    cache.get("a")
    (row,) = cache.models()
    assert row.bytes == 300 * mib


def test_too_large_for_memory_by_size_of(make_cache: MakeCache) -> None:
    """A model that size_of says can never fit is TooLarge, with what it needs and what there is."""
    book = Book()
    cache = make_cache(book=book, size_of=lambda model, path: 900, memory={"high": 800, "gauge": FakeGauge(0)})
    with pytest.raises(TooLarge) as caught:
        cache.get("a")
    assert (caught.value.tier, caught.value.need, caught.value.limit) == ("memory", 900, 800)
    assert book.loads == []


def test_no_room_that_is_nobodys_lease(make_cache: MakeCache) -> None:
    """Where what is used is not the cache's, NoRoom says how little of it is models, and comes at once."""
    gauge = FakeGauge(795, 1000)
    cache = make_cache(memory={"high": 800, "gauge": gauge, "interval": NEVER}, timeout=None)
    with pytest.raises(NoRoom, match=r"'a'.*memory\.high") as caught:
        cache.get("a")
    error = caught.value
    assert (error.tier, error.need, error.used, error.limit, error.holders) == ("memory", 10, 795, 800, ())
    gauge.used = 700
    assert cache.get("a").model == "a"


def test_no_room_names_the_holders(make_cache: MakeCache) -> None:
    """NoRoom lists who holds what, oldest lease first."""
    cache = make_cache(memory={"max_models": 2, "interval": 0.01}, timeout=None)
    with cache.lease("a"), cache.lease("b"), cache.lease("b"), pytest.raises(NoRoom) as caught:
        cache.get("c")
    assert sorted(holder[:2] for holder in caught.value.holders) == [("a", 1), ("b", 2)]
    ages = [holder[2] for holder in caught.value.holders]
    assert ages == sorted(ages, reverse=True)


# The monitor


@pytest.mark.parametrize("known", [False, True], ids=["guessed sizes", "known sizes"])
def test_monitor_evicts_down_to_low(make_cache: MakeCache, known: bool) -> None:
    """Growth from outside above ``high`` is answered by evicting down to ``low``, not just to ``high``."""
    book = Book()
    outside = [0]
    gauge = FakeGauge(lambda: book.bytes + outside[0], 1000)
    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(
        source,
        book,
        memory={"high": 800, "low": 500, "gauge": gauge, "interval": 0.02},
        size_of=(lambda model, path: 100) if known else None,
    )
    for model in "abcdefgh":
        cache.get(model)
    assert len(book.alive) == 8
    outside[0] = 50
    eventually(lambda: gauge.read().used <= 500, 3)
    assert book.alive == list("efgh")
    reasons = {event.reason for event in cache.history() if isinstance(event, Evicted)}
    assert reasons == {"watermark"}


def test_monitor_leaves_alone_what_is_between_low_and_high(make_cache: MakeCache) -> None:
    """Between ``low`` and ``high`` nothing is evicted: that is the hysteresis."""
    book = Book()
    looks = [0]

    def used() -> int:
        looks[0] += 1
        return book.bytes

    source = DictSource().add(*"abcdefgh", size=100)
    cache = make_cache(source, book, memory={"high": 800, "low": 100, "gauge": FakeGauge(used), "interval": 0.01})
    for model in "abcdefgh":
        cache.get(model)
    seen = looks[0]
    eventually(lambda: looks[0] > seen + 5)
    assert len(book.alive) == 8


def test_monitor_passes_over_leased_models(make_cache: MakeCache) -> None:
    """The monitor never evicts a leased model; with its release it goes, on the releasing thread."""
    book = Book()
    outside = [0]
    gauge = FakeGauge(lambda: book.bytes + outside[0], 1000)
    source = DictSource().add("a", size=400)
    cache = make_cache(source, book, memory={"high": 800, "low": 500, "gauge": gauge, "interval": 0.01})
    with cache.lease("a"):
        outside[0] = 500
        eventually(lambda: cache._desk.short, 3)
        assert book.alive == ["a"]
    assert book.alive == []


def test_monitor_thread_ends_with_the_cache(make_cache: MakeCache) -> None:
    """The monitor starts with the first model and ends with the cache."""
    cache = make_cache()

    def runs() -> bool:
        return any(thread.name == "modelcache-monitor" for thread in threading.enumerate())

    assert not runs()
    cache.get("a")
    assert runs()
    cache.close()
    assert not runs()


# Leaving


def test_unload_runs_once_on_every_way_out(make_cache: MakeCache) -> None:
    """``unload=`` runs exactly once for each load: by eviction, unload(), delete(), a release, tuning and close()."""
    book = Book()
    cache = make_cache(book=book, memory={"max_models": 3})
    for model in "abcd":
        cache.get(model)
    assert book.unloads == ["a"]
    cache.unload("b")
    assert book.unloads == ["a", "b"]
    cache.delete("c")
    assert book.unloads == ["a", "b", "c"]
    with cache.lease("d"):
        cache.unload("d")
        assert book.unloads == ["a", "b", "c"]
    assert book.unloads == ["a", "b", "c", "d"]
    cache.get("e")
    cache.get("f")
    cache.memory.max_models = 1
    assert book.unloads == ["a", "b", "c", "d", "e"]
    cache.close()
    assert book.unloads == ["a", "b", "c", "d", "e", "f"]


def test_model_is_freed_when_it_leaves(make_cache: MakeCache) -> None:
    """After unload() returns the cache keeps no reference to the model."""

    class Big:
        pass

    cache = make_cache(load=lambda path: Big(), unload=None)
    trace = weakref.ref(cache.get("a"))
    assert trace() is not None
    assert cache.unload("a")
    assert trace() is None


def test_model_in_a_cycle_is_freed_when_it_leaves(make_cache: MakeCache) -> None:
    """A model that is part of a reference cycle is collected as part of unload()."""

    class Cyclic:
        def __init__(self) -> None:
            self.me = self

    cache = make_cache(load=lambda path: Cyclic(), unload=None)
    gc.disable()
    try:
        trace = weakref.ref(cache.get("a"))
        assert cache.unload("a")
        assert trace() is None
    finally:
        gc.enable()


def test_evicted_model_is_freed_before_the_next_is_loaded(make_cache: MakeCache) -> None:
    """Room is made before a load: the victim is gone when the newcomer's loader runs."""

    class Big:
        pass

    traces: list[weakref.ref[Big]] = []
    alive: list[int] = []

    def load(path: Path) -> Big:
        alive.append(sum(trace() is not None for trace in traces))
        model = Big()
        traces.append(weakref.ref(model))
        return model

    cache = make_cache(load=load, unload=None, memory={"max_models": 1})
    for model in "abc":
        cache.get(model)
    assert alive == [0, 0, 0]


def test_reclaimed_says_what_came_back(make_cache: MakeCache) -> None:
    """Reclaimed compares what a batch promised with what the gauge fell by, and says whether that was enough."""
    book = Book()
    gauge = FakeGauge(lambda: book.bytes + 7 * len(book.unloads), 1000)
    source = DictSource().add(*"abcd", size=100).add("big", size=300)
    cache = make_cache(
        source,
        book,
        memory={"high": 400, "gauge": gauge, "interval": NEVER},
        size_of=lambda m, path: 300 if m == "big" else 100,
    )
    for model in "abcd":
        cache.get(model)
    heard: list[Event] = []
    cache.on(Event, heard.append)
    cache.get("big")
    batches = [event for event in heard if isinstance(event, Reclaimed)]
    gone = [event for event in heard if isinstance(event, Evicted)]
    assert sum(event.models for event in batches) == len(gone)
    assert sum(event.promised for event in batches) == sum(event.bytes or 0 for event in gone)
    assert sum(event.freed for event in batches) == 93 * len(gone)
    assert batches[-1].used is not None
    assert batches[-1].used < 400
    assert str(batches[-1]).endswith(f"used {batches[-1].used} B of 400 B")
    assert str(gone[-1]).endswith("+ 300 B for 'big' > 400 B")


def test_unload_runs_on_the_thread_that_caused_it(make_cache: MakeCache) -> None:
    """``unload=`` runs on the thread that unloads or releases, before that call returns."""
    threads: list[int] = []
    cache = make_cache(book=Book(unload=lambda _: threads.append(threading.get_ident())))
    cache.get("a")
    cache.unload("a")
    with cache.lease("b"):
        cache.unload("b")
    assert threads == [threading.get_ident()] * 2


def test_unloaded_after_evicted(make_cache: MakeCache) -> None:
    """An eviction is told before the model has left, Unloaded after."""
    book = Book()
    cache = make_cache(book=book, memory={"max_models": 1})
    seen: list[tuple[str, int]] = []
    cache.on(Evicted, lambda event: seen.append(("evicted", len(book.unloads))))
    cache.on(Unloaded, lambda event: seen.append(("unloaded", len(book.unloads))))
    cache.get("a")
    cache.get("b")
    assert seen == [("evicted", 0), ("unloaded", 1)]
