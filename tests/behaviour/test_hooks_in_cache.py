"""Events of a real cache: which, in which order, with which fields, and that no callback can do harm."""

import json
import threading
from typing import Any

import pytest

from modelcache import (
    Event,
    Evicted,
    Failed,
    Fetched,
    Hit,
    Loaded,
    Missed,
    ModelCache,
    ModelNotFound,
    NoRoom,
    Reclaimed,
    Unloaded,
)
from tests.support.fakes import Book, DictSource, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually, is_unlocked


def story(cache: ModelCache[Any]) -> list[Event]:
    """Register for all events; return the list that they go to."""
    heard: list[Event] = []
    cache.on(Event, heard.append)
    return heard


def names(events: list[Event]) -> list[tuple[str, str | None]]:
    """Return class name and model of each event."""
    return [(type(event).__name__, event.model) for event in events]


def test_story_of_a_miss(make_cache: MakeCache) -> None:
    """A first lookup is told as Missed, Fetched, Loaded, then Hit; all are there when the lookup returns."""
    cache = make_cache()
    heard = story(cache)
    cache.get("a")
    cache.get("a")
    assert names(heard) == [("Missed", "a"), ("Fetched", "a"), ("Loaded", "a"), ("Hit", "a")]


def test_story_of_an_eviction(make_cache: MakeCache) -> None:
    """Room for a newcomer is told as Evicted, Unloaded, Reclaimed between its Fetched and its Loaded."""
    cache = make_cache(memory={"max_models": 1})
    cache.get("a")
    heard = story(cache)
    cache.get("b")
    assert names(heard) == [
        ("Missed", "b"),
        ("Fetched", "b"),
        ("Evicted", "a"),
        ("Unloaded", "a"),
        ("Reclaimed", None),
        ("Loaded", "b"),
    ]


def test_story_of_a_model_on_disk(make_cache: MakeCache) -> None:
    """A model on disk is missed in memory but not fetched."""
    cache = make_cache()
    cache.get("a")
    cache.unload("a")
    heard = story(cache)
    cache.get("a")
    assert names(heard) == [("Missed", "a"), ("Loaded", "a")]
    assert heard[0].tier == "disk"


def test_story_of_a_failure(make_cache: MakeCache) -> None:
    """A failure is told as Missed and Failed; one that is remembered as Missed only."""
    cache = make_cache(retry_after=60)
    heard = story(cache)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            cache.get("nope")
    assert names(heard) == [("Missed", "nope"), ("Failed", "nope"), ("Missed", "nope")]


def test_story_of_unload_delete_and_close(make_cache: MakeCache) -> None:
    """Each way out of memory is told once, as Unloaded with its reason."""
    cache = make_cache()
    for model in "abc":
        cache.get(model)
    heard = story(cache)
    cache.unload("a")
    cache.delete("b")
    cache.close()
    assert [(type(event), event.model, event.reason, event.tier) for event in heard] == [
        (Unloaded, "a", "unload", "memory"),
        (Unloaded, "b", "delete", "memory"),
        (Unloaded, "c", "close", "memory"),
    ]


def test_seq_is_the_order_of_decision(make_cache: MakeCache) -> None:
    """Events carry ascending numbers, from 1, each once."""
    cache = make_cache(memory={"max_models": 2})
    heard = story(cache)
    for model in "abcadbec":
        cache.get(model)
    numbers = [event.seq for event in heard]
    assert numbers[0] == 1
    assert numbers == sorted(set(numbers))


