"""Fetches and loads under way: who waits, who runs them, circles, failures, closing."""

import contextvars
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import CacheClosed, Evicted, Loaded, LoadFailed, ModelNotFound, Unloaded
from tests.support.fakes import DictSource
from tests.support.racing import Call, Counting, Gate, Model, load_model, small_cache, together
from tests.support.waiting import eventually


def test_f081_200_threads_one_load(tmp_path: Path) -> None:
    """F081: 200 threads that ask for one cold model at one moment get the same object of one load."""
    done = Counting()
    source = DictSource().add("a")
    with small_cache(tmp_path, source, done.load) as cache:
        models = together(*[lambda: cache.get("a")] * 200)
        assert len(set(map(id, models))) == 1
        stats = cache.stats()
    assert (done.loaded, source.opens) == (["a"], ["a"])
    assert (stats.loads, stats.fetches, stats.waiters) == (1, 1, 0)


def test_f081_hits_during_unloads_are_never_lost(tmp_path: Path) -> None:
    """F081: get never fails while the model is unloaded and loaded again all the time."""
    done = Counting()
    stop = threading.Event()

    def hit() -> int:
        count = 0
        while not stop.is_set():
            assert cache.get("a").name == "a"
            count += 1
        return count

    with small_cache(tmp_path, DictSource().add("a"), done.load) as cache:
        hitters = [Call(hit) for _ in range(4)]
        for _ in range(100):
            cache.unload("a")
        stop.set()
        assert all(call.result() for call in hitters)
    assert not done.twice


@pytest.mark.parametrize("loaders", [1, 2])
def test_f084_ensembles_take_no_second_slot(tmp_path: Path, loaders: int) -> None:
    """F084: 40 ensembles of three parts each, all asked for at once, are loaded by one or two threads."""
    parts = [f"part{number}" for number in range(5)]
    whole = [f"whole{number}" for number in range(40)]
    loading: set[int] = set()

    def load(path: Path, name: str) -> Any:
        loading.add(threading.get_ident())
        if name in whole:
            number = whole.index(name)
            wanted = [parts[(number + step) % 5] for step in (0, 2, 4)]
            return [cache.get(part).name for part in wanted]
        return load_model(path)

    source = DictSource().add(*parts, *whole)
    with small_cache(tmp_path, source, load, loaders=loaders) as cache:
        results = together(*[lambda name=name: cache.get(name) for name in whole])  # type: ignore[misc]
        assert all(isinstance(result, list) and len(result) == 3 for result in results), results
        assert cache.stats().loads == 45
    assert len(loading) <= loaders


def test_queued_prefetch_is_stolen_by_a_nested_lookup(tmp_path: Path) -> None:
    """A part that is queued behind the very loader that asks for it is loaded by that loader's thread."""
    gate = Gate()

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            gate()
            return cache.get("part", timeout=5)
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("whole", "part"), load, loaders=1) as cache:
        get = Call(cache.get, "whole")
        gate.wait()
        handle = cache.prefetch(["part"])
        gate.open()
        part = get.result()
        assert handle.wait(5)
        assert not handle.errors
        assert cache.get("part") is part
        assert cache.stats().loads == 2


def test_circle_on_one_thread(tmp_path: Path) -> None:
    """A loader that asks for itself by way of another fails, naming the circle, and at once."""

    def load(path: Path, name: str) -> Any:
        return cache.get({"a": "b", "b": "c", "c": "a"}[name], timeout=None)

    with (
        small_cache(tmp_path, DictSource().add("a", "b", "c"), load) as cache,
        pytest.raises(LoadFailed, match="circle: 'c' -> 'a' -> 'b' -> 'c'"),
    ):
        cache.get("a", timeout=None)


def test_circle_over_two_threads(tmp_path: Path) -> None:
    """Two loaders on two threads that ask for each other's models do not wait for ever: both lookups end."""
    barrier = threading.Barrier(2)

    def load(path: Path, name: str) -> Any:
        barrier.wait(5)
        return cache.get({"a": "b", "b": "a"}[name], timeout=None)

    with small_cache(tmp_path, DictSource().add("a", "b"), load, loaders=2) as cache:
        calls = [Call(cache.get, name, timeout=None) for name in "ab"]
        errors = [call.error(8) for call in calls]
        assert all(isinstance(error, LoadFailed) for error in errors), errors
        assert any("circle" in str(error) for error in errors)
        assert cache.stats().waiters == 0


