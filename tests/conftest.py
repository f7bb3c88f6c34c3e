"""Fixtures for all tests: caches that are closed and checked after each, and checks that nothing leaks.

What is checked after every test: no thread of the library is left, and no file descriptor. After every cache of
``make_cache``: it is gone, each load had its one unload, the bytes it counted are the bytes on disk, and its
temporary folder is gone.
"""

import concurrent.futures
import contextlib
import gc
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier, MemoryTier, ModelCache
from tests.support.fakes import Book, DictSource
from tests.support.waiting import WAIT

pytest_plugins = ["tests.support.fixtures"] if importlib.util.find_spec("tests.support.fixtures") else []

_TOLERATED = ("socket:", "anon_inode:", "/dev/")
"""Descriptors that may stay: connections pooled by a client of a server that the whole session shares, the event
descriptors that go with them, and devices that the interpreter keeps open (``/dev/urandom``)."""


def _ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("modelcache-")}


def _descriptors() -> dict[str, str]:
    if not sys.platform.startswith("linux"):
        return {}
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            goal = os.readlink(f"/proc/self/fd/{number}")
            if not goal.startswith(_TOLERATED):
                found[number] = goal
    return found


@pytest.fixture(autouse=True)
def _no_leaked_thread() -> Iterator[None]:
    """Fail a test that leaves a thread of the library behind."""
    before = _ours()
    yield
    deadline = time.monotonic() + 5.0
    for thread in _ours() - before:
        thread.join(max(deadline - time.monotonic(), 0))
    left = sorted(thread.name for thread in _ours() - before)
    assert not left, f"threads left behind: {left}"


@pytest.fixture(autouse=True)
def _no_leaked_descriptor() -> Iterator[None]:
    """Fail a test that leaves a file descriptor open."""
    before = _descriptors()
    yield
    if len(_descriptors()) > len(before):
        gc.collect()
        after = _descriptors()
        new = [goal for number, goal in after.items() if before.get(number) != goal]
        assert len(after) <= len(before), f"descriptors left open: {new}"


class Spawn:
    """Runs functions on threads of the test's own; what they raise comes out of the future's ``result``."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Call ``function`` on a new thread."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                future.set_exception(error)

        thread = threading.Thread(target=run, name="test", daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def join(self) -> None:
        """Wait for all; fail where one does not end."""
        deadline = time.monotonic() + WAIT
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a thread of the test hangs"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Give a function that runs another one on a thread and returns its future."""
    threads = Spawn()
    yield threads
    threads.join()


class Caches:
    """Makes caches over a folder of the test, and checks each of them after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[tuple[ModelCache[Any], Book, bool]] = []

    def __call__(
        self,
        source: Any = None,
        book: Book | None = None,
        *,
        folder: Path | None = None,
        disk: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        leases_left: bool = False,
        **settings: Any,
    ) -> ModelCache[Any]:
        """Make a cache.

        Args:
            source: None: one with the models a to h, of 10 bytes each.
            book: loads, unloads and keeps count. None: one of its own.
            folder: of the disk tier. None: ``disk`` in the test's own folder.
            disk: more settings of the disk tier.
            memory: settings of the memory tier.
            leases_left: the test expects that leases are left when the cache is closed.
            **settings: of the cache.
        """
        book = book if book is not None else Book()
        cache: ModelCache[Any] = ModelCache(
            DictSource().add(*"abcdefgh") if source is None else source,
            settings.pop("load", book.load),
            unload=settings.pop("unload", book.unload),
            disk=DiskTier(self.folder / "disk" if folder is None else folder, **{"min_free": 0, **(disk or {})}),
            memory=MemoryTier(**(memory or {})),
            **settings,
        )
        self._made.append((cache, book, leases_left))
        return cache

    def finish(self) -> None:
        """Close all that were made, and check what must hold; look at all before failing for one."""
        problems: list[str] = []
        for cache, book, leases_left in self._made:
            try:
                check_closed(cache, book, leases_left=leases_left)
            except AssertionError as error:
                problems.append(str(error))
        assert not problems, "\n".join(problems)


def check_closed(cache: ModelCache[Any], book: Book, *, leases_left: bool = False) -> None:
    """Close a cache, and assert all that must hold of a closed one."""
    closed = cache.close(timeout=WAIT)
    assert closed is not leases_left, f"close() returned {closed}"
    if not leases_left:
        book.check()
        left = [str(path) for path in (cache.disk.path / "tmp").iterdir()]
        assert not left, f"left under tmp/: {left}"
    used, there = cache.stats().disk_used, allocated(cache.disk.path)
    assert used == there, f"counted {used} bytes on disk, there are {there}"


def allocated(disk: Path) -> int:
    """Return the bytes that the file system allocated for all published folders below a disk tier's folder."""
    total = 0
    for folder in (disk / "models").iterdir():
        total += sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))
    return total


def is_unlocked(cache: ModelCache[Any]) -> bool:
    """Return whether another thread can look at the cache now: nobody holds its lock."""
    looked = threading.Event()

    def look() -> None:
        cache.models()
        cache.stats()
        looked.set()

    threading.Thread(target=look, name="test-look", daemon=True).start()
    return looked.wait(3.0)


@pytest.fixture(name="is_unlocked")
def _is_unlocked() -> Callable[[ModelCache[Any]], bool]:
    """Give a function that tells, from another thread, whether a cache's lock is free."""
    return is_unlocked


@pytest.fixture(name="allocated")
def _allocated() -> Callable[[Path], int]:
    """Give a function that measures what lies published below a disk tier's folder."""
    return allocated


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[Caches]:
    """Give a maker of caches, all of which are closed and checked after the test."""
    caches = Caches(tmp_path)
    yield caches
    caches.finish()


@pytest.fixture
def source() -> DictSource:
    """Give a source with the models a to h, of 10 bytes each."""
    return DictSource().add(*"abcdefgh")


@pytest.fixture
def book() -> Book:
    """Give a loader and an unloader that keep books."""
    return Book()
