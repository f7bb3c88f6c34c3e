"""The ledger that processes share, at its seams: locks, forks, signals, rollbacks, full disks, stopped processes."""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier
from tests.support.children import run
from tests.support.fakes import DictSource
from tests.support.racing import small_cache


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
        print(before == (ledger.stat().st_ino, len(list((folder / "disk" / "models").iterdir()))), cache.stats().fetches)
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
    """A handler that interrupts this thread under the guard may call stats(), though another thread is in the ledger."""
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
    """A verb from a handler inside this thread's transaction is refused at once; looks, leases' ends and close() are not."""
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
        assert not list(Path(sys.argv[1]).glob("disk/tmp/*"))
        print("refused")
        """,
        tmp_path,
    )
    assert said == "refused\n"
