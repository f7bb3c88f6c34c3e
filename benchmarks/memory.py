"""Where memory goes and what brings it back: the figures of ``docs/explanation/memory.md``.

    python -m benchmarks.memory [NAME ...]

Each table is one claim, by name; each row is measured in a process of its own (``benchmarks.trials``), within
seconds. Megabytes (10**6 bytes) above what that process had before, unless a heading says otherwise. Linux and glibc
only; what a table needs beside that (a writable memory cgroup, jemalloc) is said in its place where it is missing.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Group, Unavailable
from benchmarks.report import machine

JEMALLOC = "libjemalloc.so.2"
"""Debian: apt-get install libjemalloc2."""

NO_DYNAMIC = {"MALLOC_TRIM_THRESHOLD_": "131072"}


def trial(*arguments: str, **settings: str) -> Any:
    """Run one trial in a process of its own, with ``settings`` in its environment."""
    command = [sys.executable, "-m", "benchmarks.trials", *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def mb(count: float) -> str:
    """Format bytes."""
    return f"{max(count, 0) / 1e6:.0f}"


def ms(seconds: float) -> str:
    """Format seconds as milliseconds."""
    return f"{seconds * 1e3:.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: words to the left in the first column, figures to the right in the others."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    sys.stdout.write(f"\n{title}\n")
    for number, (first, *others) in enumerate(lines):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
        if not number:
            sys.stdout.write("  ".join("-" * width for width in widths) + "\n")
    sys.stdout.flush()


def freed() -> None:
    """Print what stays resident once objects are dropped, collected and trimmed."""
    kinds = {
        "one array of 300 MB": "one",
        "4,600 arrays of 64 KB": "small",
        "the same as ten models, loaded in turns; nine dropped": "turns",
        "2.6 million tuples with a float each": "objects",
        "the same, one in a thousand kept": "scattered",
    }
    rows = [[name, *map(mb, trial("freed", kind)[:4])] for name, kind in kinds.items()]
    show("Resident, MB", ["loaded, then dropped", "loaded", "del", "gc.collect", "malloc_trim"], rows)


def arenas() -> None:
    """Print what threads that load leave in their arenas."""
    settings: Mapping[str, Mapping[str, str]] = {
        "default": {},
        "MALLOC_ARENA_MAX=2": {"MALLOC_ARENA_MAX": "2"},
        "MALLOC_ARENA_MAX=1": {"MALLOC_ARENA_MAX": "1"},
    }
    rows = []
    for name, variables in settings.items():
        count, *sizes = trial("one_by_one", "8", **variables)
        rows.append([name, str(count), *map(mb, sizes)])
    title = "60 MB loaded and dropped on each of 8 threads, one after the other: resident, MB"
    show(title, ["", "arenas", "at most", "malloc_trim"], rows)
    rows = []
    for name, variables in settings.items():
        count, *sizes = trial("at_once", "8", **variables)
        rows.append([name, str(count), *map(mb, sizes)])
    show("300 MB loaded by 8 threads at once: resident, MB", ["", "arenas", "loaded", "dropped", "malloc_trim"], rows)


def thresholds() -> None:
    """Print what glibc's growing thresholds keep, and what fixed ones cost."""
    rows = []
    for name, variables in {"default": {}, "MALLOC_TRIM_THRESHOLD_=131072": NO_DYNAMIC}.items():
        *sizes, seconds = trial("large", **variables)
        rows.append([name, *map(mb, sizes), f"{seconds * 1e6:.0f}"])
    title = "15 arrays of 20 MB with 10 MB of small ones between; the large are dropped: resident, MB"
    show(title, ["", "loaded", "dropped", "malloc_trim", "us to make and drop 1 MB"], rows)


