"""Which figure a model counts with: what it was measured at, what is said of it, or what its artifact suggests.

With a gauge that the test moves. Real memory is in ``faults/test_memory_faults``, what is done with the figures in
``test_admission``; restarts and blending are in ``test_history`` too.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import LoadFailed, LocalSource, TooLarge
from modelcache.gauges import Reading
from tests.support.fakes import Book, DictSource, MakeCache, allocated
from tests.support.waiting import Gate, Spawn, eventually

MIB = 2**20


class Thing:
    """A model."""


class Scales:
    """A gauge that reads what the loads of a test have taken, and a book whose loader takes it.

    Attributes:
        takes: id to the bytes that its load takes.
        used: bytes in use.
        during: called by each load with its id, before it takes anything.
    """

    def __init__(self, **takes: int) -> None:
        self.takes = {model: size * MIB for model, size in takes.items()}
        self.used = 0
        self.during: Callable[[str], Any] = lambda model: None
        self.book = Book(load=self._load)

    def read(self) -> Reading:
        """Return it."""
        return Reading(self.used, 2**40)

    def _load(self, path: Path, model: str) -> Thing:
        self.during(model)
        self.used += self.takes[model]
        return Thing()


def make(make_cache: MakeCache, scales: Scales, source: DictSource | None = None, **settings: Any) -> Any:
    """Return a cache that weighs with ``scales``, and never evicts."""
    memory = {"high": 2**39, "gauge": scales, "interval": 0.05, **settings.pop("memory", {})}
    return make_cache(source or DictSource().add(*scales.takes), scales.book, memory=memory, **settings)


def row(cache: Any, model: str) -> Any:
    """Return the model's row."""
    return next(info for info in cache.models() if info.model == model)


# Which figure is in use


def test_estimate_until_there_is_more(make_cache: MakeCache) -> None:
    """A model too small to be measured counts with its artifact's bytes, and its row says so."""
    cache = make(make_cache, Scales(a=0))
    cache.get("a")
    info = row(cache, "a")
    assert (info.in_use, info.bytes, info.estimate, info.measured) == ("estimate", 10, 10, None)


def test_given_until_it_is_measured(make_cache: MakeCache) -> None:
    """The word of ``size_of`` counts where growth is too small to be measured; a measurement outweighs it."""
    cache = make(make_cache, Scales(small=0, large=30), size_of=lambda model, path: 7 * MIB)
    cache.get("small")
    cache.get("large")
    small, large = row(cache, "small"), row(cache, "large")
    assert (small.in_use, small.bytes) == ("given", 7 * MIB)
    assert (large.in_use, large.bytes, large.estimate) == ("measured", 30 * MIB, 7 * MIB)


def test_what_artifacts_become_is_learned(make_cache: MakeCache) -> None:
    """The estimate for a new model is its artifact times what others became of theirs, by the middle one."""
    source = DictSource()
    for model in "abcx":
        source.add(model, size=2 * MIB)
    scales = Scales(a=10, b=12, c=200, x=0)
    cache = make(make_cache, scales, source)
    for model in "abc":
        cache.get(model)
    scales.during = lambda model: (_ for _ in ()).throw(RuntimeError("never mind"))
    with pytest.raises(LoadFailed):
        cache.get("x")
    assert row(cache, "x").estimate == 12 * MIB


def test_kinds_of_artifacts_are_told_apart(make_cache: MakeCache, tmp_path: Path) -> None:
    """Models whose largest file has one suffix are estimated by each other, not by those of another format."""
    sizes = {"a.npy": 8, "b.npy": 8, "c.npy": 8, "d.npz": 40, "e.npz": 40, "f.npz": 40, "x.npy": 0, "y.npz": 0}
    for name in sizes:
        folder = tmp_path / "source" / name[0]
        folder.mkdir(parents=True)
        (folder / f"weights{name[1:]}").write_bytes(bytes(4 * MIB))
        (folder / "readme.txt").write_bytes(b"what it is")
    scales = Scales(**{name[0]: size for name, size in sizes.items()})
    source = LocalSource(tmp_path / "source")
    cache = make_cache(source, scales.book, memory={"high": 2**39, "gauge": scales, "interval": 0.05})
    for model in "adbecf":
        cache.get(model)
    scales.during = lambda model: (_ for _ in ()).throw(RuntimeError("never mind"))
    for model, size in (("x", 8), ("y", 40)):
        with pytest.raises(LoadFailed):
            cache.get(model)
        assert row(cache, model).estimate == pytest.approx(size * MIB, rel=0.01)


