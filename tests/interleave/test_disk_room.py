"""Fetches that need one another's room, leased artifacts in the way, and retuning while bytes move."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import NoRoom, Timeout, TooLarge
from modelcache.disk.reserving import DiskRoom
from tests.support.fakes import DictSource
from tests.support.racing import Call, Counting, Gate, Model, allocated, small_cache, together
from tests.support.waiting import eventually

BLOCK = 4096
OVERHEAD = 4 * BLOCK  # the published folder, artifact/ in it, the record, and a file's last block


def size_on_disk(blocks: int) -> int:
    """Return the bytes of a file that takes this many blocks."""
    return blocks * BLOCK


def load_name(path: Path, name: str) -> Model:
    """Load without a look at the files."""
    return Model(name)


def test_two_fetches_need_one_anothers_room(tmp_path: Path) -> None:
    """Two archives that each unpack into most of the budget, begun at one moment, arrive one after the other."""
    source = DictSource().add("a", "b", size=size_on_disk(30))
    both = threading.Barrier(2)
    passed = threading.local()

    def meet() -> None:
        if not getattr(passed, "once", False):
            passed.once = True
            both.wait(5)

    source.gate = meet
    with small_cache(tmp_path, source, disk={"budget": size_on_disk(30) + 2 * OVERHEAD}, loaders=2) as cache:
        models = together(lambda: cache.get("a", timeout=14), lambda: cache.get("b", timeout=14), timeout=15)
        assert [getattr(model, "name", model) for model in models] == ["a", "b"]


@pytest.mark.parametrize("count", [3, 6])
def test_many_fetches_need_one_anothers_room(tmp_path: Path, count: int) -> None:
    """More archives than fit, all begun at one moment, all arrive, and the budget holds meanwhile."""
    names = [f"m{number}" for number in range(count)]
    source = DictSource().add(*names, size=size_on_disk(30))
    budget = size_on_disk(45) + OVERHEAD
    seen: list[int] = []
    source.gate = lambda: seen.append(allocated(tmp_path / "disk"))
    with small_cache(tmp_path, source, load_name, disk={"budget": budget}, loaders=count) as cache:
        models = together(*[lambda name=name: cache.get(name, timeout=17) for name in names], timeout=18)  # type: ignore[misc]
        assert [getattr(model, "name", model) for model in models] == names
    assert max(seen) <= budget


def test_leased_artifacts_in_the_way_of_two_fetches(tmp_path: Path) -> None:
    """Two lookups that wait for disk room which one lease holds are both told who holds it."""
    source = DictSource().add("held", size=size_on_disk(20)).add("a", "b", size=size_on_disk(20))
    budget = size_on_disk(30) + OVERHEAD
    with small_cache(tmp_path, source, load_name, disk={"budget": budget}, loaders=2) as cache:
        lease = cache.lease("held")
        lease.acquire()
        errors = together(lambda: cache.get("a", timeout=3), lambda: cache.get("b", timeout=3))
        for error in errors:
            assert isinstance(error, NoRoom), errors
            assert [name for name, _, _ in error.holders] == ["held"]
        eventually(lambda: not cache._parts.flights.active, 6)
        lease.release()
        assert cache.get("a").name == "a"


def test_two_threads_whose_own_leases_are_in_the_way_on_disk(tmp_path: Path) -> None:
    """Two threads that each lease one model and need disk room for another are refused at once."""
    source = DictSource().add("a", "b", "c", "d", size=size_on_disk(20))
    budget = size_on_disk(50) + 2 * OVERHEAD
    barrier = threading.Barrier(2)

    def work(mine: str, wanted: str) -> None:
        with cache.lease(mine):
            barrier.wait(5)
            cache.get(wanted, timeout=None)

    with small_cache(tmp_path, source, load_name, disk={"budget": budget}, loaders=2) as cache:
        calls = [Call(work, "a", "c"), Call(work, "b", "d")]
        errors = [call.error(8) for call in calls]
        assert any(isinstance(error, NoRoom) for error in errors), errors
        assert all(error is None or isinstance(error, NoRoom) for error in errors), errors


def test_flight_without_waiters_stops_waiting_for_disk_room(tmp_path: Path) -> None:
    """Fetches that nobody waits for any more do not go on asking the source while a lease is in their way."""
    source = DictSource().add("held", "a", "b", size=size_on_disk(20))
    with (
        small_cache(tmp_path, source, load_name, disk={"budget": size_on_disk(30) + OVERHEAD}, loaders=2) as cache,
        cache.lease("held"),
    ):
        calls = [Call(cache.get, name, timeout=0.3) for name in "ab"]
        for call in calls:
            assert isinstance(call.error(), NoRoom | Timeout)
        eventually(lambda: not cache._parts.flights.active, 8)


def test_retune_meets_a_fetch(tmp_path: Path) -> None:
    """A disk budget lowered below a fetch under way ends it with TooLarge; raised, a waiting one goes on."""
    gate = Gate()
    source = DictSource().add("a", size=size_on_disk(30))
    source.gate = gate
    with small_cache(tmp_path, source, load_name, disk={"budget": size_on_disk(60)}, retry_after=0) as cache:
        get = Call(cache.get, "a")
        gate.wait()
        cache.disk.budget = size_on_disk(8)
        gate.open()
        assert isinstance(get.error(), TooLarge)
        assert allocated(tmp_path / "disk") <= size_on_disk(8)
        cache.disk.budget = size_on_disk(60)
        assert cache.get("a").name == "a"


def test_raised_budget_lets_a_waiting_fetch_go_on(tmp_path: Path) -> None:
    """A fetch that waits for disk room goes on as the budget is raised."""
    source = DictSource().add("held", "a", size=size_on_disk(20))
    with small_cache(tmp_path, source, load_name, disk={"budget": size_on_disk(30) + OVERHEAD}) as cache:
        lease = cache.lease("held")
        lease.acquire()
        get = Call(cache.get, "a", timeout=9)
        eventually(lambda: any(staging.waiting for staging in cache._parts.shelf.index.stagings))
        cache.disk.budget = size_on_disk(80)
        assert get.result(5).name == "a"
        lease.release()


def test_retune_meets_a_load(tmp_path: Path) -> None:
    """max_models lowered while a load runs is kept once it has landed and its lease has ended."""
    gate = Gate()
    done = Counting(c=gate)
    with small_cache(
        tmp_path, DictSource().add("a", "b", "c"), done.load, unload=done.unload, memory={"max_models": 3}
    ) as cache:
        cache.prefetch(["a", "b"]).wait(5)
        lease = cache.lease("c")
        acquire = Call(lease.acquire)
        gate.wait()
        cache.memory.max_models = 1
        assert len(done.unloaded) == 2
        gate.open()
        acquire.result()
        lease.release()
        assert [model.model for model in cache.models() if model.tier == "memory"] == ["c"]


def test_setter_never_waits_for_another_threads_unload(tmp_path: Path) -> None:
    """Assigning max_models evicts what it can itself, while an unload= on another thread hangs."""
    gate = Gate()
    done = Counting()

    def unload(model: Model) -> None:
        done.unload(model)
        if model.name == "a":
            gate()

    with small_cache(tmp_path, DictSource().add("a", "b", "c"), done.load, unload=unload) as cache:
        cache.prefetch(["a", "b", "c"]).wait(5)
        leaving = Call(cache.unload, "a")
        gate.wait()
        Call(setattr, cache.memory, "max_models", 1).result(3)
        assert len(done.unloaded) == 2
        gate.open()
        assert leaving.result() is True


def test_model_in_memory_gives_up_its_files_once_released(tmp_path: Path) -> None:
    """A fetch waits for the files of a leased model, and gets their room as the lease ends: both tiers drop it."""
    done = Counting()
    source = DictSource().add("held", "a", size=size_on_disk(20))

    def load(path: Path, name: str) -> Any:
        return done.load(path, name)

    with small_cache(tmp_path, source, load, unload=done.unload, disk={"budget": size_on_disk(30) + OVERHEAD}) as cache:
        lease = cache.lease("held")
        lease.acquire()
        get = Call(cache.get, "a", timeout=9)
        eventually(lambda: any(staging.waiting for staging in cache._parts.shelf.index.stagings))
        assert not done.unloaded
        lease.release()
        assert get.result(5).name == "a"
        assert [model.name for model in done.unloaded] == ["held"]
        assert [model.model for model in cache.models()] == ["a"]


def test_removal_by_another_cache_of_this_folder(tmp_path: Path) -> None:
    """A lookup of an artifact that another process has just removed fetches it again; one that is loaded stays."""
    source = DictSource().add("a", "b")
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as other:
        one.get("a")
        one.prefetch(["b"], tier="disk").wait(5)
        assert other.delete("a") is False
        assert other.delete("b") is True
        assert one.get("b").name == "b"
        assert source.opens == ["a", "b", "b"]
        assert one.get("a").name == "a"


def test_two_caches_evict_and_fetch_in_one_folder(tmp_path: Path) -> None:
    """Two caches that fight over one folder with room for three models never fail, and never get a wrong model."""
    names = [f"m{number}" for number in range(8)]
    source = DictSource().add(*names, size=size_on_disk(3))
    budget = 3 * (size_on_disk(3) + OVERHEAD)
    settings: dict[str, Any] = {"disk": {"budget": budget}, "memory": {"max_models": 1}}
    with small_cache(tmp_path, source, **settings) as one, small_cache(tmp_path, source, **settings) as other:

        def work(cache: Any, seed: int) -> None:
            for step in range(25):
                name = names[(step * seed + seed) % 8]
                with cache.lease(name, timeout=15) as model:
                    assert model.name == name

        outcomes = together(
            lambda: work(one, 3), lambda: work(one, 5), lambda: work(other, 7), lambda: work(other, 1), timeout=18
        )
        assert outcomes == [None] * 4, outcomes


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_lease_of_an_ended_thread_is_not_the_next_ones(tmp_path: Path, tier: str) -> None:
    """A lease that a thread took and handed over before it ended is not taken for that of a later thread."""
    settings: dict[str, Any] = {
        "memory": {"memory": {"max_models": 1}},
        "disk": {"disk": {"budget": size_on_disk(30) + OVERHEAD}},
    }[tier]
    with small_cache(tmp_path, DictSource().add("held", "a", size=size_on_disk(20)), load_name, **settings) as cache:
        cache.prefetch(["held"]).wait(5)
        lease = cache.lease("held")
        Call(lease.acquire).result()
        get = Call(cache.get, "a", timeout=9)  # most likely on a thread of the same ident
        eventually(lambda: get.over or cache.stats().waiters)
        never = threading.Event()
        never.wait(0.2)
        assert not get.over, get.error()
        lease.release()
        assert get.result(5).name == "a"


@pytest.mark.parametrize("what", ["gone", "published"])
def test_others_move_between_a_decision_and_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What another process ends just after it was in the way makes room, whoever here learns of it first."""
    settings: dict[str, Any] = {"disk": {"budget": size_on_disk(4) + OVERHEAD}}
    source = DictSource().add("a", "b")
    with small_cache(tmp_path, source, **settings) as one, small_cache(tmp_path, source, **settings) as other:
        step, gate = ("discard", Gate()) if what == "gone" else ("publish", Gate())
        if what == "gone":
            assert other.prefetch(["a"], tier="disk").wait(5)
        store = other.disk.store
        real = getattr(store, step)
        monkeypatch.setattr(store, step, lambda *arguments: (gate(), real(*arguments))[1])
        job = Call(other.delete, "a") if what == "gone" else Call(other.prefetch(["a"], tier="disk").wait, 9)
        gate.wait()
        wait = DiskRoom._wait

        def late(*arguments: Any) -> None:
            gate.open()
            job.result()
            one.models()
            wait(*arguments)

        monkeypatch.setattr(DiskRoom, "_wait", late)
        assert one.get("b", timeout=9).name == "b"


