"""Leases against eviction, unload and each other, forced at the seams."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from modelcache import Evicted, NoRoom, Timeout, Unloaded
from modelcache.policies import Resident
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import Call, Counting, Gate, small_cache, together
from tests.support.waiting import eventually


class Scripted:
    """A policy that gives its candidates in order of admission, and runs a script when it is asked for victims.

    Attributes:
        script: called once with the candidates, under the cache's lock.
        stop: called once at the next request that is booked, under the cache's lock.
    """

    def __init__(self) -> None:
        self.script: Any = None
        self.stop: Any = None
        self._order: list[str] = []

    def requested(self, model: str, clock: int) -> None:
        """Stop, where that is asked for."""
        stop, self.stop = self.stop, None
        if stop is not None:
            stop()

    def admitted(self, resident: Resident) -> None:
        """Keep the order."""
        self.removed(resident.model)
        self._order.append(resident.model)

    def removed(self, model: str) -> None:
        """Keep the order."""
        if model in self._order:
            self._order.remove(model)

    def victims(self, need: int, evictable: Any) -> list[str]:
        """Run the script, then give all candidates."""
        script, self.script = self.script, None
        if script is not None:
            script(set(evictable))
        return [model for model in self._order if model in evictable]


def test_lease_comes_between_choice_and_retirement(tmp_path: Path) -> None:
    """A victim that is leased after it was chosen stays, and the next one goes."""
    policy, done = Scripted(), Counting()
    source = DictSource().add("a", "b", "c")
    with small_cache(
        tmp_path, source, done.load, unload=done.unload, memory={"max_models": 2, "policy": policy}
    ) as cache:
        cache.prefetch(["a", "b"]).wait(10)
        first, second = sorted(model.model for model in cache.models())
        held = cache.lease(first)
        policy.script = lambda candidates: Call(held.acquire).result()
        with cache.lease("c"):
            assert [model.name for model in done.unloaded] == [second]
            assert {model.model for model in cache.models() if model.tier == "memory"} == {first, "c"}
        held.release()


def test_only_idle_model_is_leased_and_another_released_meanwhile(tmp_path: Path) -> None:
    """A load that found all leased looks again at once where a lease ended while it was deciding."""
    policy, done = Scripted(), Counting()
    source = DictSource().add("a", "b", "c")
    memory = {"max_models": 2, "policy": policy, "interval": 3600.0}
    with small_cache(tmp_path, source, done.load, unload=done.unload, memory=memory) as cache:
        cache.prefetch(["a", "b"]).wait(10)
        first, second = cache.lease("a"), cache.lease("b")
        first.acquire()

        def swap(candidates: set[str]) -> None:
            assert candidates == {"b"}
            Call(second.acquire).result()
            releases.append(Call(first.release))  # may have to wait until this decision is over

        policy.script = swap
        releases: list[Call] = []
        third = cache.lease("c")
        assert Call(third.acquire).result(5).name == "c"
        releases[0].result()
        second.release()
        third.release()


def test_hit_and_lease_take_no_lock(tmp_path: Path) -> None:
    """Warm get, lease and release return while another thread stands inside the cache's lock."""
    policy, gate = Scripted(), Gate()
    source = DictSource().add("a", "b", "c")
    with small_cache(tmp_path, source, memory={"policy": policy}) as cache:
        cache.get("a")
        cache.get("b")
        cache.models()  # books the uses so far
        policy.stop = gate
        cold = Call(cache.get, "c")
        gate.wait()

        def warm() -> str:
            for _ in range(1000):
                cache.get("b")
                with cache.lease("a") as model:
                    pass
            lease = cache.lease("b")
            lease.acquire()
            lease.release()
            return str(model.name)

        assert Call(warm).result(5) == "a"
        looking = Call(cache.models)
        threading.Event().wait(0.1)
        assert not looking.over, "the lock was not held: this test proves nothing"
        gate.open()
        assert cold.result().name == "c"
        looking.result()


def test_two_threads_lease_and_evict_all_the_time(tmp_path: Path) -> None:
    """However leases and evictions meet, a leased model is never unloaded, and each is unloaded once."""
    done = Counting()
    names = [f"m{number}" for number in range(6)]
    source = DictSource().add(*names)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(150):
            name = names[(seed * 7 + step * (seed + 1)) % len(names)]
            with cache.lease(name) as model:
                if model.unloads or model.name != name:
                    wrong.append(name)
            if step % 11 == seed:
                cache.unload(name)

    with small_cache(tmp_path, source, done.load, unload=done.unload, memory={"max_models": 5}) as cache:
        outcomes = together(*[lambda seed=seed: work(seed) for seed in range(4)])  # type: ignore[misc]
        assert outcomes == [None] * 4
    assert not wrong
    assert not done.twice
    assert len(done.unloaded) == len(done.loaded)
    assert all(model.unloads == 1 for model in done.unloaded)