def test_estimate_is_no_reason_to_refuse(make_cache: MakeCache) -> None:
    """A model whose artifact fits in the budget is loaded, and measured, whatever others became of theirs."""
    source = DictSource().add("a", "b", "c", size=2 * MIB).add("x", size=4 * MIB)
    cache = make(make_cache, Scales(a=40, b=40, c=40, x=5), source, memory={"budget": 60 * MIB})
    for model in "abcx":
        cache.get(model)
    assert row(cache, "x").bytes == 5 * MIB


def test_gauge_that_fails_leaves_the_estimate(make_cache: MakeCache) -> None:
    """Where the gauge can't be read after a load nothing is learned, and the model is served."""
    scales = Scales(a=30)

    def broken(model: str) -> None:
        scales.read = lambda: (_ for _ in ()).throw(OSError("gone"))  # type: ignore[method-assign]

    scales.during = broken
    cache = make(make_cache, scales)
    assert isinstance(cache.get("a"), Thing)
    assert row(cache, "a").in_use == "estimate"


# Who else loaded meanwhile


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Give a gate in the load of ``a``, open at the end of the test."""
    with Gate("a") as gate:
        yield gate


def test_loads_at_once_are_doubtful(make_cache: MakeCache, spawn: Spawn, gate: Gate) -> None:
    """Neither of two loads that overlap is measured, whichever began or ended first: shown, but not used."""
    scales = Scales(a=20, b=20)
    scales.during = gate
    cache = make(make_cache, scales)
    first = spawn(cache.get, "a")
    gate.wait()
    cache.get("b")
    info = row(cache, "b")
    assert (info.in_use, info.doubtful, info.measured) == ("estimate", 20 * MIB, None)
    gate.open()
    first.result()
    info = row(cache, "a")
    assert (info.in_use, info.doubtful, info.measured) == ("estimate", 40 * MIB, None)
    assert "not trusted" in cache.explain("a")


def test_failed_load_beside_is_doubtful_too(make_cache: MakeCache, spawn: Spawn, gate: Gate) -> None:
    """A load that fails while another one runs has disturbed it all the same."""
    scales = Scales(a=20, b=20)

    def during(model: str) -> None:
        if model == "a":
            gate(model)
            scales.used += 100 * MIB
            raise RuntimeError("half way")

    scales.during = during
    cache = make(make_cache, scales)
    first = spawn(cache.get, "a")
    gate.wait()
    cache.get("b")
    assert row(cache, "b").in_use == "estimate"
    gate.open()
    assert isinstance(first.exception(), LoadFailed)


@pytest.mark.parametrize("what", ["unload", "delete"])
def test_departure_meanwhile_is_doubtful(make_cache: MakeCache, spawn: Spawn, gate: Gate, what: str) -> None:
    """A model that leaves during a load spoils its measurement."""
    scales = Scales(a=20, b=20)
    scales.during = gate
    cache = make(make_cache, scales)
    cache.get("b")
    first = spawn(cache.get, "a")
    gate.wait()
    assert getattr(cache, what)("b")
    scales.used -= 20 * MIB
    gate.open()
    first.result()
    info = row(cache, "a")
    assert (info.in_use, info.doubtful, info.measured) == ("estimate", 0, None)


def test_hits_meanwhile_disturb_nothing(make_cache: MakeCache, spawn: Spawn, gate: Gate) -> None:
    """Leases and hits on other models during a load leave its measurement clean."""
    scales = Scales(a=20, b=20)
    scales.during = gate
    cache = make(make_cache, scales)
    cache.get("b")
    first = spawn(cache.get, "a")
    gate.wait()
    with cache.lease("b"):
        cache.get("b")
    gate.open()
    first.result()
    assert row(cache, "a").in_use == "measured"


def test_after_three_doubtful_ones_it_loads_alone(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model measured doubtfully three times loads alone the fourth time: it waits for others, and they for it."""
    scales = Scales(a=20, other=20, late=20)
    cache = make(make_cache, scales)
    cache.get("other")
    cache.unload("other")
    for _ in range(3):
        with Gate("other") as gate:
            scales.during = gate
            other = spawn(cache.get, "other")
            gate.wait()
            cache.get("a")
        other.result()
        assert row(cache, "a").in_use == "estimate"
        cache.unload("a")
        cache.unload("other")
    running: list[str] = []
    most: list[int] = []

    def during(model: str) -> None:
        running.append(model)
        most.append(len(running))
        gates[model](model)
        running.remove(model)

    gates = {model: Gate(model) for model in scales.takes}
    scales.during = during
    with gates["other"], gates["a"], gates["late"]:
        other = spawn(cache.get, "other")
        gates["other"].wait()
        alone = spawn(cache.get, "a")
        eventually(lambda: any(info.state == "waiting for a measurement" for info in cache.models()))
        gates["other"].open()
        other.result()
        gates["a"].wait()
        late = spawn(cache.get, "late")
        gates["late"].open()
        gates["a"].open()
    for load in (alone, late):
        load.result()
    assert most == [1, 1, 1]
    info = row(cache, "a")
    assert (info.in_use, info.measured, info.doubtful) == ("measured", 20 * MIB, None)


