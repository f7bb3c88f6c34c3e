"""The disk tier through a cache: its budget, its order, its folder, and what it finds again after a restart."""

import contextlib
import gc
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import (
    AccessDenied,
    ConfigError,
    DiskTier,
    Event,
    Evicted,
    Fetched,
    ModelCache,
    NoRoom,
    SourceUnavailable,
    TooLarge,
)
from modelcache.disk.sweeping import sweep
from modelcache.policies import Resident, Standing, Worth
from modelcache.policies.ranked import LeastRecent
from tests.support.fakes import Book, DictSource, MakeCache, allocated, tar
from tests.support.waiting import WAIT, Spawn, eventually

MODELS = [f"m{number}" for number in range(8)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def on_disk(cache: ModelCache[Any]) -> list[str]:
    """Return the ids that are known on disk or above."""
    return [row.model for row in cache.models()]


def bring(cache: ModelCache[Any], *models: str) -> None:
    """Fetch models to disk, one after the other."""
    for model in models:
        handle = cache.prefetch([model], tier="disk")
        assert handle.wait(WAIT)
        assert handle.errors == {}


def evictions(cache: ModelCache[Any]) -> list[tuple[str | None, str | None]]:
    """Return model and tier of each eviction."""
    return [(event.model, event.tier) for event in cache.history() if isinstance(event, Evicted)]


def everything(disk: Path) -> int:
    """Return the bytes allocated for all that is published or staged, or being removed, right now."""
    found: dict[int, int] = {}  # by inode: what is moved as we look is seen in both places
    for place, _, files in os.walk(disk):  # passes over what is removed as we look
        if Path(place) in {disk, disk / "models", disk / "tmp"} or Path(place).parent == disk / "tmp":
            continue
        for path in (place, *(os.path.join(place, name) for name in files)):  # noqa: PTH118 - many, fast
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


# Budget


@pytest.mark.parametrize("kind", ["one file", "archive", "many small files", "deep", "large folder"])
def test_budget_holds_at_every_moment(make_cache: MakeCache, kind: str) -> None:
    """Downloads and unpacking included, what is allocated never exceeds the budget, whatever is unpacked."""
    source = DictSource()
    for number, model in enumerate(MODELS):
        blob = os.urandom(150_000 + 10_000 * number)
        if kind == "one file":
            source.add_file(model, f"{model}.bin", blob)
        elif kind == "archive":
            source.artifacts[model] = tar({"weights": bytes(200_000), "more/weights": blob})
        elif kind == "many small files":
            source.artifacts[model] = tar({f"file{index}": b"x" for index in range(60)})
        elif kind == "deep":
            source.artifacts[model] = tar({"/".join("abcdefgh"[: depth + 1]) + f"/{depth}": b"x" for depth in range(8)})
        else:
            source.artifacts[model] = tar({f"{index}" + "n" * 200: b"" for index in range(100)})
    budget = 600_000
    cache = make_cache(source, disk={"budget": budget})
    seen: list[int] = []
    source.gate = lambda: seen.append(everything(cache.disk.path))
    cache.on(Event, lambda event: seen.append(everything(cache.disk.path)))
    for model in [*MODELS, *MODELS]:
        cache.get(model)
        seen.append(everything(cache.disk.path))
        assert cache.stats().disk_used <= budget
    assert max(seen) <= budget
    assert len(seen) > 50


def test_budget_holds_while_several_fetch(make_cache: MakeCache, spawn: Spawn) -> None:
    """The budget holds while several threads fetch at once, and all of them get what they want."""
    source = DictSource()
    for number, model in enumerate(MODELS):
        source.artifacts[model] = tar({"weights": os.urandom(100_000 + 20_000 * number)})
    seen: list[int] = []
    source.gate = lambda: seen.append(everything(cache.disk.path))
    cache = make_cache(source, disk={"budget": 700_000}, memory={"max_models": 2, "interval": 0.02}, timeout=None)
    futures = [spawn(lambda models=models: [cache.get(m).model for m in models]) for models in (MODELS, MODELS[::-1])]
    for future in futures:
        assert sorted(future.result(WAIT)) == MODELS
    assert max(seen) <= 700_000


def test_too_large_is_refused_before_the_download(make_cache: MakeCache) -> None:
    """A model larger than the budget is refused unread, and nothing is evicted for it."""
    source = DictSource().add("a").add_file("big", "big.bin", bytes(2**20))
    cache = make_cache(source, disk={"budget": "512 KiB"})
    bring(cache, "a")
    with pytest.raises(TooLarge) as caught:
        cache.get("big")
    assert (caught.value.tier, caught.value.limit) == ("disk", 2**19)
    assert source.opens == ["a"]
    assert on_disk(cache) == ["a"]


def test_archive_that_unpacks_past_the_budget(make_cache: MakeCache) -> None:
    """An archive that only turns out to be too large as it unpacks is refused, and leaves nothing."""
    source = DictSource({"bomb": tar({"zeros": bytes(4 * 2**20)})})
    cache = make_cache(source, disk={"budget": "1 MiB"})
    with pytest.raises(TooLarge, match="'bomb'"):
        cache.get("bomb")
    assert cache.stats().disk_used == 0
    assert everything(cache.disk.path) == 0


def test_min_free_guards_the_file_system(make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that would leave less than ``min_free`` evicts for it, and is NoRoom where that does not help."""
    source = DictSource().add(*MODELS)
    cache = make_cache(source)
    bring(cache, "m0")
    one = cache.stats().disk_used
    store = cache.disk.store
    monkeypatch.setattr(store, "free", lambda: 10 * one - everything(store.path))
    cache.disk.min_free = 7 * one
    bring(cache, *MODELS[1:])
    assert on_disk(cache) == ["m5", "m6", "m7"]
    assert {event.reason for event in cache.history() if isinstance(event, Evicted)} == {"min_free"}
    monkeypatch.setattr(store, "free", lambda: 0)
    with pytest.raises(NoRoom, match=r"disk\.min_free") as caught:
        cache.get("m0")
    assert caught.value.tier == "disk"
    assert caught.value.model == "m0"


def test_counted_bytes_are_allocated_bytes(make_cache: MakeCache) -> None:
    """What stats() and models() show is what the file system allocated, folders and records included."""
    source = DictSource().add("small").add("large", size=100_000)
    cache = make_cache(source)
    bring(cache, "small", "large")
    assert cache.stats().disk_used == allocated(cache.disk.path)
    assert sum(row.bytes for row in cache.models()) == cache.stats().disk_used
    cache.delete("large")
    assert cache.stats().disk_used == allocated(cache.disk.path)


# Order


def room_for(cache: ModelCache[Any], count: int) -> None:
    """Set the budget so that ``count`` artifacts like the one that is there fit."""
    cache.disk.budget = count * cache.stats().disk_used


def test_lru_on_memory_misses(make_cache: MakeCache) -> None:
    """The artifact that was least recently missed in memory goes first."""
    cache = make_cache()
    bring(cache, "a")
    room_for(cache, 3)
    bring(cache, "b", "c")
    cache.get("a")
    cache.unload("a")
    bring(cache, "d")
    assert evictions(cache) == [("b", "disk")]
    assert on_disk(cache) == ["a", "c", "d"]


def test_hits_in_memory_are_no_use_of_an_artifact(make_cache: MakeCache) -> None:
    """A model that is hit in memory again and again does not keep its artifact warm: LRU of misses only."""
    cache = make_cache()
    cache.get("a")
    room_for(cache, 3)
    bring(cache, "b", "c")
    for _ in range(20):
        cache.get("a")
    cache.unload("a")
    bring(cache, "d")
    assert evictions(cache) == [("a", "disk")]


def test_prefetch_and_refresh_are_no_use_of_an_artifact(make_cache: MakeCache) -> None:
    """Bringing a model into memory before anybody asks, and asking for a new version, does not keep its artifact."""
    cache = make_cache()
    bring(cache, "a")
    room_for(cache, 3)
    bring(cache, "b", "c")
    assert cache.prefetch(["a"]).wait(WAIT)
    for _ in range(3):
        assert not cache.refresh("a")
    cache.unload("a")
    bring(cache, "d")
    assert evictions(cache) == [("a", "disk")]


def test_model_in_memory_keeps_its_files(make_cache: MakeCache) -> None:
    """The coldest artifact stays while its model is in memory; the next one goes."""
    cache = make_cache()
    model = cache.get("a")
    room_for(cache, 3)
    bring(cache, "b", "c", "d")
    assert evictions(cache) == [("b", "disk")]
    assert model.path.exists()


def test_model_in_memory_gives_way_in_both_tiers(make_cache: MakeCache, book: Book) -> None:
    """If the budget can't be met otherwise, the coldest model leaves both tiers: two Evicted, memory then disk."""
    cache = make_cache(book=book)
    first = cache.get("a")
    room_for(cache, 2)
    cache.get("b")
    cache.get("a")
    cache.get("c")
    assert evictions(cache) == [("b", "memory"), ("b", "disk")]
    assert book.alive == ["a", "c"]
    assert first.path.exists()
    reasons = {(event.reason, event.for_model) for event in cache.history() if isinstance(event, Evicted)}
    assert reasons == {("disk budget", "c")}


def test_leased_model_keeps_its_files(make_cache: MakeCache) -> None:
    """Where every artifact is leased, a fetch is NoRoom of the disk tier, and names the holders."""
    cache = make_cache(timeout=None)
    with cache.lease("a"):
        room_for(cache, 1)
        with pytest.raises(NoRoom, match=r"'b'.*disk\.budget") as caught:
            cache.get("b")
    assert caught.value.tier == "disk"
    assert [holder[:2] for holder in caught.value.holders] == [("a", 1)]
    assert cache.get("b").model == "b"


def test_waiter_gets_disk_room_from_anothers_release(make_cache: MakeCache, spawn: Spawn) -> None:
    """A fetch that finds all artifacts leased waits for a release."""
    cache = make_cache(timeout=None)
    lease = cache.lease("a")
    lease.acquire()
    room_for(cache, 1)
    waiting = spawn(cache.get, "b")
    eventually(lambda: cache.stats().waiters == 1)
    lease.release()
    assert waiting.result(WAIT).model == "b"


def test_failed_fetch_evicts_for_nothing_more_than_it_reserved(make_cache: MakeCache) -> None:
    """Nothing on disk is evicted for a model that the source does not have."""
    cache = make_cache()
    bring(cache, "a")
    room_for(cache, 1)
    with pytest.raises(LookupError):
        cache.get("nope")
    assert on_disk(cache) == ["a"]


class Lazy:
    """A user's policy: by id, one after the other, counting how many were taken."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def requested(self, model: str, clock: int) -> None:
        """Ignore."""

    admitted = removed = lambda *_: None

    def victims(self, need: int, evictable: Collection[str]) -> Iterator[str]:
        """Give the first of those that may go, when asked."""
        for model in "abcdefgh":
            if model in evictable:
                self.given.append(model)
                yield model


def test_policy_is_asked_for_no_more_than_goes(make_cache: MakeCache) -> None:
    """Victims are taken one by one, until they suffice; what is in use is never offered."""
    policy = Lazy()
    cache = make_cache(disk={"policy": policy})
    bring(cache, "a")
    room_for(cache, 4)
    with cache.lease("b"):
        bring(cache, "c", "d", "e", "f")
        assert policy.given == ["a", "c"]
    assert [model for model, _ in evictions(cache)] == ["a", "c"]


# Loaders that read all at once


def test_artifact_may_leave_under_its_model(make_cache: MakeCache, source: DictSource) -> None:
    """With ``keep_files=False`` an artifact is evicted under its model, which is served all the same."""
    cache = make_cache(source, disk={"keep_files": False})
    assert cache.disk.keep_files is False
    for model in "abc":
        cache.get(model)
    cache.disk.budget = 1
    assert evictions(cache) == [("a", "disk"), ("b", "disk"), ("c", "disk")]
    assert cache.stats().disk_used == allocated(cache.disk.path) == 0
    opens = list(source.opens)
    assert [cache.get(model).model for model in "abc"] == ["a", "b", "c"]
    assert source.opens == opens
    assert [(row.model, row.tier) for row in cache.models()] == [("a", "memory"), ("b", "memory"), ("c", "memory")]
    assert not cache.refresh("a")
    cache.disk.budget = None
    assert cache.unload("a")
    assert on_disk(cache) == ["b", "c"]
    assert cache.get("a").model == "a"
    assert source.opens == [*opens, "a"]
    assert cache.delete("b")
    assert on_disk(cache) == ["a", "c"]


def test_figures_outlast_a_model_whose_artifact_may_leave(make_cache: MakeCache, source: DictSource) -> None:
    """With ``keep_files=False`` the figures of a model are kept beside an artifact that is still there."""
    with make_cache(source, disk={"keep_files": False}, memory={"policy": "worth"}) as cache:
        cache.get("a")
        (figures,) = cache.disk.path.glob("models/*/figures.json")
        before = figures.read_bytes()
        cache.get("a")
        cache.unload("a")
        assert figures.read_bytes() != before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_where_artifacts_may_leave(make_cache: MakeCache, source: DictSource) -> None:
    """With ``keep_files=False`` a forked child serves what its parent had in memory, and takes nothing from it."""
    cache = make_cache(source, disk={"keep_files": False})
    cache.get("a")
    child = os.fork()
    if not child:
        served = cache.get("a").model == "a" and cache.unload("a") and cache.get("a").model == "a"
        os._exit(0 if served and cache.close() else 1)  # else it may leave a temporary folder, for others to sweep
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.get("a").model == "a"
    assert source.opens == ["a"]


# Worth


def remember_fetches(cache: ModelCache[Any], **seconds: float) -> None:
    """Write into the records how long the fetch of each model took."""
    for path in (cache.disk.path / "models").glob("*/record.json"):
        record = json.loads(path.read_text())
        used = path.stat().st_mtime_ns
        path.write_text(json.dumps(record | {"fetch_seconds": seconds[record["model"]]}))
        os.utime(path, ns=(used, used))
    for path in cache.disk.path.glob("ledger*"):
        path.unlink()  # to be made anew from the records


def test_worth_is_the_default() -> None:
    """Without a word about it, the disk tier weighs fetch seconds."""
    assert isinstance(DiskTier().policy, Worth)


def test_worth_keeps_what_takes_long_to_fetch(make_cache: MakeCache, source: DictSource) -> None:
    """Of artifacts of one size, the one that is fetched fastest goes first; an unknown fetch counts as the usual."""
    with make_cache(source) as first:
        bring(first, *"abcd")
        remember_fetches(first, a=1_000.0, b=1.0, c=0.0, d=50_000.0)
    cache = make_cache(source, disk={"policy": "worth"})
    cache.disk.budget = 1
    assert [model for model, _ in evictions(cache)] == ["b", "a", "c", "d"]


def test_worth_finds_its_order_again(make_cache: MakeCache, source: DictSource) -> None:
    """What a start finds on disk stands in the order of its last use, as if asked for once; finding is no request."""
    with make_cache(source) as first:
        bring(first, *"abcd")
        for model in "ba":
            first.get(model)
        remember_fetches(first, a=1.0, b=1.0, c=1.0, d=1.0)
    cache = make_cache(source, disk={"policy": "worth"})
    assert isinstance(cache.disk.policy, Worth)
    standings = [cache.disk.policy.standing(model) for model in "abdc"]
    assert standings == [Standing(1, idle, idle) for idle in range(4)]
    cache.get("c")
    assert cache.disk.policy.standing("c") == Standing(2, 4, 0)
    cache.unload("c")
    cache.disk.budget = 1
    assert [model for model, _ in evictions(cache)] == ["d", "b", "a", "c"]


# Restart


def test_restart_finds_every_model(make_cache: MakeCache, source: DictSource) -> None:
    """A new cache over the folder lists at once what is there, and serves it without the source, even with it down."""
    with make_cache(source) as first:
        bring(first, *"abcd")
        before = [(row.model, row.bytes) for row in first.models()]
    source.down = SourceUnavailable("down")
    source.finds.clear()
    cache = make_cache(source)
    assert [(row.model, row.bytes) for row in cache.models()] == before
    assert {row.tier for row in cache.models()} == {"disk"}
    for model in "abcd":
        assert cache.get(model).model == model
    assert source.finds == []
    assert [event for event in cache.history() if isinstance(event, Fetched)] == []


class Watching(LeastRecent):
    """LRU that notes whether cyclic garbage could be collected as it was told of models."""

    def __init__(self) -> None:
        super().__init__()
        self.collecting: list[bool] = []

    def admitted(self, resident: Resident) -> None:
        """Look."""
        self.collecting.append(gc.isenabled())
        super().admitted(resident)


@pytest.mark.parametrize("enabled", [True, False])
def test_restart_with_many_models_collects_no_garbage(make_cache: MakeCache, tmp_path: Path, enabled: bool) -> None:
    """While a start takes in more than a thousand models nothing is collected; then it is as it was before."""
    with make_cache() as cache:
        bring(cache, "a")
    first = published(tmp_path / "disk")
    for number in range(1001):
        folder = first.with_name(f"{first.name[:-8]}{number:08x}")
        shutil.copytree(first, folder)
        rewrite(model=f"m{number}")(folder)
    policy = Watching()
    (gc.enable if enabled else gc.disable)()
    try:
        cache = make_cache(disk={"policy": policy})
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert len(on_disk(cache)) == 1002
    assert policy.collecting == [enabled, *[False] * 1001]  # the ledger knew of the first alone


def test_restart_keeps_recency(make_cache: MakeCache, source: DictSource) -> None:
    """The order of last use survives a restart: the coldest goes first."""
    with make_cache(source) as first:
        bring(first, *"abcd")
        for model in "ba":
            first.get(model)
        total = first.stats().disk_used
        last_used = {row.model: row.last_used for row in first.models()}
    cache = make_cache(source, disk={"budget": total})
    for row in cache.models():
        assert row.last_used == pytest.approx(last_used[row.model], abs=2)
    bring(cache, "e", "f", "g")
    assert [model for model, _ in evictions(cache)] == ["c", "d", "b"]


def test_restart_with_a_smaller_budget(make_cache: MakeCache, source: DictSource) -> None:
    """A smaller budget after a restart is met by the first fetch at the latest."""
    with make_cache(source) as first:
        bring(first, *"abcd")
        one = first.stats().disk_used // 4
    cache = make_cache(source, disk={"budget": 2 * one})
    bring(cache, "e")
    assert cache.stats().disk_used <= 2 * one
    assert "e" in on_disk(cache)


def test_another_source_in_the_same_folder(make_cache: MakeCache, source: DictSource) -> None:
    """Artifacts of another source are nobody's model here, but count, and give way."""
    with make_cache(source) as first:
        bring(first, "a", "b")
        total = first.stats().disk_used
    other = DictSource().add("a", "c", "d")
    other.url = "dict://other"
    cache = make_cache(other, disk={"budget": total})
    assert cache.models() == []
    assert cache.stats().disk_used == total
    assert cache.get("a").model == "a"
    assert other.opens == ["a"]
    assert cache.stats().disk_used <= total


@pytest.mark.parametrize("policy", ["lru", "worth"])
def test_sources_in_one_folder_give_way_by_one_order(make_cache: MakeCache, policy: str) -> None:
    """Where two sources share a folder, the least worthy of all goes, and neither source pushes out the other first."""
    source, other = (DictSource().add("a", "b", "c", "d") for _ in range(2))
    other.url = "dict://other"
    one = make_cache(source, disk={"policy": policy})
    two = make_cache(other, disk={"policy": policy})
    for cache, model in ((one, "a"), (two, "a"), (one, "b"), (two, "b")):
        cache.get(model)
        cache.unload(model)
    for _ in range(3):
        for cache, model in ((two, "a"), (one, "b")):
            cache.get(model)
            cache.unload(model)
    two.get("c")  # tells of all that two was asked for
    two.unload("c")
    used = one.stats().disk_used
    one.disk.budget = used - used // 5 - 1  # of five equal ones
    assert (len(on_disk(one)), len(on_disk(two))) in ({(1, 2)} if policy == "lru" else {(1, 2), (2, 1)})
    assert ("b" in on_disk(one), "a" in on_disk(two)) == (True, True)


# What lies in the folder


def test_foreign_files_are_left_alone(make_cache: MakeCache, tmp_path: Path) -> None:
    """Files and folders that are not ours stay as they are."""
    disk = tmp_path / "disk"
    with make_cache(folder=disk) as cache:
        cache.get("a")
    for name in ("notes.txt", "models/notes.txt", "models/lost+found/x", "lost+found/x"):
        (disk / name).parent.mkdir(exist_ok=True)
        (disk / name).write_text("mine")
    cache = make_cache(folder=disk, disk={"budget": "30 KiB"})
    for model in "abcd":
        cache.get(model)
    cache.delete("d")
    cache.close()
    for name in ("notes.txt", "models/notes.txt", "models/lost+found/x", "lost+found/x"):
        assert (disk / name).read_text() == "mine"
    for name in ("models/notes.txt", "models/lost+found"):
        path = disk / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


CHILD = """
import pathlib, sys, threading
sys.path.insert(0, {root!r})
from modelcache import DiskTier, ModelCache
from tests.support.fakes import DictSource

source = DictSource().add("a", "b", size=100_000)
cache = ModelCache(source, lambda path: path, disk=DiskTier({folder!r}, min_free=0))
cache.get("b")
def gate():
    print("inside", flush=True)
    sys.stdin.read()
source.gate = gate
cache.get("a")
"""


def child(folder: Path) -> subprocess.Popen[str]:
    """Start a process with a cache over the folder that stops in the middle of a fetch."""
    root = str(Path(__file__).resolve().parents[2])
    text = textwrap.dedent(CHILD).format(root=root, folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    return process


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_kept(make_cache: MakeCache, tmp_path: Path) -> None:
    """What a live process stages is left alone; once it is killed, the next start sweeps it."""
    disk = tmp_path / "disk"
    with child(disk) as process:
        (workshop,) = (disk / "tmp").iterdir()
        assert list(workshop.iterdir())
        with make_cache(folder=disk) as cache:
            assert on_disk(cache) == ["b"]
            assert workshop.exists()
            assert list(workshop.iterdir())
        process.kill()
        process.wait(WAIT)
        assert workshop.exists()
        with make_cache(folder=disk):
            assert not workshop.exists()


def test_leftovers_that_cannot_be_deleted_count(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process left counts until it can be deleted, and nobody waits for its fetch meanwhile."""
    disk = tmp_path / "disk"
    source = DictSource().add("a", "b", size=100_000)
    with child(disk) as process:
        process.kill()
        process.wait(WAIT)
    with monkeypatch.context() as patch:
        patch.setattr("modelcache.disk.files.shutil.rmtree", lambda *_args, **_settings: None)
        cache = make_cache(source, folder=disk)
        cache.get("b")
        left = cache.stats().disk_used
        assert left > allocated(disk)
        cache.get("a")
    sweep(cache.disk.store)
    cache.get("b")
    assert eventually(lambda: cache.stats().disk_used == allocated(disk))


def test_leftovers_count_in_a_new_ledger(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process could not delete yet counts also once the ledger was lost, until it is deleted."""
    disk = tmp_path / "disk"
    cache = make_cache(DictSource().add("a", "b", "c", size=100_000), folder=disk)
    bring(cache, "a")
    with monkeypatch.context() as patch:
        patch.setattr(cache.disk.store, "discard", lambda _folder: False)
        cache.delete("a")
        left = cache.stats().disk_used
        assert left > allocated(disk) == 0
        for file in disk.glob("ledger*"):
            file.unlink()
        bring(cache, "b")
        assert cache.stats().disk_used == left + allocated(disk)
    bring(cache, "c")
    assert cache.stats().disk_used == allocated(disk)


def test_files_that_another_process_has_leased_stay(make_cache: MakeCache, tmp_path: Path) -> None:
    """Files of a model that any process has in memory are never deleted; once it is killed they may go."""
    disk = tmp_path / "disk"
    source = DictSource().add("a", "b", size=100_000)
    with child(disk) as process:
        cache = make_cache(source, folder=disk)
        (row,) = cache.models()
        assert row.model == "b"
        assert cache.delete("b") is False
        cache.disk.budget = 4096
        assert on_disk(cache) == []  # nobody begins to read it any more
        assert allocated(disk) > 0
        process.kill()
        process.wait(WAIT)
        assert eventually(lambda: cache.delete("b"))
    assert cache.models() == []
    assert allocated(disk) == 0
    DiskTier(disk).store.close()  # which sweeps what the child left, and what was set aside for it
    assert cache.stats().disk_used == 0


def test_leftovers_are_swept_when_room_is_short(make_cache: MakeCache, tmp_path: Path) -> None:
    """What a killed process left is swept also by a live cache, when room is short, before anything is evicted."""
    disk = tmp_path / "disk"
    source = DictSource().add("c", "d", size=100_000)
    cache = make_cache(source, folder=disk)
    bring(cache, "c")
    used = cache.stats().disk_used
    with child(disk) as process:
        process.kill()
        process.wait(WAIT)
    left = [path for path in (disk / "tmp").iterdir() if any(path.iterdir())]
    assert left
    cache.disk.budget = 2 * used
    bring(cache, "d")
    assert everything(disk) <= (cache.disk.budget or 0)
    assert not any(path.exists() for path in left)


def published(disk: Path) -> Path:
    """Return the one published folder."""
    (folder,) = (disk / "models").iterdir()
    return folder


def rewrite(**fields: object) -> Callable[[Path], object]:
    """Return what gives a record other fields."""

    def damage(folder: Path) -> None:
        path = folder / "record.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


DAMAGES = {
    "empty record": lambda folder: (folder / "record.json").write_text(""),
    "no JSON": lambda folder: (folder / "record.json").write_text("{"),
    "a list": lambda folder: (folder / "record.json").write_text("[]"),
    "no UTF-8": lambda folder: (folder / "record.json").write_bytes(b"\xff\xfe"),
    "no record": lambda folder: (folder / "record.json").unlink(),
    "no artifact": lambda folder: shutil.rmtree(folder / "artifact"),
    "a deep nest": lambda folder: (folder / "record.json").write_text("[" * 100_000),
    "more than a record": lambda folder: (folder / "record.json").write_text(
        (folder / "record.json").read_text() + "{}"
    ),
    "a number for an id": rewrite(model=7),
    "half a character": rewrite(version="\ud83d"),
    "no number": rewrite(fetch_seconds=float("nan")),
    "a number beyond the ledger's": rewrite(size=2**63),
    "bytes below none": rewrite(bytes=-1),
    "a strange field": rewrite(color="red"),
    "another format": rewrite(format=0),
}


@pytest.mark.parametrize("lost", [False, True], ids=["known", "ledger lost"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_record_is_fetched_again(
    make_cache: MakeCache, source: DictSource, tmp_path: Path, damage: Any, lost: bool
) -> None:
    """An artifact whose record is damaged is fetched again; the damaged one takes no uncounted room."""
    with make_cache(source) as cache:
        bring(cache, "a")
    damage(published(tmp_path / "disk"))
    for path in (tmp_path / "disk").glob("ledger*") if lost else ():
        path.unlink()
    cache = make_cache(source)
    assert cache.get("a").model == "a"
    assert source.opens == ["a", "a"]
    assert cache.stats().disk_used == allocated(tmp_path / "disk")


@pytest.mark.parametrize("what", ["models", "tmp", "everything", "one artifact"])
def test_folder_removed_under_a_live_cache(make_cache: MakeCache, source: DictSource, what: str) -> None:
    """Somebody who cleans the folder by hand costs a fetch, not the service."""
    cache = make_cache(source)
    cache.get("a")
    cache.unload("a")
    disk = cache.disk.path
    if what == "everything":
        shutil.rmtree(disk)
    elif what == "one artifact":
        shutil.rmtree(published(disk))
    else:
        shutil.rmtree(disk / what)
    assert cache.get("a").model == "a"
    assert cache.get("b").model == "b"


def test_marker_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    """A folder that a newer modelcache wrote is refused, not misread."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "modelcache.json").write_text('{"format": 999}')
    with pytest.raises(ConfigError, match="999"):
        DiskTier(disk)
    assert list((disk / "tmp").iterdir()) == []


# Whose folder it is


def mode(path: Path) -> int:
    """Return the permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)


def test_what_is_made_is_private(make_cache: MakeCache, tmp_path: Path) -> None:
    """Folders are 0700 and files 0600, whatever the umask and whatever the archive says."""
    old = os.umask(0)
    try:
        cache = make_cache(folder=tmp_path / "new" / "disk")
        cache.get("a")
    finally:
        os.umask(old)
    disk = tmp_path / "new" / "disk"
    assert mode(disk) == 0o700
    for path in disk.rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_mode_is_followed(make_cache: MakeCache) -> None:
    """With a mode given, what is made has it, also where the umask takes more away."""
    old = os.umask(0o077)
    try:
        cache = make_cache(disk={"mode": 0o750})
        cache.get("a")
    finally:
        os.umask(old)
    for path in (cache.disk.path / "models").rglob("*"):
        assert mode(path) == (0o750 if path.is_dir() else 0o640), path
    assert mode(cache.disk.path / "models") == 0o750


@pytest.mark.parametrize("folder", ["models", "tmp"])
@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
def test_folder_that_others_may_write_to_is_refused(tmp_path: Path, folder: str, bits: int) -> None:
    """Where others may write to what we made, a pickle of theirs would run: refused, with the path and what to do."""
    DiskTier(tmp_path / "disk").store.close()
    (tmp_path / "disk" / folder).chmod(bits)
    with pytest.raises(AccessDenied, match=f"{folder}.*written") as caught:
        DiskTier(tmp_path / "disk")
    assert isinstance(caught.value, PermissionError)


@needs_root
@pytest.mark.parametrize("folder", ["models", "tmp"])
def test_folder_of_somebody_else_is_refused(tmp_path: Path, folder: str) -> None:
    """Where what we made belongs to another user, it is refused."""
    DiskTier(tmp_path / "disk").store.close()
    os.chown(tmp_path / "disk" / folder, 12345, 12345)
    with pytest.raises(AccessDenied, match="12345"):
        DiskTier(tmp_path / "disk")


def test_writable_parent_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder given by the user that others may write to is used, with a warning: what we make in it is private."""
    disk = tmp_path / "disk"
    disk.mkdir()
    disk.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        DiskTier(disk).store.close()
    assert str(disk) in caplog.text
    assert mode(disk / "models") == 0o700


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    """A path that is a file is refused at construction."""
    path = tmp_path / "disk"
    path.write_text("a file")
    with pytest.raises(ConfigError, match=r"disk.*folder"):
        DiskTier(path)
    assert path.read_text() == "a file"


def test_file_on_the_way_to_the_folder(tmp_path: Path) -> None:
    """A path below a file is refused at construction."""
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match="file"):
        DiskTier(tmp_path / "file" / "disk")


@not_root
def test_folder_without_permission(tmp_path: Path) -> None:
    """A folder that this user may not write to is refused at construction."""
    (tmp_path / "disk").mkdir(mode=0o500)
    with pytest.raises(AccessDenied, match="disk"):
        DiskTier(tmp_path / "disk")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Give a folder on a file system of its own."""
    disk = tmp_path / "mounted"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=False, capture_output=True).returncode
    ):
        pytest.skip("this user may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True, capture_output=True)


def test_empty_read_only_file_system(mounted: Path) -> None:
    """An empty folder on a read-only file system is refused at construction, and the message says what to do."""
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True, capture_output=True)
    with pytest.raises(AccessDenied, match=r"disk.*may write") as caught:
        DiskTier(mounted / "in")
    assert caught.value.source == str(mounted / "in")


def test_f029_filled_read_only_file_system(mounted: Path, source: DictSource) -> None:
    """F029: what lies on a read-only file system is served, two caches at once; a miss is a typed error."""
    with ModelCache(source, lambda path: path.name, disk=DiskTier(mounted / "in", min_free=0)) as cache:
        cache.prefetch(["a", "b"], tier="disk").wait(WAIT)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True, capture_output=True)
    tiers = [DiskTier(mounted / "in", budget=4096) for _ in range(2)]
    with (
        ModelCache(source, lambda path: path.name, disk=tiers[0], retry_after=0) as cache,
        ModelCache(source, lambda path: path.name, disk=tiers[1]) as other,
    ):
        assert [row.model for row in cache.models()] == ["a", "b"]
        assert cache.get("a") == other.get("a") == "artifact"
        with pytest.raises(AccessDenied, match=r"'c' is not in disk folder.*can only be read"):
            cache.get("c")
        with pytest.raises(AccessDenied, match="only be read"):
            cache.delete("b")
        cache.unload("a")
        assert cache.get("a") == "artifact"
        assert sorted(source.opens) == ["a", "b"]


def test_read_only_cache_learns_what_is_published_later(mounted: Path, tmp_path: Path, source: DictSource) -> None:
    """A cache that can only read its folder serves what another publishes after its start, and forgets the rest."""
    view = tmp_path / "view"
    view.mkdir()
    writer = ModelCache(source, lambda path: path.name, disk=DiskTier(mounted / "in", min_free=0))
    bring(writer, "a")
    subprocess.run(["mount", "--bind", mounted, view], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", view], check=True, capture_output=True)
        with ModelCache(source, lambda path: path.name, disk=DiskTier(view / "in"), retry_after=0) as reader:
            assert on_disk(reader) == ["a"]
            with pytest.raises(AccessDenied, match="only be read"):
                reader.get("b")
            with pytest.raises(AccessDenied, match="can't be deleted"):
                reader.delete("a")
            bring(writer, "b")
            assert reader.get("b") == "artifact"
            assert reader.unload("b")
            assert writer.delete("b")
            bring(writer, "c")
            assert on_disk(reader) == ["a", "c"]
            with pytest.raises(AccessDenied, match="only be read"):
                reader.get("b")
    finally:
        subprocess.run(["umount", view], check=True, capture_output=True)
        writer.close()


@needs_root
def test_full_file_system(tmp_path: Path) -> None:
    """A file system that is full gives NoRoom of the disk tier, and the fetch leaves nothing behind."""
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        source = DictSource().add("a").add_file("big", "big.bin", os.urandom(3 * 2**20))
        with ModelCache(source, lambda path: path, disk=DiskTier(disk / "in", min_free=0), retry_after=0) as cache:
            with pytest.raises(NoRoom, match="'big'") as caught:
                cache.get("big")
            assert caught.value.tier == "disk"
            assert cache.get("a").is_dir()
            assert cache.stats().disk_used == allocated(disk / "in")
        assert list((disk / "in" / "tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True, capture_output=True)


# Where it is


def test_relative_path_is_made_absolute_at_once(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path means the folder of that moment, whatever a later chdir does."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cache = make_cache(folder=Path("disk"))
    monkeypatch.chdir(tmp_path / "there")
    assert cache.get("a").path.is_relative_to(tmp_path / "here" / "disk")
    assert cache.disk.path == tmp_path / "here" / "disk"
    assert list((tmp_path / "there").iterdir()) == []


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that begins with ``~`` is in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tier = DiskTier("~/disk")
    assert tier.path == tmp_path / "disk"
    tier.store.close()


@pytest.mark.parametrize("given", [None, DiskTier])
def test_default_folder_is_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    """Without ``disk``, or without a path, the folder is in XDG_CACHE_HOME, one for each source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folders = []
    for url in ("dict://one", "dict://two", "dict://one"):
        source = DictSource().add("a")
        source.url = url
        with ModelCache(source, lambda path: path.name, disk=None if given is None else given(min_free=0)) as cache:
            cache.disk.min_free = 0
            cache.get("a")
            folders.append(cache.disk.path)
    assert folders[0] == folders[2] != folders[1]
    assert all(folder.is_relative_to(tmp_path / "xdg" / "modelcache") for folder in folders)
    assert mode(folders[0]) == 0o700


def test_default_folder_without_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without XDG_CACHE_HOME it is ``~/.cache``."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with ModelCache(DictSource(), lambda path: path) as cache:
        assert cache.disk.path.is_relative_to(tmp_path / ".cache" / "modelcache")


def test_path_with_odd_characters(make_cache: MakeCache, tmp_path: Path) -> None:
    """A folder whose name has spaces, percent signs and other alphabets works."""
    cache = make_cache(folder=tmp_path / "m\u00f6dels %20 {x} \u6a21\u578b")
    assert cache.get("a").model == "a"


def test_clock_that_was_wrong(make_cache: MakeCache, source: DictSource, tmp_path: Path) -> None:
    """An artifact whose time lies in the future is taken as used now, not for ever."""
    with make_cache(source) as first:
        bring(first, "a", "b")
        total = first.stats().disk_used
    for folder in (tmp_path / "disk" / "models").iterdir():
        if folder.name.startswith("a-"):
            later = time.time() + 10**7
            os.utime(folder / "record.json", (later, later))
    (tmp_path / "disk" / "ledger.sqlite3").unlink()
    cache = make_cache(source, disk={"budget": total})
    assert all(row.last_used < time.time() + 60 for row in cache.models())
