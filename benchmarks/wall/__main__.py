"""The wall: 300 real models, 5 GB of them, served from a cgroup of 1 GiB by caches that count, weigh or measure.

    python -m benchmarks.wall [--rows modelcache,cachetools] [--loaders 1] [--quick]

Each row is a process in a memory cgroup of its own, which serves the same skewed, drifting requests from 16 threads:
numpy arrays (read, decoded, mapped), scikit-learn forests and plain Python objects of 5 to 120 MB; some take twice
that while they load. A process that the kernel kills is started again and goes on; what it was about to answer
counts as failed. The models are built once (6.3 GB, under two minutes) and kept. All rows take about twenty minutes.

Where we lose: ``lru_cache`` and ``cachetools`` do not measure, so they are faster as long as they live.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cgroup import Unavailable, own_group
from benchmarks.grid import grid
from benchmarks.report import machine
from benchmarks.wall.child import Task
from benchmarks.wall.rows import ROWS
from benchmarks.wall.store import Store
from benchmarks.wall.watch import Result, Watch
from modelcache.units import format_bytes, parse_size

QUICK = {"requests": 2_000, "models": 60, "limit": "512 MiB"}
HIGH = 0.8  # MemoryTier's default
TIMEOUT = 1_800.0
MB = 1e6
_HEADS = (
    "",
    "OOM kills",
    "failed",
    "peak MB",
    "above high MB",
    "underrated MB",
    "models held",
    "hit ratio",
    "evictions",
    "reload s",
    "wall s",
    "used+reserved while waiting",
    "mean used",
    "models",
    "reserved",
)


def _line(result: Result) -> list[str]:
    book = result.figures
    ours = result.row in {"modelcache", "no trim"}
    return [
        result.row,
        str(result.kills),
        str(result.failed),
        f"{result.peak / MB:.0f}",
        f"{result.above / MB:.1f}",
        f"{book['underrated'] / MB:.1f}" if ours else "-",
        f"{book['held'] / max(book['looks'], 1):.1f}",
        f"{book['hits'] / max(book['hits'] + book['misses'], 1):.1%}",
        f"{book['evictions']:.0f}",
        f"{book['reload_seconds']:.0f}",
        f"{book['seconds']:.0f}",
        f"{book['room'] / book['waits']:.1%} ({book['waits']:.0f})" if book["waits"] else "-",
        f"{result.mean_used:.1%}",
        *(
            f"{book[name] / max(book['looks'], 1) / result.high:.1%}" if ours else "-"
            for name in ("models", "reserved")
        ),
    ]


def _targets(result: Result, loaders: int) -> list[tuple[str, bool]]:
    """Return what is claimed of modelcache, and whether it holds."""
    book = result.figures
    most = book["underrated"]
    claims = [
        (f"no OOM kill: {result.kills}", result.kills == 0),
        (f"no failed request: {result.failed}", result.failed == 0),
        (
            f"above high by at most one misprediction: {result.above / MB:.1f} of {most / MB:.1f} MB",
            result.above <= most,
        ),
    ]
    if book["waits"]:
        room = book["room"] / book["waits"]
        claims.append((f"used + reserved at least 90 % of high while a load waits: {room:.1%}", room >= 0.9))
    if loaders == 1:
        claims.append(
            (f"with one loader, mean use at least 85 % of high: {result.mean_used:.1%}", result.mean_used >= 0.85)
        )
    return claims


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--loaders", type=int, default=4, help="loads that modelcache runs at once")
    parser.add_argument("--gauge", choices=("process", "container"), default="process")
    parser.add_argument("--limit", default="1 GiB")
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "modelcache-wall"))
    parser.add_argument("--quick", action="store_true", help=f"the same in small: {QUICK}")
    quick, _ = parser.parse_known_args(arguments)
    if quick.quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.rows = options.rows.split(",")
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, print the table, and say whether the targets were met."""
    options = _options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the cgroup and its process go as well
    try:
        own_group()
    except Unavailable as why:
        sys.stdout.write(f"not run: {why}\n")
        return 0
    limit = parse_size(options.limit, "limit")
    assert isinstance(limit, int)
    store = Store(options.folder, options.models)
    store.build(lambda step: sys.stdout.write(f"models {step}\n") and sys.stdout.flush())
    total = sum(fact.resident for fact in store.facts().values())
    sys.stdout.write(
        f"{machine()}; {options.models} models, {format_bytes(total)} in memory; limit {format_bytes(limit)}, high "
        f"{format_bytes(int(limit * HIGH))}; {options.requests:,} requests, {options.threads} threads, "
        f"{options.loaders} loaders, {options.gauge} gauge\n"
    )
    results = []
    for row in options.rows:
        store.forget_pages()
        task = Task(
            row,
            str(options.folder),
            options.models,
            options.requests,
            options.threads,
            options.loaders,
            options.gauge,
            int(limit * HIGH),
        )
        try:
            results.append(Watch(task, limit, TIMEOUT).run())
        except Unavailable as why:
            sys.stdout.write(f"not run: {why}\n")
            return 0
        sys.stdout.write(f"served by {row}\n")
        sys.stdout.flush()
    grid(f"The wall, {options.loaders} loaders", [_HEADS, *map(_line, results)])
    for result in results:
        for name, count, text in result.errors:
            sys.stdout.write(f"{result.row}: {name}, {count} times, at last: {text}\n")
    missed = 0
    for result in results:
        if result.row == "modelcache":
            for claim, met in _targets(result, options.loaders):
                sys.stdout.write(f"{'PASS' if met else 'MISS'} {claim}\n")
                missed += not met
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
