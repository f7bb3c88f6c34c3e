"""Three hundred models on disk, built once, with what each really takes in memory; and the requests for them.

The folder is reused between runs. How one model is made is ``models``.
"""

import argparse
import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from modelcache import DiskTier, LocalSource, ModelCache, heap

SMALLEST, LARGEST = 5_000_000, 120_000_000
_KINDS = ("array", "coded", "mapped", "forest", "objects")
_SKEW = 0.9  # the model at rank n is asked for 1/n^0.9 times as often as the first
_DRIFT = 100  # requests after which one model becomes as popular as another
_STEPS = 100_000  # to spread sizes without a pattern


@attrs.frozen
class Facts:
    """What one model really takes, in bytes, each measured alone in a process.

    Attributes:
        artifact: size of its files.
        resident: what it adds once it is loaded, and all of it was used.
        peak: what it adds at most while it loads.
    """

    artifact: int
    resident: int
    peak: int


class Store:
    """A folder with ``count`` models: ``models/<id>/`` is the source, ``tier/`` a disk tier that has them all.

    Args:
        folder: where; made where it is missing.
        count: how many models.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder / f"{count}"
        self.models = self.folder / "models"
        self.tier = self.folder / "tier"
        self._count = count

    def ids(self) -> list[str]:
        """Return the ids, each of which begins with its kind."""
        return [f"{_KINDS[number % len(_KINDS)]}-{number:03}" for number in range(self._count)]

    def size(self, number: int) -> int:
        """Return about how many bytes a model takes: many small ones, few large ones."""
        share = (number * 61_803 % _STEPS + 0.5) / _STEPS
        return int(1 / (1 / SMALLEST - share * (1 / SMALLEST - 1 / LARGEST)))

    def build(self, say: Callable[[str], object]) -> None:
        """Write, measure and fetch what is not there yet."""
        if (self.folder / "facts.json").exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        _run("make", self)
        say("made")
        _run("measure", self)
        say("measured")
        _run("fetch", self)
        say("fetched")
        (self.folder / "measured.json").rename(self.folder / "facts.json")

    def facts(self) -> dict[str, Facts]:
        """Return what each model takes."""
        return {model: Facts(**row) for model, row in json.loads((self.folder / "facts.json").read_text()).items()}

    def make(self) -> None:
        """Write all models."""
        from benchmarks.wall import models  # noqa: PLC0415 - scikit-learn, which the parent does without

        for number, model in enumerate(self.ids()):
            folder = self.models / model
            folder.mkdir(parents=True)
            models.make(folder, model.partition("-")[0], self.size(number), number)

    def measure(self) -> None:
        """Load and use each model alone, in a child of its own: a heap that others left would hide what it takes."""
        from benchmarks.wall import models  # noqa: PLC0415 - as above

        warm = next(model for model in self.ids() if model.startswith("forest"))
        models.use(warm, models.load(self.models / warm, warm), random.Random(0))  # noqa: S311 - it only imports what it needs
        facts = {}
        for model in self.ids():
            result = self.folder / "measured.one"
            if (pid := os.fork()) == 0:
                result.write_text(json.dumps(attrs.asdict(self._measure(model, models.load))))
                os._exit(0)
            os.waitpid(pid, 0)
            facts[model] = json.loads(result.read_text())
            result.unlink()
        (self.folder / "measured.json").write_text(json.dumps(facts))

    def _measure(self, model: str, load: Callable[[Path, str], Any]) -> Facts:
        folder = self.models / model
        artifact = sum(path.stat().st_size for path in folder.iterdir())
        _settle()
        anonymous, pages = resident("RssAnon"), resident("RssFile")
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
        value = load(folder, model)  # noqa: F841 - it stays while it is measured
        code = resident("RssFile") - pages  # of libraries, which a fork leaves to be mapped again
        peak = resident("VmHWM") - anonymous - pages - code
        _settle()
        stays = resident("RssAnon") - anonymous + (artifact if model.startswith("mapped") else 0)
        return Facts(artifact, stays, max(peak, stays))

    def fetch(self) -> None:
        """Bring all into the disk tier."""
        source = LocalSource(self.models)
        with ModelCache(source, lambda _: 0, disk=DiskTier(self.tier, min_free=0)) as cache:
            cache.prefetch(self.ids(), tier="disk").wait(600)
            assert cache.stats().fetches == self._count, cache.stats()

    def forget_pages(self) -> None:
        """Drop all files from the page cache, so that each row pays for its own, and they are charged to its group."""
        for path in itertools.chain(self.models.rglob("*"), self.tier.rglob("*")):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)


def resident(field: str = "VmRSS", pid: int | str = "self") -> int:
    """Return a figure of ``/proc/<pid>/status``, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _settle() -> None:
    gc.collect()
    heap.give_back()


def requests(models: list[str], count: int, seed: int = 7) -> list[str]:
    """Return the ids asked for, in order: skewed, and what is popular drifts."""
    chance = random.Random(seed)  # noqa: S311 - load, not secrets
    ranked = sorted(models)
    chance.shuffle(ranked)
    weights = list(itertools.accumulate(1 / rank**_SKEW for rank in range(1, len(ranked) + 1)))
    asked: list[str] = []
    while len(asked) < count:
        asked += chance.choices(ranked, cum_weights=weights, k=min(_DRIFT, count - len(asked)))
        (to,) = chance.choices(range(len(ranked)), cum_weights=weights)
        ranked.insert(to, ranked.pop(chance.randrange(len(ranked))))
    return asked


def _run(step: str, store: Store) -> None:
    """Run one step in a process of its own: what it leaves in memory would falsify the next."""
    arguments = [step, str(store.folder.parent), store.folder.name]
    subprocess.run([sys.executable, "-m", "benchmarks.wall.store", *arguments], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("make", "measure", "fetch"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    getattr(Store(options.folder, options.count), options.step)()