def test_fields(make_cache: MakeCache) -> None:
    """Each event says what its documentation promises."""
    source = DictSource().add("a", "b", size=300)
    book = Book()
    cache = make_cache(source, book, memory={"high": 500, "low": 400, "gauge": book.gauge(), "interval": 1000.0})
    heard = story(cache)
    cache.get("a")
    cache.get("b")
    cache.get("b")
    found = {}
    for event in heard:
        found.setdefault(type(event), []).append(event)
    assert all(event.time > 1_700_000_000 for event in heard)
    missed, fetched, loaded = found[Missed][0], found[Fetched][0], found[Loaded][0]
    assert (missed.model, missed.tier, missed.reason) == ("a", "source", "request")
    assert (fetched.tier, fetched.reason, fetched.bytes) == ("disk", "request", len(source.artifacts["a"]))
    assert fetched.duration is not None
    assert fetched.version == str(hash(source.artifacts["a"]))
    assert (loaded.tier, loaded.reason, loaded.bytes) == ("memory", "request", 300)
    assert (loaded.used, loaded.limit, loaded.high, loaded.low) == (300, 1000, 500, 400)
    assert loaded.duration is not None
    (evicted,) = found[Evicted]
    assert (evicted.model, evicted.tier, evicted.reason, evicted.bytes) == ("a", "memory", "watermark", 300)
    assert (evicted.used, evicted.need, evicted.limit, evicted.high, evicted.low) == (300, 300, 1000, 500, 400)
    assert evicted.for_model == "b"
    (unloaded,) = found[Unloaded]
    assert (unloaded.model, unloaded.tier, unloaded.reason, unloaded.bytes) == ("a", "memory", "evicted", 300)
    assert unloaded.error is None
    assert unloaded.duration is not None
    (reclaimed,) = found[Reclaimed]
    assert (reclaimed.promised, reclaimed.freed, reclaimed.models, reclaimed.used) == (300, 300, 1, 0)
    assert reclaimed.model is None
    (hit,) = found[Hit]
    assert (hit.model, hit.tier) == ("b", "memory")


def test_fields_of_an_eviction_by_count(make_cache: MakeCache) -> None:
    """An eviction for ``max_models`` has its figures in models."""
    cache = make_cache(memory={"max_models": 2})
    heard = story(cache)
    for model in "abc":
        cache.get(model)
    (evicted,) = [event for event in heard if isinstance(event, Evicted)]
    assert evicted.reason == "max_models"
    assert (evicted.used, evicted.need, evicted.limit, evicted.high, evicted.for_model) == (2, 1, 2, 2, "c")


def test_to_dict_is_json(make_cache: MakeCache) -> None:
    """to_dict() of every event is plain JSON, names its class, and leaves out what says nothing."""
    cache = make_cache(memory={"max_models": 1})
    heard = story(cache)
    for model in "aab":
        cache.get(model)
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    assert {type(event) for event in heard} >= {Missed, Fetched, Loaded, Hit, Evicted, Unloaded, Reclaimed, Failed}
    for event in heard:
        fields = event.to_dict()
        assert json.loads(json.dumps(fields)) == fields
        assert fields["event"] == type(event).__name__
        assert fields["seq"] == event.seq
        assert None not in fields.values()
        assert str(event).isascii()


def test_events_are_frozen(make_cache: MakeCache) -> None:
    """An event can't be changed by a callback that hears it first."""
    cache = make_cache()
    heard = story(cache)
    cache.get("a")
    for event in heard:
        with pytest.raises(AttributeError):
            event.model = "b"  # type: ignore[misc]


def test_hit_is_made_only_if_wanted(make_cache: MakeCache) -> None:
    """Without a listener for Hit none is made, so none is in the history; with one each lookup tells one."""
    cache = make_cache()
    cache.get("a")
    with cache.lease("a"):
        pass
    assert not [event for event in cache.history() if isinstance(event, Hit)]
    heard: list[Hit] = []
    cache.on(Hit, heard.append)
    cache.get("a")
    with cache.lease("a"):
        pass
    assert [event.model for event in heard] == ["a", "a"]
    cache.off(heard.append)
    cache.get("a")
    assert len(heard) == 2


def test_decorator_form(make_cache: MakeCache) -> None:
    """on() as a decorator registers the function and leaves it as it is."""
    cache = make_cache()
    heard: list[Event] = []

    @cache.on(Loaded)
    def told(event: Loaded) -> None:
        heard.append(event)

    assert callable(told)
    cache.get("a")
    assert names(heard) == [("Loaded", "a")]
    assert cache.off(told) is True
    assert cache.off(told) is False
    cache.get("b")
    assert len(heard) == 1


def test_decorator_form_in_the_background(make_cache: MakeCache) -> None:
    """The decorator takes background=True as well."""
    cache = make_cache()
    threads: list[str] = []

    @cache.on(Loaded, background=True)
    def told(event: Loaded) -> None:
        threads.append(threading.current_thread().name)

    cache.get("a")
    eventually(lambda: threads)
    assert threads == ["modelcache-hooks"]


