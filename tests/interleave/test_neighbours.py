"""What one process does with a shared folder, as another one sees it: prefetches, refreshes, requests and policies."""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier, Loaded, ModelCache, NoRoom
from modelcache.policies import Resident
from tests.support.fakes import DictSource, tar
from tests.support.racing import Call, Model, allocated, load_model, small_cache
from tests.support.waiting import Gate, eventually

SIZE = 40_000


def test_bytes_that_another_process_brings_need_not_come(tmp_path: Path) -> None:
    """A prefetch of what another process is just fetching is over when that one has it, with no byte left to come."""
    theirs = DictSource().add("a", size=SIZE)
    theirs.gate = gate = Gate()
    with small_cache(tmp_path, theirs) as one, small_cache(tmp_path, DictSource().add("a", size=SIZE)) as two:
        fetching = Call(one.get, "a")
        gate.wait()
        handle = two.prefetch(["a"], tier="disk")
        assert eventually(lambda: handle.progress.bytes_total)
        gate.open()
        assert handle.wait(10)
        progress = handle.progress
        assert (progress.bytes, progress.bytes_total, progress.left) == (0, 0, 0)
        assert fetching.result().name == "a"


def test_what_others_have_done_is_known_to_all_verbs(tmp_path: Path) -> None:
    """A model that another process has removed is prefetched, one that it has brought is refreshed, and explained."""
    source = DictSource().add("a", "b", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        one.prefetch(["a"], tier="disk").wait(10)
        assert [row.model for row in two.models()] == ["a"]
        assert one.delete("a")
        assert two.prefetch(["a"], tier="disk").wait(10)
        assert [row.model for row in one.models()] == ["a"]
        assert one.delete("a")
        assert "neither in memory nor on disk" in two.explain("a")
        one.prefetch(["b"], tier="disk").wait(10)
        source.artifacts["b"] = tar({"model.txt": b"b".ljust(SIZE, b"\1")})
        assert two.refresh("b")


def test_artifact_that_is_about_to_be_let_go_of_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetch of more than fits fails for no model since another one, just fetched, is still held for a moment."""
    source = DictSource().add("a", "b", size=SIZE)
    with small_cache(tmp_path, source, loaders=4, disk={"budget": 3 * SIZE // 2 + 16_384}) as cache:
        gate, release = Gate(), cache._parts.shelf.release

        def late(held: Any) -> None:
            gate()
            release(held)

        monkeypatch.setattr(cache._parts.shelf, "release", late)
        first = cache.prefetch(["a"], tier="disk")
        gate.wait()
        second = cache.prefetch(["b"], tier="disk")
        flights = cache._parts.flights
        assert eventually(lambda: flights.active["b"].refusal)
        gate.open()
        assert second.wait(10)
        assert not second.errors
        assert first.wait(10)
        assert [row.model for row in cache.models()] == ["b"]


def test_request_goes_before_prefetches_of_another_process(tmp_path: Path) -> None:
    """One that lacks room gets it, though another process has very many models to bring in where only one fits."""
    names = [f"m{number}" for number in range(400)]
    mine, theirs = DictSource().add("a", size=SIZE), DictSource().add(*names, size=SIZE)
    budget = {"budget": 3 * SIZE // 2 + 16_384}
    with small_cache(tmp_path, theirs, disk=budget) as one, small_cache(tmp_path, mine, disk=budget) as two:
        handle = one.prefetch(names, tier="disk")
        eventually(lambda: theirs.opens)
        assert two.get("a", timeout=20).name == "a"
        assert "queued" in handle.states.values()
        handle.cancel()
        handle.wait(10)
        assert two.stats().disk_used == allocated(tmp_path / "disk") <= budget["budget"]


class Listening:
    """A policy that notes what it is told of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def requested(self, model: str, clock: int) -> None:
        """Note a request."""
        self.heard.append(model)

    def admitted(self, resident: Resident) -> None:
        """Do nothing."""

    def removed(self, model: str) -> None:
        """Do nothing."""

    def victims(self, need: int, allowed: Collection[str] | Mapping[str, object]) -> Iterator[str]:
        """Return all that may go."""
        return iter(list(allowed))


def test_policy_hears_of_lookups_in_other_processes_only(tmp_path: Path) -> None:
    """A look for a new version, or a prefetch, by another process is no use of an artifact."""
    source, policy = DictSource().add("a", "b", size=SIZE), Listening()

    def hear(cache: ModelCache[Any]) -> list[str]:
        other.disk.min_free += 4096  # a transaction, which tells of all uses
        cache.models()
        heard, policy.heard = policy.heard, []
        return heard

    with small_cache(tmp_path, source) as other:
        other.prefetch(["a", "b"], tier="disk").wait(10)
        tier = DiskTier(tmp_path / "disk", min_free=0, policy=policy)
        with ModelCache(source, lambda path: path.name, disk=tier) as cache:
            hear(cache)
            assert not other.refresh("a")
            other.prefetch(["b"]).wait(10)
            assert hear(cache) == []
            assert other.get("a").name == "a"
            assert hear(cache) == ["a"]


def lacking(cache: ModelCache[Any], model: str) -> bool:
    """Whether a model waits for room."""
    flight = cache._parts.flights.active.get(model)
    return flight is not None and flight.state == "waiting for room"


def asks(folder: Path) -> bool:
    """Whether a request in some process lacks room, as all are told."""
    with contextlib.closing(sqlite3.connect(folder / "disk" / "ledger.sqlite3")) as connection:
        (found,) = connection.execute("SELECT count(*) FROM holds WHERE asked > 0").fetchone()
        return bool(found)


def test_prefetch_that_stands_behind_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Behind a request of another process it is no fetch under way for whoever asks for its model, and no rival."""
    theirs = DictSource().add("first", "small", size=4000)
    mine = DictSource().add("a", "b", size=SIZE).add("small", size=4000)
    theirs.gate = gate = Gate()
    budget = {"budget": 106_000}  # for one large model, and what is small
    with small_cache(tmp_path, theirs, disk=budget) as one, small_cache(tmp_path, mine, disk=budget) as two:
        with two.lease("a"):
            first = one.prefetch(["first"], tier="disk")  # so that there is somebody to be told
            gate.wait()
            waiting = Call(two.get, "b", timeout=30)
            eventually(lambda: asks(tmp_path))
            behind = one.prefetch(["small"], tier="disk")
            eventually(lambda: lacking(one, "small"))
            gate.open()
            assert first.wait(10)
            assert two.get("small", timeout=5).name == "small"
            assert not waiting.over
        assert waiting.result(20).name == "b"
        assert behind.wait(10)
        assert not behind.errors
        assert mine.opens.count("b") == 1


def test_request_that_can_never_fit_does_not_wait_for_prefetches(tmp_path: Path) -> None:
    """One that only its own lease keeps from room is refused, though another process has more to bring in."""
    theirs, mine = DictSource().add("c", "d", size=4000), DictSource().add("a", "b", size=SIZE)
    theirs.gate = gate = Gate()
    budget = {"budget": 106_000}
    with small_cache(tmp_path, theirs, loaders=2, disk=budget) as one, small_cache(tmp_path, mine, disk=budget) as two:

        def beside_its_own() -> None:
            with two.lease("a"):
                two.get("b", timeout=30)

        prefetch = one.prefetch(["c", "d"], tier="disk")
        gate.wait()
        asking = Call(beside_its_own)
        eventually(lambda: asks(tmp_path))
        gate.open()
        assert isinstance(asking.error(15), NoRoom)
        assert prefetch.wait(10)
        assert not prefetch.errors


def test_request_of_a_callback_is_refused_at_once(tmp_path: Path) -> None:
    """One that waits, in a callback, for what the very load that calls it has in hand, can only be refused."""
    with small_cache(tmp_path, DictSource().add("a", "b", size=SIZE), disk={"budget": 76_000}) as cache:
        refused: list[NoRoom] = []

        def both(event: Loaded) -> None:
            if event.model == "a":
                with cache.lease("a"), pytest.raises(NoRoom) as caught:
                    cache.get("b", timeout=5)
                refused.append(caught.value)

        cache.on(Loaded, both)
        assert cache.prefetch(["a"]).wait(10)
        assert refused


def test_files_that_a_load_lets_go_of_are_waited_for(tmp_path: Path) -> None:
    """A load that keeps no files still has them while its callbacks run: they are about to be free."""
    source = DictSource().add("a", "b", size=SIZE).add("c", size=4000)

    def load(path: Path) -> Model:
        model = load_model(path)
        if model.name == "c":
            with cache.lease("a"):
                assert cache.get("b", timeout=20).name == "b"
        return model

    disk = {"budget": 106_000, "keep_files": False}
    with small_cache(tmp_path, source, load, disk=disk, loaders=4) as cache, Gate() as gate:
        cache.on(Loaded, lambda event: gate() if event.model == "a" else None)
        prefetch = cache.prefetch(["a"])
        gate.wait()
        loading = Call(cache.get, "c", timeout=20)
        eventually(lambda: lacking(cache, "b"))
        gate.open()
        assert loading.result(20).name == "c"
        assert prefetch.wait(10)


def test_version_from_the_future_that_is_on_its_way_out_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was fetched while the clock was wrong, and deleted while somebody reads it, is fetched once more."""
    source, right = DictSource().add("a", size=SIZE), time.time
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: right() + 3600)
            one.prefetch(["a"], tier="disk").wait(10)
        with two.lease("a"):
            assert not one.delete("a")
            for _ in range(2):
                assert one.prefetch(["a"], tier="disk").wait(10)
                assert [row.model for row in one.models()] == ["a"]
        assert source.opens == ["a", "a"]


