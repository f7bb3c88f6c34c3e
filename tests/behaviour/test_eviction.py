"""What follows an eviction: who is rescued, what lingers, what is told of memory that does not come back.

Whom it hits, and why, is in ``test_admission`` and ``test_memory_tier``; the events themselves are in ``test_pressure``
too, and real memory is in ``faults/test_memory_faults``.
"""

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from modelcache import Evicted, NoRoom, Pressure, Reason, Reclaimed, Thrashing, Unloaded, heap
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Gate, Spawn, eventually

NEVER = 1000.0  # seconds between two looks of a monitor that is to stay out of a test


class Thing:
    """A model that can be referenced weakly."""


def heard(cache: Any, *kinds: type) -> list[Any]:
    """Return a list that fills with the events of these kinds."""
    events: list[Any] = []
    for kind in kinds:
        cache.on(kind, events.append)
    return events


def row(cache: Any, model: str) -> Any:
    """Return the model's row."""
    return next(info for info in cache.models() if info.model == model)


def passed(looks: int) -> Callable[[], bool]:
    """Return what is true once ``eventually`` has asked it so many times."""
    count = itertools.count()
    return lambda: next(count) > looks


# Rescue


@pytest.fixture
def batch(make_cache: MakeCache, spawn: Spawn) -> Iterator[Any]:
    """Give a cache in the middle of an eviction of a, b and c of a to d, where ``unload=`` of a stands still."""
    with Gate() as gate:
        book = Book(unload=lambda model: gate() if model.model == "a" else None)
        cache = make_cache(
            DictSource().add(*"abcd"), book, size_of=lambda model, path: 100, memory={"gauge": FakeGauge()}
        )
        told = heard(cache, Evicted, Unloaded, Reclaimed)
        for model in "abcd":
            cache.get(model)
        lowering = spawn(setattr, cache.memory, "max_models", 1)
        gate.wait()

        def end() -> list[Any]:
            gate.open()
            lowering.result()
            return told

        yield cache, book, end


def test_rescued_model_was_never_away(batch: Any) -> None:
    """Who asks for a victim before its unload begins gets that very model: no load, no event, its hits go on."""
    cache, book, end = batch
    cache.get("d")
    with cache.lease("b") as model:
        assert model.model == "b"
        with cache.lease("b") as same:
            assert same is model
        told = end()
        assert book.alive == ["b"]
    assert book.loads == list("abcd")
    assert not [event for event in told if event.model == "b"]
    assert row(cache, "b").hits == 2
    assert "evicted" not in cache.explain("b")


def test_rescue_by_prefetch(batch: Any) -> None:
    """A prefetch of a victim whose unload has not begun brings it back at once."""
    cache, book, end = batch
    assert cache.prefetch(["b"]).wait(1)
    assert row(cache, "b").state == "in memory"
    end()
    assert book.loads == list("abcd")


def test_rescued_model_promises_nothing(batch: Any) -> None:
    """What a batch promised, and how many it evicted, leaves out who was rescued from it."""
    cache, _, end = batch
    with cache.lease("b"):
        told = end()
    first = next(event for event in told if isinstance(event, Reclaimed))
    assert (first.models, first.promised) == (2, 200)


def test_rescued_model_that_is_replaced_is_no_reload(batch: Any, make_cache: MakeCache) -> None:
    """A later load of a model that was rescued is no reload: it was never evicted."""
    cache, _, end = batch
    lease = cache.lease("b")
    lease.acquire()
    end()
    cache.memory.max_models = 5
    cache._parts.source.add("b", size=20)
    assert cache.refresh("b")
    lease.release()
    assert cache.stats().reloads == 0


def test_rescued_model_that_leaves_again_is_unloaded_once(batch: Any) -> None:
    """A victim that was rescued and then unloaded, while its batch still goes on, leaves once and is told once."""
    cache, book, end = batch
    cache.get("b")
    assert cache.unload("b")
    told = end()
    assert book.unloads.count("b") == 1
    assert [(type(event), event.reason) for event in told if event.model == "b"] == [(Unloaded, "unload")]
    first = next(event for event in told if isinstance(event, Reclaimed))
    assert (first.models, first.promised) == (2, 200)


def test_unload_that_has_begun_is_no_rescue(make_cache: MakeCache, spawn: Spawn) -> None:
    """Who asks for a model whose ``unload=`` runs gets a new one, once that is over."""
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(
            DictSource().add("a", "b"), book, memory={"max_models": 1, "gauge": FakeGauge(), "interval": 0.05}
        )
        cache.get("a")
        evicting = spawn(cache.get, "b")
        gate.wait()
        again = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 2)
        assert book.loads == ["a"]
    assert evicting.result().model == "b"
    assert again.result().model == "a"
    assert book.loads.count("a") == 2


