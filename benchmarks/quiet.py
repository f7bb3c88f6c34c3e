"""No false evictions: freed heap that is kept, page cache and a neighbour look like use, and cost no model.

    python -m benchmarks.quiet [--rounds 1]

Each row is a process in a memory cgroup of 1 GiB with models loaded to about half of ``high``, in which something
happens that takes no memory from them; then more models are loaded, up to nine tenths of ``high``. Nothing need be
evicted, and every eviction is a false one. Growth that does take memory is ``growth``.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Group, Unavailable, enter, own_group
from benchmarks.grid import grid
from benchmarks.report import machine
from modelcache import DiskTier, LocalSource, MemoryTier, ModelCache, Pressure, gauges

LIMIT = 2**30
MODEL = 40 * 10**6  # bytes of a model
INTERVAL = 0.25  # seconds between two looks of the monitor
LOOKS = 4  # of the monitor, that a row waits for after each step
MB = 1e6
_BLOCK = 64 * 1024  # below glibc's threshold for a mapping of its own
_THREADS = 8  # each with an arena of the heap
_FILES = 8  # of 256 MiB


def keep_heap(room: int) -> str:
    """Allocate and free blocks on several threads in turn; a few that stay keep all pages of each heap in place."""
    kept: list[bytes] = []
    share = room // _THREADS
    turns = [threading.Event() for _ in range(_THREADS + 1)]
    turns[0].set()
    done = threading.Event()

    def churn(number: int) -> None:
        turns[number].wait()
        blocks = [os.urandom(1) * _BLOCK for _ in range(share // _BLOCK)]
        kept.append(blocks[-1])
        del blocks
        turns[number + 1].set()
        done.wait()  # a thread that ends would leave its heap to the next

    threads = [threading.Thread(target=churn, args=(number,), daemon=True) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    turns[-1].wait()
    done.set()
    return f"{share * _THREADS / MB:.0f} MB in blocks, {share / MB:.0f} MB at once"


def fill_page_cache(_: int) -> str:
    """Write 2 GiB, and read it twice, so that it is active."""
    size = 2**28
    with tempfile.TemporaryDirectory() as folder:
        for number in range(_FILES):
            path = Path(folder, str(number))
            path.write_bytes(b"x" * size)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for _ in range(2):
            for number in range(_FILES):
                with Path(folder, str(number)).open("rb") as file:
                    while file.read(2**20):
                        pass
    return f"{_FILES * size / MB:.0f} MB of files"


def nothing(_: int) -> str:
    """Do nothing: it is the neighbour who does."""
    return "4 GB next door"


CASES: dict[str, Callable[[int], str]] = {
    "freed heap": keep_heap,
    "page cache": fill_page_cache,
    "neighbour": nothing,
}


@contextlib.contextmanager
def _most(gauge: Any) -> Iterator[list[int]]:
    """Sample the gauge meanwhile; the one item of the list is the most that was used."""
    most, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], gauge.read().used)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _serve(case: str, gauge: str) -> dict[str, Any]:
    """Load, disturb, load more; return what happened. This runs inside the cgroup."""
    measure = gauges.ContainerGauge() if gauge == "container" else gauges.ProcessGauge()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "models")
        for number in range(30):
            model = source / str(number)
            model.mkdir(parents=True)
            (model / "size").write_text(str(MODEL))
        tier = MemoryTier(gauge=measure, interval=INTERVAL)
        told: list[str] = []
        with ModelCache(
            LocalSource(source, copy=False),
            load=lambda path: bytearray(b"x") * int((path / "size").read_text()),
            disk=DiskTier(Path(folder, "tier"), min_free=0),
            memory=tier,
            size_of=lambda _, path: int((path / "size").read_text()),
        ) as cache:
            cache.on(Pressure, lambda event: told.append(str(event)))
            high, loaded = tier.high, 0

            def fill(share: float) -> None:
                nonlocal loaded
                while base + (loaded + 1) * MODEL <= share * high:
                    cache.get(str(loaded))
                    loaded += 1

            base = measure.read().used
            fill(0.5)
            with _most(measure) as most:
                what = CASES[case](int(LIMIT * 0.95) - measure.read().used)
                time.sleep(LOOKS * INTERVAL)
            fill(0.9)
            time.sleep(LOOKS * INTERVAL)
            stats = cache.stats()
    return {
        "what": what,
        "high": high,
        "loaded": loaded,
        "held": stats.models,
        "evictions": stats.evictions,
        "most": most[0],
        "after": stats.memory_used,
        "told": told,
    }


@contextlib.contextmanager
def _neighbour(size: int) -> Iterator[None]:
    """Have a process in another cgroup hold so much memory."""
    script = "import sys; held = bytearray(b'x') * int(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    with Group("neighbour", None) as group:
        command = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.path)]
        command += [sys.executable, "-c", script, str(size)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            yield


def _run(case: str, gauge: str) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if case == "neighbour":
            stack.enter_context(_neighbour(4 * 10**9))
        group = stack.enter_context(Group("quiet", LIMIT))
        command = [sys.executable, "-m", "benchmarks.quiet", "--inside", str(group.path), case, gauge]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            return {"died": f"ended with {done.returncode}, {group.kills()} OOM kills"}
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run each case with each gauge, print the table; 1 where something was evicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--inside", nargs=3, metavar=("GROUP", "CASE", "GAUGE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        group, case, gauge = options.inside
        enter(group)
        sys.stdout.write(json.dumps(_serve(case, gauge)))
        return 0
    lines, told, missed = [], [], 0
    try:
        own_group()
        for _ in range(options.rounds):
            for case in CASES:
                for gauge in ("process", "container"):
                    result = _run(case, gauge)
                    good = not result.get("evictions", 1)
                    missed += not good
                    lines.append(_line(f"{case}, {gauge} gauge", result, good=good))
                    told += result.get("told", [])
    except Unavailable as why:
        sys.stdout.write(f"not run: {why}\n")
        return 0
    heads = ["", "what", "most used by it MB", "high MB", "used at the end MB", "loaded", "held", "false evictions", ""]
    sys.stdout.write(f"{machine()}; limit 1 GiB, models of {MODEL / MB:.0f} MB\n")
    grid("No false evictions", [heads, *lines])
    sys.stdout.writelines(f"{line}\n" for line in told)
    return 1 if missed else 0


def _line(name: str, result: dict[str, Any], *, good: bool) -> list[str]:
    if "died" in result:
        return [name, result["died"], *["-"] * 6, "MISS"]
    figures = [f"{result[figure] / MB:.0f}" for figure in ("most", "high", "after")]
    counts = [str(result[figure]) for figure in ("loaded", "held", "evictions")]
    return [name, result["what"], *figures, *counts, "PASS" if good else "MISS"]


if __name__ == "__main__":
    raise SystemExit(main())