def test_child_waits_for_no_flight_of_its_parent(tmp_path: Path) -> None:
    """What a thread of the parent is about to let go of is nothing that a child could wait for."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as cache:
        gate = Gate()
        cache.on(Loaded, gate)
        prefetch = cache.prefetch(["a"])
        gate.wait()
        child = os.fork()
        if not child:
            os._exit(len(cache._parts.flights.parting))
        _, status = os.waitpid(child, 0)
        gate.open()
        assert prefetch.wait(10)
        assert status == 0


def test_prefetch_returns_while_the_ledger_can_not_be_opened(tmp_path: Path) -> None:
    """Where a process has stopped while it opens the ledger, no verb waits for it for ever."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as cache:
        cache.get("a")
        with (tmp_path / "disk" / "ledger.sqlite3.lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cache.disk.store.ledger.close()
            prefetch = Call(cache.prefetch, ["a"]).result(8)
            assert "in memory" in Call(cache.explain, "a").result(8)
        assert prefetch.wait(10)


def test_link_in_place_of_a_model_is_not_taken_in(tmp_path: Path) -> None:
    """A ledger that is made anew counts no bytes that lie somewhere else."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        (folder,) = (tmp_path / "disk" / "models").iterdir()
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "disk" / "ledger.sqlite3").unlink()
        assert cache.stats().disk_used == 0
        assert cache.models() == []
        assert cache.get("a").name == "a"
