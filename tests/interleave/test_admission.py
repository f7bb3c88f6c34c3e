"""Threads that meet at the door of the memory tier: newcomers, victims that are asked for, limits that move."""

import contextlib
import gc
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from modelcache import CacheClosed, Evicted, NoRoom, Timeout
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import Call, Counting, Gate, Model, small_cache, together
from tests.support.waiting import eventually


class Weighed(Counting):
    """A loader that keeps count, and a gauge that reads 100 bytes for each model whose load is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = 0
        self.gauge = FakeGauge(lambda: 100 * (self.over - len(self.unloaded)))

    def load(self, path: Path, name: str) -> Model:
        """Load a model."""
        model = super().load(path, name)
        with self._lock:
            self.over += 1
        return model


def test_f015_loads_at_once_share_the_room(tmp_path: Path) -> None:
    """F015: of eight loads that begin at one moment only those are let in whose sum fits, each time."""
    inside: list[int] = []
    counting = Weighed()

    def load(path: Path, name: str) -> Model:
        inside.append(100 * (len(counting.loaded) + 1 - len(counting.unloaded)))
        return counting.load(path, name)

    names = [f"m{number}" for number in range(8)]
    with small_cache(
        tmp_path,
        DictSource().add(*names),
        load,
        unload=counting.unload,
        size_of=lambda model, path: 100,
        loaders=8,
        memory={"high": 300, "low": 300, "gauge": counting.gauge},
    ) as cache:
        got = together(*(lambda name=name: cache.get(name).name for name in names))
        assert sorted(got) == names
        assert max(inside) <= 300
        assert cache.stats().models == 3


def test_two_newcomers_each_evict_their_own_share(tmp_path: Path) -> None:
    """F014: two loads at once at ``high`` evict two models, though neither victim's unload is over."""
    gate = Gate()
    counting = Weighed()

    def unload(model: Model) -> None:
        gate()
        counting.unload(model)

    with small_cache(
        tmp_path,
        DictSource().add(*"abcdefgh", "x", "y"),
        counting.load,
        unload=unload,
        size_of=lambda model, path: 100,
        memory={"high": 800, "low": 400, "gauge": counting.gauge},
    ) as cache:
        told: list[Any] = []
        cache.on(Evicted, told.append)
        for model in "abcdefgh":
            cache.get(model)
        calls = [Call(cache.get, model) for model in "xy"]
        eventually(lambda: gate.passed >= 1)
        gate.open()
        assert [call.result().name for call in calls] == ["x", "y"]
        assert len(told) == 2


def test_victim_is_asked_for_while_a_newcomer_evicts(tmp_path: Path) -> None:
    """A victim asked for behind another one whose unload stands still is rescued; the newcomer takes another."""
    gate = Gate()
    counting = Counting()

    def unload(model: Model) -> None:
        if model.name == "a":
            gate()
        counting.unload(model)

    with small_cache(
        tmp_path,
        DictSource().add(*"abcd", "new"),
        counting.load,
        unload=unload,
        size_of=lambda model, path: 200 if model == "new" else 100,
        memory={"budget": 400, "policy": "lru"},
    ) as cache:
        for model in "abcd":
            cache.get(model)
        newcomer = Call(cache.get, "new")
        gate.wait()
        with cache.lease("b") as rescued:
            assert counting.loaded == list("abcd")
            gate.open()
            assert newcomer.result().name == "new"
            assert rescued.unloads == 0
            assert [model.name for model in counting.unloaded] == ["a", "c"]


def test_waiter_that_gives_up_lets_the_next_in(tmp_path: Path) -> None:
    """A load at the head of the line whose caller gives up does not hold up those behind it."""
    with small_cache(
        tmp_path,
        DictSource().add("held", "big", "small"),
        size_of=lambda model, path: {"held": 600, "big": 900, "small": 300}[model],
        memory={"budget": 1000},
    ) as cache:
        release = threading.Event()

        def hold() -> None:
            with cache.lease("held"):
                release.wait(10)

        holder = Call(hold)
        eventually(lambda: cache.stats().leases == 1)
        big = Call(cache.get, "big", timeout=0.3)
        eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
        small = Call(cache.get, "small")
        assert isinstance(big.error(), NoRoom | Timeout)
        assert small.result().name == "small"
        release.set()
        holder.result()


def test_alone_and_asked_for_by_a_loader(tmp_path: Path) -> None:
    """A model that is to load alone does not wait for the very loader that asks for it."""
    counting = Counting()
    made: list[Any] = []
    used = [0]

    def load(path: Path, name: str) -> Model:
        if name == "whole":
            made[0].get("part")
        used[0] += 20 * 2**20
        return counting.load(path, name)

    with small_cache(
        tmp_path, DictSource().add("whole", "part", "other"), load, memory={"gauge": FakeGauge(lambda: used[0], 2**40)}
    ) as cache:
        made.append(cache)
        for _ in range(3):
            gate = Gate()
            counting.gates["other"] = gate
            other = Call(cache.get, "other")
            gate.wait()
            cache.get("part")
            gate.open()
            other.result()
            cache.unload("part")
            cache.unload("other")
        assert Call(cache.get, "whole").result(5.0).name == "whole"
        assert {row.in_use for row in cache.models() if row.tier == "memory"} <= {"measured", "estimate"}


@pytest.mark.parametrize("seed", range(3))
def test_everybody_at_the_door(tmp_path: Path, seed: int) -> None:
    """Whatever threads do at once, the limits hold at each load, each load has one unload, and figures add up."""
    counting = Counting()
    names = [f"m{number}" for number in range(8)]
    sizes = {name: 50 + 25 * number for number, name in enumerate(names)}
    seen: list[weakref.ref[Model]] = []
    over: list[int] = []

    def load(path: Path, name: str) -> Model:
        stats = cache.stats()
        over.append(stats.memory_models + stats.memory_reserved - 700)
        model = counting.load(path, name)
        seen.append(weakref.ref(model))
        return model

    cache = small_cache(
        tmp_path,
        DictSource().add(*names),
        load,
        unload=counting.unload,
        size_of=lambda model, path: sizes[model],
        timeout=5.0,
        memory={"budget": 700, "max_models": 5, "interval": 0.01, "idle_after": 0.05},
    )

    def roam(number: int) -> bool:
        choice = random.Random(seed * 100 + number)  # noqa: S311
        for _ in range(25):
            name = choice.choice(names)
            what = choice.random()
            with contextlib.suppress(NoRoom, Timeout, CacheClosed):
                if what < 0.5:
                    with cache.lease(name) as model:
                        assert model.name == name
                        assert not model.unloads
                elif what < 0.8:
                    cache.get(name)
                elif what < 0.9:
                    cache.unload(name)
                elif what < 0.95:
                    cache.prefetch([name])
                else:
                    cache.memory.max_models = choice.choice([4, 5])
        return True

    assert together(*(lambda number=number: roam(number) for number in range(6)), timeout=20) == [True] * 6
    assert max(over) <= 0
    assert counting.twice == []
    assert cache.close()
    assert cache.stats().memory_models == cache.stats().memory_reserved == 0
    assert len(counting.loaded) == len(counting.unloaded)
    assert {model.unloads for model in counting.unloaded} == {1}
    counting.unloaded.clear()
    gc.collect()
    assert not [model for model in seen if model() is not None]
