"""What the memory tier does when memory does not come back, and what it says of it."""

import contextlib
import gc
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from modelcache import Evicted, NoRoom, Pressure, Reason, Reclaimed, Thrashing, Unloaded
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Gate, Spawn, eventually


def heard(cache: Any, kind: type) -> list[Any]:
    """Return a list that fills with the events of one kind."""
    events: list[Any] = []
    cache.on(kind, events.append)
    return events


def test_one_pressure_an_episode(make_cache: MakeCache) -> None:
    """Where evicting frees nothing, one event says so with its figures, and most models stay."""
    book = Book()
    gauge = FakeGauge(0, 1000)
    source = DictSource().add(*(f"m{number}" for number in range(40)), size=10)
    cache = make_cache(source, book, memory={"high": 800, "gauge": gauge, "interval": 0.01})
    told = heard(cache, Pressure)
    for number in range(40):
        cache.get(f"m{number}")
    gauge.used = 900
    eventually(lambda: told)
    (event,) = told
    assert event.reason is Reason.FUTILE
    assert event.promised > 0
    assert event.freed == 0
    assert event.used == 900
    assert event.high == 800
    assert event.lingering is not None
    assert event.foreign is not None
    assert "evicted" in str(event)
    assert cache.stats().pressed
    assert len(book.alive) > 20
    gauge.used = 100
    eventually(lambda: not cache.stats().pressed)
    assert len(told) == 1


def test_growth_from_outside_is_the_watermark_down_to_low(make_cache: MakeCache) -> None:
    """All that leaves between ``high`` and ``low`` leaves for the watermark, with a reading above ``high``."""
    book, outside = Book(), [0]
    gauge = FakeGauge(lambda: book.bytes + outside[0], 2000)
    cache = make_cache(
        DictSource().add(*"abcdefgh", size=100),
        book,
        memory={"high": 1000, "low": 500, "gauge": gauge, "interval": 0.01},
    )
    for model in "abcdefgh":
        cache.get(model)
    gone, batches = heard(cache, Evicted), heard(cache, Reclaimed)
    outside[0] = 300
    eventually(lambda: batches and batches[-1].used <= 500)
    assert {event.reason for event in [*gone, *batches]} == {Reason.WATERMARK}
    assert all(event.used > event.high for event in gone)


def test_idle_models_go(make_cache: MakeCache) -> None:
    """What nobody used for ``idle_after`` seconds is dropped; what is used, or leased, stays; looking is no use."""
    book = Book()
    cache = make_cache(
        DictSource().add("a", "b", "c"), book, memory={"idle_after": 0.3, "interval": 0.02, "gauge": FakeGauge()}
    )
    told = heard(cache, Evicted)
    for model in "abc":
        cache.get(model)
    with cache.lease("c"):

        def gone() -> bool:
            cache.get("a")
            cache.models()
            cache.explain("b")
            return book.unloads == ["b"]

        eventually(gone)
        assert sorted(book.alive) == ["a", "c"]
    (event,) = told
    assert event.model == "b"
    assert event.reason is Reason.IDLE
    assert event.reason.was_eviction
    assert str(event).endswith("(memory): idle")
    eventually(lambda: not book.alive)
    assert cache.stats().reloads == 0


def test_old_lease_is_told_once(make_cache: MakeCache) -> None:
    """A lease held longer than ``lease_warning`` is told once, with its age; a new one later is told again."""
    cache = make_cache(DictSource().add("a"), memory={"lease_warning": 0.05, "interval": 0.01, "gauge": FakeGauge()})
    told = heard(cache, Pressure)
    with cache.lease("a"):
        eventually(lambda: told)
        (event,) = told
        assert event.model == "a"
        assert event.reason is Reason.OLD_LEASE
        assert event.duration >= 0.05
    again = cache.lease("a")
    again.acquire()
    eventually(lambda: len(told) == 2)
    again.release()


class Thing:
    """A model that can be referenced weakly."""


