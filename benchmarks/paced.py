"""Warm hits at a steady pace while others load, evict and give heap back: ``get`` and ``lease`` beside a plain dict.

    python -m benchmarks.paced [--rounds 5] [--seconds 10]

One thread looks up one model that is there 1,000 times a second. Beside it two threads bring in 20 other models a
second, numpy arrays and plain Python objects, of which 8 stay: through the cache (watermark, events to a listener,
unloads, collections, trims), or, beside the dict, with plain code that does the same loads and drops the oldest.
Each row is a process of its own, in turns, and counts once each model was brought in twice. A figure counts from the
moment the request was due, as a client sees it: most of it is waiting for the interpreter lock, which a loader that
unpickles holds. "In the call" is the lookup alone.
Where we lose: in the call, a dict does less.
"""

import argparse
import collections
import itertools
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.grid import grid
from benchmarks.report import machine, percentile
from modelcache import DiskTier, Evicted, Loaded, LocalSource, MemoryTier, ModelCache, Reclaimed

PACE = 1_000  # lookups a second
LOADERS, LOADS = 2, 20  # threads, and loads a second of both
MODELS, STAY = 40, 8
WARM = 2 * MODELS / LOADS  # seconds until each model was brought in twice, before which nothing counts
ROWS = ("dict", "get", "lease")
HOT = "hot"
_ARRAY, _ENTRIES = 4_000_000, 1_500  # numbers of an array (16 MB); entries of a model of plain objects (about 2 MB)
_MEAN = 12_000_000  # bytes of a model, with some air
US = 1e3  # nanoseconds

Served = tuple[Callable[[str], object], Callable[[], object], Callable[[], int]]
"""How a model is brought in, how the hot one is looked up, and how many were loaded so far."""


def _make(folder: Path) -> None:
    """Write the models: every second one is plain Python objects."""
    for number in range(MODELS):
        model = folder / str(number)
        model.mkdir(parents=True)
        if number % 2:
            np.save(model / "array.npy", np.full(_ARRAY, number, dtype=np.float32))
        else:
            entries = {f"item-{item}": [f"{number}-{item}-{part}" for part in range(12)] for item in range(_ENTRIES)}
            (model / "objects.pickle").write_bytes(pickle.dumps(entries))
    (folder / HOT).mkdir()
    (folder / HOT / "array.txt").write_text("1.0 " * 1_000)


def _load(path: Path) -> Any:
    if path.name == HOT:
        return [float(word) for word in (path / "array.txt").read_text().split()]
    if (path / "array.npy").exists():
        return np.load(path / "array.npy")
    return pickle.loads((path / "objects.pickle").read_bytes())  # noqa: S301 - our own bytes


class Plain:
    """A dict, and loads beside it that drop the oldest."""

    def __init__(self, models: Path) -> None:
        self._models = models
        self._held: collections.OrderedDict[str, Any] = collections.OrderedDict()
        # guards the dict above
        self._lock = threading.Lock()
        self.loads = 0

    def bring(self, model: str) -> None:
        """Load one and drop the oldest."""
        value = _load(self._models / model)
        with self._lock:
            self._held[model] = value
            self.loads += 1
            oldest = self._held.popitem(last=False) if len(self._held) > STAY else None
        del oldest


@contextmanager
def _plain(models: Path) -> Iterator[Served]:
    plain = Plain(models)
    known = {HOT: _load(models / HOT)}
    yield plain.bring, lambda: known[HOT], lambda: plain.loads


@contextmanager
def _cached(row: str, models: Path, tier: Path) -> Iterator[Served]:
    high = psutil.Process().memory_info().rss + STAY * _MEAN
    with ModelCache(
        LocalSource(models, copy=False),
        load=_load,
        disk=DiskTier(tier, min_free=0),
        memory=MemoryTier(high, policy="lru", interval=0.25),
        unload=lambda _: None,
    ) as cache:
        for kind in (Evicted, Loaded, Reclaimed):
            cache.on(kind, str, background=True)

        def lease() -> None:
            with cache.lease(HOT):
                pass

        with cache.lease(HOT):  # it stays, whatever else comes
            yield cache.get, (lambda: cache.get(HOT)) if row == "get" else lease, lambda: cache.stats().loads