@pytest.mark.parametrize("order", ["unload", "delete"])
def test_what_was_ordered_to_go_is_not_rescued(make_cache: MakeCache, spawn: Spawn, order: str) -> None:
    """A model that somebody unloads or deletes leaves, whoever asks meanwhile; the new one is another object."""
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(DictSource().add("a"), book, memory={"gauge": FakeGauge(), "interval": 0.05})
        old = cache.get("a")
        dropping = spawn(getattr(cache, order), "a")
        gate.wait()
        again = spawn(cache.get, "a")
    assert dropping.result() in {True, False}
    assert again.result() is not old
    assert book.loads == ["a", "a"]


# Who still holds it


def test_lingering_ages_and_goes(make_cache: MakeCache) -> None:
    """Earlier loads that somebody references are counted and aged beside the model's new load, until they are gone."""
    cache = make_cache(
        DictSource().add("a"), load=lambda path: Thing(), unload=None, memory={"gauge": FakeGauge(), "interval": NEVER}
    )
    held = []
    for _ in range(2):
        held.append(cache.get("a"))
        cache.unload("a")
    cache.get("a")
    info = row(cache, "a")
    assert (info.tier, info.lingering) == ("memory", 2)
    assert cache.stats().lingering == 2
    assert cache.stats().lingering_bytes == 2 * info.bytes
    eventually(lambda: row(cache, "a").lingering_for > 0.05)
    held.pop(0)
    young = row(cache, "a")
    assert young.lingering == 1
    assert young.lingering_for < row(cache, "a").lingering_for
    held.clear()
    assert cache.stats().lingering == cache.stats().lingering_bytes == 0


def test_what_no_longer_lingers_is_forgotten(make_cache: MakeCache) -> None:
    """Models that lingered for a moment leave nothing behind, though nobody ever looks."""
    cache = make_cache(
        DictSource().add("a"), load=lambda path: Thing(), unload=None, memory={"gauge": FakeGauge(), "interval": NEVER}
    )
    for _ in range(20):
        held = cache.get("a")
        cache.unload("a")
        del held
    assert len(cache._parts.residents.lingering._all) <= 2


def test_looking_at_lingering_keeps_nothing_alive(make_cache: MakeCache) -> None:
    """``models()``, ``stats()`` and ``explain()`` never hold a model that lingers."""
    cache = make_cache(
        DictSource().add("a"), load=lambda path: Thing(), unload=None, memory={"gauge": FakeGauge(), "interval": NEVER}
    )
    held = cache.get("a")
    seen = weakref.ref(held)
    cache.unload("a")
    cache.models()
    cache.stats()
    cache.explain("a")
    del held
    assert seen() is None


# Models in cycles: F012


class Direct:
    """A model in a cycle of its own."""

    def __init__(self) -> None:
        self.call = self.run

    def run(self) -> None:
        """Do nothing."""


class Slotted:
    """A model in a cycle, which can't be referenced weakly."""

    __slots__ = ("inner", "me")

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.me = self


