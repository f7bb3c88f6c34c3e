"""Whatever comes between two steps, what lies on disk is counted, and what is counted lies there."""

import contextlib
import functools
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcache import ModelCache
from modelcache.disk.book import Book
from modelcache.disk.layout import RECORD
from modelcache.disk.ledger import patience
from modelcache.disk.states import State
from modelcache.disk.store import Store
from modelcache.disk.sweeping import sweep
from tests.support.fakes import DictSource, tar
from tests.support.racing import Call, allocated, small_cache
from tests.support.waiting import Gate, eventually

SIZE = 40_000


def counted(folder: Path) -> int:
    """Return the bytes that the ledger counts."""
    with contextlib.closing(sqlite3.connect(folder / "disk" / "ledger.sqlite3")) as connection:
        query = """
            SELECT (SELECT ifnull(sum(bytes), 0) FROM artifacts WHERE state != 4)
                + (SELECT ifnull(sum(reserved), 0) FROM holds)
        """
        (found,) = connection.execute(query).fetchone()
        return int(found)


def press(cache: ModelCache[Any]) -> None:
    """Have a cache remove all that it may."""
    cache.disk.budget = 4096


def lose_ledger(folder: Path, cache: ModelCache[Any]) -> None:
    """Remove the ledger, and have a cache make it anew."""
    (folder / "disk" / "ledger.sqlite3").unlink()
    cache.disk.min_free = 4096  # a transaction


def gated(monkeypatch: pytest.MonkeyPatch, cache: ModelCache[Any], step: str) -> Gate:
    """Return where a cache stands still before a step of its store."""
    gate, real = Gate(), getattr(cache.disk.store, step)

    def late(*arguments: Any) -> Any:
        gate()
        return real(*arguments)

    monkeypatch.setattr(cache.disk.store, step, late)
    return gate


def damaged(folder: Path) -> DictSource:
    """Leave a model whose record says nothing, and no ledger; return its source."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(folder, source) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
    (record,) = (folder / "disk" / "models").glob(f"*/{RECORD}")
    record.write_text("{}")
    (folder / "disk" / "ledger.sqlite3").unlink()
    return source


def failing_once(monkeypatch: pytest.MonkeyPatch, cache: ModelCache[Any], error: BaseException, at: int = 1) -> None:
    """Have a transaction of a cache, the ``at``-th from now on, fail before it begins."""
    ledger, calls = cache.disk.store.ledger, list[int]()
    real = ledger.change

    def change(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*arguments)

    monkeypatch.setattr(ledger, "change", change)


def test_what_is_read_in_a_transaction_that_fails_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be told is told in a transaction that then finds another process at the same model."""
    mine, theirs = DictSource().add("x", "a", "c", size=SIZE), DictSource().add("x", "a", size=SIZE)
    with small_cache(tmp_path, mine, retry_after=0) as one, small_cache(tmp_path, theirs) as two:
        one.prefetch(["x"], tier="disk").wait(10)
        theirs.gate = gate = Gate()
        theirs_comes = Call(two.get, "a")
        gate.wait()
        with monkeypatch.context() as patch:
            failing_once(patch, one, OSError(24, "Too many open files"), at=2)
            one.delete("x")
        comes = Call(one.get, "a", timeout=15)
        eventually(lambda: one.stats().waiters == 1 and one._parts.shelf._agreed.fetched_elsewhere("a"))
        publishing = gated(monkeypatch, two, "publish")
        gate.open()
        publishing.wait()  # its change has the number that the one that failed would have had
        one.prefetch(["c"], tier="disk").wait(10)
        assert one.stats().disk_used == counted(tmp_path) >= allocated(tmp_path / "disk")
        publishing.open()
        assert theirs_comes.result().name == comes.result().name == "a"
        assert one.stats().disk_used == counted(tmp_path) == allocated(tmp_path / "disk")


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_twice_while_a_model_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The second one comes while it is to be told what became of the first: that is told later."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        one.prefetch(["a"], tier="disk").wait(10)

        def interrupted(path: Path, **_: Any) -> None:
            failing_once(patch, one, KeyboardInterrupt())
            if times == 2:
                failing_once(patch, one, KeyboardInterrupt(), at=2)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.delete("a")
        press(two)
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE

        def gone() -> bool:
            press(one)
            return counted(tmp_path) == 0

        eventually(gone)
        assert allocated(tmp_path / "disk") == 0


