"""What is remembered of a model over restarts, and how footprints are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier, MemoryTier, ModelCache
from modelcache.gauges import Reading
from tests.support.fakes import DictSource, allocated

MIB = 2**20


class Growing:
    """A gauge that reads what the loaders of a test have taken."""

    def __init__(self) -> None:
        self.used = 0

    def read(self) -> Reading:
        """Return it."""
        return Reading(self.used, 2**40)


class Thing:
    """A model."""


def cache_of(folder: Path, gauge: Growing, takes: dict[str, int]) -> ModelCache[Any]:
    """Return a cache whose loaders make the gauge grow."""

    def load(path: Path, model: str) -> Thing:
        gauge.used += takes[model]
        return Thing()

    return ModelCache(
        DictSource().add(*takes),
        load,
        disk=DiskTier(folder, min_free=0),
        memory=MemoryTier(high=2**39, gauge=gauge, interval=1000.0),
    )


def row(cache: ModelCache[Any], model: str) -> Any:
    """Return the model's row."""
    return next(info for info in cache.models() if info.model == model)


def test_footprint_is_measured_and_told(tmp_path: Path) -> None:
    """A load is measured; the row says what was expected, what it took, and which of these decides."""
    with cache_of(tmp_path, Growing(), {"a": 30 * MIB}) as cache:
        cache.get("a")
        info = row(cache, "a")
        assert info.measured == info.bytes == info.peak == 30 * MIB
        assert info.estimate < MIB
        assert info.in_use == "measured"


def test_later_measurements_rise_at_once_and_fall_slowly(tmp_path: Path) -> None:
    """A higher measurement counts at once, a lower one by three tenths."""
    takes = {"a": 10 * MIB}
    with cache_of(tmp_path, Growing(), takes) as cache:
        for taken, known in ((10, 10), (20, 20), (10, 17)):
            takes["a"] = taken * MIB
            cache.get("a")
            assert row(cache, "a").bytes == known * MIB
            cache.unload("a")


def test_footprint_outlives_a_restart(tmp_path: Path) -> None:
    """What a model takes is known from the start to a process that finds it on disk, without a measurement."""
    with cache_of(tmp_path, Growing(), {"a": 30 * MIB}) as cache:
        cache.get("a")
    gauge, takes = Growing(), {"a": 0}
    with cache_of(tmp_path, gauge, takes) as cache:
        cache.get("a")
        info = row(cache, "a")
        assert info.in_use == "measured"
        assert info.bytes > 20 * MIB


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seconds": "x"}', '{"resident": -1, "seconds": 1}', "null"])
def test_damaged_figures_are_no_figures(tmp_path: Path, text: str) -> None:
    """Figures that can't be read are measured anew, and nothing fails."""
    with cache_of(tmp_path, Growing(), {"a": 30 * MIB}) as cache:
        cache.get("a")
    (figures,) = tmp_path.glob("models/*/figures.json")
    assert json.loads(figures.read_text())["resident"] == 30 * MIB
    figures.write_text(text)
    with cache_of(tmp_path, Growing(), {"a": 20 * MIB}) as cache:
        cache.get("a")
        assert row(cache, "a").bytes == 20 * MIB


def test_figures_are_part_of_the_budget(tmp_path: Path) -> None:
    """What is counted on disk is what is allocated there, before and after the figures are written."""
    with cache_of(tmp_path, Growing(), {"a": 30 * MIB}) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        assert cache.stats().disk_used == allocated(tmp_path)
        cache.get("a")
        cache.unload("a")
        assert cache.stats().disk_used == allocated(tmp_path)


def test_parts_are_not_counted_twice(tmp_path: Path) -> None:
    """What a loader's parts took is theirs, and not counted again with the whole."""
    gauge = Growing()
    made: list[ModelCache[Any]] = []

    def load(path: Path, model: str) -> Thing:
        if model == "whole":
            made[0].get("part")
        gauge.used += {"whole": 5, "part": 40}[model] * MIB
        return Thing()

    with ModelCache(
        DictSource().add("whole", "part"),
        load,
        disk=DiskTier(tmp_path, min_free=0),
        memory=MemoryTier(high=2**39, gauge=gauge, interval=1000.0),
    ) as cache:
        made.append(cache)
        cache.get("whole")
        assert row(cache, "part").measured == 40 * MIB
        assert row(cache, "whole").measured == 5 * MIB