def test_files_of_a_model_that_another_thread_unloads(tmp_path: Path) -> None:
    """A fetch waits for the files of a model whose ``unload=`` runs on another thread."""
    gate = Gate()
    settings: dict[str, Any] = {"disk": {"budget": size_on_disk(4) + OVERHEAD}}
    with small_cache(tmp_path, DictSource().add("a", "b"), unload=lambda _: gate(), **settings) as cache:
        cache.get("a")
        dropped = Call(cache.unload, "a")
        gate.wait()
        get = Call(cache.get, "b", timeout=9)
        eventually(lambda: get.over or cache._parts.flights.active["b"].state == "waiting for room")
        gate.open()
        assert get.result().name == "b"
        assert dropped.result()


def test_unload_that_asks_for_the_room_of_its_own_files(tmp_path: Path) -> None:
    """An ``unload=`` that looks up a model for which its own files are in the way is told so, and does not hang."""
    errors: list[Exception] = []

    def unload(_: Model) -> None:
        try:
            cache.get("b", timeout=9)
        except NoRoom as error:
            errors.append(error)

    budget = size_on_disk(4) + OVERHEAD
    with small_cache(tmp_path, DictSource().add("a", "b"), unload=unload, disk={"budget": budget}) as cache:
        cache.get("a")
        started = time.monotonic()
        assert cache.unload("a")
        assert len(errors) == 1
        assert time.monotonic() - started < 5
