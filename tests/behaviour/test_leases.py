"""Leases: what they hold, how they end, and what waits for that."""

import gc
import threading
from typing import Any

import pytest

from modelcache import Event, Evicted, ModelCacheError, NoRoom, Timeout, Unloaded
from tests.support.fakes import Book, DictSource, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually


def row(cache: Any, model: str) -> Any:
    """Return the row of a model."""
    return next(row for row in cache.models() if row.model == model)


def hold(cache: Any, model: str) -> list[Any]:
    """Return a list with a lease that is held."""
    lease = cache.lease(model)
    lease.acquire()
    return [lease]


def forget(held: list[Any]) -> None:
    """Drop the last reference to what is held, unreleased."""
    held.clear()
    gc.collect()


def test_lease_is_acquired_on_entering(make_cache: MakeCache, book: Book) -> None:
    """Asking for a lease does nothing until it is entered or acquired."""
    cache = make_cache(book=book)
    lease = cache.lease("a")
    assert book.loads == []
    assert lease.model == "a"
    with lease as model:
        assert model.model == "a"
        assert row(cache, "a").leases == 1
    assert row(cache, "a").leases == 0


def test_acquire_and_release(make_cache: MakeCache) -> None:
    """Without a ``with``, acquire returns the model and release lets it go: a pin is a lease that you keep."""
    cache = make_cache()
    lease = cache.lease("a")
    assert lease.acquire().model == "a"
    assert row(cache, "a").leases == 1
    lease.release()
    assert row(cache, "a").leases == 0


def test_lease_is_released_when_the_block_raises(make_cache: MakeCache) -> None:
    """An error in the block releases the lease and passes on."""
    cache = make_cache()
    with pytest.raises(ZeroDivisionError), cache.lease("a"):
        raise ZeroDivisionError
    assert row(cache, "a").leases == 0


@pytest.mark.parametrize("warm", [False, True])
def test_lease_is_one_shot(make_cache: MakeCache, warm: bool) -> None:
    """A lease that is held or was released can't be acquired again."""
    cache = make_cache()
    if warm:
        cache.get("a")
    lease = cache.lease("a")
    with lease, pytest.raises(ModelCacheError, match="one-shot"):
        lease.acquire()
    with pytest.raises(ModelCacheError, match="'a'"):
        lease.acquire()
    assert row(cache, "a").leases == 0


def test_release_is_idempotent(make_cache: MakeCache, book: Book) -> None:
    """Releasing twice is releasing once, and never another's lease."""
    cache = make_cache(book=book)
    with cache.lease("a"):
        lease = cache.lease("a")
        lease.acquire()
        lease.release()
        lease.release()
        assert row(cache, "a").leases == 1
        assert not cache.unload("a")
    assert book.unloads == ["a"]


def test_release_of_what_was_never_acquired(make_cache: MakeCache) -> None:
    """Releasing a lease that was never acquired does nothing; it may be acquired afterwards."""
    lease = make_cache().lease("a")
    lease.release()
    with lease as model:
        assert model.model == "a"