# Ensembles


class Ensemble:
    """Scales on which ``whole`` asks for its parts while it loads.

    Args:
        parts: what it asks for, in order.
        takes: as of ``Scales``.
    """

    def __init__(self, make_cache: MakeCache, parts: str, **takes: int) -> None:
        self.scales = Scales(**takes)
        self.parts = parts
        self.scales.during = self._ask
        self.cache = make(make_cache, self.scales)

    def _ask(self, model: str) -> None:
        if model == "whole":
            for part in self.parts:
                self.cache.get(part)

    def measured(self, model: str) -> int | None:
        """Return what the model was measured at, in MiB."""
        info = row(self.cache, model)
        return None if info.measured is None else info.measured // MIB


def test_parts_are_taken_off(make_cache: MakeCache) -> None:
    """What parts took is theirs, not the whole's; all are measured cleanly."""
    ensemble = Ensemble(make_cache, "pq", whole=5, p=40, q=30)
    ensemble.cache.get("whole")
    assert [ensemble.measured(model) for model in ("whole", "p", "q")] == [5, 40, 30]


def test_parts_of_parts_are_taken_off(make_cache: MakeCache) -> None:
    """What a part's own parts took is neither the part's nor the whole's."""
    ensemble = Ensemble(make_cache, "p", whole=5, p=40, q=30)
    ask = ensemble.scales.during
    ensemble.scales.during = lambda model: ensemble.cache.get("q") if model == "p" else ask(model)
    ensemble.cache.get("whole")
    assert [ensemble.measured(model) for model in ("whole", "p", "q")] == [5, 40, 30]


def test_part_that_was_there_is_not_taken_off(make_cache: MakeCache) -> None:
    """A part that was in memory before took nothing during the whole's load."""
    ensemble = Ensemble(make_cache, "p", whole=50, p=40)
    ensemble.cache.get("p")
    ensemble.cache.get("whole")
    assert ensemble.measured("whole") == 50


def test_part_counts_with_what_it_took_this_time(make_cache: MakeCache) -> None:
    """Taken off is what a part took now, not what is known of it from before."""
    ensemble = Ensemble(make_cache, "p", whole=50, p=40)
    ensemble.cache.get("p")
    ensemble.cache.unload("p")
    ensemble.scales.used = 0
    ensemble.scales.takes["p"] = 20 * MIB
    ensemble.cache.get("whole")
    assert ensemble.measured("whole") == 50


def test_part_that_leaves_meanwhile_is_doubtful(make_cache: MakeCache) -> None:
    """A part that is unloaded again during the whole's load leaves the whole unmeasured."""
    ensemble = Ensemble(make_cache, "", whole=50, p=40)

    def during(model: str) -> None:
        if model == "whole":
            ensemble.cache.get("p")
            ensemble.cache.unload("p")

    ensemble.scales.during = during
    ensemble.cache.get("whole")
    assert row(ensemble.cache, "whole").in_use == "estimate"


# Over restarts


def figures_of(cache: Any) -> Path:
    """Return the one file of figures of a cache."""
    (path,) = cache.disk.path.glob("models/*/figures.json")
    return Path(path)


