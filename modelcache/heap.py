"""Giving freed heap back to the system, by asking the allocator that really serves this process.

When to do it (after a batch of evictions, never on the path of a hit) is decided by the memory tier, as is running
``gc`` before. Freed objects whose pages the allocator keeps still count as resident memory.
"""

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from modelcache.turns import Turns

_MAPS = Path("/proc/self/maps")
_KNOWN = re.compile(r"/lib(jemalloc|tcmalloc|mimalloc|snmalloc|hoard|asan)[^/\n]*\.so[^/\n]*$", re.MULTILINE)
_ALL_ARENAS = b"arena.4096.purge"  # MALLCTL_ARENAS_ALL, since jemalloc 5
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
_KEPT_TOP = 4 << 20  # what threads that were not included may keep at the top of an arena each, from here on
_BLOCK = 96 << 10  # below the mmap threshold, whatever it is
_MOST_BLOCKS = 256


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _Found:
    """The allocator of one process, and how it is asked."""

    def __init__(self, allocator: str, ask: Callable[[], bool] | None, include: Callable[[], None] | None) -> None:
        self.allocator = allocator
        self._ask = ask
        self._include = include
        # guards the two figures below, and the asking itself: whoever comes meanwhile waits, and one asks for all.
        self._lock = threading.RLock()
        self._began = -1
        self._asked = False
        self.turns = Turns()

    def include_thread(self) -> None:
        if self._include is not None:
            self._include()

    def give_back(self) -> bool:
        if self._ask is None:
            return False
        self.include_thread()
        came = time.monotonic_ns()
        with self._lock:
            if self._began <= came:  # otherwise somebody began after we came: what we freed has gone with theirs
                with self.turns.giving():
                    self._began = time.monotonic_ns()
                    self._asked = self._ask()
            return self._asked


_found: dict[int, _Found] = {}  # by pid; whoever puts it in first is right, so that it needs no lock


def give_back() -> bool:
    """Give freed heap back to the system, as far as the allocator that serves this process can.

    - glibc: ``malloc_trim(0)``, then what that leaves at the top of the arenas of included threads (see
      :func:`include_thread`; the caller is one). For that the mmap and trim thresholds become 32 and 4 MiB,
      for good; not where ``MALLOC_..._`` or ``GLIBC_TUNABLES`` in the environment set them.
    - jemalloc: the caller's cache is flushed and all arenas are purged.
    - mimalloc: ``mi_collect`` for the caller's heap and those of threads that ended. Free pages between blocks that are
      held stay, unless ``MIMALLOC_PURGE_DELAY`` (before 2.1 ``MIMALLOC_DECOMMIT_DELAY``) is 0.
    - tcmalloc: free pages are released.
    - Another allocator, musl, macOS and Windows: nothing is done.

    ``gc`` is not run. Python's own small objects come back only where their whole arena (256 KiB, 1 MiB) is free.
    Never raises.

    Cost: 15 to 20 milliseconds for 300 MB of fragmented heap, up to a second for gigabytes, with the GIL released. A
    thread that allocates from the heap in work, or frees to it, waits as long, with the GIL: see :func:`freeing`. The
    first call in a process takes a millisecond more, to look at the allocator.

    Concurrency: any thread. Calls that arrive while one is under way wait for it, and are then served by one more
    that they share. Looks at the allocator anew after a fork.

    Returns:
        Whether the allocator did as it was asked; how much came back, only a gauge can tell.
    """
    return _look().give_back()


def freeing() -> AbstractContextManager[None]:
    """Free a model, or collect cycles, inside: not while heap is given back, which is waited for, two seconds at most.

    Concurrency: any thread, with no lock held.
    """
    return _look().turns.freeing()


def include_thread() -> None:
    """Have all later calls of :func:`give_back`, on whatever thread, reach what the calling thread allocates.

    Under glibc each thread takes memory from an arena, and up to 64 MiB that are free at the top of each arena but the
    main one stay there. It takes up to 100 microseconds the first time on a thread, one later, and a few
    kilobytes. Does nothing under other allocators; never raises. Concurrency: any thread; the first time it waits for
    a :func:`give_back` that is under way.
    """
    _look().include_thread()


def allocator() -> str:
    """Return what serves ``malloc`` here.

    ``"glibc"``, ``"jemalloc"``, ``"mimalloc"`` and ``"tcmalloc"`` are those that :func:`give_back` works with; others
    are known by the name of their library, or ``"unknown"``. Never raises.
    """
    return _look().allocator


def _look() -> _Found:
    pid = os.getpid()
    found = _found.get(pid)
    if found is None:
        for other in list(_found):  # of processes that forked us
            _found.pop(other, None)
        found = _found.setdefault(pid, _Found(*_search()))
    return found


def _search() -> tuple[str, Callable[[], bool] | None, Callable[[], None] | None]:
    if sys.platform == "linux":
        try:
            owner = _Owner()
            for find in (_jemalloc, _mimalloc, _tcmalloc, _glibc):
                if (found := find(owner)) is not None:
                    return found
        except (AttributeError, OSError, TypeError, ValueError):  # no malloc or dladdr to be found
            pass
    return _mapped() or "unknown", None, None


