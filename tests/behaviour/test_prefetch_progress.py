"""How far a prefetch is: bytes, rate, time left, and the state of each model."""

import threading
from pathlib import Path
from typing import Any

import pytest

from modelcache import Fetched, LoadFailed, ModelCache
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually, is_unlocked

SIZE = 2**20  # stored bytes of each model; read in four pieces


class Slow(DictSource):
    """A source whose streams stop before each read until as many were allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = threading.Semaphore(0)
        self.broken = False
        self.gate = self._stop

    def _stop(self) -> None:
        assert self.allowed.acquire(timeout=WAIT), "nobody allowed the read"
        if self.broken:
            raise OSError("the line is cut")

    def add_files(self, *models: str) -> "Slow":
        """Add models of one file each."""
        for model in models:
            self.add_file(model, "model.bin", bytes(SIZE))
        return self


def test_bytes_as_they_arrive(make_cache: MakeCache) -> None:
    """The total is known once the artifact was found, and the bytes that arrived after each read."""
    source = Slow().add_files("a")
    handle = make_cache(source).prefetch(["a"], tier="disk")
    assert eventually(lambda: handle.progress.bytes_total == SIZE)
    assert (handle.progress.bytes, handle.progress.unsized, handle.progress.left) == (0, 0, None)
    assert handle.states == {"a": "fetching"}
    source.allowed.release()
    arrived = eventually(lambda: handle.progress.bytes)
    assert 0 < arrived < SIZE
    progress = handle.progress
    assert progress.rate > 0
    assert progress.left is not None
    assert progress.left == pytest.approx((SIZE - arrived) / progress.rate, rel=0.5)
    source.allowed.release(100)
    assert handle.wait(WAIT)
    progress = handle.progress
    assert (progress.bytes, progress.bytes_total, progress.left) == (SIZE, SIZE, 0)
    assert handle.states == {"a": "ready"}


def test_what_is_not_found_yet(make_cache: MakeCache) -> None:
    """Models whose artifact was not found yet are counted apart, and estimated to be as large as the others."""
    source = Slow().add_files("a", "b", "c")
    handle = make_cache(source, loaders=1).prefetch(["a", "b", "c"], tier="disk")
    assert (handle.progress.left, handle.progress.rate) == (None, 0)
    source.allowed.release()
    eventually(lambda: handle.progress.bytes)
    progress = handle.progress
    assert (progress.unsized, progress.bytes_total) == (2, SIZE)
    assert progress.left is not None
    assert progress.left > 2 * SIZE / progress.rate
    source.allowed.release(100)
    assert handle.wait(WAIT)
    assert (handle.progress.bytes, handle.progress.unsized) == (3 * SIZE, 0)


def test_states_of_a_model_on_its_way(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """The handle uses the words of ``models()`` for a model on its way, and says how each one ended."""
    cache = make_cache(source, book, loaders=1, memory={"max_models": 1, "interval": 0.02})
    with cache.lease("d"):
        with Gate() as fetching, Gate("b") as loading:
            source.gate, book.gate = fetching, loading
            handle = cache.prefetch(["nope", "b", "a"])
            fetching.wait()
            assert handle.states == {"nope": "failed", "b": "fetching", "a": "queued"}
            fetching.open()
            eventually(lambda: handle.states["b"] == "waiting for room")
            assert {row.model: row.state for row in cache.models()}["b"] == "waiting for room"
            cache.memory.max_models = 2
            loading.wait()
            assert handle.states["b"] == "loading"
        assert eventually(lambda: handle.states["b"] == "ready")
        handle.cancel()
    assert handle.states["nope"] == "failed"
    assert handle.states["a"] in {"cancelled", "ready"}
    progress = handle.progress
    assert progress.ready + progress.failed + progress.cancelled == 3


def test_callbacks_come_before_ready(make_cache: MakeCache) -> None:
    """While the callbacks of its last event run, a model is not ready yet, nor is the handle done."""
    cache = make_cache()
    with Gate() as gate:
        cache.on(Fetched, gate)
        handle = cache.prefetch(["a"], tier="disk")
        gate.wait()
        assert (handle.states, handle.done, handle.progress.ready) == ({"a": "fetching"}, False, 0)
    assert handle.wait(WAIT)
    assert handle.states == {"a": "ready"}


def test_what_is_on_disk_needs_no_bytes(make_cache: MakeCache, source: DictSource) -> None:
    """Models that are in memory, or on disk, count with no bytes."""
    cache = make_cache(source)
    cache.prefetch(["a"], tier="disk").wait(WAIT)
    cache.get("b")
    handle = cache.prefetch(["a", "b"])
    assert handle.wait(WAIT)
    progress = handle.progress
    assert (progress.bytes, progress.bytes_total, progress.unsized, progress.left) == (0, 0, 0, 0)


def test_shared_fetch_counts_for_each(make_cache: MakeCache, spawn: Spawn) -> None:
    """Prefetches and lookups that share a fetch do not count its bytes twice, and each handle has all of them."""
    source = Slow().add_files("a")
    cache = make_cache(source)
    wanted = spawn(cache.get, "a")
    source.allowed.release()
    handles = [cache.prefetch(["a"]), cache.prefetch(["a", "a"])]
    assert eventually(lambda: handles[0].progress.bytes) == eventually(lambda: handles[1].progress.bytes)
    source.allowed.release(100)
    assert all(handle.wait(WAIT) for handle in handles)
    wanted.result(WAIT)
    assert [handle.progress.bytes for handle in handles] == [SIZE, SIZE]
    assert cache.stats().fetched_bytes == SIZE


def test_cancelled_figures_stand_still(make_cache: MakeCache, spawn: Spawn) -> None:
    """After cancel() the figures stay, also where the fetch goes on for a lookup; both sums have what had arrived."""
    source = Slow().add_files("a", "b")
    cache = make_cache(source, loaders=1)
    handle = cache.prefetch(["a", "b"])
    source.allowed.release()
    arrived = eventually(lambda: handle.progress.bytes)
    wanted = spawn(cache.get, "a")
    eventually(lambda: cache.stats().waiters == 1)
    handle.cancel()
    source.allowed.release(100)
    wanted.result(WAIT)
    assert handle.states == {"a": "cancelled", "b": "cancelled"}
    progress = handle.progress
    assert (progress.bytes, progress.bytes_total, progress.unsized) == (arrived, arrived, 0)
    assert (progress.cancelled, progress.ready, progress.left) == (2, 0, 0)


def test_broken_fetch_counts_what_arrived(make_cache: MakeCache) -> None:
    """A model whose fetch breaks counts with the bytes that had arrived, in both sums."""
    source = Slow().add_files("a")
    cache = make_cache(source)
    handle = cache.prefetch(["a"])
    source.allowed.release()
    arrived = eventually(lambda: handle.progress.bytes)
    source.broken = True
    source.allowed.release()
    assert handle.wait(WAIT)
    assert handle.states == {"a": "failed"}
    assert (handle.progress.bytes, handle.progress.bytes_total) == (arrived, arrived)


def test_disk_is_enough(make_cache: MakeCache, source: DictSource, spawn: Spawn) -> None:
    """A prefetch to disk is ready once its model is there, though a lookup goes on to load it, and fails."""

    def load(path: Path, model: str) -> str:
        gate()
        raise ValueError("broken")

    cache = make_cache(source, book=Book(load))
    with Gate() as gate:
        with Gate() as fetching:
            source.gate = fetching
            handle = cache.prefetch(["a"], tier="disk")
            fetching.wait()
            wanted = spawn(cache.get, "a")
            eventually(lambda: cache.stats().waiters == 1)
        gate.wait()
        assert handle.wait(WAIT)
        assert (handle.states, handle.errors) == ({"a": "ready"}, {})
    with pytest.raises(LoadFailed):
        wanted.result(WAIT)


def test_looking_never_waits(make_cache: MakeCache, source: DictSource, book: Book, spawn: Spawn) -> None:
    """Progress, states and ``done`` can be had in callbacks, in a loader, and while others wait for the handle."""
    seen: list[tuple[Any, ...]] = []
    cache: ModelCache[Any]

    def look(*_: object) -> None:
        assert is_unlocked(cache)
        seen.append((handles[0].progress.total, handles[0].states, handles[0].done))

    handles: list[Any] = []
    book.gate = look
    with Gate() as gate:
        source.gate = gate
        cache = make_cache(source, book, memory={"gauge": FakeGauge()})
        cache.on(Fetched, look)
        handles.append(cache.prefetch(["a"]))
        waiter = spawn(handles[0].wait, WAIT)
        gate.wait()
    assert waiter.result(WAIT)
    assert [(total, states["a"]) for total, states, _ in seen] == [(1, "fetching"), (1, "loading")]


def test_cancel_of_one_of_two(make_cache: MakeCache) -> None:
    """Of two prefetches of a model one may be cancelled: its figures stand still, and the other's go on."""
    source = Slow().add_files("a")
    cache = make_cache(source)
    first = cache.prefetch(["a"])
    source.allowed.release()
    eventually(lambda: first.progress.bytes)
    second = cache.prefetch(["a"])
    first.cancel()
    assert second.progress.bytes == first.progress.bytes
    source.allowed.release(100)
    assert second.wait(WAIT)
    assert second.progress.bytes == SIZE