def test_unload_of_leased_model_happens_at_release(tmp_path: Path) -> None:
    """A model unloaded while two threads lease it goes with the last of them, before that release returns."""
    done, where = Counting(), []

    def unload(model: Any) -> None:
        done.unload(model)
        where.append(threading.get_ident())

    with small_cache(tmp_path, DictSource().add("a"), done.load, unload=unload) as cache:
        first, second = cache.lease("a"), cache.lease("a")
        first.acquire()
        second.acquire()
        assert cache.unload("a") is False
        Call(first.release).result()
        assert not where

        def last() -> int:
            second.release()
            assert where, "unload= had not run when release returned"
            return threading.get_ident()

        ident = Call(last).result()
        assert where == [ident]
        assert cache.unload("a") is True


def test_rescued_before_last_release(tmp_path: Path) -> None:
    """A lookup of a model that waits for its last release takes it back without a second load."""
    done = Counting()
    with small_cache(tmp_path, DictSource().add("a"), done.load, unload=done.unload) as cache:
        lease = cache.lease("a")
        model = lease.acquire()
        assert cache.unload("a") is False
        assert Call(cache.get, "a").result() is model
        lease.release()
        assert not done.unloaded
        assert cache.get("a") is model
    assert done.loaded == ["a"]
    assert done.unloaded == [model]


def test_lookup_while_unload_runs_waits_and_loads_anew(tmp_path: Path) -> None:
    """A model is not loaded again before the unload= of its last load has returned."""
    done, gate = Counting(), Gate()
    order: list[str] = []

    def load(path: Path, name: str) -> Any:
        order.append("load")
        return done.load(path, name)

    def unload(model: Any) -> None:
        gate()
        order.append("unload")

    with small_cache(tmp_path, DictSource().add("a"), load, unload=unload) as cache:
        first = cache.get("a")
        leaving = Call(cache.unload, "a")
        gate.wait()
        assert cache.unload("a") is False
        states = {model.model: model.state for model in cache.models()}
        assert states == {"a": "unloading"}
        get = Call(cache.get, "a")
        eventually(lambda: cache.stats().waiters)
        gate.open()
        assert leaving.result() is True
        assert get.result() is not first
    assert order == ["load", "unload", "load", "unload"]


def test_release_twice_at_once_releases_once(tmp_path: Path) -> None:
    """Eight threads that release one lease at one moment release it once, and nobody else's."""
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        for _ in range(50):
            mine, other = cache.lease("a"), cache.lease("a")
            mine.acquire()
            other.acquire()
            assert together(*[mine.release] * 8) == [None] * 8
            assert [model.leases for model in cache.models()] == [1]
            other.release()


def test_lease_of_another_thread_gives_room_when_released(tmp_path: Path) -> None:
    """A load that waits for a leased model goes on when that lease ends, and not before."""
    done = Counting()
    memory = {"max_models": 1, "interval": 3600.0}
    with small_cache(tmp_path, DictSource().add("a", "b"), done.load, unload=done.unload, memory=memory) as cache:
        start, stop = threading.Event(), threading.Event()

        def hold() -> None:
            with cache.lease("a"):
                start.set()
                stop.wait(10)

        holder = Call(hold)
        assert start.wait(5)
        get = Call(cache.get, "b")
        eventually(lambda: "waiting for room" in [model.state for model in cache.models()])
        assert not done.unloaded
        stop.set()
        assert get.result(5).name == "b"
        holder.result()


def test_own_lease_in_the_way_is_refused_at_once(tmp_path: Path) -> None:
    """NoRoom comes at once where only the caller's own lease is in the way, however long its timeout."""
    with (
        small_cache(tmp_path, DictSource().add("a", "b"), memory={"max_models": 1, "interval": 3600.0}) as cache,
        cache.lease("a"),
    ):
        with pytest.raises(NoRoom) as refusal:
            cache.get("b", timeout=None)
        assert [name for name, _, _ in refusal.value.holders] == ["a"]


def test_two_threads_hold_what_the_other_needs(tmp_path: Path) -> None:
    """Two threads that each hold a lease and wait for a third model's room are both refused at once, in memory."""
    barrier = threading.Barrier(2)

    def work(mine: str, wanted: str) -> None:
        with cache.lease(mine):
            barrier.wait(5)
            cache.get(wanted, timeout=None)

    memory = {"max_models": 2, "interval": 0.05}
    with small_cache(tmp_path, DictSource().add("a", "b", "c", "d"), memory=memory) as cache:
        calls = [Call(work, "a", "c"), Call(work, "b", "d")]
        errors = [call.error(8) for call in calls]
        assert any(isinstance(error, NoRoom) for error in errors), errors
        assert all(error is None or isinstance(error, NoRoom) for error in errors), errors


