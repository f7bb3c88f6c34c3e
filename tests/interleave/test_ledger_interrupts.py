"""Ctrl-C at the two calls of the ledger where it counts: just after a transaction has begun, and just after its end."""

import functools
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import ModelCache
from tests.support.fakes import DictSource
from tests.support.racing import Call, allocated, small_cache
from tests.support.waiting import Gate, eventually


class Interrupting(sqlite3.Connection):
    """A connection of which a statement, once it is done, is followed by a real SIGINT: once, on the main thread."""

    after = ""
    writes = False

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        """Run a statement."""
        found = super().execute(sql, *arguments)
        if sql.startswith("BEGIN"):
            self.writes = sql == "BEGIN IMMEDIATE"
        due = Interrupting.after and sql.startswith(Interrupting.after) and self.writes
        if due and threading.current_thread() is threading.main_thread():
            Interrupting.after = ""
            signal.raise_signal(signal.SIGINT)
        return found


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Give a function that has the next statement of a writing transaction interrupted."""
    monkeypatch.setattr(
        "modelcache.disk.ledger.sqlite3.connect", functools.partial(sqlite3.connect, factory=Interrupting)
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(setattr, Interrupting, "after")
    signal.signal(signal.SIGINT, before)
    assert not Interrupting.after, "nothing was interrupted"


def delete(cache: ModelCache[Any]) -> None:
    """Remove a model from disk."""
    cache.delete("a")


def shrink(cache: ModelCache[Any]) -> None:
    """Have everything removed from disk."""
    cache.disk.budget = 4096


@pytest.mark.parametrize("verb", [delete, shrink])
def test_ctrl_c_as_a_transaction_begins(
    tmp_path: Path, interrupt_after: Callable[[str], None], verb: Callable[[ModelCache[Any]], None]
) -> None:
    """It ends the transaction, keeps nobody else waiting, and is no reason to make the ledger of all processes anew."""
    one_source, two_source, gate = DictSource().add("a", "b"), DictSource().add("a", "b"), Gate()
    with small_cache(tmp_path, one_source) as one, small_cache(tmp_path, two_source) as two:
        one.prefetch(["a"], tier="disk").wait(10)
        two_source.gate = gate
        fetching = Call(two.get, "b")
        gate.wait()
        ledger = tmp_path / "disk" / "ledger.sqlite3"
        before, reserved = ledger.stat().st_ino, two.stats().disk_used
        interrupt_after("BEGIN IMMEDIATE")
        with pytest.raises(KeyboardInterrupt):
            verb(one)
        two.disk.min_free = 4096  # a transaction, which would wait for one that is still open
        one.disk.budget = None
        waiting = Call(one.get, "b")
        eventually(lambda: one.stats().waiters == 1)
        assert ledger.stat().st_ino == before
        assert two.stats().disk_used == one.stats().disk_used == reserved
        gate.open()
        assert {fetching.result().name, waiting.result().name} == {"b"}
        assert [*one_source.opens, *two_source.opens] == ["a", "b"]


@pytest.mark.parametrize("verb", [delete, shrink])
def test_ctrl_c_as_a_transaction_ends(
    tmp_path: Path, interrupt_after: Callable[[str], None], verb: Callable[[ModelCache[Any]], None]
) -> None:
    """What was marked as leaving just then keeps no other process waiting for its room."""
    source = DictSource().add("a", "b", size=40_000)
    with small_cache(tmp_path, source) as one:
        one.prefetch(["a"], tier="disk").wait(10)
        interrupt_after("COMMIT")
        with pytest.raises(KeyboardInterrupt):
            verb(one)
        budget = allocated(tmp_path / "disk") * 3 // 2
        with small_cache(tmp_path, source, disk={"budget": budget}) as two:
            assert two.get("b", timeout=5).name == "b"
            assert two.stats().disk_used == allocated(tmp_path / "disk") <= budget
        one.stats()  # by which it learns what the other has done
        assert not one._parts.shelf.index.moving()
        assert one.delete("a")
        assert one.stats().disk_used == allocated(tmp_path / "disk")