def test_circle_over_three_threads_with_innocent_bystanders(tmp_path: Path) -> None:
    """A circle over three threads ends; a fourth lookup that waits for a part of it gets an error too."""
    barrier = threading.Barrier(3)

    def load(path: Path, name: str) -> Any:
        barrier.wait(5)
        return cache.get({"a": "b", "b": "c", "c": "a"}[name], timeout=None)

    with small_cache(tmp_path, DictSource().add("a", "b", "c"), load, loaders=3) as cache:
        calls = [Call(cache.get, name, timeout=None) for name in "abca"]
        assert all(isinstance(call.error(8), LoadFailed) for call in calls)


def test_f092_leader_fails_for_all(tmp_path: Path) -> None:
    """F092: when the load that 20 lookups wait for fails, each gets an error of its own, of one type."""
    gate = Gate()

    def load(path: Path) -> Any:
        gate()
        raise ValueError("broken")

    with small_cache(tmp_path, DictSource().add("a"), load, retry_after=60) as cache:
        calls = [Call(cache.get, "a") for _ in range(20)]
        gate.wait()
        eventually(lambda: cache.stats().waiters == 20)
        gate.open()
        errors = [call.error() for call in calls]
        assert all(type(error) is LoadFailed for error in errors)
        assert len(set(map(id, errors))) == 20
        with pytest.raises(LoadFailed):
            cache.get("a")
        assert gate.passed == 1


def test_get_joins_a_cancelled_prefetch(tmp_path: Path) -> None:
    """A lookup that comes as the prefetch it would join is cancelled still gets its model."""
    gate = Gate()
    source = DictSource().add("a")
    source.gate = gate
    with small_cache(tmp_path, source) as cache:
        handle = cache.prefetch(["a"])
        gate.wait()
        handle.cancel()
        get = Call(cache.get, "a")
        eventually(lambda: cache.stats().waiters)
        gate.open()
        assert get.result().name == "a"
        assert handle.done


def test_prefetch_to_disk_is_raised_to_memory_on_its_way(tmp_path: Path) -> None:
    """A lookup that joins a prefetch to disk gets the model in memory, of one fetch."""
    gate = Gate()
    source = DictSource().add("a")
    source.gate = gate
    with small_cache(tmp_path, source) as cache:
        handle = cache.prefetch(["a"], tier="disk")
        gate.wait()
        get = Call(cache.get, "a")
        eventually(lambda: cache.stats().waiters)
        gate.open()
        assert get.result().name == "a"
        assert handle.wait(5)
    assert source.opens == ["a"]


def test_two_prefetches_and_a_lookup_share_a_flight(tmp_path: Path) -> None:
    """Cancelling one of two prefetches of a model that a lookup waits for disturbs neither."""
    gate = Gate()
    source = DictSource().add("a")
    source.gate = gate
    with small_cache(tmp_path, source) as cache:
        first, second = cache.prefetch(["a"]), cache.prefetch(["a"])
        gate.wait()
        first.cancel()
        gate.open()
        assert second.wait(5)
        assert not second.errors
        assert second.progress.ready == 1
    assert source.opens == ["a"]


def test_loader_runs_in_the_first_callers_context(tmp_path: Path) -> None:
    """A load sees the contextvars of whoever asked first, and changes to them stay with the load."""
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")
    seen = []

    def load(path: Path) -> Model:
        seen.append(tenant.get())
        tenant.set("loader")
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("a"), load) as cache:
        tenant.set("caller")
        cache.get("a")
        assert tenant.get() == "caller"
    assert seen == ["caller"]