def test_ctrl_c_while_leftovers_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be deleted at first, and then was, counts no more."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as one:
        one.prefetch(["a"], tier="disk").wait(10)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            one.delete("a")
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE
        with monkeypatch.context() as patch:
            failing_once(patch, one, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                press(one)
        press(one)
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


def test_budget_assigned_while_a_reservation_waits_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reservation goes by the budget of the moment at which it is made."""
    source = DictSource().add_file("a", "a.bin", bytes(SIZE)).add_file("b", "b.bin", bytes(SIZE))
    with small_cache(tmp_path, source, Path, retry_after=0, disk={"budget": 10 * SIZE}) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        gate, room = Gate(), cache._parts.disk_room
        decide = room._decide

        def late(staging: Any, *arguments: Any, **settings: Any) -> Any:
            if staging is not None:
                gate()
            return decide(staging, *arguments, **settings)

        monkeypatch.setattr(room, "_decide", late)
        sealing = gated(monkeypatch, cache, "seal")
        fetching = Call(cache.get, "b")
        gate.wait()
        cache.disk.budget = 2 * SIZE
        assert allocated(tmp_path / "disk") > SIZE
        gate.open()
        sealing.wait()
        assert counted(tmp_path) <= 2 * SIZE
        sealing.open()
        assert fetching.result().name == "b.bin"


def test_workshop_is_removed_in_the_middle_of_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That there is nowhere to move a folder to does not mean that the folder is gone."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as one:
        one.prefetch(["a"], tier="disk").wait(10)
        gate = gated(monkeypatch, one, "remove")
        removing = Call(one.delete, "a")
        gate.wait()
        shutil.rmtree(tmp_path / "disk" / "tmp")
        gate.open()
        assert not removing.result()
        assert counted(tmp_path) == allocated(tmp_path / "disk") > SIZE


def read(cache: ModelCache[Any]) -> None:
    """Ask for the model."""
    assert cache.get("a").name == "a"


@pytest.mark.parametrize("verb", [press, read])
def test_ledger_is_lost_before_a_folder_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Callable[[ModelCache[Any]], None]
) -> None:
    """What somebody has moved aside counts, though the new ledger did not know that it would be."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        one.prefetch(["a"], tier="disk").wait(10)
        moving, deleting = gated(monkeypatch, one, "remove"), gated(monkeypatch, one, "discard")
        removing = Call(one.delete, "a")
        moving.wait()
        lose_ledger(tmp_path, two)
        moving.open()
        deleting.wait()
        verb(two)
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE
        deleting.open()
        removing.error()
        assert counted(tmp_path) == allocated(tmp_path / "disk")
        two.unload("a")
        press(two)
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


def test_ledger_is_made_anew_in_the_middle_of_a_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from tmp/ to models/ after the one was looked at, and before the other is, counts."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        before, after, publish = Gate(), Gate(), one.disk.store.publish

        def slowly(*arguments: Any) -> None:
            before()
            publish(*arguments)
            after()

        monkeypatch.setattr(one.disk.store, "publish", slowly)
        fetching = Call(one.get, "a")
        before.wait()
        under_way = two.disk.store.workshop.under_way

        def between() -> Any:
            before.open()
            after.wait()
            return under_way()

        monkeypatch.setattr(two.disk.store.workshop, "under_way", between)
        lose_ledger(tmp_path, two)
        press(two)
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE
        after.open()
        fetching.error()
        assert counted(tmp_path) == allocated(tmp_path / "disk")


def test_ledger_is_lost_before_a_folder_says_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set aside for a fetch is told anew once its folder is there, which the new ledger did not find."""
    source = DictSource().add_file("a", "a.bin", bytes(SIZE))  # all of it is set aside at once
    with small_cache(tmp_path, source, Path) as one, small_cache(tmp_path, DictSource()) as two:
        staging, sealing = gated(monkeypatch, one, "stage"), gated(monkeypatch, one, "seal")
        fetching = Call(one.get, "a")
        staging.wait()
        lose_ledger(tmp_path, two)
        staging.open()
        sealing.wait()
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE
        sealing.open()
        assert fetching.result().name == "a.bin"
        assert counted(tmp_path) == allocated(tmp_path / "disk")


def test_nothing_stays_where_it_can_not_be_told_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that can't look at the ledger once its folder is there leaves neither the folder nor its bytes."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE), retry_after=0) as cache:

        def fails() -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(cache._parts.shelf._agreed, "confirm", fails)
            assert "Input/output error" in str(Call(cache.get, "a").error())
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0
        read(cache)


def test_ledger_is_lost_while_a_change_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that was written into a file that nobody will see is written again."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, DictSource()) as two:
        one.stats()
        room, lost = one._parts.disk_room, list[int]()
        hold = one._parts.disk_room._agreed.hold

        def losing(*arguments: Any) -> None:
            hold(*arguments)
            if not lost:
                lost.append(1)
                (tmp_path / "disk" / "ledger.sqlite3").unlink()

        monkeypatch.setattr(room._agreed, "hold", losing)
        staging = gated(monkeypatch, one, "stage")
        fetching = Call(one.get, "a")
        staging.wait()
        two.disk.min_free = 4096
        assert counted(tmp_path) > 0
        staging.open()
        assert fetching.result().name == "a"


def test_what_a_start_clears_away_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders whose record is damaged, or of an older format, count until they are deleted."""
    source = damaged(tmp_path)
    gate, discard = Gate(), Store.discard

    def late(store: Store, folder: Path) -> bool:
        gate()
        return discard(store, folder)

    monkeypatch.setattr(Store, "discard", late)
    starting = Call(small_cache, tmp_path, source)
    gate.wait()
    with small_cache(tmp_path, source) as two:
        assert counted(tmp_path) == two.stats().disk_used == allocated(tmp_path / "disk") > SIZE
        gate.open()
        with starting.result():
            two.disk.min_free = 4096
            assert counted(tmp_path) == two.stats().disk_used == allocated(tmp_path / "disk") == 0


def test_version_replaced_while_it_is_evicted_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old version whose eviction finds it read elsewhere goes with that reader, as a new one has come meanwhile."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        read(one)
        one.unload("a")
        gate = gated(monkeypatch, one, "remove")
        with two.lease("a"):
            evicting = Call(press, one)
            gate.wait()
            source.artifacts["a"] = tar({"model.txt": b"a".ljust(SIZE, b"\1")})
            one.disk._budget = None
            one.prefetch(["a"], tier="disk").wait(10)
            gate.open()
            evicting.result()
        two.unload("a")
        assert [row.model for row in two.models()] == ["a"]
        assert len(list((tmp_path / "disk" / "models").iterdir())) == 1
        assert counted(tmp_path) == allocated(tmp_path / "disk")


def test_folder_that_comes_and_goes_during_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start has found, and somebody has removed since, is not taken in."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one:
        listing, reading, listed, found = Gate(), Gate(), Store.listed, Store.read

        def late(store: Store) -> Any:
            if store is not one.disk.store:
                listing()
            return listed(store)

        def slow(store: Store, name: str) -> Any:
            result = found(store, name)
            if store is not one.disk.store:
                reading()
            return result

        monkeypatch.setattr(Store, "listed", late)
        monkeypatch.setattr(Store, "read", slow)
        starting = Call(small_cache, tmp_path, source)
        listing.wait()
        one.prefetch(["a"], tier="disk").wait(10)
        listing.open()
        reading.wait()
        assert one.delete("a")
        reading.open()
        with starting.result():
            assert counted(tmp_path) == 0


def test_publication_that_can_not_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses to move the folder back, it counts until it is removed."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE), retry_after=0) as cache:

        def fails(path: Path) -> None:
            if path.name == "models":
                raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr("modelcache.disk.store.sync", fails)
            patch.setattr(Store, "withdraw", lambda *_: None)
            assert "Input/output error" in str(Call(cache.get, "a").error())
        cache.disk.min_free = 4096
        assert counted(tmp_path) == cache.stats().disk_used == allocated(tmp_path / "disk") > SIZE
        press(cache)
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


def test_busy_ledger_is_no_reason_to_read_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process is in the middle of a change, what is known stays known: else that would never end."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        whole, changes = list[bool](), Book.changes

        def noting(book: Book, *arguments: Any) -> Any:
            found = changes(book, *arguments)
            whole.append(found[2])
            return found

        monkeypatch.setattr(Book, "changes", noting)
        connection = sqlite3.connect(tmp_path / "disk" / "ledger.sqlite3", isolation_level=None)
        with contextlib.closing(connection):
            connection.execute("BEGIN IMMEDIATE")
            tried, check = Gate(), patience(10)

            def waiting() -> None:
                tried()
                check()

            change = cache._parts.shelf._agreed.change
            changing = Call(change, cache._parts.shelf._agreed.learn, waiting)
            tried.wait()
            connection.execute("ROLLBACK")
            tried.open()
            changing.result()
        assert whole
        assert not any(whole)


@pytest.mark.parametrize("moment", ["before it is moved", "once it was found to be read"])
def test_temporary_folders_are_removed_in_the_middle_of_an_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What was to go, and stays, is nobody's again, though this process has another name by then."""
    source = DictSource().add("a", "b", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        one.prefetch(["a"], tier="disk").wait(10)
        store, read_there = one.disk.store, moment != "before it is moved"
        lease = two.lease("a")
        if read_there:
            lease.acquire()
        remove = store.remove

        def removing(*arguments: Any) -> Any:
            monkeypatch.setattr(store, "remove", remove)
            if not read_there:
                shutil.rmtree(tmp_path / "disk" / "tmp")
            found = remove(*arguments)
            shutil.rmtree(tmp_path / "disk" / "tmp")
            return found

        monkeypatch.setattr(store, "remove", removing)
        press(one)
        assert [row.model for row in one.models()] == ["a"]
        assert counted(tmp_path) == allocated(tmp_path / "disk") > SIZE
        if read_there:
            lease.release()
            two.unload("a")
        assert two.delete("a")
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


class Forking(sqlite3.Connection):
    """A connection after whose next change the process forks, as a signal handler may."""

    armed = writes = False

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        """Run a statement."""
        found = super().execute(sql, *arguments)
        if sql.startswith("BEGIN"):
            self.writes = sql != "BEGIN"
        if sql == "COMMIT" and self.writes and Forking.armed:
            Forking.armed = False
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        return found


def test_handler_forks_just_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that is in the ledger is not made again, though the file was closed and opened for the fork."""
    monkeypatch.setattr("modelcache.disk.ledger.sqlite3.connect", functools.partial(sqlite3.connect, factory=Forking))
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        Forking.armed = True
        assert cache.delete("a")
        assert not Forking.armed
        assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


def test_two_starts_clear_one_folder_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one, which finds it gone, leaves what the first one still deletes to that one."""
    source = damaged(tmp_path)
    reading, deleting, late = Gate(), Gate(), list[Store]()
    taken, discard = Store.taken, Store.discard

    def slowly(store: Store, name: str) -> int:
        size = taken(store, name)
        late.append(store)
        if late[0] is store:
            reading()
        return size

    def slower(store: Store, folder: Path) -> bool:
        deleting()
        return discard(store, folder)

    monkeypatch.setattr(Store, "taken", slowly)
    monkeypatch.setattr(Store, "discard", slower)
    second = Call(small_cache, tmp_path, source)
    reading.wait()
    first = Call(small_cache, tmp_path, source)
    deleting.wait()
    reading.open()
    with second.result():
        assert counted(tmp_path) == allocated(tmp_path / "disk") > SIZE
        deleting.open()
        with first.result():
            assert counted(tmp_path) == allocated(tmp_path / "disk") == 0


def test_late_publication_removes_no_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who tells of what it has published only after another process has replaced that, leaves the newer one alone."""
    source = DictSource().add("a", size=SIZE)
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, source) as two:
        gate, publish = Gate(), one.disk.store.publish

        def slowly(*arguments: Any) -> None:
            publish(*arguments)
            gate()

        monkeypatch.setattr(one.disk.store, "publish", slowly)
        handle = one.prefetch(["a"], tier="disk")
        gate.wait()
        lose_ledger(tmp_path, two)
        source.artifacts["a"] = tar({"model.txt": b"a".ljust(SIZE, b"\1")})
        assert two.refresh("a")
        gate.open()
        handle.wait(10)
        assert [row.model for row in one.models()] == ["a"]
        assert not two.refresh("a")


def test_own_thread_is_known_to_move_a_folder_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread of this process has moved aside counts, though the new ledger does not know of it."""
    with small_cache(tmp_path, DictSource().add("a", size=SIZE)) as one:
        one.prefetch(["a"], tier="disk").wait(10)
        moving, deleting = gated(monkeypatch, one, "remove"), gated(monkeypatch, one, "discard")
        removing = Call(one.delete, "a")
        moving.wait()
        lose_ledger(tmp_path, one)
        moving.open()
        deleting.wait()
        read(one)
        assert counted(tmp_path) >= allocated(tmp_path / "disk") > SIZE
        deleting.open()
        removing.error()
        assert counted(tmp_path) == allocated(tmp_path / "disk") > SIZE


def test_what_a_process_was_removing_when_it_died_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the room finds out also where the other one dies only after it was looked for."""
    source = DictSource().add("a", "b", size=SIZE)
    with small_cache(tmp_path, source, disk={"budget": 2 * SIZE}) as cache:
        cache.prefetch(["a"], tier="disk").wait(10)
        sweeps = list[int]()

        def dying(store: Store) -> None:
            sweep(store)
            sweeps.append(1)
            if len(sweeps) == 1:
                store.ledger.change(lambda book: book.mark(book.names(), State.LEAVING, "0123456789abcdef"))

        monkeypatch.setattr("modelcache.disk.reserving.sweep", dying)
        assert cache.get("b", timeout=20).name == "b"
        assert counted(tmp_path) == allocated(tmp_path / "disk")
