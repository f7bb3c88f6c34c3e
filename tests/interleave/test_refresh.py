"""A refresh against lookups, leases, other refreshes, orders and ``close``, forced at the seams.

One caller at a time is ``behaviour/test_refresh``.
"""

import itertools
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from modelcache import (
    CacheClosed,
    Event,
    Evicted,
    Fetched,
    Loaded,
    LoadFailed,
    LocalSource,
    ModelCache,
    NoRoom,
    SourceUnavailable,
    Unloaded,
)
from tests.support import children
from tests.support.fakes import Book, DictSource, MakeCache, allocated
from tests.support.waiting import Gate, Spawn, eventually


class Halting(DictSource):
    """A source that stands still at ``halt`` each time it is asked, once that is set."""

    halt: Any = None

    def find(self, model: str) -> Any:
        """Stand still, then find."""
        if self.halt is not None:
            self.halt()
        return super().find(model)


def on_disk(make_cache: MakeCache, source: DictSource, *args: Any, **settings: Any) -> ModelCache[Any]:
    """Return a cache with the model a on disk, and a newer one at the source."""
    source.add("a", size=10)
    cache = make_cache(source, *args, **settings)
    cache.prefetch(["a"], tier="disk").wait(10)
    source.add("a", size=20)
    return cache


def in_memory(make_cache: MakeCache, source: DictSource, *args: Any, **settings: Any) -> ModelCache[Any]:
    """Return a cache with the model a in memory, and a newer one at the source."""
    source.add("a", size=10)
    cache = make_cache(source, *args, **settings)
    cache.get("a")
    source.add("a", size=20)
    return cache


# Several refreshes