class Wrapper:
    """A model in no cycle, around one that is."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


CYCLES: dict[str, Callable[[Direct], Any]] = {
    "direct": lambda inner: inner,
    "inside": Wrapper,
    "dict": lambda inner: {"weights": inner},
    "list": lambda inner: [inner],
    "slots": Slotted,
}


@pytest.mark.parametrize("kind", CYCLES)
@pytest.mark.parametrize("collector", [True, False], ids=["gc on", "gc off"])
def test_f012_cycles_give_way_to_the_next(make_cache: MakeCache, kind: str, *, collector: bool) -> None:
    """F012: memory of evicted models in cycles, wherever in the model these are, is there for the next load."""
    alive: list[Any] = []

    def load(path: Path) -> Any:
        inner = Direct()
        alive.append(weakref.ref(inner))
        return CYCLES[kind](inner)

    def used() -> int:
        return 100 * sum(one() is not None for one in alive)

    cache = make_cache(
        DictSource().add(*"abcdef"),
        load=load,
        unload=None,
        size_of=lambda model, path: 100,
        memory={"gauge": FakeGauge(used), "high": 300, "low": 300, "interval": 0.05},
    )
    most = []
    if not collector:
        gc.disable()
    try:
        for model in "abcdef":
            cache.get(model)
            most.append(used())
    finally:
        gc.enable()
    assert max(most) == 300
    assert cache.stats().evictions == 3


def cache_of_rings(make_cache: MakeCache, models: str, kind: str, **settings: Any) -> tuple[Any, Callable[[], int]]:
    """Return a cache with models in cycles loaded, a GiB of its gauge each while it lives, and how many live."""
    alive: list[Any] = []

    def load(path: Path) -> Any:
        inner = Direct()
        alive.append(weakref.ref(inner))
        return CYCLES[kind](inner)

    def living() -> int:
        return sum(one() is not None for one in alive)

    gauge = FakeGauge(lambda: living() << 30, 8 << 30)
    memory = {"gauge": gauge, "interval": NEVER}
    cache = make_cache(DictSource().add(*models), load=load, unload=None, memory=memory, **settings)
    for model in models:
        cache.get(model)
    return cache, living


def test_f012_loads_larger_than_expected_keep_no_cycles(make_cache: MakeCache) -> None:
    """F012: looks in vain for garbage of loads, as they took more than expected, delay none for evicted models."""
    cache, _ = cache_of_rings(make_cache, "abcd", "direct")
    told: list[Any] = []
    cache.on(Reclaimed, told.append)
    gc.disable()
    try:
        cache.memory.high = "2 GiB"
    finally:
        gc.enable()
    assert sum(event.freed for event in told) == 2 << 30
    assert cache.stats().evictions == 2


def test_f012_cycles_are_found_that_could_not_be_looked_for(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F012: models leave, and cycles in them are collected, though memory was out when the models were looked at."""
    cache, _ = cache_of_rings(make_cache, "abcd", "dict", size_of=lambda model, path: 1 << 30)
    told: list[Any] = []
    cache.on(Reclaimed, told.append)

    def short(*parts: object) -> list[Any]:
        raise MemoryError

    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(gc, "get_referents", short)
            cache.memory.high = "2 GiB"
    finally:
        gc.enable()
    assert sum(event.freed for event in told) == 2 << 30
    assert cache.stats().evictions == 2


def test_f012_no_collection_is_in_vain_that_nothing_tells_of(make_cache: MakeCache) -> None:
    """F012: after a collection for a part of a model, which can't be seen to help, cycles are looked for as before."""
    cache, living = cache_of_rings(make_cache, "abcdef", "dict", size_of=lambda model, path: 1 << 30)
    gc.disable()
    try:
        cache.memory.max_models = 5
        for high in (5, 4, 3):
            cache.memory.high = (high << 30) - 1
            assert living() == cache.stats().models == high - 1
    finally:
        gc.enable()


# What does not come back


def test_pressure_once_an_episode(make_cache: MakeCache) -> None:
    """While evicting does not help there is one event, with its figures; the next episode has its own."""
    book = Book()
    gauge = FakeGauge(0, 1000)
    names = [f"m{number}" for number in range(48)]
    cache = make_cache(
        DictSource().add(*names),
        book,
        size_of=lambda model, path: 13,  # a little more than a 64th of what is allowed: each is a round of its own
        memory={"high": 800, "low": 700, "gauge": gauge, "interval": 0.01},
    )
    told = heard(cache, Pressure)
    for name in names:
        cache.get(name)
    for episode in (1, 2):
        gauge.used = 900
        eventually(lambda number=episode: len(told) == number)
        assert cache.stats().pressed
        left = len(book.alive)
        eventually(passed(3))
        assert len(book.alive) >= left - 1
        event = told[-1]
        assert (event.reason, event.used, event.freed, event.high) == (Reason.FUTILE, 900, 0, 800)
        assert event.promised >= 30
        assert event.lingering >= event.promised  # the book keeps what it has booked
        assert event.foreign >= 250
        readings = [100] * 10
        gauge.used = lambda left=readings: left.pop() if len(left) > 1 else left[0]
        eventually(lambda left=readings: len(left) == 1)  # the monitor has seen it
        assert not cache.stats().pressed
    assert len(told) == 2


def test_pressure_says_what_lingers(make_cache: MakeCache) -> None:
    """Where the evicted models are still held by somebody, the event says how much that is."""
    held: list[Any] = []

    def load(path: Path) -> Thing:
        held.append(Thing())
        return held[-1]

    cache = make_cache(
        DictSource().add(*"abcdefgh"),
        load=load,
        unload=None,
        size_of=lambda model, path: 100,
        memory={"high": 800, "low": 100, "gauge": FakeGauge(lambda: 100 + 100 * len(held)), "interval": 0.02},
    )
    told = heard(cache, Pressure)
    for model in "abcdefg":
        cache.get(model)
    with pytest.raises(NoRoom, match="evicting did not help"):
        cache.get("h", timeout=5.0)
    (event,) = told
    assert event.lingering >= 300
    assert event.lingering == cache.stats().lingering_bytes
    held.clear()


