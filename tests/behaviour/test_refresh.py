"""``refresh`` and ``revalidate_after``, one caller at a time: what is brought in, what stays, what goes and when.

The first look at both is ``test_versions``; threads that race with a refresh are ``interleave/test_refresh``.
"""

import itertools
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import (
    CacheClosed,
    ConfigError,
    Event,
    Evicted,
    Failed,
    Fetched,
    InvalidModelId,
    Loaded,
    LoadFailed,
    LocalSource,
    ModelCache,
    ModelNotFound,
    NoRoom,
    SourceUnavailable,
    Timeout,
    TooLarge,
    Unloaded,
)
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache, allocated, tar
from tests.support.waiting import WAIT, Gate, Spawn, eventually


def fail(*_: object) -> None:
    """Be a step that fails."""
    raise ValueError("broken")


def folders(cache: ModelCache[Any]) -> list[Path]:
    """Return the published folders."""
    return list((cache.disk.path / "models").iterdir())


def replaced(cache: ModelCache[Any]) -> list[str]:
    """Return the models of which an old version has left memory, in order."""
    return [str(event.model) for event in cache.history() if isinstance(event, Unloaded) and event.reason == "replaced"]


# What is brought in


def test_events_of_a_new_version(make_cache: MakeCache) -> None:
    """A new version is fetched and loaded for the reason of a refresh, and then the old one leaves as replaced."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    cache.get("a")
    source.add("a", size=20)
    told: list[Any] = []
    cache.on(Event, told.append)
    assert cache.refresh("a")
    assert [(type(event), event.reason) for event in told] == [
        (Fetched, "refresh"),
        (Loaded, "refresh"),
        (Unloaded, "replaced"),
    ]
    assert [event.model for event in told] == ["a"] * 3
    assert sorted(told, key=lambda event: event.seq) == told


def test_no_tier(make_cache: MakeCache) -> None:
    """A model in no tier is not asked for; neither is one that has left both."""
    source = DictSource().add("a", "b")
    cache = make_cache(source)
    assert not cache.refresh("b")
    cache.get("a")
    assert cache.delete("a")
    assert not cache.refresh("a")
    assert source.finds == ["a"]


def test_upload_during_the_first_fetch(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model on its way to its first tier is waited for and asked for again: the fetch may be of the old version."""
    source = DictSource().add("a", size=10)
    with Gate() as gate:
        source.gate = gate
        cache = make_cache(source)
        first = spawn(cache.get, "a")
        gate.wait()
        source.artifacts["a"], source.gate = tar({"model.txt": bytes(20)}), None
        refreshed = spawn(cache.refresh, "a")
        flight = cache._parts.flights.active["a"]
        eventually(lambda: flight.watchers or refreshed.done())
    assert first.result().model == "a"
    assert refreshed.result()
    assert cache.get("a").size == 20


def test_same_version_tells_nothing(make_cache: MakeCache) -> None:
    """Where the source has nothing new nothing happens, and looking is no use of the model."""
    cache = make_cache()
    cache.get("a")
    (before,) = cache.models()
    told: list[Any] = []
    cache.on(Event, told.append)
    assert not cache.refresh("a")
    assert told == []
    assert cache.models() == [before]


def test_wrong_calls(make_cache: MakeCache) -> None:
    """An id or a timeout that can't work is refused before the source is asked, as is a closed cache."""
    source = DictSource().add("a")
    cache = make_cache(source)
    cache.get("a")
    with pytest.raises(InvalidModelId):
        cache.refresh("../a")
    with pytest.raises(ConfigError):
        cache.refresh("a", timeout=-1)
    cache.close()
    with pytest.raises(CacheClosed):
        cache.refresh("a")
    assert source.finds == ["a"]


@pytest.mark.parametrize("after", [0, -1, "5 s", True, float("nan")])
def test_wrong_setting(make_cache: MakeCache, after: Any) -> None:
    """A ``revalidate_after`` that can't work is refused at construction."""
    with pytest.raises(ConfigError, match="revalidate_after"):
        make_cache(revalidate_after=after)


def test_after_a_restart(make_cache: MakeCache) -> None:
    """A version that an earlier process fetched is refreshed; later starts find the new one."""
    source, book = DictSource().add("a", size=10), Book()
    make_cache(source).prefetch(["a"], tier="disk").wait(10)
    source.add("a", size=20)
    assert make_cache(source).refresh("a")
    assert make_cache(source, book).get("a").size == 20
    assert source.opens == ["a", "a"]


