"""The end of a cache: what still finishes, what is refused, and that nothing is left."""

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcache import CacheClosed, DiskTier, Loaded, ModelCache, ModelCacheError
from tests.support.fakes import Book, DictSource, MakeCache
from tests.support.waiting import WAIT, Gate, Spawn, eventually

VERBS: dict[str, Callable[[ModelCache[Any]], Any]] = {
    "get": lambda cache: cache.get("a"),
    "get what was in memory": lambda cache: cache.get("b"),
    "lease": lambda cache: cache.lease("a").acquire(),
    "lease what was in memory": lambda cache: cache.lease("b").acquire(),
    "prefetch": lambda cache: cache.prefetch(["a"]),
    "prefetch nothing": lambda cache: cache.prefetch([]),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_use_after_close(make_cache: MakeCache, verb: Callable[[ModelCache[Any]], Any]) -> None:
    """After close() every request gets CacheClosed, also for what was in memory, and it is not remembered."""
    cache = make_cache()
    cache.get("b")
    assert cache.close() is True
    for _ in range(2):
        with pytest.raises(CacheClosed, match="closed"):
            verb(cache)


def test_looking_after_close(make_cache: MakeCache) -> None:
    """A closed cache can still be asked for its figures, its history, and what lies on disk."""
    cache = make_cache()
    cache.get("a")
    cache.close()
    assert cache.stats().loads == 1
    assert [(row.model, row.tier) for row in cache.models()] == [("a", "disk")]
    assert cache.history("a")
    assert "ModelCache" in repr(cache)
    assert cache.memory.high > 0


@pytest.mark.parametrize(
    "late",
    [
        lambda cache: cache.unload("a"),
        lambda cache: cache.delete("a"),
        lambda cache: setattr(cache.memory, "max_models", 1),
        lambda cache: setattr(cache.disk, "budget", 1),
        lambda cache: setattr(cache.disk, "min_free", "99%"),
    ],
    ids=["unload", "delete", "max_models", "budget", "min_free"],
)
def test_late_orders_leave_nothing_behind(make_cache: MakeCache, late: Callable[[ModelCache[Any]], Any]) -> None:
    """Dropping or tuning after close() either is refused or works, and leaves no folder and no descriptor."""
    cache = make_cache()
    cache.get("a")
    cache.get("b")
    cache.close()
    with contextlib.suppress(CacheClosed):
        late(cache)
    assert list((cache.disk.path / "tmp").iterdir()) == []


def test_close_twice(make_cache: MakeCache, book: Book) -> None:
    """close() may be called again: it returns True again, and nothing is unloaded twice."""
    cache = make_cache(book=book)
    cache.get("a")
    assert cache.close() is True
    assert cache.close() is True
    assert book.unloads == ["a"]


def test_close_from_many_threads(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """close() from several threads at once closes once; each call returns."""
    cache = make_cache(book=book)
    for model in "abcd":
        cache.get(model)
    start = threading.Barrier(4, timeout=WAIT)

    def close() -> bool:
        start.wait()
        return bool(cache.close())

    results = [future.result(WAIT) for future in [spawn(close) for _ in range(4)]]
    assert any(results)
    assert sorted(book.unloads) == list("abcd")


def test_close_of_a_cache_never_used(make_cache: MakeCache) -> None:
    """A cache that was never used closes without a thread ever having run."""
    before = threading.active_count()
    cache = make_cache()
    assert cache.close() is True
    assert threading.active_count() == before


def test_context_manager_closes(make_cache: MakeCache, book: Book) -> None:
    """Leaving the ``with`` block closes, also on an error, which passes on."""
    cache = make_cache(book=book)
    cache.get("a")
    with pytest.raises(ZeroDivisionError), cache:
        raise ZeroDivisionError
    assert book.unloads == ["a"]
    with pytest.raises(CacheClosed):
        cache.get("a")


def test_close_unloads_all(make_cache: MakeCache, book: Book) -> None:
    """Every load has had its unload when close() returns True."""
    cache = make_cache(book=book)
    for model in "abcdefgh":
        cache.get(model)
    assert cache.close() is True
    assert sorted(book.unloads) == list("abcdefgh")
    assert cache.stats().models == 0


def test_running_request_finishes(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """A request that was under way gets its model; close() waits for it, and then unloads the model."""
    cache = make_cache(book=book)
    with Gate() as gate:
        book.gate = gate
        running = spawn(cache.get, "a")
        gate.wait()
        closing = spawn(cache.close)
        eventually(lambda: closed(cache))
        assert not closing.done()
    assert running.result(WAIT).model == "a"
    closing.result(WAIT)
    eventually(lambda: book.unloads == ["a"])


def closed(cache: ModelCache[Any]) -> bool:
    """Return whether a cache takes no new requests."""
    try:
        cache.prefetch([])
    except CacheClosed:
        return True
    return False


def test_running_request_may_still_ask_for_parts(make_cache: MakeCache, spawn: Spawn) -> None:
    """A load under way when the cache is closed still gets the parts that it asks for: running requests finish."""

    def load(path: Path, model: str) -> Any:
        if model != "a":
            return model
        gate()
        return cache.get("b")

    with Gate() as gate:
        cache = make_cache(book=Book(load))
        running = spawn(cache.get, "a")
        gate.wait()
        closing = spawn(cache.close)
        eventually(lambda: closed(cache))
    assert running.result(WAIT) == "b"
    closing.result(WAIT)


def test_close_gives_up_waiting_at_its_timeout(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """close() returns False when a load outlasts its timeout; a later one finishes the job."""
    cache = make_cache(book=book)
    with Gate() as gate:
        book.gate = gate
        running = spawn(cache.get, "a")
        gate.wait()
        assert cache.close(timeout=0.05) is False
    running.exception(WAIT)
    assert cache.close() is True


def test_close_stops_what_nobody_waits_for(make_cache: MakeCache, book: Book) -> None:
    """Prefetches that have not begun are dropped by close(), and their handles hear of it."""
    cache = make_cache(book=book, loaders=1)
    with Gate() as gate:
        book.gate = gate
        handle = cache.prefetch(list("abcdefgh"))
        gate.wait()
        assert cache.close(timeout=0.05) is False
    assert handle.wait(WAIT)
    assert len(handle.errors) >= 7
    assert all(isinstance(error, CacheClosed) for error in handle.errors.values())
    assert cache.close() is True


def test_close_with_leases_left(make_cache: MakeCache, book: Book) -> None:
    """close() returns False while a lease is held, unloads the rest, and the lease unloads at its release."""
    cache = make_cache(book=book)
    cache.get("b")
    lease = cache.lease("a")
    model = lease.acquire()
    assert cache.close(timeout=0.1) is False
    assert book.unloads == ["b"]
    assert [row.model for row in cache.models() if row.tier == "memory"] == ["a"]
    assert model.path.exists()
    lease.release()
    assert book.unloads == ["b", "a"]
    assert list((cache.disk.path / "tmp").iterdir()) == []
    assert cache.close() is True


def test_close_does_not_wait_for_leases(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lease held for long does not hold up close(), however long its timeout is."""
    cache = make_cache(leases_left=False)
    lease = cache.lease("a")
    lease.acquire()
    assert spawn(cache.close, timeout=None).result(WAIT) is False
    lease.release()


def test_waiter_for_room_ends_when_closed(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lookup that waits for room when the cache is closed gets an error, or the room, but does not hang."""
    cache = make_cache(memory={"max_models": 1, "interval": 0.05}, timeout=None)
    lease = cache.lease("a")
    lease.acquire()
    waiting = spawn(cache.get, "b")
    eventually(lambda: any(row.state == "waiting for room" for row in cache.models()))
    assert cache.close(timeout=0.1) is False
    lease.release()
    error = waiting.exception(WAIT)
    assert error is None or isinstance(error, ModelCacheError)


def test_close_within_a_loader(make_cache: MakeCache) -> None:
    """A loader that closes the cache does not wait for itself."""

    def load(path: Path, model: str) -> str:
        assert cache.close(timeout=None) is False
        return model

    cache = make_cache(book=Book(load))
    assert cache.get("a") == "a"
    assert cache.close() is True


def test_close_within_a_callback(make_cache: MakeCache) -> None:
    """A callback that closes the cache, on whichever thread, does not wait for itself."""
    cache = make_cache()
    cache.on(Loaded, lambda event: cache.close(timeout=5.0))
    assert cache.get("a").model == "a"
    assert cache.close() is True


def test_close_within_unload(make_cache: MakeCache) -> None:
    """An ``unload=`` that closes the cache does not wait for itself."""
    book = Book(unload=lambda model: cache.close(timeout=5.0))
    cache = make_cache(book=book)
    cache.get("a")
    assert cache.unload("a")
    assert cache.close() is True


def test_exit_from_unload_at_close(make_cache: MakeCache) -> None:
    """An ``unload=`` that raises SystemExit passes on from close(), after everything is gone."""

    def unload(model: Any) -> None:
        raise SystemExit

    book = Book(unload=unload)
    cache = make_cache(book=book)
    for model in "abc":
        cache.get(model)
    with pytest.raises(SystemExit):
        cache.close()
    assert sorted(book.unloads) == list("abc")
    assert list((cache.disk.path / "tmp").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modelcache-")]


def test_a_closed_cache_is_collected(make_cache: MakeCache, tmp_path: Path) -> None:
    """Nothing in the library keeps a closed cache alive."""
    cache: ModelCache[str] | None = ModelCache(
        DictSource().add("a"), lambda path: "model", disk=DiskTier(tmp_path / "own", min_free=0)
    )
    assert cache is not None
    cache.get("a")
    cache.close()
    trace = weakref.ref(cache)
    parts = weakref.ref(cache._parts)
    del cache
    gc.collect()
    assert trace() is None
    assert parts() is None


def test_closed_late_is_collected(tmp_path: Path) -> None:
    """A cache whose close() returned False is let go by the library once its last lease is released."""
    cache: ModelCache[str] | None = ModelCache(
        DictSource().add("a"), lambda path: "model", disk=DiskTier(tmp_path / "own", min_free=0)
    )
    assert cache is not None
    lease = cache.lease("a")
    lease.acquire()
    assert cache.close() is False
    lease.release()
    parts = weakref.ref(cache._parts)
    del cache, lease

    def collected() -> bool:
        gc.collect()
        return parts() is None

    eventually(collected)  # the monitor, which looked after the last lease, ends at its next look


def test_reopened_folder_serves(make_cache: MakeCache, source: DictSource) -> None:
    """A folder whose cache was closed serves the next one at once."""
    make_cache(source).close()
    assert make_cache(source).get("a").model == "a"


# In a process of its own

PROGRAM = """
import os, pathlib, signal, sys, threading
sys.path.insert(0, {root!r})
from modelcache import DiskTier, MemoryTier, ModelCache
from tests.support.fakes import DictSource

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once, beside what another thread says
    sys.stdout.flush()

def unload(model):
    say("unload", model)

source = DictSource().add(*"abcdefgh")
cache = ModelCache(source, lambda path: (path / "model.txt").read_text().strip(chr(0)), unload=unload,
                   disk=DiskTier({folder!r}, min_free=0), memory=MemoryTier(interval=0.01))
"""


def run(tmp_path: Path, program: str, timeout: float = 15) -> subprocess.CompletedProcess[str]:
    """Run a program with a cache in a process of its own; fail where it hangs."""
    root = str(Path(__file__).resolve().parents[2])
    text = PROGRAM.format(root=root, folder=str(tmp_path / "disk")) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=timeout, check=False, cwd=root
    )


def left(tmp_path: Path) -> list[str]:
    """Return what lies under tmp/ of the disk tier."""
    return os.listdir(tmp_path / "disk" / "tmp")  # noqa: PTH208 - names only


def test_cache_that_nobody_closed_is_closed_at_exit(tmp_path: Path) -> None:
    """At interpreter exit what nobody closed is closed: each load gets its unload, no temporary folder stays."""
    done = run(tmp_path, "cache.get('a'); cache.get('b')")
    assert (done.returncode, sorted(done.stdout.split("\n"))) == (0, ["", "unload a", "unload b"])
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == []


def test_exit_with_a_lease_held(tmp_path: Path) -> None:
    """A lease that is still held does not keep the interpreter from ending."""
    done = run(tmp_path, "lease = cache.lease('a'); lease.acquire()")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_exit_during_a_load(tmp_path: Path) -> None:
    """A load that never ends does not keep the interpreter from ending."""
    program = """
        entered = threading.Event()
        def gate():
            entered.set()
            threading.Event().wait()
        source.gate = gate
        cache.prefetch(["a"])
        assert entered.wait(10)
    """
    done = run(tmp_path, program)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_close_from_a_signal_handler(tmp_path: Path) -> None:
    """close() from a signal handler that interrupts a warm server thread closes everything."""
    program = """
        def stop(number, frame):
            say("closed", cache.close(timeout=5))
            sys.exit(0)
        signal.signal(signal.SIGTERM, stop)
        for model in "abc":
            cache.get(model)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while True:
            with cache.lease("a"):
                pass
            cache.models()
    """
    done = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(line for line in done.stdout.split("\n") if line.startswith("unload")) == [
        "unload a",
        "unload b",
        "unload c",
    ]
    assert left(tmp_path) == []


@pytest.mark.parametrize("thread", ["modelcache-loader", "modelcache-hooks"])
def test_close_from_a_signal_handler_while_a_thread_is_started(tmp_path: Path, thread: str) -> None:
    """A signal that comes while the main thread starts a thread of the cache's does not lock it up."""
    program = f"""
        def stop(number, frame):
            cache.close(timeout=1)
        signal.signal(signal.SIGTERM, stop)
        start = threading.Thread.start
        def interrupted(self):
            start(self)
            if self.name == {thread!r}:
                os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread.start = interrupted
        from modelcache import Missed
        cache.on(Missed, lambda event: None, background=True)
        try:
            cache.get("a", timeout=5)
        except Exception as error:
            print(type(error).__name__, flush=True)
        threading.Thread.start = start
        print("closed", cache.close(timeout=5), flush=True)
    """
    done = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "closed True" in done.stdout, done.stdout + done.stderr
    assert left(tmp_path) == []


def test_close_from_a_signal_handler_while_waiting(tmp_path: Path) -> None:
    """A signal that comes while the main thread waits for a load: its handler may close, and the load ends."""
    program = """
        go, entered = threading.Event(), threading.Event()
        def gate():
            entered.set()
            assert go.wait(10)
        source.gate = gate
        def stop(number, frame):
            print("first", cache.close(timeout=0.1), flush=True)
            go.set()
        signal.signal(signal.SIGTERM, stop)
        def send():
            assert entered.wait(10)
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=send).start()
        try:
            print(cache.get("a", timeout=10), flush=True)
        except Exception as error:
            print(type(error).__name__, flush=True)
        print("closed", cache.close(timeout=5), flush=True)
    """
    done = run(tmp_path, program)
    assert done.returncode == 0, done.stderr
    assert "first False" in done.stdout
    assert "closed True" in done.stdout, done.stdout + done.stderr
    assert left(tmp_path) == []


def test_close_from_a_signal_handler_at_any_moment(tmp_path: Path) -> None:
    """Wherever a signal interrupts the main thread in a busy cache, its handler's close() comes back."""
    program = """
        import itertools
        from modelcache import CacheClosed
        for delay in range(1, 40):
            cache = ModelCache(source, lambda path: "model", disk=DiskTier({folder!r}, min_free=0),
                               memory=MemoryTier(max_models=2, interval=0.01))
            def stop(number, frame):
                cache.close(timeout=0.2)
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, delay / 4000)
            try:
                for model in itertools.cycle("abcdefgh"):
                    cache.get(model, timeout=5)
                    cache.prefetch([model]).wait(5)
                    cache.unload(model)
            except CacheClosed:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert cache.close(timeout=5), delay
        print("all", flush=True)
    """.replace("{folder!r}", repr(str(tmp_path / "disk2")))
    done = run(tmp_path, program, timeout=18)
    assert done.stdout.endswith("all\n"), done.stdout + done.stderr


def test_close_waits_for_what_another_close_unloads(make_cache: MakeCache, spawn: Spawn) -> None:
    """Two threads close one cache: neither says that something is left which the other one is just unloading."""
    began, go = threading.Event(), threading.Event()

    def unload(_: object) -> None:
        began.set()
        assert go.wait(10)

    cache = make_cache(DictSource().add("a"), Book(unload=unload))
    cache.get("a")
    first = spawn(lambda: cache.close(timeout=10))
    assert began.wait(10)
    second = spawn(lambda: cache.close(timeout=10))
    eventually(lambda: len(cache._parts.flights.closers) == 2)
    go.set()
    assert first.result() is True
    assert second.result() is True
