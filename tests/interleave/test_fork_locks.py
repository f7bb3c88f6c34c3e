"""Locks over a fork: a child keeps none of its parent's, and a handler that forks waits for nobody who waits for it.

What else a child finds is ``test_fork``; forks inside a transaction, ``test_ledger``.
"""

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interleave.test_fork import fork_script
from tests.support.children import run, start
from tests.support.fakes import DictSource
from tests.support.racing import small_cache
from tests.support.waiting import eventually

FOLDERS = """
import fcntl
if sys.argv[2] == "folders": del fcntl.F_OFD_SETLK
"""
"""As on macOS, where the second argument of a script wants that."""

LEAVE = """
def leave(begin=lambda: None):
    '''Fork a child that calls begin and lives until its standard input ends; tell its id, and die.'''
    get, put = os.pipe()
    if not os.fork():
        signal.alarm(30)
        begin()
        os.write(put, b"%d" % os.getpid())
        os.close(1), os.close(2)
        sys.stdin.read()
        os._exit(0)
    print(int(os.read(get, 20)), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"))
cache.get("a"), cache.get("b")
"""


@pytest.fixture(params=["ranges", "folders"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give each kind of locks in turn, here too."""
    if request.param == "folders":
        monkeypatch.delattr(fcntl, "F_OFD_SETLK", raising=False)
    return str(request.param)


def is_over(pid: int) -> bool:
    """Whether a process has closed all its files: it is gone, or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def orphan(folder: Path, kind: str, script: str) -> Iterator[None]:
    """Run a script that calls ``leave``; until the end of the block its child is alive, and its parent dead."""
    with start(FOLDERS + LEAVE + script, folder, kind, stdin=-1) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert child.wait(10) == -signal.SIGKILL
        os.kill(pid, 0)
        yield
        child.stdin.close()
        eventually(lambda: is_over(pid))


def test_idle_child_keeps_nothing_of_a_dead_parent(tmp_path: Path, kind: str) -> None:
    """A child that never uses the cache keeps no lease of its dead parent, nor its temporary folder."""
    script = """
    other = Call(lambda: (lease := cache.lease("a"), lease.acquire(), threading.Event().wait()))
    eventually(lambda: any(row.leases for row in cache.models()))
    leave()
    """
    with orphan(tmp_path, kind, dedented(script)), small_cache(tmp_path, DictSource()) as cache:
        assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1
        assert cache.delete("a") is True
        cache.disk.budget = 4096
        assert not list((tmp_path / "disk" / "models").iterdir())


def test_lease_of_the_forking_thread_outlives_the_parent(tmp_path: Path, kind: str) -> None:
    """Where the thread that forks holds a lease, the child goes on holding that, and only that."""
    script = """
    with cache.lease("a"): leave()
    """
    with small_cache(tmp_path, DictSource()) as cache:
        with orphan(tmp_path, kind, dedented(script)):
            assert cache.delete("b") is True
            assert cache.delete("a") is False
        assert eventually(lambda: cache.delete("a"))


def test_child_takes_over_at_its_first_use(tmp_path: Path, kind: str) -> None:
    """A child that has looked at the cache has leases of its own on all that its parent had loaded."""
    with small_cache(tmp_path, DictSource()) as cache:
        with orphan(tmp_path, kind, "leave(lambda: cache.get('b'))"):
            assert cache.delete("a") is False
            assert cache.delete("b") is False
        assert eventually(lambda: cache.delete("a"))  # its last thread may end a moment after its first


def dedented(script: str) -> str:
    """Return a script without its indentation here."""
    return "\n".join(line.removeprefix("    ") for line in script.splitlines())


STEPS = {
    "claim": 'lambda: cache.disk.store._pins.claim(FOLDER / "disk" / "models" / "x")',
    "entrance": "lambda: cache.disk.store.ledger._entrance(FOLDER / 'disk' / 'ledger.sqlite3')",
}


@pytest.mark.parametrize("step", STEPS)
def test_fork_while_another_thread_has_something_locked(tmp_path: Path, step: str) -> None:
    """What another thread has locked for a moment at a fork is not locked for as long as the child lives."""
    fork_script(
        tmp_path,
        f"""
        cache = small_cache(FOLDER, DictSource().add("a"))
        cache.get("a")
        gate, stop = Gate(), os.pipe()
        (FOLDER / "disk" / "models" / "x").mkdir()
        def hold(lock):
            with lock():
                gate()
        holder = Call(hold, {STEPS[step]})
        gate.wait()
        join = fork(lambda: os.read(stop[0], 1))
        gate.open()
        holder.result()
        second = small_cache(FOLDER, DictSource().add("b"))
        assert second.get("b", timeout=3).name == "b"
        pin = cache.disk.store.pin("x")
        assert pin is not None
        pin.close()
        os.write(stop[1], b"x")
        join()
        assert second.close() and cache.close()
        """,
    )


def test_handler_forks_while_another_thread_waits_for_its_guard(tmp_path: Path) -> None:
    """A handler that forks under the guard waits for no thread that waits for it inside a transaction."""
    fork_script(
        tmp_path,
        """
        cache = small_cache(FOLDER, DictSource().add("a", "b"))
        cache.get("a")
        inside, tries = threading.Event(), []
        guard, ledger = cache._parts.guard, cache.disk.store.ledger
        def decide(book):
            tries.append(book.epoch)
            inside.set()
            with guard:
                book.register("somebody", "{}")
                return book.owners()
        signal.signal(signal.SIGUSR1, lambda *_: fork(lambda: None)())
        with guard:
            other = Call(ledger.change, decide)
            assert inside.wait(5)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert "somebody" in other.result()
        assert len(tries) == 2 and len(set(tries)) == 1, tries
        assert cache.get("b").name == "b"
        def child():
            assert cache.get("a").name == "a"
            assert cache.delete("b") is False
        fork(child)()
        assert cache.close()
        """,
    )


WRITES = """
import io
from tests.support.archives import gz, tar_of, zip_of
from tests.support.s3 import noise
name = sys.argv[2]
data = noise(3_000_000)
packed = {"m.tar.gz": lambda: gz(tar_of({"m.bin": data})), "m.zip": lambda: zip_of({"m.bin": data})}
source = DictSource().add_file("m", name, packed.get(name, lambda: data)())
folder, reads, forked = Path(sys.argv[1]), [], threading.Event()

def gate():
    reads.append(1)
    if len(reads) == 8:
        begun.set()
        forked.wait()

source.gate, begun = gate, threading.Event()
cache = small_cache(folder, source, lambda path: path)
call = Call(cache.get, "m")
begun.wait()
mine = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
assert any("/disk/tmp/" in path and ("artifact" in path or "spool" in path) for path in mine), mine
pid = os.fork()
if not pid:
    signal.pause()
try:
    forked.set()
    call.result()
    assert cache.delete("m")
    theirs = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
finally:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print([path for path in theirs if "/disk/" in path])
"""


@pytest.mark.parametrize("name", ["m.tar.gz", "m.zip", "m.bin"])
def test_child_keeps_no_file_that_is_being_written(tmp_path: Path, name: str) -> None:
    """What its parent was writing at the fork, and deletes, takes nothing on disk for as long as the child lives."""
    assert run(WRITES, tmp_path, name).strip() == "[]"
