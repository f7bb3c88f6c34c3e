"""New versions: ``refresh`` and ``revalidate_after``."""

from typing import Any

import pytest

from modelcache import LoadFailed, SourceUnavailable, Unloaded
from tests.support.fakes import Book, DictSource, MakeCache, allocated
from tests.support.waiting import eventually


def test_new_version_beside_the_old(make_cache: MakeCache) -> None:
    """New lookups get the new version, leases finish on the old, which then goes once, with its files."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    told: list[Any] = []
    cache.on(Unloaded, told.append)
    lease = cache.lease("a")
    old = lease.acquire()
    source.add("a", size=20)
    assert cache.refresh("a")
    new = cache.get("a")
    assert new is not old
    assert (old.size, new.size) == (10, 20)
    assert book.unloads == []
    (row,) = cache.models()
    assert row.leases == 1
    assert old.path.exists()
    lease.release()
    assert [(event.model, event.reason) for event in told] == [("a", "replaced")]
    assert not old.path.exists()
    assert cache.get("a") is new
    assert cache.stats().disk_used == allocated(cache.disk.path)


def test_same_version(make_cache: MakeCache) -> None:
    """Where the source has nothing new nothing is fetched or loaded; a model in no tier is not brought in."""
    source, book = DictSource().add("a", "b"), Book()
    cache = make_cache(source, book)
    value = cache.get("a")
    assert not cache.refresh("a")
    assert not cache.refresh("b")
    assert cache.get("a") is value
    assert source.opens == ["a"]
    assert source.finds == ["a", "a"]


def test_on_disk_only(make_cache: MakeCache) -> None:
    """A model that is only on disk is fetched anew, and not loaded."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    cache.prefetch(["a"], tier="disk").wait(10)
    source.add("a", size=20)
    assert cache.refresh("a")
    assert book.loads == []
    assert cache.get("a").size == 20
    assert len(source.opens) == 2


def test_failure_leaves_the_old(make_cache: MakeCache) -> None:
    """A new version that can't be loaded, or a source that is down, leaves the old one served."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    value = cache.get("a")
    source.down = ConnectionError("down")
    with pytest.raises(Exception, match="down"):
        cache.refresh("a")
    assert cache.get("a") is value
    cache.unload("a")
    assert cache.get("a").size == 10  # from disk: the failure is not remembered against it
    value = cache.get("a")
    source.down = None
    source.add("a", size=20)

    def broken(model: str) -> None:
        raise ValueError("broken")

    book.gate = broken
    with pytest.raises(LoadFailed):
        cache.refresh("a")
    assert cache.get("a") is value


def test_replaced_many_times(make_cache: MakeCache) -> None:
    """A hundred versions leave one model in memory and one folder on disk."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    cache.get("a")
    for size in range(11, 111):
        source.add("a", size=size)
        assert cache.refresh("a")
    assert book.alive == ["a"]
    assert cache.get("a").size == 110
    assert len(list((cache.disk.path / "models").iterdir())) == 1
    assert len(book.unloads) == 100


def test_unload_and_delete_take_both_versions(make_cache: MakeCache) -> None:
    """``delete`` takes a version that waits for its last lease too, and says when all is gone."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book)
    with cache.lease("a"):
        source.add("a", size=20)
        assert cache.refresh("a")
        assert not cache.delete("a")
    assert book.alive == []
    assert cache.delete("a")
    assert cache.models() == []


def test_used_models_are_asked_for_again(make_cache: MakeCache) -> None:
    """With ``revalidate_after`` a model in use gets its new version in the background; others are not asked for."""
    source, book = DictSource().add("a", "idle", size=10), Book()
    cache = make_cache(source, book, revalidate_after=0.05, memory={"interval": 0.02})
    cache.get("idle")
    cache.get("a")
    source.add("a", "idle", size=20)
    eventually(lambda: cache.get("a").size == 20)
    source.down = SourceUnavailable("down", source="dict")
    eventually(lambda: cache.get("a") and cache.stats().failures > 0)
    assert cache.get("a").size == 20
