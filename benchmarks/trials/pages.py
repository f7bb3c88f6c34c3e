"""Pages that are shared, cached or mapped: what a process has resident of them, and what a container is charged."""

import contextlib
import gc
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cgroup import enter
from benchmarks.trials.measuring import MB, SMALL, rollup, trial


@trial
def mapped() -> list[list[int]]:
    """Map 300 MB of weights: resident and anonymous bytes once loaded, used by half, used, and dropped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.npy")
        np.save(path, np.ones(300 * MB // 8))
        before = rollup()

        def now() -> list[int]:
            after = rollup()
            return [after[name] - before[name] for name in ("Rss", "Anonymous")]

        weights = np.load(path, mmap_mode="c")
        steps = [now()]
        weights[: len(weights) // 2].sum()
        steps.append(now())
        weights.sum()
        steps.append(now())
        weights[: len(weights) // 2] += 1  # mode "c": a private copy of the pages that are written
        steps.append(now())
        del weights
        return [*steps, now()]


@trial
def forked(kind: str) -> list[float]:
    """Load 200 MB, fork four workers that read it: each one's Rss, Pss, and what the fork copied for it."""
    model: Any
    if kind == "array":
        model = np.ones(200 * MB // 8)
    elif kind == "floats":
        model = [float(number) for number in range(6_000_000)]
    else:
        model = [[number] for number in range(2_000_000)]
    if kind == "frozen":
        gc.freeze()
    children = [_fork(lambda: _read(model, kind)) for _ in range(4)]
    figures = [rollup(child) for child in children]
    _end(children)
    return [sum(figure[name] for figure in figures) / 4 for name in ("Rss", "Pss", "Private_Dirty")]


def _read(model: Any, kind: str) -> None:
    if kind == "array":
        model.sum()
    elif kind == "floats":
        sum(model)
    else:
        gc.collect()


def _fork(work: Callable[[], object]) -> int:
    """Return a child that has done its work, and keeps what that returned."""
    done = os.pipe()
    child = os.fork()
    if not child:
        kept = work()
        os.write(done[1], b".")
        time.sleep(60)
        del kept
        os._exit(0)
    os.close(done[1])
    os.read(done[0], 1)
    return child


def _end(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@trial
def gauges(group: str) -> dict[str, list[int]]:
    """Load 200 MB, fork two workers that read it and load 50 MB each; 100 MB on a tmpfs, 300 MB of page cache.

    Returns: by how much each gauge rose, and its limit.
    """
    from modelcache.gauges import ContainerGauge, HostGauge, ProcessGauge  # noqa: PLC0415 - slow

    enter(group)
    kinds: dict[str, Any] = {
        "ProcessGauge()": ProcessGauge(),
        "ProcessGauge(children=True)": ProcessGauge(children=True, clock=itertools.count().__next__),
        "ContainerGauge()": ContainerGauge(),
        "HostGauge()": HostGauge(),
    }
    before = {name: gauge.read().used for name, gauge in kinds.items()}
    model = np.ones(200 * MB // 8)
    children = [_fork(lambda: (model.sum(), np.ones(50 * MB // 8))) for _ in range(2)]
    with _written("/dev/shm", 100), _written(tempfile.gettempdir(), 300):  # noqa: S108 - a tmpfs
        after = {name: gauge.read() for name, gauge in kinds.items()}
    _end(children)
    return {name: [after[name].used - before[name], after[name].limit] for name in kinds}


@contextlib.contextmanager
def _written(where: str, megabytes: int) -> Iterator[None]:
    """Write a file and read it, so that it is cached."""
    block = b"x" * MB
    with tempfile.NamedTemporaryFile(dir=where) as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        while file.read(MB):
            pass
        yield


@trial
def within(group: str, where: str, megabytes: str) -> list[dict[str, int]]:
    """Write and read a file from within a cgroup, then take 100 MB: what is charged there, and what our gauge reads."""
    from modelcache.gauges import ProcessGauge  # noqa: PLC0415 - slow, and in nobody else's figures

    enter(group)
    gauge = ProcessGauge()
    start = gauge.read().used
    names = ("total_cache", "total_shmem")

    def now() -> dict[str, int]:
        lines = Path(group, "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        charged = int(Path(group, "memory.usage_in_bytes").read_text())
        used = gauge.read().used - start
        return {name: stat[name] for name in names} | {"charged": charged, "gauge": used}

    with _written(where, int(megabytes)):
        steps = [now()]
        model = np.ones(100 * MB // 8)
        steps.append(now())
        del model
    return steps


@trial
def huge() -> list[int]:
    """Write 8 bytes in each 64 KB of 300 MB: resident bytes, and those of them in huge pages."""
    before = rollup()
    model = np.empty(300 * MB // 8)
    model[:: SMALL // 8] = 1.0
    after = rollup()
    del model
    return [after["Rss"] - before["Rss"], after["AnonHugePages"] - before["AnonHugePages"]]