def again(make_cache: MakeCache, taken: int) -> Any:
    """Start a new cache over the same folder, load ``a``, which takes so many MiB, and return the cache."""
    cache = make(make_cache, Scales(a=taken))
    cache.get("a")
    return cache


def test_figures_are_kept_and_blended_over_restarts(make_cache: MakeCache) -> None:
    """What is known is known after a restart, and a lower measurement there moves it by three tenths only."""
    again(make_cache, 30).close()
    cache = again(make_cache, 20)
    assert row(cache, "a").measured == 27 * MIB
    cache.close()
    assert row(again(make_cache, 27), "a").measured == 27 * MIB


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 4000,
        b'{"resident": 1e999, "seconds": 1}',
        b'{"resident": true, "seconds": 1}',
        b'{"resident": 5.5, "seconds": 1}',
        b'{"resident": 5, "seconds": NaN}',
        b'{"resident": 5, "seconds": 1, "more": 1}',
        b"\xff\xfe",
        b"9" * 4000,
    ],
    ids=["empty", "deep", "infinite", "bool", "float", "nan", "more", "no text", "long number"],
)
def test_damaged_figures_are_measured_anew_and_healed(make_cache: MakeCache, text: bytes) -> None:
    """Figures that can't be read are no figures; the next load writes good ones over them."""
    cache = again(make_cache, 30)
    path = figures_of(cache)
    cache.close()
    path.write_bytes(text)
    cache = again(make_cache, 20)
    assert row(cache, "a").measured == 20 * MIB
    cache.close()
    cache = again(make_cache, 10)
    assert row(cache, "a").measured == 17 * MIB


def test_missing_figures_are_measured_anew(make_cache: MakeCache) -> None:
    """An artifact without figures, of an older version, say, is loaded and measured."""
    cache = again(make_cache, 30)
    path = figures_of(cache)
    cache.close()
    record = path.with_name("record.json")
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"bytes": known["bytes"] - path.stat().st_blocks * 512}))
    for gone in (path, *cache.disk.path.glob("ledger*")):  # which is made anew from the record
        gone.unlink()
    assert row(again(make_cache, 20), "a").measured == 20 * MIB


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what it likes")
def test_figures_that_can_not_be_written(make_cache: MakeCache) -> None:
    """A file of figures that is read-only is read, and left as it is."""
    cache = again(make_cache, 30)
    path = figures_of(cache)
    cache.close()
    path.chmod(0o400)
    kept = path.read_bytes()
    assert row(again(make_cache, 20), "a").measured == 27 * MIB
    assert path.read_bytes() == kept


def test_figures_that_are_a_link_are_left_alone(make_cache: MakeCache, tmp_path: Path) -> None:
    """A link in place of the figures is not written through."""
    cache = again(make_cache, 30)
    path = figures_of(cache)
    cache.close()
    other = tmp_path / "other"
    other.write_text("mine")
    path.unlink()
    path.symlink_to(other)
    again(make_cache, 20).close()
    assert other.read_text() == "mine"


def test_figures_stay_within_what_was_counted(make_cache: MakeCache) -> None:
    """Writing figures, however often, changes nothing of what the disk tier counts."""
    cache = again(make_cache, 30)
    for _ in range(3):
        cache.unload("a")
        cache.get("a")
    assert cache.stats().disk_used == allocated(cache.disk.path)


def test_delete_forgets_the_figures(make_cache: MakeCache) -> None:
    """A model that was deleted from both tiers is measured anew."""
    scales = Scales(a=30)
    cache = make(make_cache, scales)
    cache.get("a")
    assert cache.delete("a")
    assert cache.models() == []
    scales.takes["a"] = 10 * MIB
    cache.get("a")
    assert row(cache, "a").measured == 10 * MIB


# What can't be believed


def test_measurement_above_all_that_is_allowed(make_cache: MakeCache) -> None:
    """A thread of the host takes memory during a load: its model is not refused from then on, nor after a restart."""
    scales = Scales(a=30)

    def guest(model: str) -> None:
        scales.used += 700 * MIB

    scales.during = guest
    for _ in range(2):  # the second time after a restart, on the same folder
        cache = make(make_cache, scales, memory={"high": 500 * MIB})
        cache.get("a")
        assert "not trusted, as that is more than all models may take" in cache.explain("a")
        cache.unload("a")
        cache.close()
        scales.used = 0
    scales.during = lambda model: None
    cache = make(make_cache, scales, memory={"high": 500 * MIB})
    cache.get("a")
    assert (row(cache, "a").in_use, row(cache, "a").bytes) == ("measured", 30 * MIB)


