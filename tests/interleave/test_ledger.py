"""The ledger that processes share, at its seams: locks, forks, signals, rollbacks, full disks, stopped processes."""

import contextlib
import logging
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier
from modelcache.disk.book import Book
from modelcache.disk.publishing import Publisher
from modelcache.disk.removing import Remover
from tests.support.children import run, start
from tests.support.fakes import DictSource
from tests.support.racing import Call, allocated, small_cache
from tests.support.waiting import eventually
from tests.support.warm import Warm


def ledger_of(folder: Path) -> Path:
    """Return the file."""
    return folder / "disk" / "ledger.sqlite3"


def models_in(ledger: Path) -> list[str]:
    """Return the models that a ledger says are served, as another process sees it."""
    script = """
    import sqlite3
    rows = sqlite3.connect(sys.argv[1]).execute("SELECT model FROM artifacts WHERE state = 0 ORDER BY model")
    print(*[model for model, in rows])
    """
    return run(script, ledger).split()


def test_second_cache_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """A second cache of this process on the folder drops no lock: the end of another process takes no log away."""
    other = "with small_cache(Path(sys.argv[1]), DictSource().add('c')) as cache: cache.get('c')\nprint()"
    with small_cache(tmp_path, DictSource().add("a", "b")) as cache:
        cache.get("a")
        DiskTier(tmp_path / "disk")
        run(other, tmp_path)
        cache.get("b")
        assert models_in(ledger_of(tmp_path)) == ["a", "b", "c"]


