"""What processes have set aside on disk is known to all, whatever becomes of the ledger, or of them."""

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modelcache import ArtifactCorrupt
from modelcache.disk.book import Book
from modelcache.disk.layout import RECORD, Draft
from modelcache.disk.store import Store
from tests.support.children import KILLED, run
from tests.support.fakes import DictSource, tar
from tests.support.racing import Call, allocated, small_cache
from tests.support.waiting import Gate, eventually


def ledger_of(folder: Path) -> Path:
    """Return the file."""
    return folder / "disk" / "ledger.sqlite3"


def lose(ledger: Path) -> None:
    """Remove the file."""
    ledger.unlink()


def spoil(ledger: Path) -> None:
    """Make it no database."""
    ledger.write_bytes(b"nothing" * 10_000)


def test_publication_that_fails_counts_until_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be published is set aside until its files are gone, as others are told."""
    gate, discard = Gate(), Store.discard

    def late(store: Store, folder: Path) -> bool:
        gate()
        return discard(store, folder)

    def fails(store: Store, staged: Path, name: str) -> None:
        raise OSError(5, "Input/output error")

    with small_cache(tmp_path, DictSource().add("a", size=50_000)) as one, small_cache(tmp_path, DictSource()) as two:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "publish", fails)
            patch.setattr(Store, "discard", late)
            failing = Call(one.get, "a")
            gate.wait()
            two.disk.min_free = 4096  # a transaction
            assert two.stats().disk_used >= allocated(tmp_path / "disk") > 50_000
            gate.open()
            assert "Input/output error" in str(failing.error())
        two.disk.min_free = 8192
        assert two.stats().disk_used == one.stats().disk_used == 0


@pytest.mark.parametrize("harm", [lose, spoil])
def test_fetch_under_way_while_the_ledger_is_lost(tmp_path: Path, harm: Any) -> None:
    """A new ledger knows of it: its bytes count, and nobody fetches the same model a second time."""
    sources, gate = [DictSource().add("a", "b", size=200_000) for _ in range(2)], Gate()
    with small_cache(tmp_path, sources[0]) as one, small_cache(tmp_path, sources[1]) as two:
        sources[0].gate = gate
        fetching = Call(one.get, "a")
        gate.wait()
        reserved = one.stats().disk_used
        assert reserved > 0
        harm(ledger_of(tmp_path))
        waiting = Call(two.get, "a")
        eventually(lambda: two.stats().waiters == 1)
        eventually(lambda: two.stats().disk_used == reserved)
        assert not waiting.over
        assert sources[1].opens == []
        gate.open()
        assert {fetching.result().name, waiting.result().name} == {"a"}
        assert [*sources[0].opens, *sources[1].opens] == ["a"]
        for cache in (one, two):
            assert cache.get("b").name == "b"
            assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_removal_under_way_while_the_ledger_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new ledger knows of it: its bytes count until they are gone, and no longer."""
    gate, discard = Gate(), Store.discard

    def late(store: Store, folder: Path) -> bool:
        gate()
        return discard(store, folder)

    with small_cache(tmp_path, DictSource().add("a", "b", size=50_000)) as one:
        one.get("a")
        monkeypatch.setattr(Store, "discard", late)
        going = Call(one.delete, "a")
        gate.wait()
        lose(ledger_of(tmp_path))
        with small_cache(tmp_path, DictSource().add("a", "b")) as two:
            assert two.stats().disk_used == allocated(tmp_path / "disk") > 50_000
            one.disk.min_free = 4096  # transactions
            two.disk.min_free = 4096
            assert two.stats().disk_used == allocated(tmp_path / "disk") > 50_000
            gate.open()
            assert going.result()
            two.disk.min_free = 8192
            assert two.stats().disk_used == allocated(tmp_path / "disk") == 0


