"""Warm hits: ``get`` and ``lease`` beside dict, ``functools.lru_cache``, ``cachetools.cached`` and cachebox.

    python -m benchmarks.hit [--rounds 15]

Each row is one lookup of one key that is there. With 8 threads all of them look up at once, and a figure is the
time of all their lookups over their number: on a Python with a GIL that is what one lookup costs, plus contention.
Where we lose: a plain dict and ``lru_cache`` do less (no ids checked for leases, no note for the policy, no lease).
"""

import argparse
import functools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cachebox
import cachetools

from benchmarks.report import machine, rounds, table
from modelcache import DiskTier, MemoryTier, ModelCache

LOOKUPS = 100_000
KEY = "fraud/v3"


def timed(statement: str, names: dict[str, Any], threads: int) -> Callable[[], float]:
    """Return a measurement of ``statement``, in nanoseconds a lookup."""
    count = LOOKUPS // threads
    source = f"def loop():\n    for _ in range({count}):\n        {statement}\n"
    scope = dict(names)
    exec(source, scope)  # noqa: S102 - as timeit does: no call around the statement
    loop = scope["loop"]

    def measure() -> float:
        if threads == 1:
            start = time.perf_counter()
            loop()
            return (time.perf_counter() - start) / count * 1e9
        ready = threading.Barrier(threads + 1)
        workers = [threading.Thread(target=lambda: (ready.wait(), loop())) for _ in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        return (time.perf_counter() - start) / (count * threads) * 1e9

    return measure


def main() -> int:
    """Measure, print the tables, and say whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    plain = {KEY: object()}

    @functools.lru_cache(maxsize=100)
    def lru(_: str) -> object:
        return plain

    @cachetools.cached(cachetools.LRUCache(100), lock=threading.RLock())
    def locked(_: str) -> object:
        return plain

    boxed: Any = cachebox.LRUCache(100)
    boxed[KEY] = plain
    sys.stdout.write(f"{machine()}; {options.rounds} rounds of {LOOKUPS:,} lookups\n")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "models", KEY)
        model.mkdir(parents=True)
        (model / "model.json").write_text("{}")
        with ModelCache(
            Path(folder, "models"),
            load=lambda path: json.loads((path / "model.json").read_text()),
            disk=DiskTier(Path(folder, "disk"), min_free=0),
            memory=MemoryTier(),
        ) as cache:
            cache.get(KEY)
            names = {"d": plain, "lru": lru, "locked": locked, "boxed": boxed, "get": cache.get, "lease": cache.lease}
            names["k"] = KEY
            for threads in (1, 8):
                rows = {
                    "dict": timed("d[k]", names, threads),
                    "lru_cache": timed("lru(k)", names, threads),
                    "cachebox.LRUCache": timed("boxed[k]", names, threads),
                    "cachetools.cached+RLock": timed("locked(k)", names, threads),
                    "modelcache get": timed("get(k)", names, threads),
                    "modelcache lease": timed("with lease(k): pass", names, threads),
                }
                figures = rounds(rows, options.rounds)
                title = f"A warm hit, {threads} thread{'s' if threads > 1 else ''}"
                table(title, figures, "ns", ("lru_cache", "cachetools.cached+RLock"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