def test_lingering_is_counted_and_aged(make_cache: MakeCache) -> None:
    """A model that was unloaded while somebody still holds it is counted until it is really gone."""
    cache = make_cache(DictSource().add("a"), load=lambda path: Thing(), unload=None)
    held = cache.get("a")
    assert cache.unload("a")
    assert cache.stats().lingering == 1
    assert cache.stats().lingering_bytes > 0
    (row,) = cache.models()
    assert row.tier == "disk"
    assert row.lingering == 1
    assert row.lingering_for >= 0
    assert "linger" in cache.explain("a")
    del held
    assert cache.stats().lingering == 0
    assert cache.models()[0].lingering == 0


def test_request_rescues_what_has_not_begun_to_leave(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model that waits in a batch of evictions stays if it is asked for before its own unload begins."""
    gate = Gate()
    book = Book(unload=lambda model: gate() if model.model == "a" else None)
    cache = make_cache(
        DictSource().add("a", "b", "c"), book, size_of=lambda model, path: 100, memory={"gauge": FakeGauge()}
    )
    told = heard(cache, Evicted)
    left = heard(cache, Unloaded)
    for model in "abc":
        cache.get(model)
    with gate:
        lowering = spawn(setattr, cache.memory, "max_models", 1)
        gate.wait()
        assert cache.get("b").model == "b"
        assert book.loads == ["a", "b", "c"]
    lowering.result()
    assert book.loads.count("b") == 1
    eventually(lambda: len(book.alive) == 1)
    assert sorted(event.model for event in told) == sorted(event.model for event in left)
    assert cache.stats().evictions == len(told) == 2


def test_thrashing_is_told(make_cache: MakeCache) -> None:
    """Where more time goes into reloads than into serving, that is told with share, rate and worst models."""
    clock = threading.Event()
    book = Book(load=lambda path, model: clock.wait(0.02) or Thing())
    cache = make_cache(
        DictSource().add("a", "b"),
        book,
        memory={"max_models": 1, "interval": 0.02, "request_seconds": 0.0001, "gauge": FakeGauge()},
    )
    told = heard(cache, Thrashing)
    for _ in range(12):
        cache.get("a")
        cache.get("b")
    eventually(lambda: told)
    event = told[0]
    assert event.reason is Reason.SWAPPING
    assert event.share >= 0.5
    assert event.reloads_per_minute >= 10
    assert {model for model, _ in event.worst} == {"a", "b"}
    assert event.memory_needed is None
    stats = cache.stats()
    assert stats.thrashing
    assert stats.reloads >= 10
    assert stats.reload_seconds > 0
    assert stats.regrets > 0


def test_one_that_suffices_is_taken_rather_than_several(make_cache: MakeCache) -> None:
    """Where a later victim alone makes the room, the earlier ones are spared."""
    sizes = {"a": 100, "b": 100, "big": 500, "new": 400}
    book = Book()
    cache = make_cache(DictSource().add(*sizes), book, size_of=lambda model, path: sizes[model], memory={"budget": 700})
    for model in ("a", "b", "big", "new"):
        cache.get(model)
    assert sorted(book.alive) == ["a", "b", "new"]


def test_nothing_goes_where_all_of_it_would_not_suffice(make_cache: MakeCache, spawn: Spawn) -> None:
    """What may go stays where it would not make the room together with what is leased: the newcomer waits."""
    sizes = {"held": 600, "a": 100, "b": 100, "new": 700}
    book = Book()
    cache = make_cache(DictSource().add(*sizes), book, size_of=lambda model, path: sizes[model], memory={"budget": 900})
    lease = cache.lease("held")
    lease.acquire()
    cache.get("a")
    cache.get("b")
    waiting = spawn(cache.get, "new")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    assert sorted(book.alive) == ["a", "b", "held"]
    lease.release()
    assert waiting.result().model == "new"
    assert sorted(book.alive) == ["a", "b", "new"]


def test_memory_error_is_tried_once_more(make_cache: MakeCache) -> None:
    """A load that runs out of memory gets room made, and a second try; one that still does is a typed error."""
    tries: list[str] = []

    def load(path: Any, model: str) -> Any:
        tries.append(model)
        if model == "never" or (model == "tight" and tries.count(model) == 1):
            raise MemoryError("no more")
        return Thing()

    cache = make_cache(
        DictSource().add("a", "tight", "never"),
        Book(load=load),
        size_of=lambda model, path: 100,
        memory={"gauge": FakeGauge(0, 10_000)},
        retry_after=0,
    )
    told = heard(cache, Evicted)
    cache.get("a")
    cache.get("tight")
    assert tries == ["a", "tight", "tight"]
    assert [(event.model, event.reason, event.for_model) for event in told] == [("a", Reason.MEMORY_ERROR, "tight")]
    assert str(told[0]).endswith("(memory): memory error: for 'tight'")
    try:
        cache.get("never")
    except Exception as error:  # noqa: BLE001 - looked at below
        raised = error
    assert type(raised).__name__ == "LoadFailed"
    assert tries.count("never") == 2
    assert cache.stats().memory_reserved == 0


def test_lowering_a_limit_in_vain_empties_nothing(make_cache: MakeCache) -> None:
    """Where memory does not come back, an assignment to ``high`` returns with most models still there."""
    book = Book()
    names = [f"m{number}" for number in range(40)]
    gauge = FakeGauge(700, 1000)
    cache = make_cache(
        DictSource().add(*names), book, memory={"high": 900, "gauge": gauge, "interval": 1000.0, "budget": None}
    )
    told = heard(cache, Pressure)
    for name in names:
        cache.get(name)
    cache.memory.high = 600
    assert len(book.alive) > 20
    assert len(told) == 1


def test_cycles_are_not_looked_for_again_and_again_in_vain(make_cache: MakeCache) -> None:
    """Where a search for cycles brought nothing back, the next is ten seconds later, whatever is wanted meanwhile."""
    gauge = FakeGauge(0, 1000)
    source = DictSource().add(*(f"m{number}" for number in range(60)), size=10)
    cache = make_cache(source, Book(), memory={"high": 800, "gauge": gauge, "interval": 60.0})
    for number in range(60):
        cache.get(f"m{number}")
    gauge.used = 900
    with collections_of_ours() as collections:
        for high in range(799, 789, -1):
            cache.memory.high = high
    assert cache.stats().evictions > 10
    assert len(collections) == 1


@contextmanager
def collections_of_ours() -> Iterator[list[str]]:
    """Give a list that gets an item for each full collection, with Python's own switched off."""
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            collections.append(phase)

    gc.disable()
    gc.callbacks.append(note)
    try:
        yield collections
    finally:
        gc.callbacks.remove(note)
        gc.enable()


def ring() -> list[Any]:
    """Return a list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


def shared() -> dict[str, Any]:
    """Return a model whose parts are held twice, but in no cycle."""
    inner: list[Any] = [["weights"]]
    return {"first": [[inner, inner[0]]], "second": inner}


def dependent() -> dict[str, list[Any]]:
    """Return a model of parts in the order in which they build on each other."""
    layers: dict[str, list[Any]] = {"first": []}
    for number in range(20):
        layers[f"layer {number}"] = [list(layers.values())[-1]]
    return layers


def closure() -> Callable[[], Any]:
    """Return a function that holds a model."""
    weights: list[Any] = [["weights"]]
    return lambda: weights


def recursive() -> dict[str, Callable[[int], Any]]:
    """Return a model with a function that holds the weights, and itself."""
    weights: list[Any] = [["weights"]]

    def predict(depth: int) -> Any:
        return predict(depth - 1) if depth else weights

    return {"predict": predict}


def of_its_own() -> object:
    """Return a model of a class that was made for it: a class is a cycle."""

    class Model:
        weights: ClassVar[list[Any]] = [["weights"]]

    return Model()


def common() -> list[Any]:
    """Return a model with what modules share among all."""
    return [Reason.WATERMARK, logging.getLogger(__name__), re.compile("a+"), ring, Odd, len, [].append]


class Odd(type):
    """A class of classes that can't be looked up in a dict."""

    def __hash__(cls) -> int:
        raise AssertionError


class Inner(metaclass=Odd):
    """A part of a model."""

    def __init__(self) -> None:
        self.whole = self


@pytest.mark.parametrize(
    ("make", "searched"),
    [
        (lambda: b"weights", False),
        (lambda: {f"item {number}": [["weights"], {"of": ["items"]}] for number in range(500)}, False),
        (threading.local, False),
        (shared, False),
        (dependent, False),
        (common, False),
        (closure, False),
        (recursive, True),
        (of_its_own, True),
        (lambda: [ring().append], True),
        (lambda: [Inner()], True),
        (ring, True),
        (lambda: {"deep": [{"inside": (ring(),)}]}, True),
        (lambda: list(range(100_000)), True),  # too large to be looked at
    ],
    ids=[
        *["bytes", "tree", "object", "shared", "dependent", "common", "closure", "recursive", "class", "method"],
        *["odd class", "ring", "ring inside", "large"],
    ],
)
def test_cycles_are_looked_for_where_something_lives_on(
    make_cache: MakeCache, make: Callable[[], Any], *, searched: bool
) -> None:
    """Where memory stays in the heap, a collection, which stalls all threads, is run only if a model left a part."""
    gone: list[Any] = []
    cache = make_cache(
        DictSource().add(*"abcdef"),
        load=lambda path: make(),
        unload=None,
        size_of=lambda model, path: 100,
        memory={"gauge": FakeGauge(lambda: 900 - 40 * len(gone), 3000), "high": 2000, "low": 700, "interval": 60.0},
    )
    told = heard(cache, Reclaimed)
    cache.on(Evicted, gone.append)
    for model in "abcdef":
        cache.get(model)
    with collections_of_ours() as collections:
        cache.memory.high = 800
    assert [(event.promised, event.freed) for event in told] == [(100, 40)] * 3
    assert [event.collected for event in told] == [searched, False, False]
    assert len(collections) == searched


def sized_cache(
    make_cache: MakeCache, book: Book, sizes: dict[str, int], used: Callable[[], int], **memory: Any
) -> Any:
    """Return a cache of models of these sizes, whose gauge shows what ``used`` says of 10,000 bytes."""
    settings = {"gauge": FakeGauge(used, limit=10_000), "policy": "lru", **memory}
    return make_cache(DictSource().add(*sizes), book, size_of=lambda model, path: sizes[model], memory=settings)


def test_large_model_among_small_ones_is_found(make_cache: MakeCache) -> None:
    """Where small models give nothing back, the next batch promises more, so that a large one that does is tried."""
    sizes = {"s1": 20, "s2": 20, "s3": 20, "large": 300, "s4": 20, "s5": 20, "s6": 20, "new": 20}
    book = Book()
    used = lambda: 20 * 4 + 300 * ("large" in book.alive) + 600  # noqa: E731 - of the next line
    cache = sized_cache(make_cache, book, sizes, used, high=2_000, low=900, interval=1000.0)
    told: list[Any] = []
    cache.on(Pressure, told.append)
    for model in list(sizes)[:-1]:
        cache.get(model)
    cache.memory.high = 985  # just above what is in use
    assert cache.get("new", timeout=5.0).model == "new"
    assert "large" not in {info.model for info in cache.models() if info.tier == "memory"}
    assert not told


def test_large_model_goes_before_a_load_is_refused(make_cache: MakeCache) -> None:
    """While evictions rest that did not help, a load takes the place of one that is large enough, rather than none."""
    sizes = {"large": 300} | {f"s{number}": 20 for number in range(12)} | {"new": 20, "more": 20}
    book = Book()
    used = lambda: 600 + 300 * ("large" in book.alive)  # noqa: E731 - of the next line
    cache = sized_cache(make_cache, book, sizes, used, high=2_000, low=500, interval=0.1)
    told, names = heard(cache, Pressure), list(sizes)[:-2]
    for model in names:
        cache.get(model)
    with cache.lease("large"):
        cache.memory.high = 905  # just above what is in use
        with pytest.raises(NoRoom):
            cache.get("new", timeout=5.0)
        assert told
    left = len(book.alive)
    assert cache.get("new", timeout=5.0).model == "new"
    assert "large" not in book.alive
    assert len(book.alive) == left
    assert cache.get("more", timeout=5.0).model == "more"


def test_several_models_go_before_a_load_is_refused(make_cache: MakeCache) -> None:
    """While evictions rest that did not help, just enough go together where no model alone is large enough."""
    sizes = {f"large{number}": 200 for number in range(4)} | {f"s{number}": 20 for number in range(12)}
    sizes |= {"new": 300, "tiny": 20}
    book = Book()
    real = {"large0", "large1"}  # the others' memory never comes back
    used = lambda: 600 + sum(200 for model in real if model in book.alive)  # noqa: E731 - of the next line
    cache = sized_cache(make_cache, book, sizes, used, high=5_000, low=500, interval=0.1)
    told, names = heard(cache, Pressure), list(sizes)[:-2]
    for model in names:
        cache.get(model)
    with contextlib.ExitStack() as leases:
        for number in range(4):
            leases.enter_context(cache.lease(f"large{number}"))
        cache.memory.high = 1_005  # just above what is in use
        with pytest.raises(NoRoom):
            cache.get("tiny", timeout=5.0)
        assert told
    assert cache.get("new", timeout=5.0).model == "new"
    assert not real & set(book.alive)
    assert {"large2", "large3"} <= set(book.alive)


def test_nothing_goes_together_that_is_not_enough(make_cache: MakeCache) -> None:
    """While evictions rest that did not help, a load that all idle models together make no room for costs none."""
    names, book, gauge = [f"m{number}" for number in range(20)], Book(), FakeGauge(300, 1000)
    cache = make_cache(
        DictSource().add(*names, "new", size=10).add("huge", size=400),
        book,
        memory={"high": 900, "gauge": gauge, "interval": 1.0, "low": 500},
    )
    told = heard(cache, Pressure)
    for name in names:
        cache.get(name)
    gauge.used = 899
    with pytest.raises(NoRoom):
        cache.get("new", timeout=30.0)
    assert told
    left = list(book.alive)
    assert left
    for _ in range(2):
        with pytest.raises(NoRoom):
            cache.get("huge", timeout=30.0)
    assert book.alive == left


def test_what_does_not_help_goes_seldom(make_cache: MakeCache) -> None:
    """Loads that are refused while evictions rest cost one larger model, together, where that does not help either."""
    small, large = [f"m{number}" for number in range(20)], ["large1", "large2"]
    book, gauge = Book(), FakeGauge(700, 1000)
    cache = make_cache(
        DictSource().add(*small, "new1", "new2", "new3", size=50).add(*large, size=80),
        book,
        memory={"high": 900, "gauge": gauge, "interval": 1.0, "low": 500},
    )
    told = heard(cache, Pressure)
    for name in (*small, *large):
        cache.get(name)
    gauge.used = 899
    left = []
    for name in ("new1", "new2", "new3"):
        with pytest.raises(NoRoom):
            cache.get(name, timeout=30.0)
        assert told
        left.append([sum(model in names for model in book.alive) for names in (small, large)])
    assert left == [[left[0][0], 1]] * 3
    assert left[0][0] >= 10


def test_one_large_model_hides_nothing(make_cache: MakeCache) -> None:
    """Beside one large leased model, small ones whose leaving does not help stay all the same once that is known."""
    sizes = {"large": 700_000} | {f"small{number}": 7_000 for number in range(20)}
    gauge = FakeGauge(0, limit=1_000_000)
    cache = make_cache(
        DictSource().add(*sizes),
        size_of=lambda model, path: sizes[model],
        memory={"gauge": gauge, "high": 900_000, "low": 800_000, "interval": 0.02},
    )
    pressures: list[Any] = []
    cache.on(Pressure, pressures.append)
    with cache.lease("large"):
        for model in sizes:
            cache.get(model)
        gauge.used = 950_000
        eventually(lambda: pressures)
        assert cache.stats().models > 1
