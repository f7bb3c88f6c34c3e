"""The end of a child of ``multiprocessing``, for each way to start one: it closes its caches, and only its own.

What else a forked child does with a cache is in ``tests/interleave/test_fork.py``.
"""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import modelcache

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = str(Path(modelcache.__file__).parent)
METHODS = ("fork", "spawn", "forkserver")

# How a program begins that starts children; without the second part a child imports the library only when it runs.
START = """
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

def start(target, *arguments):
    '''Run target in a child to its end.'''
    child = multiprocessing.get_context(os.environ["METHOD"]).Process(target=target, args=arguments)
    child.start()
    child.join()
    print("child ended with", child.exitcode, flush=True)

def make(who):
    '''Return a cache that tells who unloads what.'''
    from tests.support.fakes import DictSource
    from tests.support.racing import small_cache
    def unload(model):
        print(who if os.getpid() == made else "heir of " + who, "unloads", model.name, flush=True)
    made = os.getpid()
    return small_cache(Path(os.environ["FOLDER"]), DictSource().add("a", "b", "c"), unload=unload)
"""
IMPORTS = "import modelcache\n"


def run(tmp_path: Path, program: str, method: str = "fork") -> list[str]:
    """Run a program to its end, and return the lines it printed, sorted; nobody may have left a temporary file."""
    script = tmp_path / "program.py"
    script.write_text(START + textwrap.dedent(program))
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path, "FOLDER": str(tmp_path), "METHOD": method}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "disk" / "tmp").iterdir()), done.stderr
    assert LIBRARY not in done.stderr, done.stderr  # no traceback leads through it
    return sorted(done.stdout.splitlines())


@pytest.mark.parametrize("imports", [IMPORTS, ""], ids=["imported before", "imported within"])
@pytest.mark.parametrize("method", METHODS)
def test_child_closes_what_it_made(tmp_path: Path, method: str, imports: str) -> None:
    """A cache that a child makes and nobody closes is closed when the child ends, however it was started."""
    program = """
    def child():
        cache = make("child")
        cache.get("a"), cache.get("b")

    if __name__ == "__main__":
        start(child)
    """
    told = run(tmp_path, imports + textwrap.dedent(program), method)
    assert told == ["child ended with 0", "child unloads a", "child unloads b"]


def test_child_closes_what_it_inherited(tmp_path: Path) -> None:
    """Each process unloads once what it has of an inherited cache, and the parent's goes on as if nothing was."""
    program = """
    def grandchild():
        assert cache.get("a") is model
        cache.get("c")

    def child():
        assert cache.get("a") is model
        cache.get("b")
        start(grandchild)

    if __name__ == "__main__":
        cache = make("parent")
        model = cache.get("a")
        start(child)
        assert cache.get("a") is model
        print("parent goes on", flush=True)
    """
    assert run(tmp_path, program) == [
        *["child ended with 0"] * 2,
        *["heir of parent unloads a"] * 2,  # in the child, and in its own child
        *["heir of parent unloads b"] * 2,
        "heir of parent unloads c",
        "parent goes on",
        "parent unloads a",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_child_that_fails(tmp_path: Path, method: str) -> None:
    """A child that ends by an exception closes its cache, and ends as it would without one."""
    program = """
    def child(error):
        cache = make("child")
        cache.get("a")
        raise error

    if __name__ == "__main__":
        start(child, OSError("made for this"))
        start(child, SystemExit(3))
    """
    told = run(tmp_path, program, method)
    assert told == ["child ended with 1", "child ended with 3", *["child unloads a"] * 2]


@pytest.mark.parametrize("method", METHODS)
def test_daemons_do_not_keep_a_child(tmp_path: Path, method: str) -> None:
    """Daemon threads that use the cache for ever, and one that holds a lease, are not in the way of a child's end."""
    program = """
    import contextlib
    from modelcache import CacheClosed

    def child():
        cache = make("child")
        ready = threading.Barrier(4)
        def use():
            cache.get("a")
            ready.wait()
            with contextlib.suppress(CacheClosed):
                while True:
                    cache.get("a")
        def hold():
            with cache.lease("b"):
                ready.wait()
                threading.Event().wait()
        for work in (use, use, hold):
            threading.Thread(target=work, daemon=True).start()
        ready.wait()

    if __name__ == "__main__":
        start(child)
    """
    told = run(tmp_path, program, method)
    assert told == ["child ended with 0", "child unloads a"]


def test_load_that_never_ends_in_a_child(tmp_path: Path) -> None:
    """A load that never ends is given the five seconds of any exit, once, and leaves no temporary file."""
    program = """
    import modelcache

    def child():
        from tests.support.fakes import DictSource
        from tests.support.racing import small_cache
        entered = threading.Event()
        def load(path):
            entered.set()
            threading.Event().wait()
        cache = small_cache(Path(os.environ["FOLDER"]), DictSource().add("a"), load)
        cache.prefetch(["a"])
        entered.wait()

    if __name__ == "__main__":
        start(child)
    """
    started = time.monotonic()
    assert run(tmp_path, program, "forkserver") == ["child ended with 0"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("method", METHODS)
def test_threads_that_outlive_the_work_of_a_child(tmp_path: Path, method: str) -> None:
    """Like at any exit, threads other than daemons find the cache open until the last of them has ended."""
    program = """
    pool = ThreadPoolExecutor(1)

    def child():
        cache = make("child")
        cache.get("a")
        pool.submit(cache.get, "a").result()  # its thread waits for more until the interpreter ends
        awaited = threading.Event()
        threading._register_atexit(awaited.set)  # once the main thread has done all but to wait for other threads
        def serve():
            awaited.wait()
            print("still served:", cache.get("a").name, cache.get("b").name, flush=True)
        threading.Thread(target=serve).start()

    if __name__ == "__main__":
        start(child)
    """
    told = run(tmp_path, program, method)
    assert told == ["child ended with 0", "child unloads a", "child unloads b", "still served: a b"]


@pytest.mark.parametrize("method", METHODS if sys.version_info >= (3, 13) else ["spawn"])  # others run no handlers
def test_handler_that_a_child_registers(tmp_path: Path, method: str) -> None:
    """Like at any exit, what a child has registered with atexit finds the cache open."""
    program = """
    import atexit

    def child():
        cache = make("child")
        cache.get("a")  # Python 3.12 starts no thread for a load any more
        atexit.register(lambda: print("handled:", cache.get("a").name, flush=True))

    if __name__ == "__main__":
        start(child)
    """
    assert run(tmp_path, program, method) == ["child ended with 0", "child unloads a", "handled: a"]