HALF = '{"draft": 2, "hold": %s, "source": "s", "model": "m", "reserved": %s}'


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"draft": 2}', HALF % ('"h"', '"x"'), HALF % ('["h"]', 1), HALF % ('"\\ud800"', 1)]
    + [HALF % ('"h"', number) for number in ("-1", "1.5", "true", "1e30", "9223372036854775808")],
)
def test_draft_that_says_nothing(tmp_path: Path, text: str) -> None:
    """Whatever lies in place of a draft is passed over."""
    assert Draft.from_json(HALF % ('"h"', 1)) == Draft("h", "s", "m", 1)
    assert Draft.from_json(text) is None
    folder = tmp_path / "disk" / "tmp" / "somebody" / "something"
    folder.mkdir(parents=True, mode=0o700)
    for parent in (folder.parents[2], folder.parents[1]):
        parent.chmod(0o700)
    (folder / RECORD).write_text(text)
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        assert cache.get("a").name == "a"
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_draft(tmp_path: Path) -> None:
    """What is staged says whose it is, and what was set aside for it."""
    source, gate, found = DictSource().add("a", size=50_000), Gate(), list[Draft | None]()
    with small_cache(tmp_path, source) as cache:
        source.gate = gate
        call = Call(cache.get, "a")
        gate.wait()
        (record,) = (tmp_path / "disk" / "tmp").glob(f"*/*/{RECORD}")
        found.append(Draft.from_json(record.read_text()))
        gate.open()
        call.result()
        (hold,) = [draft for draft in found if draft]
        assert (hold.source, hold.model) == (source.url, "a")
        assert hold.reserved > 0
        (record,) = (tmp_path / "disk" / "models").glob(f"*/{RECORD}")
        assert Draft.from_json(record.read_text()) is None
        assert json.loads(record.read_text())["model"] == "a"


DIES = """
from modelcache.disk.{module} import {name}
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
source = DictSource().add("a", size=50_000)
cache = small_cache(Path(sys.argv[1]), source)
{before}
setattr({name}, "{at}", die)
cache.get("a") if {loads} else cache.delete("a")
"""
"""A process that is killed just before a step, with or without its artifact published."""


@pytest.mark.parametrize(
    "step",
    [
        {"module": "store", "name": "Store", "at": "discard", "before": "cache.get('a')", "loads": False},
        {"module": "store", "name": "Store", "at": "publish", "before": "", "loads": True},
    ],
    ids=["while it removes", "while it publishes"],
)
def test_leftovers_that_can_not_be_deleted_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, Any]
) -> None:
    """What a killed process was removing or publishing counts until it can be deleted, by whoever looks then."""
    run(DIES.format(**step), tmp_path, code=KILLED)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # no descriptor left, say
        with small_cache(tmp_path, DictSource().add("b")) as cache:
            lying = allocated(tmp_path / "disk")
            assert lying > 50_000
            assert cache.stats().disk_used == lying
            patch.undo()
            cache.disk.budget = lying  # less than that and "b"
            assert cache.get("b").name == "b"
            assert cache.stats().disk_used == allocated(tmp_path / "disk") < 50_000


def test_debts_are_paid_once(tmp_path: Path) -> None:
    """What could not be told yet is told by the first transaction that can, though another one waits for it."""
    gate, paid = Gate(), list[str]()
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        agreed = cache._parts.shelf._agreed

        def pay(_: Book) -> None:
            paid.append("paid")
            gate()

        agreed._debts.append(pay)
        calls = [Call(agreed.change, agreed.learn) for _ in range(2)]
        gate.wait()
        gate.open()
        for call in calls:
            call.result()
        assert paid == ["paid"]


def test_debts_outlive_a_transaction_that_fails(tmp_path: Path) -> None:
    """They are paid by the next one, in their order."""
    paid = list[int]()
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        agreed = cache._parts.shelf._agreed
        for number in range(3):
            agreed._debts.append(lambda _, number=number: paid.append(number))

        def fails(_: Book) -> None:
            raise OSError(28, "full")

        with pytest.raises(OSError, match="full"):
            agreed.change(fails)
        agreed.change(agreed.learn)
        assert paid == [0, 1, 2, 0, 1, 2]
        agreed.change(agreed.learn)
        assert paid == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("length", [900, 2000], ids=["than its draft", "as its draft"])