class _Owner:
    """The file that ``malloc`` lies in: the allocator that the process uses, under whatever name.

    An allocator that was preloaded or linked in comes first in the order of lookup. One that is merely mapped, by an
    extension module for its own use, does not.
    """

    def __init__(self) -> None:
        self._process = ctypes.CDLL(None)
        self._process.dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Symbol))
        self._process.dladdr.restype = ctypes.c_int
        self._file = self._file_of(self._process.malloc)

    def function(self, *names: str) -> Any | None:
        """Return the first of these functions that the allocator itself has."""
        for name in names:
            found = getattr(self._process, name, None)
            if found is not None and self._file_of(found) == self._file:
                return found
        return None

    def _file_of(self, function: object) -> bytes:
        symbol = _Symbol()
        address = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]  # ctypes
        if not self._process.dladdr(address, ctypes.byref(symbol)) or not symbol.file:
            raise ValueError("dladdr does not know the symbol")
        return bytes(symbol.file)


_Asked = tuple[str, Callable[[], bool], Callable[[], None] | None]


def _jemalloc(owner: _Owner) -> _Asked | None:
    if (control := owner.function("mallctl", "je_mallctl")) is None:
        return None
    control.argtypes = (ctypes.c_char_p, *(ctypes.c_void_p,) * 3, ctypes.c_size_t)
    control.restype = ctypes.c_int

    def purge() -> bool:
        control(b"thread.tcache.flush", None, None, None, 0)
        return not control(_ALL_ARENAS, None, None, None, 0)

    return "jemalloc", purge, None


def _mimalloc(owner: _Owner) -> _Asked | None:
    if (collect := owner.function("mi_collect")) is None:
        return None
    collect.argtypes, collect.restype = (ctypes.c_bool,), None
    return "mimalloc", lambda: collect(True) is None, None  # noqa: FBT003 - forced


def _tcmalloc(owner: _Owner) -> _Asked | None:
    if (release := owner.function("MallocExtension_ReleaseFreeMemory")) is None:
        return None
    release.argtypes, release.restype = (), None
    return "tcmalloc", lambda: release() is None, None


def _glibc(owner: _Owner) -> _Asked | None:
    trim, version = owner.function("malloc_trim"), owner.function("gnu_get_libc_version")
    if trim is None or version is None:
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    tops = _Tops.of(owner)

    def ask() -> bool:
        trim(0)  # 0 or 1: whether there was anything to give back
        if tops is not None:
            tops.give_back()
        return True

    return "glibc", ask, None if tops is None else tops.include_thread


class _Tops:
    """The free memory at the top of glibc's arenas, which malloc_trim leaves in all but the main one.

    Whenever 64 KiB or more are freed in an arena, it gives its top back as far as that is above a threshold; no matter
    on which thread, and where in the arena. So one block is kept in the arena of each thread, and made smaller and
    large again while the threshold is low.
    """

    def __init__(self, malloc: Any, realloc: Any, free: Any, mallopt: Any) -> None:
        malloc.argtypes, malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
        realloc.argtypes, realloc.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
        free.argtypes, free.restype = (ctypes.c_void_p,), None
        mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
        self._malloc, self._realloc, self._free, self._mallopt = malloc, realloc, free, mallopt
        self._here = threading.local()
        # guards the blocks: addresses, the oldest first; those of threads that ended are kept, as arenas outlive them.
        self._lock = threading.RLock()
        self._blocks: list[int] = []

    @classmethod
    def of(cls, owner: _Owner) -> "_Tops | None":
        """Return None where it can't be done, or where the user has set thresholds."""
        tuned = any(name in os.environ for name in _TUNED) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
        if tuned or ctypes.sizeof(ctypes.c_void_p) < 8:  # noqa: PLR2004 - 64 bits
            return None
        functions = [owner.function(name) for name in ("malloc", "realloc", "free", "mallopt")]
        if None in functions:
            return None
        return cls(*functions)

    def include_thread(self) -> None:
        """Keep a block in the arena that the calling thread takes memory from."""
        if getattr(self._here, "included", False):
            return
        self._here.included = True
        with self._lock:
            if (block := self._malloc(_BLOCK)) is not None:
                self._blocks.append(block)
            if len(self._blocks) > _MOST_BLOCKS:
                self._free(self._blocks.pop(0))

    def give_back(self) -> None:
        """Give the tops back."""
        with self._lock:
            self._mallopt(_TRIM_THRESHOLD, 1 << 16)
            try:
                for _ in range(len(self._blocks)):
                    block = self._blocks.pop(0)  # out meanwhile: an interrupt may lose it, but not leave a dead address
                    self._blocks.append(self._stir(block))
            finally:
                self._mallopt(_MMAP_THRESHOLD, 32 << 20)
                self._mallopt(_TRIM_THRESHOLD, _KEPT_TOP)

    def _stir(self, block: int) -> int:
        block = self._realloc(block, 64) or block
        return self._realloc(block, _BLOCK) or block


def _mapped() -> str | None:
    """Return the name of a known allocator among the mapped files."""
    try:
        match = _KNOWN.search(os.fsdecode(_MAPS.read_bytes()))
    except OSError:
        return None
    return match[1] if match else None