def jemalloc() -> None:
    """Print the same under jemalloc, whose own purge takes the place of malloc_trim."""
    decay = "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0"
    rows = []
    for name, arguments, variables in (
        ("4,600 arrays of 64 KB", ("small",), {}),
        ("ten models in turns, nine dropped", ("turns",), {}),
        ("the same, 3 s later", ("turns", "3"), {}),
        ("the same, 3 s later, decay set", ("turns", "3"), {"MALLOC_CONF": decay}),
    ):
        *sizes, seconds = trial("freed", *arguments, LD_PRELOAD=JEMALLOC, **variables)
        rows.append([name, mb(sizes[0]), mb(sizes[2]), mb(sizes[3]), ms(seconds)])
    title = f"jemalloc preloaded (decay set: MALLOC_CONF={decay}): resident, MB"
    show(title, ["", "loaded", "dropped", "purge", "ms of purge"], rows)
    _, *sizes = trial("one_by_one", "8", LD_PRELOAD=JEMALLOC)
    title = "60 MB loaded and dropped on each of 8 threads, one after the other: resident, MB"
    show(title, ["", "at most", "purge"], [["jemalloc", *map(mb, sizes)]])


def find_jemalloc() -> None:
    """Raise if the loader does not find it."""
    command = [sys.executable, "-c", "import ctypes; ctypes.CDLL(None).mallctl"]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": JEMALLOC}, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise Unavailable(f"{JEMALLOC} is not installed")


def mapped() -> None:
    """Print what a mapped array has resident as it is used."""
    names = ("np.load(mmap_mode='c')", "half of it read", "all of it read", "half of it written", "dropped")
    show(
        "300 MB of weights, mapped: MB",
        ["", "resident", "of it private"],
        [[name, *map(mb, sizes)] for name, sizes in zip(names, trial("mapped"), strict=True)],
    )


def fork() -> None:
    """Print what forked workers copy by reading."""
    kinds = {
        "one array: summed": "array",
        "6 million floats in a list: summed": "floats",
        "2 million lists: gc.collect() in the worker": "lists",
        "the same, gc.freeze() before the fork": "frozen",
    }
    title = "About 200 MB loaded, then 4 workers forked: MB of each worker, all told"
    rows = [[name, *map(mb, trial("forked", kind))] for name, kind in kinds.items()]
    show(title, ["", "RSS", "PSS", "copied for it"], rows)


def page_cache() -> None:
    """Print what a container is charged for a file that is written and read."""
    charged("page-cache", "A file of 1,000 MB written and read in a container of 256 MiB: MB", "/tmp", "1000")  # noqa: S108


def tmpfs() -> None:
    """Print what a container is charged for a file on a tmpfs."""
    charged("tmpfs", "A file of 100 MB on /dev/shm, in a container of 256 MiB: MB", "/dev/shm", "100")  # noqa: S108


def charged(name: str, title: str, where: str, megabytes: str) -> None:
    """Print what a cgroup is charged with, and what our gauge reads."""
    with Group(name, 256 * 2**20) as group:
        steps = trial("within", str(group.path), where, megabytes)
        killed = group.kills()
    rows = []
    for step, figures in zip(("file written and read", "100 MB of model loaded"), steps, strict=True):
        cells = [figures[key] for key in ("charged", "total_cache", "total_shmem", "gauge")]
        rows.append([step, *map(mb, cells)])
    show(f"{title}; killed: {killed}", ["", "charged", "cache", "of it shmem", "ProcessGauge"], rows)


def gauges() -> None:
    """Print what the gauges read of the same processes."""
    with Group("gauges", 2**30) as group:
        figures = trial("gauges", str(group.path))
    title = "200 MB loaded, then two workers forked with 50 MB more each; 100 MB on a tmpfs, 300 MB cached: MB"
    rows = [[name, *map(mb, sizes)] for name, sizes in figures.items()]
    show(title, ["", "used", "limit"], rows)