def test_record_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """The record of a model with a long id from a long URL takes more than a block, which is charged before."""
    seal, seen = Store.seal, list[tuple[int, int]]()
    source = DictSource()
    source.url = "dict://" + "x" * length
    model = "é" * 500
    source.add(model)
    with small_cache(tmp_path, source) as cache:

        def look(store: Store, *arguments: Any) -> Any:
            sealed = seal(store, *arguments)
            seen.append((allocated(tmp_path / "disk"), cache.stats().disk_used))
            return sealed

        monkeypatch.setattr(Store, "seal", look)
        cache.get(model)
        ((taken, charged),) = seen
        assert taken <= charged
        (record,) = (tmp_path / "disk" / "models").glob(f"*/{RECORD}")
        assert record.stat().st_size > 4096
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_nothing_stays_of_a_folder_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full just as a folder is staged, no half of it stays."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with small_cache(tmp_path, DictSource().add("a"), retry_after=0) as cache:
        before = sorted((tmp_path / "disk" / "tmp").glob("*/*"))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", fails)
            with pytest.raises(MemoryError, match="the disk is full"):
                cache.get("a")
        assert sorted((tmp_path / "disk" / "tmp").glob("*/*")) == before
        assert cache.stats().disk_used == 0
        assert cache.get("a").name == "a"


def test_path_that_is_too_long_once_published(tmp_path: Path) -> None:
    """A file that the system could open only while it is staged is refused before it is published."""
    source, disk = DictSource(), tmp_path / "disk"
    published = len(os.fsencode(disk)) + len("/models/") + len("m-") + 32 + len(".01234567/artifact/")
    name = "/".join(["d" * 200] * 30)[: 4100 - published].rstrip("/")
    source.artifacts["m"] = tar({name: b"deep"})
    with small_cache(tmp_path, source) as cache, pytest.raises(Exception, match="can't store") as caught:
        cache.get("m")
    assert type(caught.value).__name__ == "UnsafeArtifact"
    with sqlite3.connect(ledger_of(tmp_path)) as ledger:
        assert ledger.execute("SELECT count(*) FROM artifacts WHERE state = 0").fetchone() == (0,)
    ledger.close()


def test_fetch_that_failed_and_can_not_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a fetch that failed counts, but nobody takes it for one under way, in a new ledger neither."""
    source = DictSource().add("a", size=50_000)
    source.artifacts["a"] = source.artifacts["a"][:-100]
    with small_cache(tmp_path, source) as one, small_cache(tmp_path, DictSource().add("a", "b")) as two:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # no descriptor left, say
            with pytest.raises(ArtifactCorrupt, match="cut off"):
                one.get("a")
            assert two.get("b").name == "b"
            lose(ledger_of(tmp_path))
            assert two.get("a", timeout=5).name == "a"
            assert two.stats().disk_used >= allocated(tmp_path / "disk")
        one.prefetch(["b"], tier="disk").wait(5)
        one.delete("b")


@pytest.mark.parametrize("verb", ["replace", "delete"])
def test_what_is_being_removed_counts_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Whoever replaces or deletes what another process is just removing leaves its bytes to that one."""
    gate, discard = Gate(), Store.discard
    source = DictSource().add("a", size=50_000)
    one, two, three = (small_cache(tmp_path, source) for _ in range(3))
    with one, two, three:

        def late(store: Store, folder: Path) -> bool:
            if store is one.disk.store:
                gate()
            return discard(store, folder)

        one.prefetch(["a"], tier="disk").wait(10)
        monkeypatch.setattr(Store, "discard", late)
        removing = Call(one.delete, "a")
        gate.wait()
        if verb == "replace":
            assert two.get("a").name == "a"
        else:
            assert not two.delete("a")
        three.disk.budget = 4096  # what is doomed and nobody's goes first
        assert three.stats().disk_used == one.stats().disk_used == allocated(tmp_path / "disk") > 50_000
        gate.open()
        assert removing.result() == (verb == "delete")
        three.disk.budget = None  # a transaction, with which it learns of that
        assert three.stats().disk_used == one.stats().disk_used == allocated(tmp_path / "disk")