def _serve(row: str, models: Path, seconds: float) -> dict[str, Any]:
    """Look up at the pace while others load; return the figures of each lookup in nanoseconds."""
    with tempfile.TemporaryDirectory() as tier:
        stop = threading.Event()
        with _plain(models) if row == "dict" else _cached(row, models, Path(tier)) as (bring, lookup, loads):
            order = itertools.cycle(map(str, range(MODELS)))
            failed: list[str] = []
            loaders = [threading.Thread(target=_bring, args=(bring, order, stop, failed)) for _ in range(LOADERS)]
            for loader in loaders:
                loader.start()
            _pace(lookup, WARM)
            before = loads()
            figures = _pace(lookup, seconds)
            count = loads() - before
            stop.set()
            for loader in loaders:
                loader.join()
    return {"due": figures[0], "call": figures[1], "loads": count, "failed": failed}


def _bring(bring: Callable[[str], object], order: Iterator[str], stop: threading.Event, failed: list[str]) -> None:
    due = time.monotonic()
    while not stop.wait(max(due - time.monotonic(), 0)):
        due += LOADERS / LOADS
        try:
            bring(next(order))
        except Exception as error:  # noqa: BLE001 - counted, whatever it is
            failed.append(str(error))


def _pace(lookup: Callable[[], object], seconds: float) -> tuple[list[int], list[int]]:
    now, dues, calls = time.perf_counter_ns, [], []
    step = 10**9 // PACE
    due = now()
    for _ in range(int(seconds * PACE)):
        due += step
        while (left := due - now()) > 0:
            time.sleep(left / 1e9)
        started = now()
        lookup()
        ended = now()
        dues.append(ended - due)
        calls.append(ended - started)
    return dues, calls


def _lines(results: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    for kind, title in (("due", "since it was due"), ("call", "in the call")):
        for row in ROWS:
            cells = [f"{row}, {title}"]
            for share in (0.5, 0.99, 0.999):
                figures = [percentile(result[kind], share) / US for result in results[row]]
                cells.append(f"{statistics.median(figures):,.1f}")
            ratios = _ratios(results, row, kind)
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
            cells.append(f"{statistics.median(result['loads'] for result in results[row]):.0f}")
            cells.append(str(sum(len(result["failed"]) for result in results[row])))
            yield cells


def _ratios(results: dict[str, list[dict[str, Any]]], row: str, kind: str) -> list[float]:
    pairs = zip(results[row], results["dict"], strict=True)
    return [percentile(mine[kind], 0.999) / percentile(theirs[kind], 0.999) for mine, theirs in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure in turns, print the table; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--inside", nargs=2, metavar=("ROW", "MODELS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        sys.stdout.write(json.dumps(_serve(options.inside[0], Path(options.inside[1]), options.seconds)))
        return 0
    sys.stdout.write(f"{machine()}; {options.rounds} rounds of {options.seconds:.0f} s, {PACE:,} lookups a second\n")
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        for _ in range(options.rounds):
            for row in ROWS:
                command = [sys.executable, "-m", "benchmarks.paced", "--inside", row, folder]
                command += ["--seconds", str(options.seconds)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                results[row].append(json.loads(done.stdout))
    heads = ["", "p50 us", "p99 us", "p99.9 us", "p99.9 x dict (min..max)", "loads", "failed"]
    grid(f"Warm hits while {LOADS} models a second are loaded and dropped", [heads, *_lines(results)])
    missed = 0
    for row in ROWS:
        failed = [text for result in results[row] for text in result["failed"]]
        sys.stdout.writelines(f"{row}: {len(failed)} loads failed, at last: {text}\n" for text in failed[-1:])
        missed += bool(failed)
    for row in ROWS[1:]:
        ratio = statistics.median(_ratios(results, row, "due"))
        missed += ratio > 2
        sys.stdout.write(f"{'MISS' if ratio > 2 else 'PASS'} {row}: p99.9 at most 2 x dict: {ratio:.2f}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