def test_clock_that_goes_back(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is fetched after the clock went back is the present one all the same, also after a restart."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    cache.prefetch(["a"], tier="disk").wait(10)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1000.0)
    source.add("a", size=20)
    assert cache.refresh("a")
    assert cache.get("a").size == 20
    assert not cache.refresh("a")
    assert make_cache(source).get("a").size == 20
    assert len(source.opens) == 2


def test_hits_count_over_versions(make_cache: MakeCache) -> None:
    """The hits of a model are those of all its versions, in whatever order these leave."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    with cache.lease("a"):
        for _ in range(3):
            cache.get("a")
        source.add("a", size=20)
        cache.refresh("a")
        assert cache.models()[0].hits == 3
        cache.get("a")
        assert cache.models()[0].hits == 4
        cache.unload("a")
    assert cache.models()[0].hits == 4


# In place


def test_in_place(make_cache: MakeCache, tmp_path: Path) -> None:
    """A folder that is loaded where it lies has a new version once a file in it is another; none on disk is known."""
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    (folder / "model.txt").write_bytes(b"x" * 10)
    cache = make_cache(LocalSource(tmp_path / "source", copy=False))
    assert not cache.refresh("a")
    with cache.lease("a"):
        assert not cache.refresh("a")
        (folder / "model.txt").write_bytes(b"x" * 20)
        assert cache.refresh("a")
        assert cache.get("a").size == 20
        assert replaced(cache) == []
    assert replaced(cache) == ["a"]
    assert cache.unload("a")
    assert not cache.refresh("a")
    assert cache.models() == []


def test_in_place_after_an_archive(make_cache: MakeCache, tmp_path: Path) -> None:
    """Where a folder loaded in place follows an archive, the unpacked archive goes from disk with its last lease."""
    folder = tmp_path / "source"
    (folder / "a").mkdir(parents=True)
    (folder / "a.tar.gz").write_bytes(DictSource().add("a", size=10).artifacts["a"])
    cache = make_cache(LocalSource(folder, copy=False))
    with cache.lease("a") as old:
        (folder / "a.tar.gz").unlink()
        (folder / "a" / "model.txt").write_bytes(b"x" * 30)
        assert cache.refresh("a")
        assert old.path.exists()
    assert folders(cache) == []
    assert cache.unload("a")
    assert cache.get("a").size == 30


# What goes, and when


def test_goes_once_after_its_last_lease(make_cache: MakeCache) -> None:
    """Each of several versions stays, with its files, until the last of its own leases ends, and is unloaded once."""
    source, book = DictSource(), Book()
    cache = make_cache(source, book)
    leases = []
    for size in (10, 20, 30):
        source.add("a", size=size)
        cache.refresh("a")
        pair = cache.lease("a"), cache.lease("a")
        assert [lease.acquire().size for lease in pair] == [size, size]
        leases.append(pair)
    assert len(folders(cache)) == 3
    assert cache.stats().disk_used == allocated(cache.disk.path)
    assert (cache.stats().models, cache.stats().leases, cache.models()[0].leases) == (3, 6, 6)
    for number in (1, 0):
        leases[number][0].release()
        assert len(folders(cache)) == 3 - len(book.unloads) == 2 + number
        leases[number][1].release()
        assert len(folders(cache)) == 3 - len(book.unloads) == 1 + number
    for lease in leases[2]:
        lease.release()
    assert replaced(cache) == ["a", "a"]
    assert cache.get("a").size == 30


def test_mapped_file_of_the_old_version(make_cache: MakeCache) -> None:
    """What a leased version has mapped reads as ever after a refresh, and after its files are gone."""

    def load(path: Path, model: str) -> mmap.mmap:
        file = os.open(path / "model.txt", os.O_RDONLY)
        try:
            return mmap.mmap(file, 0, prot=mmap.PROT_READ)
        finally:
            os.close(file)

    source = DictSource({"a": DictSource().add("a", size=100_000).artifacts["a"]})
    cache = make_cache(source, Book(load))
    with cache.lease("a") as old:
        source.add("a", size=10)
        assert cache.refresh("a")
        assert len(old[:]) == 100_000
    assert len(folders(cache)) == 1
    assert old[:1] == b"a"
    assert old[-1:] == b"\0"
    new = cache.get("a")
    assert len(new) == 10
    old.close()
    new.close()


def test_unloaded_version_is_not_taken_back(make_cache: MakeCache) -> None:
    """A version that leaves with its last lease is not taken back once a newer one was brought in."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    with cache.lease("a"):
        assert not cache.unload("a")
        source.add("a", size=20)
        assert cache.refresh("a")
        assert cache.get("a").size == 20


@pytest.mark.parametrize("verb", ["unload", "delete"])
def test_replaced_version_is_not_taken_back(make_cache: MakeCache, verb: str) -> None:
    """A lookup after ``unload`` or ``delete`` gets the new version, however long the old one is leased."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    with cache.lease("a") as old:
        source.add("a", size=20)
        assert cache.refresh("a")
        assert not getattr(cache, verb)("a")
        assert cache.get("a").size == 20
        assert old.path.exists()
    assert not old.path.exists()
    assert cache.get("a").size == 20
    assert book.alive == ["a"]
    assert len(source.opens) == (2 if verb == "unload" else 3)


def test_delete_after_unload_of_the_new_version(make_cache: MakeCache) -> None:
    """``delete`` takes a new version that is only on disk at once, while the old one is leased."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    with cache.lease("a") as old:
        source.add("a", size=20)
        assert cache.refresh("a")
        cache.unload("a")
        assert not cache.delete("a")
        assert folders(cache) == [old.path.parent]
    assert cache.models() == []
    assert folders(cache) == []


# What fails


def test_broken_version_then_a_repaired_one(make_cache: MakeCache) -> None:
    """While the new version does not load the old one is served; each refresh tries anew, and a repaired one lands."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    value = cache.get("a")
    source.add("a", size=20)
    book.gate = fail
    for _ in range(2):
        with pytest.raises(LoadFailed, match=r"at the source, then refresh\('a'\)$"):  # delete() would end the old one
            cache.refresh("a")
        assert cache.get("a") is value
    book.gate = None
    source.add("a", size=30)
    assert cache.refresh("a")
    assert cache.get("a").size == 30
    assert len(folders(cache)) == 1
    assert replaced(cache) == ["a"]


@pytest.mark.parametrize("loaded", [True, False], ids=["in memory", "on disk"])
@pytest.mark.parametrize("step", ["find", "not found", "stranger", "read"])
def test_source_fails(make_cache: MakeCache, step: str, loaded: bool) -> None:
    """Where the source fails the error comes out, the old version is served, and nothing is remembered or left over."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source)
    cache.prefetch(["a"], tier="memory" if loaded else "disk").wait(10)
    good = source.artifacts.pop("a")
    kind: type[Exception] = SourceUnavailable
    if step == "not found":
        kind = ModelNotFound
    elif step == "read":
        kind = LoadFailed
        source.add("a", size=20)
        source.gate = fail
    else:
        source.down = SourceUnavailable("down", source="dict") if step == "find" else KeyError("down")
        kind = type(source.down) if step == "find" else LoadFailed
    with pytest.raises(kind):
        cache.refresh("a")
    assert isinstance(cache.history()[-1], Failed)
    assert cache.get("a").size == 10
    cache.unload("a")
    assert cache.get("a").size == 10
    assert cache.stats().disk_used == allocated(cache.disk.path)
    source.gate = source.down = None
    source.artifacts["a"] = good
    assert not cache.refresh("a")


def test_no_room_on_disk_for_both(make_cache: MakeCache) -> None:
    """Where ``disk.budget`` has no room for both versions nothing is evicted in vain, and the old one stays."""
    source = DictSource().add("a", "b", size=200_000)
    cache = make_cache(source, disk={"budget": 500_000})
    cache.get("b")
    value = cache.get("a")
    source.artifacts["a"] = tar({"model.txt": os.urandom(400_000)})
    with pytest.raises(TooLarge, match=r"beside the .* of its old version"):
        cache.refresh("a")
    assert [event for event in cache.history() if isinstance(event, Evicted)] == []
    assert cache.get("a") is value


def test_room_on_disk_is_made_for_both(make_cache: MakeCache) -> None:
    """For a new version others give way on disk, never the old one, and the budget holds."""
    source = DictSource().add("a", "b", size=200_000)
    cache = make_cache(source, disk={"budget": 500_000})
    cache.get("a")
    cache.get("b")
    source.add("a", size=210_000)
    assert cache.refresh("a")
    assert {event.model for event in cache.history() if isinstance(event, Evicted)} == {"b"}
    assert cache.get("a").size == 210_000
    assert cache.stats().disk_used == allocated(cache.disk.path) <= 500_000


@pytest.mark.parametrize("limit", [{"max_models": 1}, {"budget": 150}], ids=["max_models", "budget"])
def test_no_room_in_memory_for_both(make_cache: MakeCache, limit: dict[str, int]) -> None:
    """Where memory has no room for both an idle old version gives way first; one that is leased stays, with NoRoom."""
    source, book = DictSource().add("a", size=100), Book()
    cache = make_cache(source, book, memory=limit)
    cache.get("a")
    source.add("a", size=101)
    assert cache.refresh("a")
    source.add("a", size=102)
    with cache.lease("a") as held:
        with pytest.raises(NoRoom) as caught:
            cache.refresh("a", timeout=1.0)
        assert [holder[:2] for holder in caught.value.holders] == [("a", 1)]
        assert cache.get("a") is held
    assert held.size == 101
    assert cache.refresh("a") or cache.get("a").size == 102
    assert cache.get("a").size == 102
    assert book.alive == ["a"]


def test_room_for_both_is_made_by_others(make_cache: MakeCache) -> None:
    """For a new version others give way in memory where the old one is leased."""
    source, book = DictSource().add("a", "b", size=10), Book()
    cache = make_cache(source, book, memory={"max_models": 2})
    cache.get("b")
    with cache.lease("a"):
        source.add("a", size=20)
        assert cache.refresh("a")
        assert book.alive == ["a", "a"]
        (event,) = [event for event in cache.history() if isinstance(event, Evicted)]
        assert (event.model, event.for_model) == ("b", "a")
    assert book.alive == ["a"]


def test_time_that_ends(make_cache: MakeCache, spawn: Spawn) -> None:
    """A refresh whose time ends says what it is doing and that the old version is served; it goes on, and lands."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    cache.get("a")
    source.add("a", size=20)
    with Gate() as gate:
        book.gate = gate
        first = spawn(cache.refresh, "a")
        gate.wait()
        with pytest.raises(Timeout, match=r"refresh of 'a'.*is loading.*old version is served") as caught:
            cache.refresh("a", timeout=0.02)
        assert (caught.value.model, caught.value.timeout, caught.value.state) == ("a", 0.02, "loading")
        assert cache.get("a").size == 10
    assert first.result(WAIT)
    assert cache.get("a").size == 20
    assert not cache.refresh("a")


# Asked for in the background


def test_unused_models_are_not_asked_for(make_cache: MakeCache) -> None:
    """With ``revalidate_after`` a model is asked for again after that time, but only while it is used."""
    source, book = DictSource().add("a", "b", size=10), Book()
    cache = make_cache(source, book, revalidate_after=0.03, memory={"interval": 0.01})
    cache.get("b")
    cache.get("a")
    eventually(lambda: cache.get("a") and source.finds.count("a") > 3)
    asked = source.finds.count("b")
    assert asked <= 2  # its load is a use
    eventually(lambda: cache.get("a") and source.finds.count("a") > 6)
    assert source.finds.count("b") == asked
    assert len(source.opens) == 2
    assert cache.stats().failures == 0


def test_not_before_its_time(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was just fetched is not asked for before its time; one fetched long ago is, at its first use."""
    source, looks = DictSource().add("a", size=10), itertools.count()
    settings = {"revalidate_after": 3600.0, "memory": {"interval": 0.01, "gauge": FakeGauge(lambda: 0 * next(looks))}}
    cache = make_cache(source, **settings)
    cache.get("a")
    later = next(looks) + 20  # a look of the monitor reads the gauge once or twice
    eventually(lambda: cache.get("a") and next(looks) > later, interval=0.005)
    assert source.finds == ["a"]
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3700.0)
    cache = make_cache(source, **settings)
    eventually(lambda: cache.get("a") and source.finds == ["a", "a"])