def test_known_footprint_outlasts_one_measurement_above_all(make_cache: MakeCache) -> None:
    """What was measured before stays in use where one load seems to take more than is allowed at all."""
    scales = Scales(a=30)
    cache = make(make_cache, scales, memory={"high": 500 * MIB})
    cache.get("a")
    cache.unload("a")
    scales.used, scales.takes["a"] = 0, 700 * MIB
    cache.get("a")
    assert (row(cache, "a").in_use, row(cache, "a").bytes) == ("measured", 30 * MIB)


def test_twice_above_all_that_is_allowed_is_refused(make_cache: MakeCache) -> None:
    """A model that was measured above ``high`` twice is refused at its third load: both figures agree."""
    scales = Scales(a=700)
    cache = make(make_cache, scales, memory={"high": 500 * MIB})
    for _ in range(2):
        cache.get("a")
        cache.unload("a")
        scales.used = 0
    with pytest.raises(TooLarge, match=r"700\.0 MiB"):
        cache.get("a")
    cache.memory.high = 1000 * MIB
    assert isinstance(cache.get("a"), Thing)


# Another version


@pytest.mark.parametrize("size", [2, 8])
def test_version_of_another_size(make_cache: MakeCache, size: int) -> None:
    """A new version that is far larger or smaller is measured anew, not blended with the old one."""
    source, scales = DictSource().add("a", size=4 * MIB), Scales(a=40)
    cache = make(make_cache, scales, source)
    cache.get("a")
    source.add("a", size=size * MIB)
    scales.takes["a"] = 10 * size * MIB
    assert cache.refresh("a")
    assert (row(cache, "a").in_use, row(cache, "a").bytes) == ("measured", 10 * size * MIB)


def test_larger_version_needs_more_room(make_cache: MakeCache) -> None:
    """Room for a version twice as large is made for twice as much as the old one took, before it is loaded."""
    source, scales = DictSource().add("a", size=4 * MIB).add("b"), Scales(a=20, b=60)

    def unload(thing: Thing) -> None:
        scales.used = max(scales.used - 60 * MIB, 0)

    scales.book = Book(load=scales.book.load, unload=unload)
    cache = make(make_cache, scales, source, memory={"high": 110 * MIB})
    cache.get("b")
    cache.get("a")
    source.add("a", size=8 * MIB)
    scales.takes["a"] = 40 * MIB
    there: list[bool] = []
    scales.during = lambda model: there.append(row(cache, "b").tier == "memory")
    with cache.lease("a"):
        assert cache.refresh("a")
    assert there == [False]


@pytest.mark.parametrize("restart", [False, True])
def test_larger_version_that_could_not_be_measured(make_cache: MakeCache, spawn: Spawn, *, restart: bool) -> None:
    """It counts with what it was expected to take; what was measured of the smaller one is not kept beside it."""
    source, scales = DictSource().add("a", size=4 * MIB).add("b"), Scales(a=10, b=1)
    cache = make(make_cache, scales, source)
    cache.get("a")
    if restart:
        cache.close()
        cache = make(make_cache, scales, source)
    with Gate("b") as beside:
        scales.during = beside
        loading = spawn(cache.get, "b")
        beside.wait()
        cache.get("a")
        source.add("a", size=40 * MIB)
        scales.takes["a"] = 100 * MIB
        assert cache.refresh("a")
        assert row(cache, "a").bytes == 100 * MIB
    loading.result()
    cache.close()
    scales.during = lambda model: (_ for _ in ()).throw(RuntimeError("never mind"))
    cache = make(make_cache, scales, source)
    with pytest.raises(LoadFailed):
        cache.get("a")
    assert row(cache, "a").measured is None


def test_version_of_another_tiny_size(make_cache: MakeCache) -> None:
    """An artifact too small to tell anything tells nothing by its growth either: no more room is made than before."""
    source, scales = DictSource().add("a", size=100).add("b"), Scales(a=60, b=60)
    cache = make(make_cache, scales, source, memory={"high": 200 * MIB})
    with cache.lease("a"):
        cache.get("b")
        source.add("a", size=200)
        assert cache.refresh("a")
    assert row(cache, "b").tier == "memory"
