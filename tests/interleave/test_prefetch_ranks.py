"""Prefetches beside requests: who gets the thread, the room in memory and on disk, and that nobody is stuck for it."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from modelcache import CacheClosed, Evicted, Fetched, Loaded, LoadFailed, ModelCacheError, NoRoom
from tests.support.children import run
from tests.support.fakes import DictSource
from tests.support.racing import Call, Counting, Gate, Model, load_model, small_cache, together
from tests.support.waiting import WAIT, eventually

MANY = [f"m{number}" for number in range(1000)]
BLOCK = 4096


def order(cache: Any) -> list[str]:
    """Return the ids in the order in which they came into memory."""
    return [event.model for event in cache.history() if isinstance(event, Loaded)]


def test_a_thread_is_left_for_requests(tmp_path: Path) -> None:
    """A prefetch of 1,000 models whose loads all stand still takes all threads but one, which serves requests."""
    gate = Gate()
    source = DictSource().add("wanted", "other", *MANY)

    def load(path: Path, name: str) -> Model:
        if name in MANY:
            gate()
        return load_model(path)

    with small_cache(tmp_path, source, load, loaders=3) as cache:
        handle = cache.prefetch(MANY)
        eventually(lambda: gate.passed == 2)
        assert cache.get("wanted").name == "wanted"
        assert cache.get("other").name == "other"
        assert gate.passed == 2
        handle.cancel()
        gate.open()


def test_loaders_1_request_waits_for_one_step(tmp_path: Path) -> None:
    """With one thread a request waits for the fetch that is under way, and is served before that model is loaded."""
    counting = Counting()
    source = DictSource().add(*"abc")
    with small_cache(tmp_path, source, counting.load, loaders=1) as cache:
        fetching = Gate()
        source.gate = fetching
        handle = cache.prefetch(["a", "b"])
        fetching.wait()
        wanted = Call(cache.get, "c")
        eventually(lambda: cache.stats().waiters == 1)
        fetching.open()
        assert wanted.result().name == "c"
        assert handle.wait(WAIT)
    assert counting.loaded[0] == "c"
    assert source.opens == ["a", "c", "b"]
    assert sorted(counting.loaded) == ["a", "b", "c"]


def test_loaders_1_prefetch_waits_for_room(tmp_path: Path) -> None:
    """With one thread, a prefetch that waits for room gives it up to a request, which has room."""
    with small_cache(
        tmp_path,
        DictSource().add("held", "big", "small"),
        size_of=lambda model, path: {"held": 600, "big": 900, "small": 300}[model],
        loaders=1,
        memory={"budget": 1000, "interval": 60.0},
    ) as cache:
        with cache.lease("held"):
            handle = cache.prefetch(["big"])
            eventually(lambda: handle.states["big"] == "waiting for room")
            assert Call(cache.get, "small").result().name == "small"
            assert not handle.done
        assert handle.wait(WAIT)
        assert handle.states == {"big": "ready"}


def test_request_overtakes_in_the_line(tmp_path: Path) -> None:
    """A request that needs room in memory gets it before prefetches that wait for room longer."""
    with small_cache(
        tmp_path,
        DictSource().add("held", *"abcd"),
        loaders=4,
        memory={"max_models": 1, "interval": 60.0},
    ) as cache:
        lease = cache.lease("held")
        lease.acquire()
        handle = cache.prefetch(list("abc"))
        eventually(lambda: list(handle.states.values()) == ["waiting for room"] * 3)
        wanted = Call(cache.get, "d")
        eventually(lambda: cache.stats().waiters == 1 and "waits for room" in cache.explain("d"))
        lease.release()
        assert wanted.result().name == "d"
        assert handle.wait(WAIT)
        assert order(cache)[:2] == ["held", "d"]


def test_request_lifts_what_it_joins(tmp_path: Path) -> None:
    """A model that a prefetch has in the line goes before the others there once a request wants it."""
    with small_cache(
        tmp_path, DictSource().add("held", *"abc"), loaders=4, memory={"max_models": 1, "interval": 60.0}
    ) as cache:
        lease = cache.lease("held")
        lease.acquire()
        handle = cache.prefetch(list("abc"))
        eventually(lambda: list(handle.states.values()) == ["waiting for room"] * 3)
        wanted = Call(cache.get, "c")
        eventually(lambda: cache.stats().waiters == 1)
        lease.release()
        assert wanted.result().name == "c"
        assert handle.wait(WAIT)
        assert order(cache)[1] == "c"


def test_request_wakes_what_it_joins(tmp_path: Path) -> None:
    """A prefetched model that stood in the line behind another, though it has room, goes on once a request joins it."""
    with (
        small_cache(
            tmp_path,
            DictSource().add("held", "big", "small"),
            size_of=lambda model, path: {"held": 600, "big": 900, "small": 300}[model],
            memory={"budget": 1000, "interval": 60.0},
        ) as cache,
        cache.lease("held"),
    ):
        big = cache.prefetch(["big"])
        eventually(lambda: big.states["big"] == "waiting for room")
        small = cache.prefetch(["small"])
        eventually(lambda: small.states["small"] == "waiting for room")
        assert Call(cache.get, "small").result().name == "small"
        assert small.wait(WAIT)
        big.cancel()


def test_rank_falls_as_the_request_leaves(tmp_path: Path) -> None:
    """A prefetched model whose request has given up goes behind a later request again."""
    counting = Counting()
    gate = counting.gates["first"] = Gate()
    source = DictSource().add("first", "left", "stays")
    with small_cache(tmp_path, source, counting.load, loaders=1) as cache:
        first = Call(cache.get, "first")
        gate.wait()
        handle = cache.prefetch(["left"])
        assert isinstance(Call(cache.get, "left", timeout=0.01).error(), ModelCacheError)
        stays = Call(cache.get, "stays")
        eventually(lambda: cache.stats().waiters == 2)
        gate.open()
        first.result()
        stays.result()
        assert handle.wait(WAIT)
    assert source.opens == counting.loaded == ["first", "stays", "left"]


def disk_cache(folder: Path, source: DictSource, blocks: int, **settings: Any) -> Any:
    """Return a cache whose disk tier takes so many blocks of 4 KiB."""
    return small_cache(folder, source, disk={"budget": blocks * BLOCK}, **settings)


def test_request_gets_the_disk_first(tmp_path: Path) -> None:
    """On disk too a request that needs room gets it before prefetches that waited longer."""
    early = [f"early{number}" for number in range(5)]
    source = DictSource().add("held", "wanted", *early, size=20 * BLOCK)
    with disk_cache(tmp_path, source, 40, loaders=6) as cache:
        lease = cache.lease("held")
        lease.acquire()
        handle = cache.prefetch(early)
        eventually(lambda: set(handle.states.values()) == {"waiting for room"})
        wanted = Call(cache.get, "wanted")
        eventually(lambda: "waits for room" in cache.explain("wanted"))
        lease.release()
        assert wanted.result().name == "wanted"
        assert handle.wait(WAIT)
        assert order(cache)[:2] == ["held", "wanted"]


def test_prefetch_spares_what_a_request_waits_for(tmp_path: Path) -> None:
    """A prefetch does not remove the files of a model that a request is about to load."""
    counting = Counting()
    busy, ahead = Gate(), Gate()
    counting.gates["busy"] = busy

    class Source(DictSource):
        def find(self, model: str) -> Any:
            if model == "new":
                ahead()
            return super().find(model)

    source = Source().add("busy", "wanted", "idle", "new", size=20 * BLOCK)
    with disk_cache(tmp_path, source, 85, load=counting.load, loaders=2, memory={"max_models": 3}) as cache:
        assert cache.prefetch(["wanted"], tier="disk").wait(WAIT)
        assert cache.prefetch(["idle"], tier="disk").wait(WAIT)
        holder = Call(cache.get, "busy")
        busy.wait()
        other = cache.prefetch(["new"], tier="disk")
        ahead.wait()
        wanted = Call(cache.get, "wanted")  # both threads are taken: it is queued
        eventually(lambda: cache.stats().waiters == 2)
        ahead.open()
        assert wanted.result().name == "wanted"
        assert other.wait(WAIT)
        told = [event.model for event in cache.history() if isinstance(event, Evicted)]
        assert told == ["idle"]
        busy.open()
        holder.result()
    assert source.opens.count("wanted") == 1


def test_prefetch_lets_go_of_files_for_a_request(tmp_path: Path) -> None:
    """A prefetch that waits for room in memory does not keep the room on disk that a request needs."""
    source = DictSource().add("held", "big", "wanted", size=20 * BLOCK)
    with disk_cache(
        tmp_path,
        source,
        62,
        size_of=lambda model, path: {"held": 600, "big": 900, "wanted": 300}[model],
        loaders=3,
        memory={"budget": 1000, "interval": 60.0},
    ) as cache:
        with cache.lease("held"):
            handle = cache.prefetch(["big"])
            eventually(lambda: handle.states["big"] == "waiting for room")
            assert cache.get("wanted", timeout=WAIT).name == "wanted"
        assert handle.wait(WAIT)
        assert handle.errors == {}
        told = [event.model for event in cache.history() if isinstance(event, Evicted) and event.tier == "disk"]
        assert told[0] == "big"


def test_no_thread_leaves_what_a_loader_waits_for(tmp_path: Path) -> None:
    """A model that the loader of a prefetched one has come to wait for keeps its thread: there may be no other."""
    gate = Gate()

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            gate()
            return cache.get("part", timeout=5)
        return load_model(path)

    with small_cache(
        tmp_path,
        DictSource().add("held", "whole", "part", "small"),
        load,
        size_of=lambda model, path: {"held": 600, "part": 900}.get(model, 50),
        loaders=2,
        memory={"budget": 1000, "interval": 0.05},
    ) as cache:
        lease = cache.lease("held")
        lease.acquire()
        handle = cache.prefetch(["whole", "part"])
        gate.wait()
        joined = Call(cache.get, "part", timeout=0.2)  # has it begun on the thread that is left for requests
        eventually(lambda: handle.states["part"] == "waiting for room")
        joined.error()
        gate.open()
        eventually(lambda: "part" in {ahead.model for each in flights(cache) for ahead in each.blocked_on})
        small = Call(cache.get, "small")
        eventually(lambda: cache.stats().waiters == 2)
        lease.release()
        assert handle.wait(WAIT)
        assert handle.errors == {}
        assert small.result().name == "small"


def flights(cache: Any) -> list[Any]:
    """Return what is under way."""
    return list(cache._parts.flights.active.values())  # nothing public says that a loader waits


def test_part_of_a_prefetched_model_waits_behind_nobody(tmp_path: Path) -> None:
    """A part that a loader under way waits for gets its room before a request that must wait for that loader."""
    gate = Gate()

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            gate()
            return cache.get("part", timeout=5)
        return load_model(path)

    with (
        small_cache(
            tmp_path,
            DictSource().add("held", "whole", "part", "wanted"),
            load,
            size_of=lambda model, path: {"held": 400, "whole": 300, "part": 200, "wanted": 500}[model],
            loaders=4,
            memory={"budget": 1000, "interval": 60.0},
        ) as cache,
        cache.lease("held"),
    ):
        whole = cache.prefetch(["whole"])
        gate.wait()
        wanted = Call(cache.get, "wanted")
        eventually(lambda: "waits for room" in cache.explain("wanted"))
        part = cache.prefetch(["part"])
        eventually(lambda: part.states["part"] == "waiting for room")
        gate.open()
        assert whole.wait(WAIT)
        assert part.wait(WAIT)
        assert wanted.result().name == "wanted"
        assert (whole.errors, part.errors) == ({}, {})


def test_cancelled_as_it_would_give_way(tmp_path: Path) -> None:
    """A fetched model whose prefetch is cancelled, while a request waits for its thread, stops and makes way."""
    with small_cache(tmp_path, DictSource().add(*"ab"), loaders=1) as cache:
        gate = Gate()
        cache.on(Fetched, lambda event: gate() if event.model == "a" else None)
        handle = cache.prefetch(["a"])
        gate.wait()
        wanted = Call(cache.get, "b")
        eventually(lambda: cache.stats().waiters == 1)
        handle.cancel()
        gate.open()
        assert wanted.result().name == "b"
        assert order(cache) == ["b"]


@pytest.mark.parametrize("loaders", [1, 2, 3])
def test_prefetched_wholes_with_parts(tmp_path: Path, loaders: int) -> None:
    """Loaders of prefetched models that ask for prefetched parts go on, whoever has the threads."""
    parts, wholes = [f"p{number}" for number in range(6)], [f"w{number}" for number in range(12)]

    def load(path: Path, name: str) -> Any:
        if name in wholes:
            number = wholes.index(name)
            cache.prefetch([parts[number % 6]]).wait(5)
            return [cache.get(parts[(number + step) % 6], timeout=5).name for step in (1, 3)]
        return load_model(path)

    with small_cache(
        tmp_path, DictSource().add("x", *parts, *wholes), load, loaders=loaders, memory={"interval": 0.02}
    ) as cache:
        handle = cache.prefetch([*wholes, *parts])
        calls = [Call(cache.get, name, timeout=5) for name in ("x", parts[5], wholes[11])]
        for call in calls:
            call.result()
        assert handle.wait(WAIT)
        assert handle.errors == {}


def test_leased_by_who_waits_for_the_prefetch(tmp_path: Path) -> None:
    """A thread that holds the lease in the way of its own prefetch is told so, where another model is queued behind."""
    with (
        small_cache(tmp_path, DictSource().add(*"abc"), loaders=2, memory={"max_models": 1, "interval": 0.02}) as cache,
        cache.lease("a"),
    ):
        handle = cache.prefetch(["b", "c"])
        assert handle.wait(WAIT)
        assert {type(error) for error in handle.errors.values()} == {NoRoom}


@pytest.mark.parametrize("state", ["queued", "fetching", "waiting for room", "loading", "ready", "failed"])
@pytest.mark.parametrize("end", ["cancel", "close", "refresh", "delete"])
def test_end_in_each_state(tmp_path: Path, state: str, end: str) -> None:
    """Whatever a model of a prefetch is doing as the prefetch or the cache ends, or it is deleted, all waits end."""
    gate = Gate()
    counting = Counting()
    source = DictSource().add(*"abz")
    if state == "loading":
        counting.gates["a"] = gate
    elif state in {"queued", "fetching"}:
        source.gate = gate
    elif state == "failed":
        del source.artifacts["a"]
    cache = small_cache(
        tmp_path, source, counting.load, unload=counting.unload, loaders=1, memory={"max_models": 1, "interval": 0.02}
    )
    lease = cache.lease("z")
    if state == "waiting for room":
        lease.acquire()
    handle = cache.prefetch(["b", "a"] if state == "queued" else ["a"])
    eventually(lambda: handle.states["a"] == state)
    waiter = Call(handle.wait, WAIT)
    ending = Call({"cancel": handle.cancel, "close": cache.close}.get(end, lambda: getattr(cache, end)("a")))
    if end == "cancel":
        ending.result()
        assert waiter.result() is True
    gate.open()
    if state == "waiting for room":
        lease.release()
    ending.error()
    assert waiter.result() is True
    ends = {"ready", "failed", "cancelled"}
    assert set(handle.states.values()) <= ends
    progress = handle.progress
    assert progress.ready + progress.failed + progress.cancelled == progress.total
    eventually(lambda: cache.close(timeout=5))
    assert len(counting.unloaded) == len(counting.loaded)


def test_prefetch_races_close(tmp_path: Path) -> None:
    """A prefetch that is being begun while the cache closes ends, and begins nothing once it is closed."""
    for number in range(20):
        cache = small_cache(tmp_path / str(number), DictSource().add(*MANY[:50]), loaders=2)
        handle, gone = together(lambda: cache.prefetch(MANY[:50]), lambda: cache.close(timeout=5))  # noqa: B023
        assert gone is True
        if isinstance(handle, Exception):
            assert isinstance(handle, CacheClosed)
        else:
            assert handle.wait(WAIT)


def test_fork_between_landing_and_callbacks(tmp_path: Path) -> None:
    """In a child, a handle ends that was forked while the callbacks of its last model ran."""
    run(
        """
        from modelcache import Loaded
        gate = Gate()
        cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"), loaders=1)
        cache.on(Loaded, gate)
        handle = cache.prefetch(["a"])
        gate.wait()
        child = os.fork()
        if child == 0:
            assert handle.wait(5)
            assert handle.states == {"a": "failed"}, handle.states
            assert handle.progress.failed == 1 and handle.progress.left == 0
            cache.off(gate)
            assert cache.prefetch(["b"]).wait(5)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        gate.open()
        assert handle.wait(5)
        assert handle.states == {"a": "ready"}
        cache.close()
        """,
        str(tmp_path),
    )


def step(cache: Any, names: list[str], choice: random.Random) -> None:
    """Do something to some models."""
    picked = choice.sample(names, 3)
    act = choice.randrange(6)
    if act == 0:
        cache.unload(picked[0])
        cache.delete(picked[1])
    elif act == 1:
        cache.refresh(picked[0])
    elif act == 2:
        handle = cache.prefetch(picked, tier=choice.choice(["memory", "disk"]))
        handle.wait(0.005)
        handle.cancel()
        assert set(handle.states.values()) <= {"ready", "failed", "cancelled"}
    elif act == 3:
        assert cache.prefetch(picked, tier=choice.choice(["memory", "disk"])).wait(15)
    else:
        assert cache.get(picked[0]).name == picked[0]


@pytest.mark.parametrize("seed", range(4))
def test_everything_beside_prefetches(tmp_path: Path, seed: int) -> None:
    """Whatever prefetches, requests, cancels, drops and refreshes do at once, all end, and loads have one unload."""
    counting = Counting()
    names = [f"m{number}" for number in range(10)]
    source = DictSource().add(*names, size=3 * BLOCK)

    def load(path: Path, name: str) -> Model:
        if name in {"m7", "m8"}:
            cache.prefetch([names[int(name[1:]) - 5]]).wait(5)
        if name == "m9":
            raise ValueError("broken")
        return counting.load(path, name)

    cache = disk_cache(
        tmp_path,
        source,
        60,
        load=load,
        unload=counting.unload,
        loaders=1 + seed % 3,
        timeout=10.0,
        retry_after=0.01,
        memory={"max_models": 4, "interval": 0.01},
    )

    def roam(number: int) -> bool:
        choice = random.Random(seed * 100 + number)  # noqa: S311
        for _ in range(25):
            try:
                step(cache, names, choice)
            except (LoadFailed, NoRoom):  # m9, or all that is in memory is leased by who waits
                continue
        return True

    assert together(*[lambda number=number: roam(number) for number in range(5)], timeout=40) == [True] * 5
    assert cache.close(timeout=10)
    assert not counting.twice
    assert sorted(model.name for model in counting.unloaded) == sorted(counting.loaded)
    assert threading.active_count() < 20