def test_refusal_names_what_lingers(make_cache: MakeCache) -> None:
    """Where evicted models that somebody still holds are in the way, the refusal says so."""
    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    def load(path: Any, model: str) -> Thing:
        alive.add(made := Thing())
        return made

    book = Book(load=load)
    cache = make_cache(
        DictSource().add("a", "b"),
        book,
        size_of=lambda model, path: 100,
        memory={"high": 150, "gauge": FakeGauge(lambda: 100 * len(alive)), "interval": 0.02},
    )
    kept = cache.get("a")
    with pytest.raises(NoRoom, match="somebody still references evicted models of 100 B") as refused:
        cache.get("b", timeout=1)
    assert "without any model" not in str(refused.value)
    assert kept in alive


def test_newcomer_waits_for_a_request_about_to_end(make_cache: MakeCache, spawn: Spawn) -> None:
    """Who needs the room of an evicted model that is still in a request's variable waits, and gets it at its end."""
    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    def load(path: Path) -> Thing:
        alive.add(made := Thing())
        return made

    cache = make_cache(
        DictSource().add("a", "b"),
        load=load,
        unload=None,
        size_of=lambda model, path: 100,
        memory={"high": 150, "gauge": FakeGauge(lambda: 100 * len(alive)), "interval": 0.02},
    )
    leased, answered = threading.Event(), threading.Event()

    def request() -> None:
        with cache.lease("a") as model:
            pass
        leased.set()
        answered.wait(10)
        del model

    first = spawn(request)
    assert leased.wait(10)
    second = spawn(lambda: cache.get("b", timeout=10.0))
    eventually(lambda: any(info.state == "waiting for room" for info in cache.models()) and cache.stats().lingering)
    answered.set()
    first.result()
    assert second.result() in alive


def test_frozen_cycles_linger(make_cache: MakeCache) -> None:
    """A model in a cycle that was loaded before ``gc.freeze()`` can't be collected: it is counted for as long."""

    def load(path: Any, model: str) -> Thing:
        made = Thing()
        made.me = made  # type: ignore[attr-defined]
        return made

    cache = make_cache(
        DictSource().add("a", "b"), Book(load=load), size_of=lambda model, path: 100, memory={"max_models": 1}
    )
    cache.get("a")
    gc.freeze()
    try:
        cache.get("b")
        assert row(cache, "a").lingering == 1
        assert cache.stats().lingering_bytes == 100
    finally:
        gc.unfreeze()


def test_f013_leaking_loads_are_served_on(make_cache: MakeCache) -> None:
    """F013: where each load leaks a part of what it took, models pass through until room is gone; then it says so."""
    leaked = [0]
    book = Book()
    names = [f"m{number}" for number in range(40)]
    cache = make_cache(
        DictSource().add(*names),
        book,
        size_of=lambda model, path: 100,
        memory={
            "high": 800,
            "low": 700,
            "gauge": FakeGauge(lambda: 100 * len(book.alive) + leaked[0]),
            "interval": 0.02,
        },
    )
    served = 0
    for name in names:
        try:
            cache.get(name, timeout=1.0)
        except NoRoom as error:
            refused = error
            break
        leaked[0] += 20
        served += 1
    assert served >= 35
    assert book.alive == [] or refused is not None
    assert "evicting did not help" in str(refused) or "without any model" in str(refused)


# Idle models and old leases


def test_lease_is_use_to_its_end(make_cache: MakeCache) -> None:
    """``idle_after`` counts from the end of a lease, not from its beginning."""
    cache = make_cache(DictSource().add("a"), memory={"gauge": FakeGauge(), "idle_after": 0.4, "interval": 0.02})
    lease = cache.lease("a")
    lease.acquire()
    never = threading.Event()
    never.wait(0.6)
    lease.release()
    never.wait(0.1)
    assert cache.stats().models == 1
    eventually(lambda: cache.stats().models == 0)


def test_old_lease_of_a_replaced_version(make_cache: MakeCache) -> None:
    """A lease on a version that was replaced is told for that version only, once."""
    source = DictSource().add("a")
    cache = make_cache(source, memory={"gauge": FakeGauge(), "lease_warning": 0.2, "interval": 0.02})
    told = heard(cache, Pressure)
    with cache.lease("a"):
        eventually(lambda: told)
        source.add("a", size=20)
        assert cache.refresh("a")
        with cache.lease("a"):
            eventually(passed(4))
            assert len(told) == 1