def test_only_the_main_file_is_lost(tmp_path: Path) -> None:
    """Where only the main file is removed, its log stays out of the new one, though a process has it open."""
    with small_cache(tmp_path, DictSource().add("a", "b", "c", "d")) as one:
        with small_cache(tmp_path, DictSource().add("a", "b", "c", "d")) as two:
            assert [one.get("a").name, two.get("b").name] == ["a", "b"]
            ledger_of(tmp_path).unlink()
            assert [two.get("c").name, one.get("d").name] == ["c", "d"]
        assert models_in(ledger_of(tmp_path)) == ["a", "b", "c", "d"]
        with contextlib.closing(sqlite3.connect(ledger_of(tmp_path))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_no_descriptor_left_is_no_damage(tmp_path: Path) -> None:
    """A process that runs out of descriptors, at whichever of its files, does not remove the ledger of all others."""
    said = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        folder = Path(sys.argv[1])
        cache = small_cache(folder, DictSource().add("a"), retry_after=0)
        cache.get("a")
        ledger = folder / "disk" / "ledger.sqlite3"
        before = ledger.stat().st_ino, len(list((folder / "disk" / "models").iterdir()))
        for spare in range(8):
            cache.unload("a")
            cache.disk.store.ledger.close()
            taken = []
            try:
                while True: taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                for _ in range(spare): os.close(taken.pop())
            try: cache.get("a", timeout=3)
            except ModelCacheError: pass
            for each in taken: os.close(each)
        assert cache.get("a").name == "a"
        after = ledger.stat().st_ino, len(list((folder / "disk" / "models").iterdir()))
        print(before == after, cache.stats().fetches)
        """,
        tmp_path,
    )
    assert said == "True 1\n"


def test_handler_forks_inside_a_transaction(tmp_path: Path) -> None:
    """A signal handler that forks in the middle of a transaction leaves a ledger that is whole, and the same one."""
    said = run(
        """
        folder = Path(sys.argv[1])
        cache = small_cache(folder, DictSource().add("a", "b"))
        cache.get("a")
        ledger = cache.disk.store.ledger
        inode = (folder / "disk" / "ledger.sqlite3").stat().st_ino
        tries = []
        def fork(*_):
            pid = os.fork()
            if pid == 0: os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        signal.signal(signal.SIGUSR1, fork)
        def decide(book):
            tries.append(book.epoch)
            if len(tries) == 1: os.kill(os.getpid(), signal.SIGUSR1)
            book.register("somebody", "{}")
            return book.owners()
        assert "somebody" in ledger.change(decide)
        assert len(set(tries)) == 1, tries
        assert inode == (folder / "disk" / "ledger.sqlite3").stat().st_ino
        assert cache.get("b").name == "b"
        assert cache.close()
        print("whole")
        """,
        tmp_path,
    )
    assert said == "whole\n"


def test_handler_looks_while_another_thread_decides(tmp_path: Path) -> None:
    """A handler that interrupts this thread under the guard may look, though another thread is in the ledger."""
    said = run(
        """
        cache = small_cache(Path(sys.argv[1]), DictSource().add("a"))
        cache.get("a")
        inside = threading.Event()
        guard, ledger = cache._parts.guard, cache.disk.store.ledger
        def decide(book):
            inside.set()
            with guard:
                return True
        looked = []
        signal.signal(signal.SIGUSR1, lambda *_: looked.append((cache.stats().models, len(cache.models()))))
        with guard:
            other = Call(ledger.change, decide)
            assert inside.wait(5)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert other.result()
        print(looked)
        cache.close()
        """,
        tmp_path,
    )
    assert said == "[(1, 1)]\n"


@pytest.mark.parametrize("verb", ["get('b')", "prefetch(['b'])", "refresh('a')", "delete('a')"])
def test_handler_calls_inside_a_transaction(tmp_path: Path, verb: str) -> None:
    """A verb from a handler inside this thread's transaction is refused at once; looks, releases, close() aren't."""
    said = run(
        f"""
        cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"), memory={{"max_models": 1}})
        lease = cache.lease("a")
        lease.acquire()
        errors = []
        def handle(*_):
            assert cache.stats().models == len(cache.models()) == 1
            try: cache.{verb}
            except ModelCacheError as error: errors.append(str(error))
            lease.release()
            assert cache.close() is False
        signal.signal(signal.SIGUSR1, handle)
        cache.disk.store.ledger.change(lambda book: os.kill(os.getpid(), signal.SIGUSR1))
        assert "hand it to another thread" in errors[0]
        assert eventually(lambda: cache.close(timeout=5))
        assert eventually(lambda: not list(Path(sys.argv[1]).glob("disk/tmp/*")))  # its close() goes on
        print("refused")
        """,
        tmp_path,
    )
    assert said == "refused\n"


def test_tier_made_before_a_fork(tmp_path: Path) -> None:
    """A tier that gets its cache only in the children of a fork gives each a temporary folder of its own."""
    said = run(
        """
        folder = Path(sys.argv[1])
        disk = DiskTier(folder / "disk", min_free=0)
        assert not any("ledger" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                       if os.path.lexists(f"/proc/self/fd/{fd}"))
        names = []
        for _ in range(2):
            get, put = os.pipe()
            pid = os.fork()
            if pid == 0:
                cache = ModelCache(DictSource().add("a"), load_model, disk=disk)
                cache.get("a")
                os.write(put, disk.store.owner.encode())
                os._exit(0 if cache.close() else 1)
            assert os.waitpid(pid, 0)[1] == 0
            names.append(os.read(get, 100))
        assert len({*names, disk.store.owner.encode()}) == 3, names
        print("apart")
        """,
        tmp_path,
    )
    assert said == "apart\n"


class Stopped(BaseException):
    """An interrupt."""


def fail(monkeypatch: pytest.MonkeyPatch, cache: Any, *, times: int, error: BaseException | None = None) -> list[str]:
    """Have the next transactions that write fail at their end, as on a full disk; return what is still to fail."""
    left = ["full"] * times
    ledger = cache.disk.store.ledger
    change = ledger.change

    def failing(decide: Any, check: Any = None) -> Any:
        def spoilt(book: Any) -> Any:
            decide(book)
            left.pop()
            raise error or OSError(28, "full")

        return change(spoilt if left else decide, check)

    monkeypatch.setattr(ledger, "change", failing)
    return left


@pytest.mark.parametrize("times", [1, 2, 3])
def test_full_ledger_while_a_model_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """A delete that the ledger could not note leaves nothing half: the model is served, or gone and not counted."""
    with small_cache(tmp_path, DictSource().add("a", "b"), retry_after=0) as cache:
        cache.prefetch(["a", "b"], tier="disk").wait(10)
        left = fail(monkeypatch, cache, times=times)
        while left:
            with contextlib.suppress(OSError):
                cache.delete("a")
        assert cache.get("a").name == "a"
        assert cache.delete("b")
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        assert not cache._parts.shelf.index.moving()


@pytest.mark.parametrize("moved", [False, True], ids=["before it is moved", "right after"])
def test_ctrl_c_between_the_removals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool) -> None:
    """Ctrl-C in the middle of removals that a lowered budget demands leaves nothing that goes on leaving, or unseen."""
    with small_cache(tmp_path, DictSource().add("a", "b", "c")) as cache:
        cache.prefetch(["a", "b", "c"], tier="disk").wait(10)
        store = cache.disk.store
        remove, calls = store.remove, list[str]()

        def interrupted(name: str, aside: Path) -> Any:
            calls.append(name)
            if len(calls) == 2 and not moved:
                raise Stopped
            found = remove(name, aside)
            if len(calls) == 2:
                raise Stopped
            return found

        monkeypatch.setattr(store, "remove", interrupted, raising=False)
        with pytest.raises(Stopped):
            cache.disk.budget = 4096
        monkeypatch.undo()
        assert not cache._parts.shelf.index.moving()
        assert cache.stats().disk_used == allocated(tmp_path / "disk") > 0

        def empty() -> bool:
            cache.disk.budget = 4096
            return cache.stats().disk_used == allocated(tmp_path / "disk") == 0

        eventually(empty)


@pytest.mark.parametrize("step", ["sync", "pin", "arrived"])
def test_publication_that_fails_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A publication that fails after its rename, or that the ledger can't note, leaves nothing behind."""
    with small_cache(tmp_path, DictSource().add("a", "b"), retry_after=0) as cache:
        store, failures = cache.disk.store, [OSError(24, "no descriptor")]

        def failing(*_: Any, **__: Any) -> Any:
            raise failures[0]

        with monkeypatch.context() as patch:
            if step == "sync":
                patch.setattr("modelcache.disk.store.sync", lambda path: failing() if path.name == "models" else None)
            elif step == "pin":
                patch.setattr(store, "pin", failing, raising=False)
            else:
                patch.setattr(Publisher, "_arrived", failing)
            with contextlib.suppress(Exception):
                cache.get("a")
        assert cache.get("a").name == "a"
        assert cache.get("b").name == "b"
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        assert not cache._parts.shelf.index.moving()
        assert len(list((tmp_path / "disk" / "models").iterdir())) == 2


STOPS = """
folder = Path(sys.argv[1])
cache = small_cache(folder, DictSource())
def stop(book):
    book.register("somebody", "{}")
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
cache.disk.store.ledger.change(stop)
os._exit(0)
"""


def test_process_stopped_inside_a_transaction(tmp_path: Path) -> None:
    """While a process is stopped in the middle of a change, hits, looks, starts and ends go on; fetches wait for it."""
    names = [f"m{number}" for number in range(70)]
    with small_cache(tmp_path, DictSource().add(*names)) as cache:
        assert cache.prefetch(names, tier="disk").wait(30)
        child = start(STOPS, tmp_path, watchdog=60)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "inside\n"
            for name in names:  # more than are told at once
                assert cache.get(name, timeout=5).name == name
                assert cache.unload(name)
            with small_cache(tmp_path, DictSource().add("m1", "new"), retry_after=0) as other:
                assert other.get("m1", timeout=5).name == "m1"
                assert other.stats().disk_used == cache.stats().disk_used
                with pytest.raises(TimeoutError):
                    other.get("new", timeout=0.5)
                waiting = other.prefetch(["new"], tier="disk")
                child.send_signal(signal.SIGCONT)
                assert waiting.wait(10)
                assert not waiting.errors
        finally:
            child.kill()
            child.communicate()


def test_budgets_that_differ_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who opens a folder that another cache uses with another budget is told so at construction, with both figures."""
    caplog.set_level(logging.WARNING, "modelcache")
    with small_cache(tmp_path, DictSource(), disk={"budget": "1 MiB"}) as one:
        with small_cache(tmp_path, DictSource(), disk={"budget": "1 MiB"}):
            assert not caplog.messages
        with small_cache(tmp_path, DictSource(), disk={"budget": "2 MiB"}):
            assert "budget of 2.0 MiB" in caplog.text
            assert "1.0 MiB" in caplog.text
        caplog.clear()
        one.disk.budget = "2 MiB"
        with small_cache(tmp_path, DictSource(), disk={"budget": "2 MiB"}):
            assert not caplog.messages
        with small_cache(tmp_path, DictSource()):
            assert "no budget" in caplog.text
    caplog.clear()
    with small_cache(tmp_path, DictSource(), disk={"budget": "3 MiB"}):
        assert not caplog.messages


KILLED = """
folder, step = Path(sys.argv[1]), sys.argv[2]
import modelcache.disk.store as module, modelcache.disk.ledger, modelcache.disk.book
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def dies_at(kind, name, when):
    old, left = getattr(kind, name), [when]
    def call(*args, **kwargs):
        left[0] -= 0.5
        if left[0] == -0.5: die()
        result = old(*args, **kwargs)
        left[0] -= 0.5
        if left[0] == -0.5: die()
        return result
    setattr(kind, name, call)
cache = small_cache(folder, DictSource().add("a", "b", "c"))
cache.prefetch(["a", "b"], tier="disk").wait(10)
Store, Book, Ledger = module.Store, modelcache.disk.book.Book, modelcache.disk.ledger.Ledger
where, name, when = step.split()
if where in {"Lost", "Ledger"}:
    for path in (folder / "disk").glob("ledger*"): path.unlink()
dies_at({"Store": Store, "Book": Book, "Ledger": Ledger, "Lost": Book, "module": module}[where], name, float(when))
if name in {"remove", "discard", "gone", "mark"}:
    cache.disk.budget = 8192
else:
    cache.get("c")
print("lived")
"""


@pytest.mark.parametrize(
    "step",
    [
        *("Store stage 0", "Store stage 0.5", "Store seal 0", "Store seal 0.5", "Book add 0", "Book add 0.5"),
        *("Store publish 0", "module sync 2", "Store publish 0.5", "Store pin 0", "Book add 1", "Book add 1.5"),
        *("Book mark 0", "Book mark 0.5", "Store remove 0", "Store remove 0.5", "Store discard 0", "Store discard 0.5"),
        *("Book gone 0", "Book gone 0.5", "Lost fill 0", "Lost fill 0.5", "Ledger _prepare 0", "Ledger _prepare 0.5"),
    ],
)
def test_killed_at_each_step(tmp_path: Path, forks: Warm, step: str) -> None:
    """Wherever a process is killed, the next one counts all there is, serves that, and fetches the rest."""
    code, out = forks.run(KILLED, tmp_path, step)
    assert (code, out) in {(-signal.SIGKILL, ""), (0, "lived\n")}
    if not step.startswith("module"):
        assert out == "", "it was not killed there"
    source = DictSource().add("a", "b", "c")
    with small_cache(tmp_path, source) as cache:
        assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        served = {row.model for row in cache.models()}
        for name in "abc":
            assert cache.get(name, timeout=5).name == name
        assert served.isdisjoint(source.opens)
        assert not cache._parts.shelf.index.moving()
        for name in "abc":
            cache.delete(name)
        cache.disk.budget = 4096
        assert cache.stats().disk_used == allocated(tmp_path / "disk") == 0
    with contextlib.closing(sqlite3.connect(ledger_of(tmp_path))) as connection:
        assert connection.execute("SELECT count(*) FROM holds").fetchall() == [(0,)]


def test_ledger_lost_in_the_middle_of_a_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published into a ledger that was made anew meanwhile, by another cache, is in it, counted and served."""
    with (
        small_cache(tmp_path, DictSource().add("a")) as one,
        small_cache(tmp_path, DictSource().add("a", "b")) as two,
    ):
        store = one.disk.store
        publish = store.publish

        def lose(staged: Path, name: str) -> None:
            for path in (tmp_path / "disk").glob("ledger*"):
                path.unlink()
            assert two.get("b").name == "b"
            publish(staged, name)

        monkeypatch.setattr(store, "publish", lose)
        assert one.get("a").name == "a"
        assert models_in(ledger_of(tmp_path)) == ["a", "b"]
        assert one.stats().disk_used == two.stats().disk_used == allocated(tmp_path / "disk")
        assert one.delete("a")
        assert one.stats().disk_used == two.stats().disk_used == allocated(tmp_path / "disk")


def test_delete_while_another_evicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delete of what another cache is about to evict holds where that finds it read, and lets it stay."""
    with small_cache(tmp_path, DictSource().add("a")) as one, small_cache(tmp_path, DictSource().add("a")) as two:
        one.get("a")
        one.unload("a")
        store = one.disk.store
        remove, held = store.remove, list[Any]()

        def meanwhile(name: str, aside: Path) -> Any:
            pin = two.disk.store.pin(name)
            held.append(pin)
            assert not two.delete("a")
            return remove(name, aside)

        monkeypatch.setattr(store, "remove", meanwhile)
        one.disk.budget = 4096
        monkeypatch.undo()
        assert held
        assert [row.model for row in one.models()] == []
        held[0].close()
        assert two.get("a").name == "a"
        assert len(two._parts.fetcher.source.opens) == 1


@pytest.mark.parametrize("step", ["new_name", "publish", "pin"])
def test_delete_of_what_another_process_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """A delete at any step of a publication by another cache takes nothing away from whoever fetches, nor its bytes."""
    with small_cache(tmp_path, DictSource().add("a")) as one, small_cache(tmp_path, DictSource().add("a")) as two:
        store, gone = one.disk.store, list[bool]()
        real = getattr(store, step)

        def deleting(*arguments: Any) -> Any:
            gone.append(two.delete("a"))
            result = real(*arguments)
            gone.append(two.delete("a"))
            return result

        monkeypatch.setattr(store, step, deleting, raising=False)
        assert one.get("a").name == "a"
        monkeypatch.undo()
        assert gone
        assert one.stats().disk_used == two.stats().disk_used == allocated(tmp_path / "disk") > 0
        one.unload("a")
        assert one.get("a").name == "a"
        assert one._parts.fetcher.source.opens == ["a"]


def test_other_ledger_evicts_what_is_being_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published is pinned before anybody can see it, whatever another process believes of its folder."""
    with small_cache(tmp_path, DictSource().add("a")) as one, small_cache(tmp_path, DictSource()) as two:
        store, tried = one.disk.store, list[Any]()
        publish = store.publish

        def publish_and_remove(staged: Path, name: str) -> None:
            publish(staged, name)
            tried.append(two.disk.store.remove(name, two.disk.store.workshop.aside(name)))

        monkeypatch.setattr(store, "publish", publish_and_remove)
        assert one.get("a").name == "a"
        assert tried == [None]


def test_retunes_between_the_steps_of_a_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget assigned right after any transaction of a fetch, told to all by the next one, changes no other count."""
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        ledger, counted = cache.disk.store.ledger, list[int]()
        change = ledger.change

        def retuned(decide: Any, check: Any = None) -> Any:
            result = change(decide, check)
            monkeypatch.undo()
            cache.disk.budget = 2**30 + len(counted)
            counted.append(cache.stats().disk_used)
            monkeypatch.setattr(ledger, "change", retuned)
            return result

        monkeypatch.setattr(ledger, "change", retuned)
        assert cache.get("a").name == "a"
        monkeypatch.undo()
        assert len(counted) >= 3
        assert min(counted) >= allocated(tmp_path / "disk") == cache.stats().disk_used


def test_retune_in_the_middle_of_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget assigned while what was set aside becomes an artifact is told with it, and sets nothing aside anew."""
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        let_go, assigning = Book.let_go, list[Call]()

        def retuned(book: Book, ids: Any) -> None:
            let_go(book, ids)
            if not assigning:
                assigning.append(Call(setattr, cache.disk, "budget", 2**30))
                eventually(lambda: cache.disk.budget == 2**30)

        monkeypatch.setattr(Book, "let_go", retuned)
        assert cache.get("a").name == "a"
        assigning[0].result()
        assert cache.stats().disk_used == allocated(tmp_path / "disk")


def test_full_ledger_after_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that the ledger could only note later counts no more, and nothing goes on leaving."""
    with small_cache(tmp_path, DictSource().add("a", "b")) as cache:
        cache.prefetch(["a", "b"], tier="disk").wait(10)
        removed = Remover._removed

        def failing(*arguments: Any) -> None:
            removed(*arguments)
            monkeypatch.undo()
            raise OSError(28, "full")

        monkeypatch.setattr(Remover, "_removed", failing)
        cache.delete("a")
        assert cache.get("b").name == "b"
        cache.disk.budget = 2**30
        assert cache.stats().disk_used == allocated(tmp_path / "disk")
        assert not cache._parts.shelf.index.moving()
