"""Fixtures for all tests: caches that are closed and checked after each, and checks that nothing leaks.

What is checked after every test: no thread of the library is left, and no file descriptor. After every cache of
``make_cache``: it is gone, each load had its one unload, the bytes it counted are the bytes on disk, and its
temporary folder is gone.
"""

import contextlib
import gc
import importlib.util
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import DiskTier, MemoryTier, ModelCache
from tests.support.fakes import Book, DictSource, allocated
from tests.support.waiting import WAIT, Spawn

pytest_plugins = ["tests.support.fixtures"] if importlib.util.find_spec("tests.support.fixtures") else []

# by a living gauge
_KEPT = re.compile(r"/proc/(\d+/(task/\d+/)?(statm|status|clear_refs)|meminfo)|.*/memory\.(stat|kmem.*)")
_TOLERATED = ("socket:", "anon_inode:", "/dev/")
"""Descriptors that may stay: connections pooled by a client of a server that the whole session shares, the event
descriptors that go with them, and devices that the interpreter keeps open (``/dev/urandom``)."""


def _ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("modelcache-")}


def _descriptors() -> dict[str, str]:
    if not sys.platform.startswith("linux"):
        return {}
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one of the listing itself
            goal = str(entry.readlink())
            if not goal.startswith(_TOLERATED) and not _KEPT.fullmatch(goal):
                found[entry.name] = goal
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
            # an order that does not depend on how fast fetches and loads are
            disk=DiskTier(
                self.folder / "disk" if folder is None else folder, **{"policy": "lru", "min_free": 0, **(disk or {})}
            ),
            memory=MemoryTier(**{"policy": "lru", **(memory or {})}),
            **settings,
        )
        self._made.append((cache, book, leases_left))
        return cache

    def finish(self) -> None:
        """Close all that were made, and check what must hold; look at all before failing for one."""
        problems: list[str] = []
        closed = [cache.close(timeout=WAIT) for cache, _, _ in self._made]
        latest = {cache.disk.path: cache for cache, _, _ in self._made}.values()
        for (cache, book, leases_left), done in zip(self._made, closed, strict=True):
            try:
                assert done is not leases_left, f"close() returned {done}"
                check_closed(cache, book, leases_left=leases_left)
                if cache in latest:  # an earlier one knows nothing of what this one did
                    check_bytes(cache)
            except AssertionError as error:
                problems.append(str(error))
        assert not problems, "\n".join(problems)


def check_closed(cache: ModelCache[Any], book: Book, *, leases_left: bool = False) -> None:
    """Assert all that must hold of a closed cache."""
    if not leases_left:
        book.check()
        left = [str(path) for path in (cache.disk.path / "tmp").iterdir()]
        assert not left, f"left under tmp/: {left}"


def check_bytes(cache: ModelCache[Any]) -> None:
    """Assert that a cache counts on disk what is there."""
    used, there = cache.stats().disk_used, allocated(cache.disk.path)
    assert used == there, f"counted {used} bytes on disk, there are {there}"


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