def test_source_down_in_the_background(make_cache: MakeCache) -> None:
    """A source that is down while models are asked for again is told as Failed, and models are served on."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source, revalidate_after=0.02, memory={"interval": 0.01})
    failed: list[Any] = []
    cache.on(Failed, failed.append)
    value = cache.get("a")
    source.down = SourceUnavailable("down", source="dict")
    eventually(lambda: cache.get("a") and len(failed) >= 2)
    assert {(event.model, event.reason, event.error) for event in failed} == {("a", "refresh", "SourceUnavailable")}
    assert cache.get("a") is value
    cache.unload("a")
    assert cache.get("a").size == 10
    source.down = None
    source.add("a", size=20)
    eventually(lambda: cache.get("a").size == 20)


def test_new_version_without_room_is_in_nobodys_way(make_cache: MakeCache) -> None:
    """A new version that has no room beside a pinned old one is told as Failed, and blocks no other model's load."""
    source = DictSource().add("a", "b", "c", size=10)
    sizes = {"a": 600, "b": 300, "c": 350}
    memory = {"budget": 1000, "interval": 0.02}
    cache = make_cache(source, revalidate_after=0.02, memory=memory, timeout=5.0, size_of=lambda model, _: sizes[model])
    failed: list[Any] = []
    cache.on(Failed, failed.append)
    with cache.lease("a") as pinned:
        source.add("a", size=20)
        eventually(lambda: cache.get("a") and failed)
        assert {(event.model, event.error) for event in failed} == {("a", "NoRoom")}
        for model in "bcbc":
            assert cache.get(model).model == model
        assert cache.get("a") is pinned
    eventually(lambda: cache.get("a").size == 20)
