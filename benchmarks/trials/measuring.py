"""What the trials of memory share: figures of a process, an allocator that is asked, and models made of small arrays.

Figures are bytes and seconds.
"""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MB = 10**6
SMALL = 64 * 1024  # bytes of an array that the heap serves; from 128 KiB on glibc maps each on its own
COUNT = 4_600  # of them: 300 MB

TRIALS: dict[str, Callable[..., Any]] = {}
_JEMALLOC_ALL = 4096  # MALLCTL_ARENAS_ALL of jemalloc.h


def trial(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a trial its name."""
    TRIALS[function.__name__] = function
    return function


def rollup(pid: int | str = "self") -> dict[str, int]:
    """Return ``/proc/PID/smaps_rollup``: ``Rss``, ``Pss`` and so on, in bytes; exact, other than ``statm``."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(words[0]) * 1024 for name, *words in (line.replace(":", "").split() for line in lines)}


def baseline() -> int:
    """Return the resident bytes of this process, once what its imports have left in the heap is given back."""
    gc.collect()
    give_back()
    return resident()


def resident() -> int:
    """Return the resident bytes of this process."""
    return rollup()["Rss"]


def give_back() -> float:
    """Have the allocator give freed heap back, glibc's or jemalloc's; return the seconds that it took."""
    libc = ctypes.CDLL(None)
    start = time.perf_counter()
    if "jemalloc" in os.environ.get("LD_PRELOAD", ""):
        libc.mallctl(b"arena.%d.purge" % _JEMALLOC_ALL, None, None, None, 0)
    else:
        libc.malloc_trim(0)
    return time.perf_counter() - start


def small(count: int) -> list[Any]:
    """Return arrays of 64 KB, written to."""
    return [np.ones(SMALL // 8) for _ in range(count)]


def in_turns(models: int) -> list[list[Any]]:
    """Return models of small arrays, 300 MB together, that were loaded side by side."""
    parts: list[list[Any]] = [[] for _ in range(models)]
    for number in range(COUNT):
        parts[number % models].extend(small(1))
    return parts
