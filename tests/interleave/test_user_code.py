"""User code runs without a lock held, and what it raises is passed on once the state is consistent."""

import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier, Event, Evicted, Hit, Loaded, MemoryTier, Missed, ModelCache, Unloaded
from modelcache.gauges import Reading
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import Call, Counting, Model, load_model, small_cache
from tests.support.waiting import eventually


class Prober:
    """Looks at a cache from another thread, as only works while nobody holds its lock.

    Attributes:
        cache: the cache.
        asked: names of the seams from which it looked.
        blocked: those where it could not.
    """

    def __init__(self) -> None:
        self.cache: ModelCache[Any] | None = None
        self.asked: set[str] = set()
        self.blocked: set[str] = set()

    def __call__(self, seam: str) -> None:
        """Look."""
        if self.cache is None or threading.current_thread().name == "look":
            return
        self.asked.add(seam)

        def look() -> None:
            threading.current_thread().name = "look"
            assert self.cache is not None
            self.cache.models()
            self.cache.history()

        try:
            Call(look).result(2)
        except AssertionError:
            self.blocked.add(seam)


def test_no_lock_while_user_code_runs(tmp_path: Path) -> None:
    """Loader, size_of, unload=, callbacks, gauge, source and finalizers run with the lock free, on all ways through."""
    probe = Prober()

    class Final(Model):
        """A model with a finalizer."""

        def __del__(self) -> None:
            probe("__del__")

    def load(path: Path) -> Any:
        probe("load")
        return Final(load_model(path).name)

    def size_of(name: str, path: Path) -> int:
        probe("size_of")
        return 10

    def unload(model: Any) -> None:
        probe("unload")

    class Probing(FakeGauge):
        """A gauge that looks."""

        def read(self) -> Reading:
            """Look, then read."""
            probe("gauge")
            return super().read()

    class ProbingSource(DictSource):
        """A source that looks."""

        def find(self, model: str) -> Any:
            """Look, then find."""
            probe("find")
            return super().find(model)

        def open(self, artifact: Any, file: Any) -> Any:
            """Look, then open."""
            probe("open")
            return super().open(artifact, file)

    source = ProbingSource().add("a", "b", "c", size=20_000)
    source.gate = lambda: probe("read")
    memory = MemoryTier(gauge=Probing(), max_models=1, interval=0.02)
    disk = DiskTier(tmp_path, min_free=0, budget=80_000)
    with ModelCache(source, load, size_of=size_of, unload=unload, memory=memory, disk=disk) as cache:
        probe.cache = cache
        cache.on(Event, lambda event: probe(type(event).__name__))
        cache.on(Hit, lambda event: probe("Hit"))
        for name in "abcab":
            with cache.lease(name):
                pass
            cache.get(name)
        cache.unload("b")
        cache.get("a")
        cache.delete("a")
        cache.prefetch(["a", "b"]).wait(10)
        cache.memory.max_models = 2
        cache.disk.budget = 60_000
        gc.collect()
    wanted = {"load", "size_of", "unload", "gauge", "find", "open", "read", "Hit", "Missed", "Loaded", "Evicted"}
    wanted |= {"Unloaded", "Fetched", "__del__"}
    assert wanted <= probe.asked
    assert not probe.blocked


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", [Missed, Hit])
def test_f113_interrupt_from_a_callback_leaves_no_lease(
    tmp_path: Path, event: type[Event], stop: type[BaseException]
) -> None:
    """F113: an interrupt that a callback raises comes out of lease and get, and nothing stays leased."""
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        if event is Hit:
            cache.get("a")

        def interrupt(_: object) -> None:
            raise stop

        cache.on(event, interrupt)
        with pytest.raises(stop):
            cache.lease("a").acquire()
        assert [model.leases for model in cache.models()] == [0]
        if event is Missed:
            cache.unload("a")
        with pytest.raises(stop):
            cache.get("a")
        assert [model.leases for model in cache.models()] == [0]
        cache.off(interrupt)
        assert cache.unload("a") is True


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", [Loaded, Evicted, Unloaded])
def test_f113_interrupt_on_a_thread_of_the_cache_disturbs_nobody(
    tmp_path: Path, event: type[Event], stop: type[BaseException]
) -> None:
    """F113: an interrupt that a callback raises on a thread of the cache fails no load, and is logged."""
    done = Counting()

    def interrupt(_: object) -> None:
        raise stop

    with small_cache(
        tmp_path, DictSource().add("a", "b", "c"), done.load, unload=done.unload, memory={"max_models": 1}
    ) as cache:
        cache.on(event, interrupt)
        for name in "abc":
            assert cache.get(name).name == name
        cache.off(interrupt)
    assert len(done.unloaded) == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_f113_unload_of_a_victim_raises(tmp_path: Path, stop: type[BaseException]) -> None:
    """F113: whatever the unload= of a victim raises, the newcomer is loaded, and the victim gone."""
    done = Counting()

    def unload(model: Model) -> None:
        done.unload(model)
        raise stop

    with small_cache(
        tmp_path, DictSource().add("a", "b", "c"), done.load, unload=unload, memory={"max_models": 1}
    ) as cache:
        for name in "abca":
            assert cache.get(name).name == name
        assert cache.stats().unload_errors == 3
        passed_on = stop in {KeyboardInterrupt, SystemExit}
        with pytest.raises(stop) if passed_on else contextlib.nullcontext():
            cache.unload("a")
        assert [model.tier for model in cache.models()] == ["disk"] * 3
    assert all(model.unloads == 1 for model in done.unloaded)


def test_f113_monitor_survives_unload(tmp_path: Path) -> None:
    """F113: the monitor goes on evicting after an unload= on its thread has raised SystemExit."""
    done = Counting()
    grown = [0]
    gauge = FakeGauge(lambda: grown[0], limit=1000)

    def unload(model: Model) -> None:
        done.unload(model)
        grown[0] = 0
        raise SystemExit

    names = ["a", "b", "c"]
    memory = {"gauge": gauge, "high": 100, "low": 90, "interval": 0.02}
    with small_cache(
        tmp_path, DictSource().add(*names), done.load, unload=unload, memory=memory, size_of=lambda *_: 15
    ) as cache:
        cache.prefetch(names).wait(10)
        for round_ in (1, 2):
            grown[0] = 104
            eventually(lambda round_=round_: len(done.unloaded) >= round_)
        grown[0] = 0
        done.unload = lambda model: None  # type: ignore[method-assign]
        with pytest.raises(SystemExit):
            cache.close()


def test_callback_looks_up_while_another_thread_evicts(tmp_path: Path) -> None:
    """Callbacks of evictions may look up other models, from several threads at once, without a deadlock."""
    done = Counting()
    names = [f"m{number}" for number in range(6)]
    with small_cache(
        tmp_path, DictSource().add(*names, "extra"), done.load, unload=done.unload, memory={"max_models": 3}
    ) as cache:
        cache.on(Unloaded, lambda event: event.model != "extra" and cache.get("extra", timeout=8).name)
        for _ in range(3):
            calls = [Call(cache.get, name, timeout=10) for name in names]
            for call in calls:
                call.result(15)


def test_background_callback_calls_the_cache(tmp_path: Path) -> None:
    """A background callback may call every verb, close included, and does not wait for itself."""
    closed = threading.Event()
    with small_cache(tmp_path, DictSource().add("a", "b")) as cache:

        def react(event: Event) -> None:
            cache.get("b")
            cache.unload("b")
            cache.close(timeout=5)
            closed.set()

        cache.on(Missed, react, background=True)
        cache.get("a")
        assert closed.wait(10)
        assert eventually(cache.close)