def test_lookup_on_a_thread_that_a_loader_started(tmp_path: Path) -> None:
    """Parts asked for on threads that a loader starts, in a copy of its context, are loaded side by side."""
    barrier = threading.Barrier(2)

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            calls = [Call(contextvars.copy_context().run, cache.get, part, timeout=8) for part in ("x", "y")]
            return [call.result().name for call in calls]
        barrier.wait(5)
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("whole", "x", "y"), load, loaders=3) as cache:
        assert cache.get("whole", timeout=9) == ["x", "y"]


def test_parts_asked_for_on_other_threads_do_not_hide_a_circle(tmp_path: Path) -> None:
    """A loader whose helper thread waits for the whole is a circle too, and ends as one."""

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            return Call(contextvars.copy_context().run, cache.get, "part", timeout=None).result(8)
        return cache.get("whole", timeout=None)

    with (
        small_cache(tmp_path, DictSource().add("whole", "part"), load, loaders=2) as cache,
        pytest.raises(LoadFailed, match="circle"),
    ):
        cache.get("whole", timeout=9)


def test_delete_while_its_fetch_is_under_way(tmp_path: Path) -> None:
    """A model deleted while it is being loaded reaches those who wait, and is loadable afterwards."""
    gate = Gate()
    done = Counting(a=gate)
    source = DictSource().add("a")
    with small_cache(tmp_path, source, done.load, unload=done.unload) as cache:
        lease = cache.lease("a")
        get = Call(lease.acquire)
        gate.wait()
        assert cache.delete("a") is False
        gate.open()
        assert get.result().name == "a"
        lease.release()
        eventually(lambda: cache.delete("a"))
        assert cache.models() == []
        assert cache.get("a").name == "a"
        assert source.opens == ["a", "a"]


def test_delete_and_get_at_once(tmp_path: Path) -> None:
    """However delete and get meet, get returns the model, and a last delete leaves nothing."""
    done = Counting()
    with small_cache(tmp_path, DictSource().add("a"), done.load, unload=done.unload) as cache:

        def get() -> None:
            for _ in range(25):
                with cache.lease("a") as model:
                    assert model.name == "a"
                    assert not model.unloads

        def delete() -> None:
            for _ in range(40):
                cache.delete("a")

        assert together(get, get, get, delete) == [None] * 4
        assert eventually(lambda: cache.delete("a"))
        assert cache.models() == []
        assert not list((tmp_path / "disk" / "models").iterdir())
    assert all(model.unloads == 1 for model in done.unloaded)
    assert len(done.unloaded) == len(done.loaded)


def test_delete_waits_for_nobodys_lease(tmp_path: Path) -> None:
    """Delete of a leased model returns False at once; files and model go with the last lease."""
    done = Counting()
    with small_cache(tmp_path, DictSource().add("a"), done.load, unload=done.unload) as cache:
        with cache.lease("a"):
            assert cache.delete("a") is False
            assert list((tmp_path / "disk" / "models").iterdir())
        assert len(done.unloaded) == 1
        assert not list((tmp_path / "disk" / "models").iterdir())
        assert cache.models() == []


def test_missing_model_asked_by_many(tmp_path: Path) -> None:
    """Many lookups of a model that the source does not have ask it once."""
    source = DictSource()
    with small_cache(tmp_path, source) as cache:
        errors = together(*[lambda: cache.get("a")] * 20)
        assert all(type(error) is ModelNotFound for error in errors)
    assert source.finds == ["a"]


def test_close_lets_a_running_ensemble_finish(tmp_path: Path) -> None:
    """A request that runs when close begins finishes, also where its loader has yet to ask for a part."""
    gate = Gate()

    def load(path: Path, name: str) -> Any:
        if name == "whole":
            gate()
            return cache.get("part").name
        return load_model(path)

    cache = small_cache(tmp_path, DictSource().add("whole", "part"), load)
    get = Call(cache.get, "whole")
    gate.wait()
    close = Call(cache.close)
    eventually(lambda: cache._parts.closed)
    with pytest.raises(CacheClosed):
        cache.get("part")
    gate.open()
    assert close.result() is True
    assert get.result() == "part"


