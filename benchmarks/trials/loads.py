"""What a load takes while it runs, how that is measured, and what an eviction brings back."""

import gc
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.trials.measuring import MB, baseline, resident, trial


def reset_peak() -> float:
    """Set the high-water mark of resident memory to what is resident now; return the seconds that it took."""
    start = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    return time.perf_counter() - start


def peak() -> int:
    """Return the high-water mark of resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@trial
def resetting(megabytes: str) -> list[float]:
    """Set the high-water mark back, with that much resident: the median seconds; then of reading it."""
    held = np.ones(int(megabytes) * MB // 8)
    resets = sorted(reset_peak() for _ in range(101))
    reads = []
    for _ in range(101):
        start = time.perf_counter()
        peak()
        reads.append(time.perf_counter() - start)
    del held
    return [resets[50], sorted(reads)[50]]


@trial
def side_by_side() -> int:
    """Load 1 MB while another thread takes 200 MB for a moment: the peak that the load is charged with."""
    before = baseline()
    reset_peak()
    other = threading.Thread(target=lambda: np.ones(200 * MB // 8).sum())
    other.start()
    model = np.ones(MB // 8)
    other.join()
    charged = peak() - before
    del model
    return charged


@trial
def loading(how: str) -> list[int]:
    """Load 300 MB of weights in some way: what it adds once loaded, and at its peak."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.npy")
        if how == "np.load":
            np.save(path, np.ones(300 * MB // 8))
        else:
            path.write_bytes(pickle.dumps(np.ones(300 * MB // 8), protocol=4))
        before = baseline()
        reset_peak()
        if how == "np.load":
            model = np.load(path)
        elif how == "pickle.load":
            with path.open("rb") as file:
                model = pickle.load(file)  # noqa: S301 - our own bytes
        else:
            model = pickle.loads(path.read_bytes())  # noqa: S301 - our own bytes
        figures = [resident() - before, peak() - before]
        del model
        return figures


class _Ring:
    """Weights in a reference cycle: a bound method in an attribute of its own object."""

    def __init__(self, weights: object) -> None:
        self.weights = weights
        self.call = self.run

    def run(self) -> object:
        return self.weights


_KINDS: dict[str, Callable[[object], object]] = {
    "plain": lambda weights: weights,
    "ring": _Ring,
    "inside": lambda weights: {"parts": [_Ring(weights)]},
    "frozen": _Ring,
}


@trial
def held(kind: str, keep: str) -> list[int]:
    """Evict eight models of 32 MB, of which callers of ``get`` still hold some: promised, freed, collections."""
    from modelcache import MemoryTier, ModelCache, Reclaimed  # noqa: PLC0415 - slow, and in nobody else's figures

    told: list[Reclaimed] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(8):
            model = Path(folder, "models", f"m{number}")
            model.mkdir(parents=True)
            (model / "size").write_text("32_000_000")
        cache = ModelCache(
            Path(folder, "models"),
            load=lambda path: _KINDS[kind](np.ones(int((path / "size").read_text()) // 8)),
            memory=MemoryTier(interval=1000.0),
        )
        with cache:
            cache.on(Reclaimed, told.append)
            models = [cache.get(f"m{number}") for number in range(8)]
            del models[int(keep) :]
            if kind == "frozen":
                gc.freeze()
            cache.memory.high = "1 MiB"
    return [sum(event.promised for event in told), sum(event.freed for event in told), sum(e.collected for e in told)]