def test_two_at_once(make_cache: MakeCache, spawn: Spawn) -> None:
    """Two refreshes of one model at once fetch and load its new version once, and both say that there was one."""
    source, book = Halting(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate() as gate:
        source.halt = gate
        refreshes = [spawn(cache.refresh, "a") for _ in range(2)]
        gate.wait()
        source.halt = None
    assert [refresh.result(10) for refresh in refreshes] == [True, True]
    assert book.loads == source.opens == ["a", "a"]


def test_upload_while_another_refresh_runs(make_cache: MakeCache, spawn: Spawn) -> None:
    """A refresh brings in what was uploaded before it was called, also where one that asked earlier still runs."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate("a") as gate:
        book.gate = gate
        first = spawn(cache.refresh, "a")
        gate.wait()
        source.add("a", size=30)
        second = spawn(cache.refresh, "a")
        eventually(lambda: len(cache._parts.flights.active["a"].watchers) == 2)
    assert first.result(10)
    assert second.result(10)
    assert cache.get("a").size == 30


# Lookups meanwhile


def test_old_version_serves_meanwhile(make_cache: MakeCache, spawn: Spawn) -> None:
    """While the new version is fetched and loaded, lookups, leases and prefetches get the old one at once."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate() as fetching, Gate("a") as loading:
        source.gate, book.gate = fetching, loading
        refresh = spawn(cache.refresh, "a")
        for gate in (fetching, loading):
            gate.wait()
            assert cache.get("a", timeout=0.01).size == 10
            assert cache.prefetch(["a"]).wait(0)
            gate.open()
    assert refresh.result(10)
    assert cache.get("a").size == 20
    assert cache.stats().misses == 1  # the very first


def test_lease_taken_meanwhile_finishes_on_the_old(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lease taken while the new version loads keeps the old one; its release unloads that, on its own thread."""
    source, threads = DictSource(), []
    book = Book(unload=lambda _: threads.append(threading.current_thread()))
    cache = in_memory(make_cache, source, book)
    lease = cache.lease("a")
    with Gate("a") as gate:
        book.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        assert lease.acquire().size == 10
    assert refresh.result(10)
    with cache.lease("a") as new:
        assert new.size == 20
    assert book.unloads == []
    lease.release()
    assert threads == [threading.current_thread()]


def test_lookups_that_join_while_the_source_is_down(make_cache: MakeCache, spawn: Spawn) -> None:
    """Who waits for the model itself gets the disk copy where the source is down; who asked for a new one hears."""
    for down, kind in ((SourceUnavailable("down", source="dict"), SourceUnavailable), (OSError("down"), LoadFailed)):
        source, book = Halting(), Book()
        cache = on_disk(make_cache, source, book)
        with Gate() as gate:
            source.halt, source.down = gate, down
            refresh = spawn(cache.refresh, "a")
            gate.wait()
            lookup, handle = spawn(cache.get, "a"), cache.prefetch(["a"])
            eventually(lambda: cache.stats().waiters == 1)  # noqa: B023 - called at once
        with pytest.raises(kind, match="down"):
            refresh.result(10)
        assert lookup.result(10).size == 10
        assert handle.wait(10)
        assert handle.errors == {}
        assert book.loads == ["a"]
        cache.delete("a")


def test_prefetch_alone_that_joins_while_the_source_is_down(make_cache: MakeCache, spawn: Spawn) -> None:
    """A prefetch that joins a refresh gets the disk copy too."""
    source, book = Halting(), Book()
    cache = on_disk(make_cache, source, book)
    with Gate() as gate:
        source.halt, source.down = gate, SourceUnavailable("down", source="dict")
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        handle = cache.prefetch(["a"])
    assert isinstance(refresh.exception(10), SourceUnavailable)
    assert handle.wait(10)
    assert handle.errors == {}
    assert book.alive == ["a"]


def test_lookup_that_joins_at_the_last_moment(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lookup that joins a refresh which has already failed, but not yet said so, gets the disk copy."""
    gate = Gate()

    class Slow(SourceUnavailable):
        """Stands still where a failed flight is tidied up, before it ends."""

        @property
        def __cause__(self) -> None:  # type: ignore[override]
            gate()

        @__cause__.setter
        def __cause__(self, cause: object) -> None:
            pass

    source, book = DictSource(), Book()
    cache = on_disk(make_cache, source, book)
    source.down = Slow("down", source="dict")
    with gate:
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        lookup = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 1)
    assert isinstance(refresh.exception(10), SourceUnavailable)
    assert lookup.result(10).size == 10


def test_old_version_is_evicted_meanwhile(make_cache: MakeCache, spawn: Spawn) -> None:
    """Where the old version is evicted while the new one loads, the new one lands alone."""
    source, book = DictSource().add("b"), Book()
    cache = in_memory(make_cache, source, book, memory={"max_models": 2})
    with Gate("a") as gate:
        book.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        assert cache.get("b").model == "b"
        assert book.alive == ["b"]
    assert refresh.result(10)
    assert sorted(book.alive) == ["a", "b"]
    assert cache.get("a").size == 20
    assert not any(isinstance(event, Unloaded) and event.reason == "replaced" for event in cache.history())


# Orders meanwhile


@pytest.mark.parametrize("where", ["fetching", "loading"])
@pytest.mark.parametrize("verb", ["unload", "delete"])
def test_dropped_meanwhile(make_cache: MakeCache, spawn: Spawn, verb: str, where: str) -> None:
    """A model that is unloaded or deleted while it is refreshed does not come back by that."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate() as gate:
        if where == "fetching":
            source.gate = gate
        else:
            book.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        getattr(cache, verb)("a")
        assert book.alive == []
    refresh.result(10)
    assert book.alive == []
    assert [row.tier for row in cache.models()] == (["disk"] if verb == "unload" else [])
    source.gate = book.gate = None
    assert cache.get("a").size == 20


def test_close_while_it_fetches(make_cache: MakeCache, spawn: Spawn) -> None:
    """``close()`` stops a refresh that fetches: its caller gets CacheClosed, and nothing is left over."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate() as gate:
        source.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        closing = spawn(cache.close)
        eventually(lambda: cache._parts.closed)
        eventually(lambda: cache._parts.flights.active["a"].cancelled)
    assert isinstance(refresh.exception(10), CacheClosed)
    assert closing.result(10)
    assert book.loads == book.unloads == ["a"]


def test_close_while_it_loads(make_cache: MakeCache, spawn: Spawn) -> None:
    """``close()`` lets a load of a new version end, and unloads both versions once."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with Gate() as gate:
        book.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        closing = spawn(cache.close)
        eventually(lambda: cache._parts.closed)
    assert closing.result(10)
    assert refresh.exception(10) is None or isinstance(refresh.exception(), CacheClosed)
    assert book.loads == book.unloads == ["a", "a"]


def test_close_with_both_versions_leased(make_cache: MakeCache) -> None:
    """Leases on two versions outlast ``close()``, and each unloads its own."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book)
    with cache.lease("a"):
        cache.refresh("a")
        with cache.lease("a"):
            assert not cache.close(timeout=0.05)
        assert book.unloads == ["a"]
    assert book.unloads == ["a", "a"]
    assert cache.close()


# From user code


def test_from_the_loader_of_another(make_cache: MakeCache) -> None:
    """A loader may refresh its part, also where there is one thread to load with."""
    source = DictSource().add("part", "whole", size=10)
    sizes = []

    def load(path: Path, model: str) -> Any:
        if model == "whole":
            assert cache.refresh("part")
            sizes.append(cache.get("part").size)
        return Book().load(path, model)

    cache = make_cache(source, Book(load), loaders=1)
    cache.get("part")
    source.add("part", size=20)
    cache.get("whole", timeout=5)
    assert sizes == [20]


@pytest.mark.parametrize("timeout", [None, 10.0])
def test_from_its_own_loader(make_cache: MakeCache, timeout: float | None) -> None:
    """A loader that refreshes the very model it loads is told so at once, whatever the timeout."""
    source, book = DictSource(), Book()
    cache = on_disk(make_cache, source, book)
    book.gate = lambda model: cache.refresh(model, timeout=timeout)
    with pytest.raises(LoadFailed, match="circle"):
        cache.get("a")
    book.gate = None


def test_circle_over_two_threads(make_cache: MakeCache, spawn: Spawn) -> None:
    """Loaders of which one waits for the other's model, and that one refreshes the first's, do not wait for ever."""
    source = DictSource().add("a", "b")
    both = threading.Barrier(2)

    def load(path: Path, model: str) -> Any:
        both.wait(10)
        if model == "a":
            return cache.get("b", timeout=None)
        eventually(lambda: cache._parts.flights.active["a"].blocked_on)
        return cache.refresh("a", timeout=None)

    cache = make_cache(source, Book(load), timeout=None)
    cache.prefetch(["a", "b"], tier="disk").wait(10)
    lookups = [spawn(cache.get, model) for model in "ab"]
    assert [type(lookup.exception(10)) for lookup in lookups] == [LoadFailed, LoadFailed]
    assert any("circle" in str(lookup.exception()) for lookup in lookups)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", [Fetched, Loaded, Unloaded, Evicted])
def test_from_a_callback(make_cache: MakeCache, kind: type[Event], background: bool) -> None:
    """A callback may refresh another model, whatever it hears of."""
    source = DictSource().add("a", "b", "c")
    cache = make_cache(source, memory={"max_models": 1}, timeout=5.0)
    cache.prefetch(["c"], tier="disk").wait(10)
    said: list[bool] = []
    done = threading.Event()

    def refresh(event: Event) -> None:
        if not done.is_set() and event.model == "a":
            source.add("c", size=20)
            said.append(cache.refresh("c"))
            done.set()

    cache.on(kind, refresh, background=background)
    assert cache.get("a").model == "a"
    assert cache.get("b").model == "b"
    assert done.wait(10)
    assert said == [True]
    assert cache.get("c").size == 20


def test_from_unload(make_cache: MakeCache) -> None:
    """``unload=`` of an old version may refresh its model again."""
    source, said = DictSource(), []

    def again(value: Any) -> None:
        if value.size == 10:
            source.add("a", size=30)
            said.append(cache.refresh("a"))

    cache = in_memory(make_cache, source, Book(unload=again))
    assert cache.refresh("a")
    assert said == [True]
    assert cache.get("a").size == 30


# Room


def test_waits_for_a_lease(make_cache: MakeCache, spawn: Spawn) -> None:
    """A refresh that has no room beside a leased old version waits, and lands once the lease ends."""
    source, book = DictSource(), Book()
    cache = in_memory(make_cache, source, book, memory={"max_models": 1})
    lease = cache.lease("a")
    lease.acquire()
    refresh = spawn(cache.refresh, "a")
    eventually(lambda: "waits for room" in cache.explain("a"))
    assert not refresh.done()
    lease.release()
    assert refresh.result(10)
    assert cache.get("a").size == 20
    assert book.alive == ["a"]


def test_own_lease_is_in_the_way(make_cache: MakeCache) -> None:
    """A refresh whose caller himself holds the lease that is in the way is refused at once."""
    cache = in_memory(make_cache, DictSource(), memory={"max_models": 1}, timeout=None)
    with cache.lease("a") as old:
        with pytest.raises(NoRoom):
            cache.refresh("a")
        assert cache.get("a") is old


# Under load


def rss() -> int:
    """Return the resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Weights:
    """A model of 4 MiB that was used."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.block = bytearray(b"x") * (4 * 2**20)


def test_hundred_versions_under_load(make_cache: MakeCache, spawn: Spawn) -> None:
    """A hundred versions, brought in while four threads use the model, leave one, and memory flat."""
    source = DictSource().add("a", size=10)
    born: list[weakref.ref[Weights]] = []
    numbers = itertools.count()

    def load(path: Path) -> Weights:
        weights = Weights(next(numbers))
        born.append(weakref.ref(weights))
        return weights

    def alive() -> int:
        return sum(each() is not None for each in born)

    gone: list[int] = []
    cache = make_cache(source, load=load, unload=lambda weights: gone.append(weights.number))
    over = threading.Event()

    def use() -> int:
        last = uses = 0
        while not over.is_set():
            with cache.lease("a") as weights:
                assert weights.number not in gone
                assert weights.number >= last
                last, uses = weights.number, uses + 1
            del weights
            over.wait(0.005)  # or the interpreter does nothing else
        return uses

    cache.get("a")
    users = [spawn(use) for _ in range(4)]
    before, most = 0, 0
    try:
        for size in range(11, 111):
            source.add("a", size=size)
            assert cache.refresh("a")
            most = max(most, alive())
            before = before or (rss() if size == 30 else 0)
    finally:
        over.set()
    assert all(user.result(10) > 0 for user in users)
    after = rss()
    assert most <= 6  # one for each thread that holds a lease, the newest, and the one being let go
    assert alive() == cache.stats().models == len(cache.models()) == 1
    assert sorted(gone) == list(range(100))
    assert after - before < 16 * 2**20
    assert len(list((cache.disk.path / "models").iterdir())) == 1
    assert cache.stats().disk_used == allocated(cache.disk.path)


# Other processes


def test_mapped_by_another_process(make_cache: MakeCache, tmp_path: Path) -> None:
    """What another process has mapped of the old version stays as it is while this one replaces it."""
    folder = tmp_path / "source"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "weights").write_bytes(b"1" * 100_000)
    child = children.start(
        """
        import mmap
        def load(path):
            with open(path / "weights", "rb") as file:
                return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        cache = ModelCache(sys.argv[1], load, disk=DiskTier(sys.argv[2], min_free=0))
        with cache.lease("a") as weights:
            print("mapped", flush=True)
            sys.stdin.readline()
            print(len(weights), set(weights[:]) == {ord("1")})
        cache.unload("a")
        print(bytes(cache.get("a")[:1]), cache.refresh("a"), bytes(cache.get("a")[:1]))
        cache.close()
        """,
        folder,
        tmp_path / "disk",
        stdin=-1,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "mapped\n"
        cache = make_cache(LocalSource(folder), Book(lambda path, _: (path / "weights").read_bytes()[:1]))
        assert cache.get("a") == b"1"
        (folder / "a" / "weights").write_bytes(b"2" * 90_000)
        assert cache.refresh("a")
        assert cache.get("a") == b"2"
        out, err = child.communicate("\n", timeout=10)
    assert child.returncode == 0, err
    cache.delete("a")  # this one learns of what the other did
    assert out.splitlines()[0] == "100000 True"
    assert out.splitlines()[1].endswith("b'2'")


def test_two_processes_share_a_new_version(make_cache: MakeCache) -> None:
    """A new version that another process has fetched is not fetched again; the old one goes with its last reader."""
    source = DictSource().add("a", size=10)  # two caches over one folder are to each other what two processes are
    caches = [make_cache(source) for _ in range(2)]
    for cache in caches:
        cache.get("a")
    source.add("a", size=20)
    assert [cache.refresh("a") for cache in caches] == [True, True]
    assert [cache.get("a").size for cache in caches] == [20, 20]
    assert source.opens == ["a", "a"]
    assert len(list((caches[0].disk.path / "models").iterdir())) == 1


def test_delete_with_an_old_version_read_elsewhere(make_cache: MakeCache) -> None:
    """``delete`` says that not all is gone while another process reads an old version, and takes that too at last."""
    source = DictSource().add("a", size=10)
    reader, cache = make_cache(source), make_cache(source)
    for each in (reader, cache):
        each.get("a")
    source.add("a", size=20)
    assert cache.refresh("a")
    assert not cache.delete("a")
    reader.close()
    assert cache.delete("a")
    assert make_cache(source).models() == []
