"""Outside growth: the host program takes 40 % of the limit and frees it; the tier gives way, and fills again after.

    python -m benchmarks.growth [--rounds 1]

A process in a memory cgroup of 1 GiB serves requests for more models than fit below ``high`` = 55 %. Then the host
program takes 40 % of the limit at once, keeps it, and frees it. Nothing tells the cache: its monitor must see it.
The time line has the mean of each half second. What looks like growth and is none is ``quiet``.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.cgroup import Group, Unavailable, enter, own_group
from benchmarks.grid import grid
from benchmarks.report import machine
from modelcache import DiskTier, LocalSource, MemoryTier, ModelCache, gauges

LIMIT = 2**30
HIGH = "55%"
GROWTH = int(LIMIT * 0.4)
INTERVAL = 1.0  # seconds between two looks of the monitor: the default
MODELS, SMALLEST, LARGEST = 60, 5_000_000, 40_000_000
THREADS, RATE = 4, 100  # requests a second, all threads together
BEFORE, KEPT, AFTER = 4.0, 6.0, 6.0  # seconds
SAMPLE, STEP = 0.02, 0.5
MB = 1e6


@attrs.frozen
class Sample:
    """What was seen at one moment; bytes, and seconds since the start."""

    at: float
    used: int
    models: int
    host: int
    evictions: int
    failed: int


class Host:
    """The program around the cache: it serves requests, and needs memory for other things.

    Args:
        cache: the cache.
        gauge: what is sampled.
    """

    def __init__(self, cache: ModelCache[Any], gauge: Any) -> None:
        self._cache = cache
        self._gauge = gauge
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._held = bytearray()
        self._failed: list[str] = []
        self.samples: list[Sample] = []

    def run(self) -> None:
        """Serve, grow, shrink."""
        threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(THREADS)]
        threads.append(threading.Thread(target=self._sample))
        for thread in threads:
            thread.start()
        time.sleep(BEFORE)
        self._held = bytearray(b"x") * GROWTH
        time.sleep(KEPT)
        self._held = bytearray()
        time.sleep(AFTER)
        self._stop.set()
        for thread in threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - load, not secrets
        weights = [1 / rank**0.9 for rank in range(1, MODELS + 1)]
        while not self._stop.wait(chance.expovariate(RATE / THREADS)):
            (model,) = chance.choices(range(MODELS), weights)
            try:
                with self._cache.lease(str(model)) as value:
                    assert value[-1]
                    del value  # else it stays until the next request
            except Exception as error:  # noqa: BLE001 - counted, whatever it is
                self._failed.append(str(error))

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE):
            stats = self._cache.stats()
            at, used = time.monotonic() - self._started, self._gauge.read().used
            figures = (stats.memory_models, len(self._held), stats.evictions, len(self._failed))
            self.samples.append(Sample(at, used, *figures))


def _serve(gauge: str) -> dict[str, Any]:
    """Run it all; inside the cgroup."""
    measure = gauges.ContainerGauge() if gauge == "container" else gauges.ProcessGauge()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "models")
        for number in range(MODELS):
            model = source / str(number)
            model.mkdir(parents=True)
            share = number * 37 % MODELS / MODELS
            (model / "size").write_text(str(int(SMALLEST * (LARGEST / SMALLEST) ** share)))
        with ModelCache(
            LocalSource(source, copy=False),
            load=lambda path: bytearray(b"x") * int((path / "size").read_text()),
            disk=DiskTier(Path(folder, "tier"), min_free=0),
            memory=MemoryTier(HIGH, gauge=measure, interval=INTERVAL),
            size_of=lambda _, path: int((path / "size").read_text()),
        ) as cache:
            host = Host(cache, measure)
            host.run()
            return {"high": cache.memory.high, "samples": [attrs.astuple(sample) for sample in host.samples]}


def above(samples: Sequence[Sample], high: int) -> float:
    """Return the longest time, in seconds, that use stayed above ``high``."""
    longest, since = 0.0, None
    for sample in samples:
        if sample.used <= high:
            since = None
        elif since is None:
            since = sample.at
        else:
            longest = max(longest, sample.at - since)
    return longest


def refill(samples: Sequence[Sample]) -> float | None:
    """Return how many seconds after the host freed its memory the models took 90 % of what they did before it grew."""
    before = [sample.models for sample in samples if BEFORE / 2 < sample.at < BEFORE]
    steady = statistics.mean(before)
    freed = max(sample.at for sample in samples if sample.host)
    return next((s.at - freed for s in samples if s.at > freed and s.models >= 0.9 * steady), None)


def _run(gauge: str) -> tuple[int, list[Sample]]:
    with Group("growth", LIMIT) as group:
        command = [sys.executable, "-m", "benchmarks.growth", "--inside", str(group.path), gauge]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise SystemExit(f"the process ended with {done.returncode}, {group.kills()} OOM kills")
    result = json.loads(done.stdout)
    return result["high"], [Sample(*row) for row in result["samples"]]


def _line(samples: Sequence[Sample], high: int, step: int) -> list[str] | None:
    part = [sample for sample in samples if step * STEP <= sample.at < (step + 1) * STEP]
    if not part:
        return None
    used, models, host = (statistics.mean(getattr(s, name) for s in part) for name in ("used", "models", "host"))
    bar = "#" * int(models / LIMIT * 50) + "o" * int(host / LIMIT * 50)
    bar = bar.ljust(50)
    mark = int(high / LIMIT * 50)
    figures = [f"{figure / MB:.0f}" for figure in (used, models, host)]
    return [
        f"{step * STEP:4.1f} s",
        *figures,
        str(part[-1].evictions),
        str(part[-1].failed),
        bar[:mark] + "|" + bar[mark:],
    ]


def _report(samples: Sequence[Sample], high: int, gauge: str) -> int:
    """Print the time line; return how many targets were missed."""
    heads = ["", "used MB", "models MB", "host MB", "evictions", "failed", "# models, o host, | high".ljust(51)]
    steps = [_line(samples, high, step) for step in range(int(samples[-1].at / STEP) + 1)]
    title = f"The host takes {GROWTH / MB:.0f} MB and frees it: {gauge} gauge, high {high / MB:.0f} MB"
    grid(title, [heads, *(step for step in steps if step)])
    longest, again, failed = above(samples, high), refill(samples), samples[-1].failed
    after = "never" if again is None else f"{again:.1f} s"
    claims = (
        (
            f"above high for at most two looks of the monitor: {longest:.2f} of {2 * INTERVAL:.2f} s",
            longest <= 2 * INTERVAL,
        ),
        (f"full again after it was freed: {after}", again is not None),
        (f"no failed request: {failed}", not failed),
    )
    for claim, met in claims:
        sys.stdout.write(f"{'PASS' if met else 'MISS'} {claim}\n")
    return sum(not met for _, met in claims)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it with each gauge; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--inside", nargs=2, metavar=("GROUP", "GAUGE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        group, gauge = options.inside
        enter(group)
        sys.stdout.write(json.dumps(_serve(gauge)))
        return 0
    missed = 0
    try:
        own_group()
        sys.stdout.write(f"{machine()}; limit 1 GiB, {MODELS} models, {RATE} requests a second\n")
        for _ in range(options.rounds):
            for gauge in ("process", "container"):
                high, samples = _run(gauge)
                missed += _report(samples, high, gauge)
    except Unavailable as why:
        sys.stdout.write(f"not run: {why}\n")
        return 0
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
