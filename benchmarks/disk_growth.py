"""How the disk tier grows: what 1,000, 10,000 and 100,000 models on disk cost at the start and with each decision.

    python -m benchmarks.disk_growth [--counts 1000 10000 100000] [--rounds 3] [--folder /var/tmp]

The published folders are written as the tier writes them, a tiny file in each, but not synced one by one. Each figure
is of a fresh process, imports not counted, with the records in the page cache of the system; the intact ledger has a
request for each model. "Held": 30 % of the models are in memory, and may not go. The peer of a start without a ledger
is a scan that reads and parses each record once, and knows the models then; it runs in the same round. What is compared
is processor time, which other programs on the machine stretch less.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import show
from benchmarks.report import machine
from modelcache import DiskTier, LocalSource, MemoryTier, ModelCache
from modelcache.disk import figures
from modelcache.disk.digests import digest_of
from modelcache.disk.files import allocated
from modelcache.disk.layout import ARTIFACT, FORMAT, MARKER, RECORD, Record, folder_prefix

COUNTS = (1_000, 10_000, 100_000)
ROUNDS = 3
LOOKUPS = 300
EVICTIONS = 30
LOOKS = 3
SECOND = 1.0  # seconds of processor time that a start with an intact ledger may take
FLAT = 2.0  # times that a decision may cost with more models, beside the fewest
PAGE = os.sysconf("SC_PAGE_SIZE")
NAMES: Mapping[str, str] = {
    "intact": "start, ledger intact: ms",
    "cpu": "of which CPU time: ms",
    "lost": "start, ledger lost: ms",
    "scan": "scan of each record: ms",
    "part": "ledger intact / scan, CPU",
    "ratio": "ledger lost / scan, CPU",
    "open": "lookup on disk: us",
    "miss": "lookup that misses: us",
    "first": "first choice of a victim: ms",
    "choose": "choice of a victim: us",
    "held": "the same, 30 % held: us",
    "evict": "victim chosen and removed: us",
    "stats": "stats(): ms",
    "models": "models(): ms",
    "rss": "memory: MB",
    "ledger": "ledger: MB",
}


def _name(number: int) -> str:
    return f"model-{number:06}"


def _source(root: Path) -> LocalSource:
    return LocalSource(root / "source")


def write(root: Path, numbers: range) -> None:
    """Add published folders: fast, so unlike ``Store`` without a sync and a digest for each."""
    models, url = root / "tier" / "models", _source(root).url
    (root / "tier").mkdir(mode=0o700, exist_ok=True)
    models.mkdir(mode=0o700, exist_ok=True)
    (root / "tier" / MARKER).write_text(json.dumps({"format": FORMAT}))
    digest, size, now = "", 0, time.time()
    for number in numbers:
        folder = models / f"{folder_prefix(url, _name(number))}{number:08x}"
        (folder / ARTIFACT).mkdir(parents=True, mode=0o700)
        (folder / ARTIFACT / "weights").write_bytes(b"tiny")
        figures.reserve(folder, 0o700)
        digest = digest or digest_of(folder / ARTIFACT)  # of equal files
        size = size or allocated(folder) + 4096  # with the record
        fetched = now - 1e6 + number
        record = Record(_name(number), url, f"version-{number}", "weights", 4, fetched, 0.5, size, digest)
        (folder / RECORD).write_text(record.to_json())
        os.utime(folder / RECORD, (fetched, fetched))


def _start(root: Path) -> tuple[ModelCache[bytes], float]:
    source = _source(root)
    gc.collect()
    before = time.perf_counter()
    tier = DiskTier(root / "tier", min_free=0)
    cache = ModelCache(source, load=lambda path: path.read_bytes(), disk=tier, memory=MemoryTier("1 GiB"))
    return cache, time.perf_counter() - before


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _median(work: Callable[[int], object], times: int) -> float:
    """Return the median seconds of one call."""
    seconds = []
    for number in range(times):
        before = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def _idle(root: Path) -> dict[str, float]:
    """Return what a process takes, and needs to start, with what is on record in ``root``."""
    before, cpu = _resident(), time.process_time()
    cache, seconds = _start(root)
    cpu = time.process_time() - cpu
    rss = _resident() - before
    cache.close()
    return {"intact": seconds * 1e3, "cpu": cpu * 1e3, "rss": rss / 1e6, "ledger": _ledger(root)}


def _lost(root: Path) -> dict[str, float]:
    """Return how long a start takes that finds no ledger."""
    for file in (root / "tier").glob("ledger.sqlite3*"):
        file.unlink()
    cpu = time.process_time()
    cache, seconds = _start(root)
    cpu = time.process_time() - cpu
    count = len(cache.models())
    cache.close()
    return {"lost": seconds * 1e3, "lost cpu": cpu * 1e3, "count": count}


def _ask(root: Path) -> dict[str, float]:
    """Have each model asked for once."""
    cache, _ = _start(root)
    with cache:
        names = [info.model for info in cache.models()]
        cache.disk.store.ledger.change(lambda book: book.ask(_source(root).url, names))
    return {"count": len(names)}


def _scan(root: Path) -> dict[str, float]:
    """Return how long the peer takes."""
    gc.collect()
    before, cpu = time.perf_counter(), time.process_time()
    known: dict[str, dict[str, Any]] = {}
    with os.scandir(root / "tier" / "models") as entries:
        for entry in entries:
            with open(f"{entry.path}/{RECORD}", encoding="utf-8") as file:  # noqa: PTH123 - as fast as it goes
                record = json.load(file)
            known[record["model"]] = {**record, "used": entry.stat().st_mtime}
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    return {"scan": seconds * 1e3, "scan cpu": cpu * 1e3, "count": len(known)}


def _decide(root: Path) -> dict[str, float]:
    """Return what lookups, decisions and looks cost."""
    cache, _ = _start(root)
    with cache:
        shelf = cache._parts.shelf  # noqa: SLF001 - a lookup on disk, without its load
        names = [info.model for info in cache.models()]

        def lookup(number: int) -> None:
            held = shelf.open(names[number * 7919 % len(names)])
            assert held is not None
            shelf.release(held)

        def choose(_: int) -> None:
            with cache._parts.guard:  # noqa: SLF001
                assert len(shelf.index.choose(1)) == 1

        def hold(_: int) -> None:
            with cache._parts.guard:  # noqa: SLF001
                for name in [name for name in names if name in shelf.index.models][: 3 * len(names) // 10]:
                    shelf.index.pin(shelf.index.models[name])

        def evict(_: int) -> None:
            cache.disk.budget = shelf.index.used() - 1

        result = {
            "first": _median(choose, 1) * 1e3,
            "open": _median(lookup, LOOKUPS) * 1e6,
            "miss": _median(lambda number: shelf.open(f"nobody-{number}"), LOOKUPS) * 1e6,
            "stats": _median(lambda _: cache.stats(), LOOKS) * 1e3,
            "models": _median(lambda _: cache.models(), LOOKS) * 1e3,
            "choose": _median(choose, LOOKUPS) * 1e6,
            "evict": _median(evict, EVICTIONS) * 1e6,
        }
        hold(0)
        choose(0)
        result["held"] = _median(choose, LOOKUPS) * 1e6
        assert cache.stats().disk_evictions == EVICTIONS
    return result


def _ledger(root: Path) -> float:
    return sum(file.stat().st_size for file in (root / "tier").glob("ledger.sqlite3*")) / 1e6


TRIALS: Mapping[str, Callable[[Path], dict[str, float]]] = {
    "lost": _lost,
    "ask": _ask,
    "scan": _scan,
    "idle": _idle,
    "decide": _decide,
}


def _trial(name: str, root: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.disk_growth", "--inside", name, str(root)]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _round(root: Path, empty: Path) -> dict[str, float]:
    """Return one figure of each row."""
    found = {**_trial("scan", root), **_trial("lost", root)}
    if _trial("scan", root)["count"] != found["count"]:
        raise SystemExit("models are missing")
    _trial("ask", root)
    found |= _trial("idle", root)
    found["rss"] -= _trial("idle", empty)["rss"]
    found |= _trial("decide", root)
    found["part"], found["ratio"] = found["cpu"] / found["scan cpu"], found["lost cpu"] / found["scan cpu"]
    return found


def measure(root: Path, counts: Sequence[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return all figures of each row, by how many models were on disk."""
    found: dict[int, dict[str, list[float]]] = {}
    empty = root / "none"
    empty.mkdir()
    write(empty, range(0))
    for fewer, count in zip((0, *counts), counts, strict=False):
        before = time.monotonic()
        write(root, range(fewer, count))
        _trial("scan", root)  # so that the records are in the page cache
        took = time.monotonic() - before
        sys.stderr.write(f"{count} models written in {took:.0f} s\n")
        figures_of = [_round(root, empty) for _ in range(rounds)]
        found[count] = {name: [figure[name] for figure in figures_of] for name in NAMES}
    return found