def trim_cost() -> None:
    """Print what giving back costs, and what it costs the next load and the requests meanwhile."""
    took, again, cold, warm = trial("trimming")
    rows = [
        ["malloc_trim", ms(took)],
        ["malloc_trim once more", ms(again)],
        ["next load, the heap given back", ms(cold)],
        ["next load, the heap kept", ms(warm)],
    ]
    show("300 MB of heap, nine tenths of it free in pieces", ["", "ms"], rows)
    rows = []
    for name, variables in {"default": {}, "MALLOC_ARENA_MAX=1": {"MALLOC_ARENA_MAX": "1"}}.items():
        rows.append([name, *map(ms, trial("stall", **variables))])
    title = "Longest allocation of another thread (8 KB each): ms, medians of five"
    show(title, ["", "malloc_trim", "during it", "in as much time before"], rows)


def peaks() -> None:
    """Print what measuring a peak costs, what falsifies it, and how peaks depend on the way to load."""
    rows = []
    for size in ("20", "1000", "4000"):
        reset, read = trial("resetting", size)
        rows.append([f"{size} MB resident", f"{reset * 1e6:.0f}", f"{read * 1e6:.0f}"])
    show("VmHWM: microseconds", ["", "to set it back", "to read it"], rows)
    rows = [["a load of 1 MB beside a thread that takes 200 MB", mb(trial("side_by_side"))]]
    show("VmHWM belongs to the process: MB", ["", "peak"], rows)
    ways = {
        "pickle.loads(path.read_bytes())": "pickle.loads",
        "pickle.load(file)": "pickle.load",
        "np.load(path)": "np.load",
    }
    rows = [[name, *map(mb, trial("loading", how))] for name, how in ways.items()]
    show("300 MB of weights: MB", ["", "resident", "peak"], rows)


def huge_pages() -> None:
    """Print what an array that is written here and there has resident, with and without huge pages."""
    rows = []
    for value, name in (("1", "default"), ("0", "NUMPY_MADVISE_HUGEPAGE=0")):
        rows.append([name, *map(mb, trial("huge", NUMPY_MADVISE_HUGEPAGE=value))])
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    title = f"An array of 300 MB, 8 bytes in each 64 KB written (transparent huge pages: {mode}): MB"
    show(title, ["", "resident", "in huge pages"], rows)


def lingering() -> None:
    """Print what evicting frees of models that callers still hold, or that hold themselves."""
    rows = [(f"arrays, {count} still referenced", "plain", count) for count in ("0", "3", "8")]
    rows += [
        ("each in a cycle of its own", "ring", "0"),
        ("a dict around what is in a cycle", "inside", "0"),
        ("each in a cycle, before gc.freeze()", "frozen", "0"),
    ]
    cells = []
    for name, kind, keep in rows:
        promised, freed, collections = trial("held", kind, keep)
        cells.append([name, mb(promised), mb(freed), str(collections)])
    show("8 models of 32 MB evicted: MB", ["", "promised", "came back", "collections"], cells)


CLAIMS: Mapping[str, Callable[[], None]] = {
    "freed": freed,
    "arenas": arenas,
    "thresholds": thresholds,
    "jemalloc": jemalloc,
    "mapped": mapped,
    "fork": fork,
    "page-cache": page_cache,
    "tmpfs": tmpfs,
    "gauges": gauges,
    "trim-cost": trim_cost,
    "peaks": peaks,
    "huge-pages": huge_pages,
    "lingering": lingering,
}


def main() -> int:
    """Measure what is asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS))
    options = parser.parse_args()
    unknown = set(options.names) - set(CLAIMS)
    if unknown:
        parser.error(f"no such claim: {', '.join(sorted(unknown))}; there are {', '.join(CLAIMS)}")
    sys.stdout.write(f"{machine()}\n")
    for name in options.names or CLAIMS:
        try:
            if name == "jemalloc":
                find_jemalloc()
            CLAIMS[name]()
        except Unavailable as reason:
            sys.stdout.write(f"\n{name}: not measured: {reason}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