def test_waiter_gives_up_while_others_wait_on(tmp_path: Path) -> None:
    """Waiters whose time is up leave with Timeout; the load goes on, and all others get the one model."""
    gate = Gate()
    done = Counting(a=gate)
    with small_cache(tmp_path, DictSource().add("a"), done.load) as cache:
        patient = [Call(cache.get, "a") for _ in range(5)]
        gate.wait()
        hasty = [Call(cache.get, "a", timeout=0.05) for _ in range(5)]
        for call in hasty:
            error = call.error()
            assert isinstance(error, Timeout)
            assert error.state == "loading"
        gate.open()
        models = {call.result() for call in patient}
        assert len(models) == 1
        assert cache.get("a") in models
        assert cache.stats().waiters == 0
        assert [model.leases for model in cache.models()] == [0]
    assert done.loaded == ["a"]


def test_landing_meets_timeout(tmp_path: Path) -> None:
    """A waiter whose time ends at the very landing gets the model or Timeout, and never leaves a lease behind."""
    done = Counting()
    names = [f"m{number}" for number in range(30)]
    with small_cache(tmp_path, DictSource().add(*names), done.load) as cache:
        outcomes = []
        for number, name in enumerate(names):
            gate = Gate()
            done.gates[name] = gate
            lease = cache.lease(name, timeout=0.02 + number * 0.0002)
            call = Call(lease.acquire)
            gate.wait()
            opener = threading.Timer(0.02, gate.open)
            opener.start()
            error = call.error()
            opener.join()
            assert error is None or isinstance(error, Timeout)
            outcomes.append(error is None)
            lease.release()
            eventually(lambda name=name: cache.prefetch([name]).wait(5))
        assert all(model.leases == 0 for model in cache.models())
        assert cache.stats().waiters == 0


def test_lease_collected_unreleased_in_a_circle_lets_go(tmp_path: Path) -> None:
    """A lease that is lost to the garbage collector is released, and somebody who waits for its room gets it."""
    done = Counting()
    memory = {"max_models": 1, "interval": 0.05}
    with small_cache(tmp_path, DictSource().add("a", "b"), done.load, unload=done.unload, memory=memory) as cache:

        def lose() -> None:
            lease = cache.lease("a")
            lease.acquire()
            with pytest.warns(ResourceWarning, match="collected unreleased"):
                del lease

        Call(lose).result()
        assert Call(cache.get, "b").result(5).name == "b"
        assert [model.name for model in done.unloaded] == ["a"]


def test_release_inside_a_decision_unloads_outside_it(tmp_path: Path) -> None:
    """A lease that a finalizer releases in the middle of a decision does not run unload= under the lock."""
    policy, locked = Scripted(), []
    caches: list[Any] = []

    def unload(model: Any) -> None:
        look = Call(caches[0].models)
        try:
            look.result(2)
        except AssertionError:
            locked.append(model.name)

    memory = {"max_models": 2, "policy": policy, "interval": 0.05}
    with small_cache(tmp_path, DictSource().add("a", "b", "c"), unload=unload, memory=memory) as cache:
        caches.append(cache)

        def generate() -> Any:
            with cache.lease("a"):
                yield

        running = generate()
        next(running)
        cache.get("b")
        assert cache.unload("a") is False
        policy.script = lambda candidates: running.close()  # as the garbage collector would, at any allocation
        cache.memory.max_models = 1
        cache.get("c")
        eventually(lambda: not any(model.model == "a" and model.tier == "memory" for model in cache.models()))
    assert not locked


def test_events_agree_with_what_happened(tmp_path: Path) -> None:
    """Each Evicted of the memory tier is followed by one Unloaded of that model, by the order of seq."""
    done = Counting()
    heard: list[Any] = []
    names = [f"m{number}" for number in range(8)]
    with small_cache(tmp_path, DictSource().add(*names), done.load, memory={"max_models": 3}) as cache:
        cache.on(Evicted, heard.append)
        cache.on(Unloaded, heard.append)
        together(*[lambda name=name: cache.get(name) for name in names * 2])  # type: ignore[misc]
    for name in names:
        story = [type(event) for event in sorted(heard, key=lambda event: event.seq) if event.model == name]
        for before, after in itertools.pairwise(story):
            assert (before, after) != (Evicted, Evicted), story
        assert story.count(Unloaded) >= story.count(Evicted)


def test_grown_gauge_and_leases_meet(tmp_path: Path) -> None:
    """A watermark that can't be met as all is leased is met by the releases, at each of them."""
    done = Counting()
    used = [0]
    gauge = FakeGauge(lambda: used[0] + 10 * (len(done.loaded) - len(done.unloaded)), limit=1000)
    memory = {"gauge": gauge, "high": 100, "interval": 0.02}
    names = ["a", "b", "c"]
    with small_cache(
        tmp_path, DictSource().add(*names), done.load, unload=done.unload, memory=memory, size_of=lambda *_: 10
    ) as cache:
        leases = [cache.lease(name) for name in names]
        for lease in leases:
            lease.acquire()
        used[0] = 200
        eventually(lambda: cache._parts.residents.short)
        for lease, expected in zip(leases, (1, 2, 3), strict=True):
            lease.release()
            assert len(done.unloaded) == expected
        used[0] = 0