def test_close_meets_landing(tmp_path: Path) -> None:
    """A load under way when close begins reaches its caller, and is unloaded with its lease."""
    gate = Gate()
    done = Counting(a=gate)
    cache = small_cache(tmp_path, DictSource().add("a", "b"), done.load, unload=done.unload)
    lease = cache.lease("a")
    acquire = Call(lease.acquire)
    gate.wait()
    close = Call(cache.close)
    eventually(lambda: cache._parts.closed)
    with pytest.raises(CacheClosed):
        cache.get("b")
    gate.open()
    model = acquire.result()
    assert close.result() is False
    assert not done.unloaded
    lease.release()
    assert done.unloaded == [model]
    assert cache.close() is True
    assert not list((tmp_path / "disk" / "tmp").iterdir())


def test_close_while_a_load_hangs(tmp_path: Path) -> None:
    """Close gives up after its timeout on a load that hangs; once that ends, its model is unloaded and all is gone."""
    gate = Gate()
    done = Counting(a=gate)
    cache = small_cache(tmp_path, DictSource().add("a"), done.load, unload=done.unload)
    get = Call(cache.get, "a", timeout=0.05)
    gate.wait()
    get.error()
    assert cache.close(timeout=0.05) is False
    gate.open()
    eventually(lambda: done.unloaded)
    assert eventually(lambda: cache.close(timeout=5))
    assert not list((tmp_path / "disk" / "tmp").iterdir())


def test_close_by_many_at_once(tmp_path: Path) -> None:
    """Eight threads that close at once while others look up unload each model once."""
    done = Counting()
    names = [f"m{number}" for number in range(10)]
    cache = small_cache(tmp_path, DictSource().add(*names), done.load, unload=done.unload)

    def look_up() -> Any:
        try:
            for name in names:
                cache.get(name)
        except CacheClosed as error:
            return error
        return None

    outcomes = together(*[cache.close] * 8, *[look_up] * 8)
    assert all(outcome in {True, False} for outcome in outcomes[:8])
    assert all(outcome is None or isinstance(outcome, CacheClosed) for outcome in outcomes[8:])
    assert cache.close() is True
    assert len(done.unloaded) == len(done.loaded)
    assert all(model.unloads == 1 for model in done.unloaded)


def test_close_meets_a_queued_prefetch(tmp_path: Path) -> None:
    """Close ends a prefetch of many models at once: what was not begun is not begun."""
    gate = Gate()
    done = Counting(m0=gate)
    names = [f"m{number}" for number in range(20)]
    cache = small_cache(tmp_path, DictSource().add(*names), done.load, unload=done.unload, loaders=1)
    handle = cache.prefetch(names)
    gate.wait()
    close = Call(cache.close)
    assert eventually(lambda: handle.progress.failed == 19)
    gate.open()
    assert close.result() is True
    assert handle.wait(0)
    assert all(isinstance(error, CacheClosed) for error in handle.errors.values())
    assert done.loaded == ["m0"]


@pytest.mark.parametrize("seam", ["unload", "Evicted", "Unloaded", "Loaded", "load"])
def test_close_from_user_code_does_not_wait_for_itself(tmp_path: Path, seam: str) -> None:
    """Close called by unload=, a loader or a callback ends at once, since it does not wait for its own caller."""
    took: list[float] = []

    def shut(_: object = None) -> None:
        if not took:
            took.append(0.0)
            started = time.monotonic()
            cache.close(timeout=9)
            took[0] = time.monotonic() - started

    def load(path: Path, name: str) -> Any:
        if name == "b" and seam == "load":
            shut()
        return load_model(path)

    unload = shut if seam == "unload" else None
    cache = small_cache(tmp_path, DictSource().add("a", "b"), load, unload=unload, memory={"max_models": 1})
    if seam in {"Evicted", "Unloaded", "Loaded"}:
        cache.on({"Evicted": Evicted, "Unloaded": Unloaded, "Loaded": Loaded}[seam], shut)
    Call(cache.get, "a", timeout=12).error(14)
    Call(cache.get, "b", timeout=12).error(14)
    assert took
    assert took[0] < 4
    assert eventually(lambda: cache.close(timeout=5))