def test_lease_warning_may_be_off(make_cache: MakeCache) -> None:
    """Without ``lease_warning`` nothing is told of a lease, while its age is known."""
    cache = make_cache(DictSource().add("a"), memory={"gauge": FakeGauge(), "lease_warning": None, "interval": 0.01})
    told = heard(cache, Pressure)
    with cache.lease("a"):
        eventually(passed(6))
        assert "the oldest for 0.0" not in cache.explain("a")
    assert told == []


# Thrashing


def test_f020_two_models_that_do_not_fit_together(make_cache: MakeCache, spawn: Spawn) -> None:
    """F020: four threads alternate between two models in room for one: all are served, and it is told once."""
    pause = threading.Event()
    book = Book(load=lambda path, model: pause.wait(0.01) or Thing())
    cache = make_cache(
        DictSource().add("a", "b"),
        book,
        size_of=lambda model, path: 600,
        memory={"budget": 1000, "interval": 0.02, "request_seconds": 0.0001, "gauge": FakeGauge()},
    )
    told = heard(cache, Thrashing)

    def ask() -> int:
        for _ in range(6):
            for model in "ab":
                cache.get(model)
        return 1

    assert sum(asking.result() for asking in [spawn(ask) for _ in range(4)]) == 4
    while len(book.loads) < 14:
        cache.get("a")
        cache.get("b")
    eventually(lambda: told)
    (event,) = told
    assert event.reason is Reason.SWAPPING
    assert event.share > 0.5
    assert {model for model, _ in event.worst} == {"a", "b"}
    assert cache.stats().thrashing


def test_f020_hits_go_on_while_another_loads(make_cache: MakeCache, spawn: Spawn) -> None:
    """F020: while a model loads in the room that is left, hits on another one go on."""
    with Gate("b") as gate:
        book = Book()
        book.gate = gate
        cache = make_cache(
            DictSource().add("a", "b"), book, size_of=lambda model, path: 400, memory={"budget": 1000, "interval": 0.05}
        )
        cache.get("a")
        loading = spawn(cache.get, "b")
        gate.wait()
        for _ in range(100):
            assert cache.get("a", timeout=0.1).model == "a"
    assert loading.result().model == "b"
    assert book.loads == ["a", "b"]


def test_interrupt_before_a_model_is_freed_leaves_none_behind(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a model waits for its turn to be freed is passed on once all of its batch have left."""
    book = Book()
    cache = make_cache(DictSource().add("a", "b", "c"), book, memory={"gauge": FakeGauge(0)})
    for model in "abc":
        cache.get(model)
    freeing, stops = heap.freeing, [KeyboardInterrupt()]

    def stopped() -> AbstractContextManager[None]:
        if stops:
            raise stops.pop()
        return freeing()

    monkeypatch.setattr(heap, "freeing", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache.memory.budget = 1
    assert book.alive == []
    assert cache.stats().memory_models == 0  # nor does any count as leaving


def test_an_unload_that_hangs_holds_no_look_up(make_cache: MakeCache, spawn: Spawn) -> None:
    """While models leave, the monitor waits with its own evictions for one look; then for none that stands still."""
    gate = Gate(only="a")
    book = Book(unload=lambda model: gate(model.model))
    gauge = FakeGauge(0, 1000)
    cache = make_cache(DictSource().add("a", "b"), book, memory={"gauge": gauge, "high": 800, "interval": 0.05})
    for model in "ab":
        cache.get(model)
    with gate:
        unloading = spawn(cache.unload, "a")
        gate.wait()
        gauge.used = 900
        eventually(lambda: "b" not in book.alive)
        assert not unloading.done()


def test_batch_in_progress_is_left_alone_for_one_look(make_cache: MakeCache, spawn: Spawn) -> None:
    """What leaves just now may be what lacks: the monitor's next look evicts nothing, the one after that does."""
    gate = Gate(only="a")
    book = Book(unload=lambda model: gate(model.model))
    gauge = FakeGauge(0, 1000)
    cache = make_cache(DictSource().add("a", "b"), book, memory={"gauge": gauge, "high": 800, "interval": 1000.0})
    look = cache._parts.room.look
    for model in "ab":
        cache.get(model)
    look()
    with gate:
        unloading = spawn(cache.unload, "a")
        gate.wait()
        gauge.used = 900
        look()
        assert "b" in book.alive
        look()
        assert "b" not in book.alive
        assert not unloading.done()