def test_release_from_another_thread(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """A lease may be released from any thread, and ``unload=`` runs on that thread before release returns."""
    threads: list[int] = []
    book = Book(unload=lambda _: threads.append(threading.get_ident()))
    cache = make_cache(book=book)
    lease = cache.lease("a")
    lease.acquire()
    assert not cache.unload("a")

    def release() -> tuple[int, int]:
        lease.release()
        return threading.get_ident(), len(threads)

    assert spawn(release).result(WAIT) == (threads[0], 1)


def test_release_from_many_threads_at_once(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """However many threads release one lease at once, it ends once."""
    cache = make_cache(book=book)
    start = threading.Barrier(4, timeout=WAIT)
    for _ in range(20):
        lease = cache.lease("a")
        lease.acquire()
        cache.unload("a")

        def release(lease: Any = lease) -> None:
            start.wait()
            lease.release()

        for future in [spawn(release) for _ in range(4)]:
            future.result(WAIT)
    assert book.unloads == ["a"] * 20


def test_leases_after_a_release_from_many_threads(make_cache: MakeCache, spawn: Spawn) -> None:
    """What many threads released at once is held by one later lease, not by two: each counts, and each is let go."""
    cache = make_cache()
    start = threading.Barrier(4, timeout=WAIT)
    for _ in range(20):
        lease = cache.lease("a")
        lease.acquire()

        def release(lease: Any = lease) -> None:
            start.wait()
            lease.release()

        for future in [spawn(release) for _ in range(4)]:
            future.result(WAIT)
        first, second = hold(cache, "a"), hold(cache, "a")
        assert row(cache, "a").leases == 2
        first.pop().release()
        assert row(cache, "a").leases == 1
        second.pop().release()
        assert row(cache, "a").leases == 0


def test_failed_acquire_holds_nothing(make_cache: MakeCache, book: Book) -> None:
    """A lease whose acquire timed out holds nothing once the load lands."""
    cache = make_cache(book=book)
    lease = cache.lease("a", timeout=0.01)
    with Gate() as gate:
        book.gate = gate
        with pytest.raises(Timeout):
            lease.acquire()
    eventually(lambda: cache.stats().models == 1)
    assert row(cache, "a").leases == 0
    assert cache.unload("a")


@pytest.mark.parametrize("warm", [False, True])
def test_forgotten_lease_is_released_with_a_warning(make_cache: MakeCache, warm: bool) -> None:
    """A lease that is collected unreleased is released, and a ResourceWarning names the model."""
    cache = make_cache()
    if warm:
        cache.get("a")
    held = hold(cache, "a")
    with pytest.warns(ResourceWarning, match="'a'"):
        forget(held)
    assert row(cache, "a").leases == 0


def test_forgotten_lease_lets_a_pending_unload_happen(make_cache: MakeCache, book: Book) -> None:
    """Where unload() waits for a lease that is collected instead, the model still leaves memory."""
    cache = make_cache(book=book, memory={"interval": 0.02})
    held = hold(cache, "a")
    assert not cache.unload("a")
    with pytest.warns(ResourceWarning):
        forget(held)
    eventually(lambda: book.unloads == ["a"])


def test_forgotten_lease_after_close_is_unloaded(make_cache: MakeCache, book: Book) -> None:
    """A lease left over when the cache was closed unloads its model also where it is collected, not released."""
    cache = make_cache(book=book, memory={"interval": 0.02})
    held = hold(cache, "a")
    assert not cache.close()
    with pytest.warns(ResourceWarning):
        forget(held)
    eventually(lambda: book.unloads == ["a"], 3)


def test_released_lease_is_collected_in_silence(make_cache: MakeCache, recwarn: pytest.WarningsRecorder) -> None:
    """A lease that was released, or never acquired, is collected without a word."""
    cache = make_cache()
    with cache.lease("a"):
        pass
    cache.lease("a")
    gc.collect()
    assert list(recwarn) == []


# Going with the last lease


def test_unload_waits_for_the_last_lease(make_cache: MakeCache, book: Book) -> None:
    """unload() of a leased model returns False at once; the model goes with its last lease."""
    cache = make_cache(book=book)
    first, second = cache.lease("a"), cache.lease("a")
    model = first.acquire()
    second.acquire()
    assert cache.unload("a") is False
    assert book.unloads == []
    first.release()
    assert book.unloads == []
    assert cache.stats().models == 1
    second.release()
    assert book.unloads == ["a"]
    assert model.model == "a"
    assert row(cache, "a").tier == "disk"


def test_delete_waits_for_the_last_lease(make_cache: MakeCache, book: Book) -> None:
    """delete() of a leased model returns False; with the last lease it leaves memory and disk."""
    cache = make_cache(book=book)
    with cache.lease("a") as model:
        assert cache.delete("a") is False
        assert (model.path / "model.txt").exists()
        assert row(cache, "a").tier == "memory"
    assert book.unloads == ["a"]
    assert cache.models() == []
    assert cache.stats().disk_used == 0
    assert not model.path.exists()


def test_delete_stays_a_delete_when_unload_follows(make_cache: MakeCache) -> None:
    """An unload() after a delete(), while the lease is held, does not bring the artifact back."""
    cache = make_cache()
    with cache.lease("a"):
        assert not cache.delete("a")
        assert not cache.unload("a")
    assert cache.models() == []


def test_delete_after_unload_deletes(make_cache: MakeCache) -> None:
    """A delete() after an unload(), while the lease is held, takes the artifact too."""
    cache = make_cache()
    with cache.lease("a"):
        assert not cache.unload("a")
        assert not cache.delete("a")
    assert cache.models() == []


def test_unload_and_delete_of_what_is_not_there(make_cache: MakeCache) -> None:
    """unload() and delete() return True for a model that was not there."""
    cache = make_cache()
    assert cache.unload("a") is True
    assert cache.delete("a") is True
    cache.get("b")
    assert cache.unload("b") is True
    assert cache.unload("b") is True
    assert cache.delete("b") is True
    assert cache.delete("b") is True


def test_unload_from_within_the_lease(make_cache: MakeCache, book: Book) -> None:
    """A thread may unload what it leases itself; nothing waits, and it goes at the end of the block."""
    cache = make_cache(book=book)
    with cache.lease("a"):
        assert not cache.unload("a")
        assert book.unloads == []
    assert book.unloads == ["a"]


def test_lookup_rescues_a_model_that_waits_for_its_last_lease(make_cache: MakeCache, book: Book) -> None:
    """A lookup before the last release takes the model back: no second load, and it stays."""
    cache = make_cache(book=book)
    with cache.lease("a") as model:
        cache.unload("a")
        assert cache.get("a") is model
    assert book.unloads == []
    assert cache.get("a") is model
    assert book.loads == ["a"]


def test_lookup_rescues_a_model_from_delete(make_cache: MakeCache, book: Book) -> None:
    """A lookup before the last release rescues a deleted model, and its artifact stays."""
    cache = make_cache(book=book)
    with cache.lease("a") as model:
        cache.delete("a")
        with cache.lease("a") as again:
            assert again is model
    assert book.unloads == []
    assert cache.unload("a")
    assert row(cache, "a").tier == "disk"


def test_prefetch_rescues(make_cache: MakeCache, book: Book) -> None:
    """A prefetch before the last release rescues the model as well."""
    cache = make_cache(book=book)
    with cache.lease("a"):
        cache.unload("a")
        assert cache.prefetch(["a"]).wait(WAIT)
    assert book.unloads == []
    assert row(cache, "a").tier == "memory"


def test_leased_models_are_never_evicted(make_cache: MakeCache, book: Book) -> None:
    """Room is made of what nobody leases, however cold the leased one is."""
    cache = make_cache(book=book, memory={"max_models": 2})
    with cache.lease("a"):
        for model in "bcde":
            cache.get(model)
        assert row(cache, "a").tier == "memory"
    assert book.unloads == ["b", "c", "d"]


def test_unloaded_event_says_why(make_cache: MakeCache) -> None:
    """unload() and delete() are no evictions: Unloaded only, with their reason."""
    cache = make_cache()
    heard: list[Event] = []
    cache.on(Evicted, heard.append)
    cache.on(Unloaded, heard.append)
    cache.get("a")
    cache.unload("a")
    cache.get("b")
    cache.delete("b")
    assert [(type(event), event.model, event.reason) for event in heard] == [
        (Unloaded, "a", "unload"),
        (Unloaded, "b", "delete"),
    ]


# No room


def test_no_room_at_once_where_only_the_own_lease_is_in_the_way(make_cache: MakeCache) -> None:
    """A caller whose own leases are all that is in the way gets NoRoom at once, with holders and ages."""
    cache = make_cache(memory={"max_models": 1}, timeout=None)
    with cache.lease("a"), cache.lease("a"), pytest.raises(NoRoom, match="'b'") as caught:
        cache.get("b")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert (error.tier, error.model, error.limit, error.used) == ("memory", "b", 1, 1)
    ((model, leases, age),) = error.holders
    assert (model, leases) == ("a", 2)
    assert 0 <= age < 10
    assert "'a'" in str(error)
    assert "max_models" in str(error)


def test_no_room_at_once_for_a_loader_whose_part_needs_room(make_cache: MakeCache) -> None:
    """A loader that leases one part and asks for another that can't fit gets NoRoom at once, and so does its caller."""

    def load(path: Any, model: str) -> Any:
        if model == "a":
            with cache.lease("b"):
                return cache.get("c")
        return model

    cache = make_cache(book=Book(load), memory={"max_models": 2}, timeout=None)
    with pytest.raises(NoRoom):
        cache.get("a")


def test_two_that_wait_for_one_anothers_leases_do_not_wait_for_ever(make_cache: MakeCache, spawn: Spawn) -> None:
    """Two threads that each hold a lease and want one more model get NoRoom, since neither can give room."""
    cache = make_cache(memory={"max_models": 2, "interval": 0.05}, timeout=None)
    held = threading.Barrier(2, timeout=WAIT)

    def hold(mine: str, wanted: str) -> None:
        with cache.lease(mine):
            held.wait()
            cache.get(wanted)

    futures = [spawn(hold, "a", "c"), spawn(hold, "b", "d")]
    assert any(isinstance(future.exception(WAIT), NoRoom) for future in futures)


def test_waiter_gets_room_from_anothers_release(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """A lookup that finds all leased waits, and goes on as soon as another thread releases."""
    cache = make_cache(book=book, memory={"max_models": 1, "interval": 1000.0})
    lease = cache.lease("a")
    lease.acquire()
    future = spawn(cache.get, "b")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    assert not future.done()
    lease.release()
    assert future.result(WAIT).model == "b"
    assert book.unloads == ["a"]


def test_waiter_ends_in_no_room_when_its_time_is_up(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lookup that waited its whole timeout for another's lease gets NoRoom, with the holder's name and age."""
    cache = make_cache(memory={"max_models": 1, "interval": 0.02})
    lease = cache.lease("a")
    lease.acquire()
    error = spawn(cache.get, "b", timeout=0.3).exception(WAIT)
    lease.release()
    assert isinstance(error, NoRoom)
    ((model, leases, age),) = error.holders
    assert (model, leases) == ("a", 1)
    assert age > 0


def queue(cache: Any, number: int) -> None:
    """Wait until so many lookups wait for room."""
    eventually(lambda: number == sum(row.state == "waiting for room" for row in cache.models()), interval=0.002)


def test_waiters_get_room_in_turn(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """Waiters queue fairly: who waited first is loaded first."""
    for turn in range(10):
        order: list[str] = []
        inner = Book()
        inner.gate = order.append
        cache = make_cache(book=inner, memory={"max_models": 1, "interval": 1000.0}, loaders=8)
        lease = cache.lease("a")
        lease.acquire()
        futures = []
        for number, model in enumerate("bcdef", 1):
            futures.append(spawn(cache.get, model))
            queue(cache, number)
        lease.release()
        for future in futures:
            future.result(WAIT)
        assert order == list("abcdef"), f"turn {turn}"
        cache.close()


def test_newcomer_does_not_pass_a_waiter(make_cache: MakeCache, spawn: Spawn) -> None:
    """A small model that would fit does not overtake a big one that waits for room, again and again."""
    source = DictSource().add("held", "held2", size=40).add("big", size=90).add("small", size=20)
    book = Book()
    cache = make_cache(
        source, book, memory={"high": 100, "low": 100, "gauge": book.gauge(), "interval": 1000.0}, loaders=4
    )
    first, second = cache.lease("held"), cache.lease("held2")
    first.acquire()
    second.acquire()
    big = spawn(cache.get, "big")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    small = spawn(cache.get, "small")
    eventually(lambda: cache.stats().waiters == 2)
    eventually(lambda: small.done() or [row.state for row in cache.models()].count("waiting for room") == 2)
    assert book.alive == ["held", "held2"]
    first.release()
    second.release()
    assert big.result(WAIT).model == "big"
    assert small.result(WAIT).model == "small"
    assert book.loads == ["held", "held2", "big", "small"]