def test_callback_that_raises_breaks_nothing(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged and counted; others hear the event and the lookup succeeds."""
    cache = make_cache(memory={"max_models": 1})

    def broken(event: Event) -> None:
        raise RuntimeError("broken callback")

    cache.on(Event, broken)
    heard = story(cache)
    for model in "abab":
        assert cache.get(model).model == model
    assert cache.unload("b")
    assert cache.stats().hook_errors == len(heard)
    assert "broken callback" in caplog.text


def test_callback_that_blocks_delays_only_its_request(make_cache: MakeCache, spawn: Spawn) -> None:
    """While a callback blocks, lookups of other models, and looks at the cache, go on."""
    cache = make_cache()
    with Gate() as gate:
        cache.on(Loaded, lambda event: gate() if event.model == "a" else None)
        slow = spawn(cache.get, "a")
        gate.wait()
        assert spawn(cache.get, "b").result(WAIT).model == "b"
        assert is_unlocked(cache)
        assert not slow.done()
    assert slow.result(WAIT).model == "a"


def test_background_callback_that_blocks_delays_nobody(make_cache: MakeCache) -> None:
    """A background callback that blocks delays no request; what it missed meanwhile comes later, in order."""
    cache = make_cache()
    heard: list[str | None] = []
    with Gate() as gate:
        cache.on(Loaded, lambda event: (gate(), heard.append(event.model)), background=True)
        for model in "abcd":
            cache.get(model)
        assert heard == []
    eventually(lambda: heard == list("abcd"))


def test_close_delivers_what_waits_in_the_background(make_cache: MakeCache) -> None:
    """close() lets the background thread deliver what waits before it returns."""
    cache = make_cache()
    heard: list[str | None] = []
    cache.on(Unloaded, lambda event: heard.append(event.model), background=True)
    cache.get("a")
    assert cache.close()
    assert heard == ["a"]


def test_no_lock_is_held_in_any_callback(make_cache: MakeCache) -> None:
    """Whatever the event, another thread can look at the cache while its callback runs."""
    cache = make_cache(memory={"max_models": 1}, retry_after=0, disk={"budget": "40 KiB"})
    free: dict[str, bool] = {}
    cache.on(Event, lambda event: free.update({type(event).__name__: is_unlocked(cache)}))
    for model in "aabcd":
        cache.get(model)
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    cache.delete("d")
    assert free == dict.fromkeys(
        ["Missed", "Fetched", "Loaded", "Hit", "Evicted", "Unloaded", "Reclaimed", "Failed"], True
    )


@pytest.mark.parametrize("event", [Missed, Fetched, Loaded, Unloaded, Reclaimed])
def test_callback_may_use_the_cache(make_cache: MakeCache, event: type[Event]) -> None:
    """A callback may look models up, also where the cache has one loader thread only."""
    cache = make_cache(memory={"max_models": 3}, loaders=1, timeout=5.0)
    for model in "efg":
        cache.get(model)
    got: list[Any] = []

    def look(_: Event) -> None:
        cache.off(look)
        got.append(cache.get("b"))

    cache.on(event, look)
    assert cache.get("a").model == "a"
    assert [model.model for model in got] == ["b"]


@pytest.mark.parametrize("where", ["callback", "unload"])
def test_lookup_from_an_eviction_does_not_wait_for_itself(make_cache: MakeCache, where: str) -> None:
    """A lookup from a thread that has a model to unload does not wait for itself: it gets a model, or NoRoom."""
    got: list[Any] = []

    def look(_: object) -> None:
        if not got:
            try:
                got.append(cache.get("b", timeout=None))
            except NoRoom as error:
                got.append(error)

    book = Book(unload=look if where == "unload" else None)
    cache = make_cache(book=book, memory={"max_models": 1})
    cache.get("e")
    if where == "callback":
        cache.on(Evicted, look)
    assert cache.get("a", timeout=5.0).model == "a"
    assert len(got) == 1


def test_failure_callback_may_use_the_cache(make_cache: MakeCache) -> None:
    """A callback for Failed may fetch a fallback, also where the cache has one loader thread only."""
    cache = make_cache(loaders=1, timeout=5.0)
    got: list[Any] = []
    cache.on(Failed, lambda event: got.append(cache.get("b")))
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    assert [model.model for model in got] == ["b"]


# SystemExit and KeyboardInterrupt


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_exit_from_a_callback_on_the_callers_thread(make_cache: MakeCache, stop: type[BaseException]) -> None:
    """SystemExit from a callback on the caller's thread passes on, once the state is consistent: no lease is left."""
    cache = make_cache()

    def leave(event: Event) -> None:
        cache.off(leave)
        raise stop

    cache.on(Missed, leave)
    lease = cache.lease("a")
    with pytest.raises(stop):
        lease.acquire()
    assert cache.stats().leases == 0
    assert cache.stats().waiters == 0
    assert cache.get("a").model == "a"
    lease.release()


def test_exit_from_a_callback_of_a_hit(make_cache: MakeCache) -> None:
    """SystemExit from a callback for Hit passes on and leaves no lease."""
    cache = make_cache()
    cache.get("a")

    def leave(event: Event) -> None:
        cache.off(leave)
        raise SystemExit

    cache.on(Hit, leave)
    lease = cache.lease("a")
    with pytest.raises(SystemExit):
        lease.acquire()
    assert cache.stats().leases == 0
    cache.on(Hit, leave)
    with pytest.raises(SystemExit):
        cache.get("a")
    assert cache.get("a").model == "a"
    lease.release()


def test_exit_from_a_callback_of_a_lookup_that_fails(make_cache: MakeCache) -> None:
    """SystemExit goes before the lookup's own error, and does not come up at a later call."""
    cache = make_cache()

    def leave(event: Event) -> None:
        cache.off(leave)
        raise SystemExit

    cache.on(Missed, leave)
    with pytest.raises(SystemExit):
        cache.get("nope")
    assert cache.get("a").model == "a"
    assert cache.unload("a")


def test_exit_from_a_callback_on_a_thread_of_the_cache(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """SystemExit from a callback on a loader thread ends nothing: it is logged, and the lookup succeeds."""
    cache = make_cache(memory={"max_models": 1}, loaders=1)

    def leave(event: Event) -> None:
        raise SystemExit

    for event in (Fetched, Loaded, Evicted):
        cache.on(event, leave)
    for model in "aba":
        assert cache.get(model).model == model
    assert "SystemExit" in caplog.text


def test_exit_from_a_callback_of_unload(make_cache: MakeCache, book: Book) -> None:
    """SystemExit from a callback for Unloaded passes on from unload(), after the model has left."""
    cache = make_cache(book=book)
    cache.get("a")

    def leave(event: Event) -> None:
        cache.off(leave)
        raise SystemExit

    cache.on(Unloaded, leave)
    with pytest.raises(SystemExit):
        cache.unload("a")
    assert book.unloads == ["a"]
    assert cache.get("a").model == "a"


def test_exit_from_a_callback_while_tuning(make_cache: MakeCache, book: Book) -> None:
    """SystemExit from a callback passes on from an assignment, after all that must go has gone."""
    cache = make_cache(book=book)
    for model in "abcd":
        cache.get(model)

    def leave(event: Event) -> None:
        raise SystemExit

    cache.on(Unloaded, leave)
    with pytest.raises(SystemExit):
        cache.memory.max_models = 1
    cache.off(leave)
    assert book.alive == ["d"]


def test_exit_from_unload_during_an_eviction(make_cache: MakeCache) -> None:
    """An ``unload=`` that raises SystemExit on a loader thread fails nobody's lookup."""

    def unload(model: Any) -> None:
        raise SystemExit

    cache = make_cache(book=Book(unload=unload), memory={"max_models": 1})
    cache.get("a")
    assert cache.get("b").model == "b"
    with pytest.raises(SystemExit):
        cache.unload("b")
    assert cache.stats().models == 0
    assert cache.stats().unload_errors == 2


def test_exit_from_unload_while_tuning(make_cache: MakeCache) -> None:
    """An ``unload=`` that raises SystemExit passes on from an assignment, after all that must go has gone."""

    def unload(model: Any) -> None:
        raise SystemExit

    book = Book(unload=unload)
    cache = make_cache(book=book)
    for model in "abcd":
        cache.get(model)
    with pytest.raises(SystemExit):
        cache.memory.max_models = 1
    assert book.alive == ["d"]
    with pytest.raises(SystemExit):
        cache.close()
    assert cache.close()


def test_unload_that_raises_is_told(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """An ``unload=`` that raises is logged, counted and told in the event; the model has left all the same."""

    def unload(model: Any) -> None:
        raise ValueError("can't close")

    cache = make_cache(book=Book(unload=unload))
    heard = story(cache)
    cache.get("a")
    assert cache.unload("a") is True
    unloaded = heard[-1]
    assert isinstance(unloaded, Unloaded)
    assert unloaded.error == "ValueError: can't close"
    assert cache.stats().unload_errors == 1
    assert "can't close" in caplog.text
    assert cache.get("a").model == "a"