def _report(found: Mapping[int, Mapping[str, Sequence[float]]]) -> int:
    """Print the table; return how many targets were missed."""
    fewest, most = min(found), max(found)
    middle = {count: {name: statistics.median(values[name]) for name in NAMES} for count, values in found.items()}
    rows = []
    for name, title in NAMES.items():
        cells = [
            f"{middle[count][name]:.2f} ({min(values[name]):.2f}..{max(values[name]):.2f})"
            for count, values in found.items()
        ]
        base = middle[fewest][name]
        rows.append([title, *cells, *(f"x {middle[count][name] / base:.1f}" if base > 0 else "-" for count in found)])
    heads = ["median (min..max)", *(f"{count:,}" for count in found), *(f"{count:,} / {fewest:,}" for count in found)]
    show("Models on disk", heads, rows)
    large, small = middle[most], middle[fewest]
    claims = [(f"start under a second of processor time: {large['cpu']:.0f} ms", large["cpu"] < SECOND * 1e3)]
    for name in ("open", "miss", "choose", "held", "evict"):
        worst = max(figures_of[name] for figures_of in middle.values()) / small[name]
        claims.append((f"{NAMES[name].rpartition(':')[0]} is flat: x {worst:.1f} at most", worst < FLAT))
    claims.append((f"a lost ledger is made anew as fast as a scan: x {large['ratio']:.2f}", large["ratio"] <= 1))
    for claim, met in claims:
        sys.stdout.write(f"{'PASS' if met else 'MISS'} {claim}\n")
    return sum(not met for _, met in claims)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all counts; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", default="/var/tmp", help="on the disk that is measured")  # noqa: S108 - the default
    parser.add_argument("--inside", nargs=2, metavar=("TRIAL", "ROOT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        name, root = options.inside
        sys.stdout.write(json.dumps(TRIALS[name](Path(root))))
        return 0
    root = Path(tempfile.mkdtemp(prefix="disk-growth-", dir=options.folder))
    try:
        found = measure(root, sorted(options.counts), options.rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    sys.stdout.write(f"{machine()}; {options.rounds} rounds\n")
    return 1 if _report(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
