"""What an allocator keeps of what was freed, and what it costs to have it back."""

import ctypes
import gc
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trials.measuring import COUNT, MB, SMALL, baseline, give_back, in_turns, resident, small, trial


def kept_of(kind: str) -> tuple[Any, Any]:
    """Load 300 MB of a kind; return what is to be dropped and what stays."""
    if kind == "one":
        return np.ones(300 * MB // 8), None
    if kind == "small":
        return small(COUNT), None
    if kind == "turns":
        first, *others = in_turns(10)
        return others, first
    objects = [(number, float(number)) for number in range(2_600_000)]
    return objects, (objects[::1000] if kind == "scattered" else None)


@trial
def freed(kind: str, wait: str = "0") -> list[float]:
    """Load, drop, wait, collect, give back: resident memory after each, and the seconds of the last."""
    start = baseline()
    dropped, kept = kept_of(kind)
    steps = [resident() - start]
    del dropped
    steps.append(resident() - start)
    gc.collect()
    time.sleep(float(wait))
    steps.append(resident() - start)
    took = give_back()
    steps.append(resident() - start)
    del kept
    return [*steps, took]


def arenas() -> int:
    """Return how many arenas glibc has made."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fclose.argtypes = (ctypes.c_void_p,)
    libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
    with tempfile.NamedTemporaryFile() as file:
        stream = libc.fopen(file.name.encode(), b"w")
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return Path(file.name).read_text().count("<heap nr=")


@trial
def at_once(count: str) -> list[float]:
    """Load on several threads at once, drop all, give back: arenas, then resident memory after each."""
    number = int(count)
    ready = threading.Barrier(number)
    models: list[list[Any]] = [[] for _ in range(number)]

    def load(model: list[Any]) -> None:
        for _ in range(COUNT // number):
            ready.wait()  # so that all go on at one pace, as loads that read files do
            model.extend(small(1))

    start = baseline()
    workers = [threading.Thread(target=load, args=(model,)) for model in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    steps = [arenas(), resident() - start]
    models.clear()
    gc.collect()
    steps.append(resident() - start)
    give_back()
    return [*steps, resident() - start]


@trial
def one_by_one(count: str) -> list[float]:
    """Load 60 MB and drop it on each of several threads, in turn; each keeps 1 KB.

    Returns: arenas, resident bytes when there were most, and after giving back.
    """
    number = int(count)
    turns = [threading.Event() for _ in range(number + 1)]
    kept: list[bytearray] = []
    seen: list[int] = []
    start = baseline()

    def load(turn: int) -> None:
        turns[turn].wait()
        model = small(60 * MB // SMALL)
        kept.append(bytearray(1024))  # a warning, a module, a registry: something that stays
        seen.append(resident() - start)
        del model
        gc.collect()
        turns[turn + 1].set()
        turns[-1].wait()

    workers = [threading.Thread(target=load, args=(turn,)) for turn in range(number)]
    for worker in workers:
        worker.start()
    turns[0].set()
    for worker in workers:
        worker.join()
    steps = [arenas(), max(seen)]
    give_back()
    return [*steps, resident() - start]


@trial
def large() -> list[float]:
    """Drop 15 arrays of 20 MB that have small ones between, in a process that has freed one of 30 MB before.

    Returns: resident once loaded, dropped, given back; then the seconds in which an array of 1 MB is made and dropped.
    """
    first = np.ones(30 * MB // 8)
    del first
    start = baseline()
    pairs = [(np.ones(20 * MB // 8), small(10)) for _ in range(15)]
    steps = [resident() - start]
    kept = [between for _, between in pairs]
    del pairs
    gc.collect()
    steps.append(resident() - start)
    give_back()
    steps.append(resident() - start)
    begun = time.perf_counter()
    for _ in range(1_000):
        np.ones(MB // 8)
    del kept
    return [*steps, (time.perf_counter() - begun) / 1_000]


@trial
def trimming() -> list[float]:
    """Fragment 300 MB of heap: the seconds of a trim, of one more, of a reload after it, and of one without it."""
    first, *others = in_turns(10)
    others.clear()
    start = time.perf_counter()
    others.append(small(COUNT * 9 // 10))
    warm = time.perf_counter() - start
    others.clear()
    took, again = give_back(), give_back()
    start = time.perf_counter()
    others.append(small(COUNT * 9 // 10))
    cold = time.perf_counter() - start
    del first
    return [took, again, cold, warm]


@trial
def stall() -> list[float]:
    """Let a thread allocate while 300 MB of heap is given back, five times.

    Returns: the median seconds of giving back, of its longest allocation meanwhile, and in as much time before.
    """
    gaps: list[tuple[float, float]] = []
    done = threading.Event()

    def serve() -> None:
        last = time.perf_counter()
        while not done.is_set():
            np.ones(1000).sum()
            now = time.perf_counter()
            gaps.append((now, now - last))
            last = now

    thread = threading.Thread(target=serve)
    thread.start()
    rounds = []
    for _ in range(5):
        first, *others = in_turns(10)
        others.clear()
        time.sleep(0.2)
        start = time.perf_counter()
        took = give_back()
        end = time.perf_counter()
        time.sleep(0.01)  # so that one which had to wait has ended
        during = max(gap for at, gap in gaps if at >= start and at - gap <= end)
        before = max((gap for at, gap in gaps if start - took <= at < start), default=0.0)
        rounds.append((took, during, before))
        del first
    done.set()
    thread.join()
    return [sorted(figures)[2] for figures in zip(*rounds, strict=True)]
