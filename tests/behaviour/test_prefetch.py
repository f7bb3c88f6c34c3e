"""Prefetch: models brought in before anybody asks for them, and the handle that says how far they are."""

import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import InvalidModelId, LoadFailed, ModelCache, ModelNotFound, NoRoom, Prefetch
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually


def tiers(cache: ModelCache[Any]) -> dict[str, str]:
    """Return the highest tier of each model."""
    return {row.model: row.tier for row in cache.models()}


def test_prefetch_to_memory(make_cache: MakeCache, book: Book) -> None:
    """By default models are brought into memory, and a lookup then finds them there."""
    cache = make_cache(book=book)
    handle = cache.prefetch(["a", "b"])
    assert isinstance(handle, Prefetch)
    assert handle.wait(WAIT) is True
    assert tiers(cache) == {"a": "memory", "b": "memory"}
    misses = cache.stats().misses
    cache.get("a")
    assert cache.stats().misses == misses


def test_prefetch_to_disk(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """With ``tier="disk"`` models are fetched but not loaded."""
    cache = make_cache(source, book)
    assert cache.prefetch(["a", "b"], tier="disk").wait(WAIT)
    assert tiers(cache) == {"a": "disk", "b": "disk"}
    assert book.loads == []
    cache.get("a")
    assert source.opens.count("a") == 1


def test_prefetch_returns_at_once(make_cache: MakeCache, source: DictSource) -> None:
    """prefetch() returns before anything is fetched; progress tells how far it is."""
    cache = make_cache(source, loaders=1)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(["a", "b", "nope"])
        gate.wait()
        assert not handle.done
        assert handle.wait(0) is False
        assert handle.wait(0.01) is False
        progress = handle.progress
        assert (progress.total, progress.ready, progress.failed) == (3, 0, 0)
    assert handle.wait(WAIT) is True
    progress = handle.progress
    assert (progress.total, progress.ready, progress.failed) == (3, 2, 1)
    assert handle.done


def test_prefetch_of_what_is_there(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """A model that is in the tier already is ready at once."""
    cache = make_cache(source, book)
    cache.get("a")
    for tier in ("memory", "disk"):
        handle = cache.prefetch(["a"], tier=tier)
        assert handle.done
        assert handle.wait(0)
        assert handle.progress.ready == 1
    assert (source.finds, book.loads) == (["a"], ["a"])


def test_prefetch_of_nothing(make_cache: MakeCache) -> None:
    """A prefetch of no models is done."""
    handle = make_cache().prefetch([])
    assert handle.done
    assert handle.wait(0)
    assert handle.progress.total == 0


def test_prefetch_takes_any_iterable(make_cache: MakeCache) -> None:
    """Ids may come from a generator or a set, and twice."""
    cache = make_cache()
    assert cache.prefetch(model for model in "aab").wait(WAIT)
    handle = cache.prefetch({"c", "d"})
    assert handle.wait(WAIT)
    assert handle.progress.total == 2
    assert sorted(tiers(cache)) == list("abcd")


def test_bad_id_raises_at_the_call(make_cache: MakeCache, source: DictSource) -> None:
    """A bad id raises at the call, and nothing is begun for the good ones."""
    cache = make_cache(source)
    with pytest.raises(InvalidModelId):
        cache.prefetch(["a", "../b"])
    assert source.finds == []
    assert cache.history() == []


def test_failures_are_in_the_handle(make_cache: MakeCache) -> None:
    """What fails later does not raise: it is in ``errors``, and the others arrive."""

    def load(path: Path, model: str) -> str:
        if model == "b":
            raise ValueError("broken")
        return model

    cache = make_cache(book=Book(load))
    handle = cache.prefetch(["a", "b", "nope"])
    assert handle.wait(WAIT)
    assert set(handle.errors) == {"b", "nope"}
    assert isinstance(handle.errors["b"], LoadFailed)
    assert isinstance(handle.errors["nope"], ModelNotFound)
    assert tiers(cache)["a"] == "memory"


def test_remembered_failure_is_in_the_handle_at_once(make_cache: MakeCache, source: DictSource) -> None:
    """A failure that is remembered answers a prefetch too."""
    cache = make_cache(source, retry_after=60)
    with pytest.raises(ModelNotFound):
        cache.get("nope")
    handle = cache.prefetch(["nope"])
    assert handle.done
    assert isinstance(handle.errors["nope"], ModelNotFound)
    assert source.finds == ["nope"]


def test_lookups_go_before_prefetches(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """What somebody waits for goes before what was only asked for in advance, also where it was asked for before."""
    cache = make_cache(book=book, loaders=1)
    with Gate("a") as gate:
        book.gate = gate
        handle = cache.prefetch(list("abcdef"))
        gate.wait()
        wanted = [spawn(cache.get, "f"), spawn(cache.get, "h")]
        eventually(lambda: cache.stats().waiters == 2)
    for future in wanted:
        future.result(WAIT)
    assert handle.wait(WAIT)
    assert set(book.loads[1:3]) == {"f", "h"}
    assert book.loads.count("f") == 1


def test_lookup_joins_a_prefetch(make_cache: MakeCache, source: DictSource, book: Book, spawn: Spawn) -> None:
    """A lookup of a model that is being prefetched to disk joins that fetch, and has it loaded."""
    cache = make_cache(source, book)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(["a"], tier="disk")
        gate.wait()
        wanted = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 1)
    assert wanted.result(WAIT).model == "a"
    assert handle.wait(WAIT)
    assert source.opens == ["a"]


def test_two_prefetches_share_a_load(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """Two prefetches of a model share one load, and each hears of it."""
    cache = make_cache(source, book)
    with Gate() as gate:
        source.gate = gate
        handles = [cache.prefetch(["a"]), cache.prefetch(["a"]), cache.prefetch(["a"], tier="disk")]
        gate.wait()
    assert all(handle.wait(WAIT) for handle in handles)
    assert (source.opens, book.loads) == (["a"], ["a"])


def test_cancel_drops_what_was_not_begun(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """cancel() drops what nobody else wants; what has arrived stays, and wait() returns at once."""
    cache = make_cache(source, book, loaders=1)
    cache.prefetch(["a"]).wait(WAIT)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(list("abcdef"))
        gate.wait()
        handle.cancel()
        assert handle.cancelled
        assert handle.done
        assert handle.wait(WAIT) is True
        handle.cancel()
    eventually(lambda: cache.stats().waiters == 0)
    assert cache.get("g").model == "g"
    assert book.loads == ["a", "g"]
    assert handle.errors == {}


def test_cancel_stops_a_fetch_under_way(make_cache: MakeCache) -> None:
    """A fetch that only a cancelled prefetch wanted stops between two reads, and leaves nothing."""
    source = DictSource().add_file("a", "a.bin", bytes(2**20))
    cache = make_cache(source)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(["a"])
        gate.wait()
        handle.cancel()
    eventually(lambda: cache.stats().disk_used == 0)
    assert cache.models() == []


def test_cancel_leaves_what_others_want(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """cancel() does not stop what a lookup, or another prefetch, waits for."""
    cache = make_cache(source)
    with Gate() as gate:
        source.gate = gate
        handle, other = cache.prefetch(["a", "b"]), cache.prefetch(["b"])
        wanted = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 1)
        handle.cancel()
    assert wanted.result(WAIT).model == "a"
    assert other.wait(WAIT)
    assert other.errors == {}
    assert tiers(cache) == {"a": "memory", "b": "memory"}


def test_lookup_after_cancel_starts_anew(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """A lookup that comes while a cancelled fetch is still stopping gets its model, not the cancellation."""
    cache = make_cache(source)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(["a"])
        gate.wait()
        handle.cancel()
        wanted = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 1)
    assert wanted.result(WAIT).model == "a"


@pytest.mark.parametrize("loaders", [1, 4])
def test_prefetch_after_cancel_starts_anew(make_cache: MakeCache, source: DictSource, loaders: int) -> None:
    """A prefetch that joins a fetch that another one's cancel has stopped brings the model in all the same."""
    cache = make_cache(source, loaders=loaders)
    with Gate() as gate:
        source.gate = gate
        first = cache.prefetch(["a"])
        gate.wait()
        first.cancel()
        second = cache.prefetch(["a"])
    assert second.wait(WAIT)
    assert second.errors == {}
    assert tiers(cache) == {"a": "memory"}


def test_prefetch_that_joins_a_refresh(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """A prefetch that joins a refresh that an unload has stopped brings the model in all the same."""
    cache = make_cache(source)
    cache.get("a")
    with Gate() as gate:
        source.gate = gate
        source.add("a", size=20)
        refreshed = spawn(cache.refresh, "a")
        gate.wait()
        assert cache.unload("a")
        handle = cache.prefetch(["a"])
    assert handle.wait(WAIT)
    assert handle.errors == {}
    assert tiers(cache) == {"a": "memory"}
    refreshed.result(WAIT)


def test_prefetch_past_what_fits(make_cache: MakeCache, book: Book) -> None:
    """A prefetch of more models than fit loads them all in turn, and never more at once than fit."""
    cache = make_cache(book=book, memory={"max_models": 2, "interval": 0.02})
    assert cache.prefetch(list("abcdef")).wait(WAIT)
    assert len(book.alive) == 2
    assert sorted(book.loads) == list("abcdef")


def test_prefetch_without_room(make_cache: MakeCache) -> None:
    """A prefetch that can't have room fails in NoRoom rather than waiting for a lease that never ends."""
    cache = make_cache(memory={"max_models": 1, "interval": 0.02})
    with cache.lease("a"):
        handle = cache.prefetch(["b"])
        started = time.monotonic()
        handle.wait(1.0)
        handle.cancel()
        assert time.monotonic() - started < WAIT
    if "b" in handle.errors:
        assert isinstance(handle.errors["b"], NoRoom)
    assert cache.get("b").model == "b"


def test_wait_from_several_threads(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """Any number of threads may wait for one handle."""
    cache = make_cache(source)
    with Gate() as gate:
        source.gate = gate
        handle = cache.prefetch(["a"])
        waiters = [spawn(handle.wait, WAIT) for _ in range(4)]
        gate.wait()
    assert all(waiter.result(WAIT) is True for waiter in waiters)


def test_prefetch_is_told_as_the_reason(make_cache: MakeCache) -> None:
    """Events of a prefetch say so, and none of its models was missed by a request."""
    cache = make_cache()
    cache.prefetch(["a"]).wait(WAIT)
    assert [(type(event).__name__, event.reason) for event in cache.history()] == [
        ("Fetched", "prefetch"),
        ("Loaded", "prefetch"),
    ]
    assert cache.stats().misses == 0


# Waits in the user's own code


@pytest.mark.parametrize("back", ["prefetch", "get"])
def test_circle_of_loaders_that_wait(make_cache: MakeCache, back: str) -> None:
    """Loaders that wait for each other, one of them for a prefetch, are told so as with lookups, and do not hang."""
    cache: list[ModelCache[Any]] = []

    def ask(model: str) -> None:
        if model == "b" and back == "get":
            cache[0].get("a", timeout=2.0)
            return
        handle = cache[0].prefetch(["b" if model == "a" else "a"])
        assert handle.wait(2.0)
        for error in handle.errors.values():
            raise error

    book = Book()
    book.gate = ask
    cache.append(make_cache(book=book))
    with pytest.raises(LoadFailed, match="circle: 'b' -> 'a' -> 'b'"):
        cache[0].get("a")


@pytest.mark.parametrize(("model", "error"), [("a", None), ("b", NoRoom)])
def test_wait_in_unload(make_cache: MakeCache, model: str, error: type[Exception] | None) -> None:
    """``unload=`` may wait for that model, which is loaded anew; for another, to which it gives no room, it is told."""
    cache: list[ModelCache[Any]] = []
    handles: list[Prefetch] = []

    def unload(_: object) -> None:
        if not handles:
            handles.append(cache[0].prefetch([model]))
            assert handles[0].wait(2.0)

    book = Book(unload=unload)
    cache.append(make_cache(book=book, memory={"gauge": FakeGauge(), "max_models": 2 if model == "a" else 1}))
    cache[0].get("a")
    assert cache[0].unload("a")
    assert cache[0].stats().unload_errors == 0
    assert [type(failure) for failure in handles[0].errors.values()] == ([] if error is None else [error])
