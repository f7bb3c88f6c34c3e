"""Clocks that jump, by their number: to 2030 and back, under running caches and between starts."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcache import ModelCache, ModelNotFound
from tests.support.fakes import DictSource
from tests.support.racing import allocated, small_cache
from tests.support.waiting import eventually

YEARS = 4 * 365 * 86400.0

Jump = Callable[[float], None]


@pytest.fixture
def jump(monkeypatch: pytest.MonkeyPatch) -> Jump:
    """Give a function that sets this process's wall clock so many seconds ahead of the true one."""
    ahead, wall, fine = [0.0], time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: wall() + ahead[0])
    monkeypatch.setattr(time, "time_ns", lambda: fine() + int(ahead[0] * 1e9))
    return lambda seconds: ahead.__setitem__(0, seconds)


@pytest.mark.parametrize("back", [0.0, -YEARS])
def test_f047_used_in_the_future(tmp_path: Path, jump: Jump, back: float) -> None:
    """F047: what was used while the clock was in 2030 is not the latest for ever: later uses, and starts, count."""
    source, settings = DictSource().add("a", "b", "c", size=20_000), {"policy": "lru"}
    with small_cache(tmp_path, source, disk=settings) as cache:
        for name in "abc":
            cache.get(name)
            cache.unload(name)
        jump(YEARS)
        cache.get("c")
        cache.unload("c")
    jump(back)
    with small_cache(tmp_path, source, disk=settings) as cache:
        assert all(row.last_used <= time.time() for row in cache.models())
        for name in "ab":
            cache.get(name)
            cache.unload(name)
    with small_cache(tmp_path, source, disk=settings) as cache:
        cache.disk.budget = cache.stats().disk_used - 4096
        assert [row.model for row in cache.models()] == ["a", "b"]
    assert sorted(source.opens) == ["a", "b", "c"]


def test_f047_jumps_under_a_running_cache(tmp_path: Path, jump: Jump) -> None:
    """F047: a clock that jumps under a running cache moves no model up or down, and no wait by a year."""
    source = DictSource().add("a", "b", "c", size=20_000)
    with small_cache(tmp_path, source, disk={"policy": "lru"}, retry_after=0.2) as cache:
        for ahead, name in [(0.0, "a"), (YEARS, "b"), (-YEARS, "c")]:
            jump(ahead)
            cache.get(name)
            cache.unload(name)
            with pytest.raises(ModelNotFound):
                cache.get(f"late-{name}")
        jump(0)
        source.add("late-a", "late-b", "late-c")
        for name in "abc":
            assert eventually(lambda name=name: found(cache, f"late-{name}"), timeout=3)  # type: ignore[misc]
            cache.unload(f"late-{name}")
            assert cache.delete(f"late-{name}")
        cache.disk.budget = cache.stats().disk_used - 4096
        assert {row.model for row in cache.models() if row.tier == "disk"} == {"b", "c"}
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def found(cache: ModelCache[Any], model: str) -> bool:
    """Whether a model can be had now."""
    try:
        return bool(cache.get(model).name == model)
    except ModelNotFound:
        return False
