"""Everything at once: 32 threads, 200 models, all verbs, settings that change, and what must hold at every moment."""

import faulthandler
import random
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from modelcache import Event, ModelCache, NoRoom, Timeout, Unloaded
from tests.support.fakes import DictSource
from tests.support.racing import Call, Counting, Model, allocated, descriptors, small_cache

MODELS = 200
THREADS = 32
LEAST = 600_000
MOST = 1_500_000


class Watch:
    """Samples the bytes allocated on disk, against the least budget in force around each sample.

    Attributes:
        samples: how many were taken.
        over: ``(bytes, budget)`` of those above.
    """

    def __init__(self, folder: Path, cache: ModelCache[Any], stop: threading.Event) -> None:
        self.samples = 0
        self.over: list[tuple[int, int]] = []
        self.settled = threading.Event()
        self._lock = threading.Lock()  # guards the sampled budget against the thread that changes it
        self._budget = MOST
        self._folder, self._cache, self._stop = folder, cache, stop

    def change(self, budget: int) -> None:
        """Assign a budget: a lower one holds once the assignment has returned."""
        with self._lock:
            self._budget = max(self._budget, budget)
            self._cache.disk.budget = budget

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._stop.wait(0.003):
            before = self._budget
            found = allocated(self._folder)
            if found > max(before, self._budget):
                self.over.append((found, before))
            self.samples += 1


class Crowd:
    """Threads that do everything to one cache.

    Attributes:
        wrong: what should never have been seen.
        refused: lookups that ended in an error that may be, by its name.
        done: verbs done.
    """

    def __init__(self, cache: ModelCache[Any], watch: Watch, stop: threading.Event) -> None:
        self.wrong: list[str] = []
        self.refused: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self._cache, self._watch, self._stop = cache, watch, stop

    def work(self, seed: int) -> None:
        """Do one verb after the other on models of which some are hot."""
        chance = random.Random(seed)  # noqa: S311 - no secret
        verbs = [self._get] * 8 + [self._lease] * 8 + [self._unload, self._prefetch, self._look, self._nest]
        verbs += [self._delete] if seed % 8 == 0 else []
        while not self._stop.is_set():
            name = f"m{min(int(chance.expovariate(1 / 30)), MODELS - 1)}"
            verb = chance.choice(verbs)
            try:
                verb(name, chance)
            except (NoRoom, Timeout) as error:
                self.refused[type(error).__name__] += 1
            except BaseException as error:
                self.wrong.append(f"{verb.__name__}: {error!r}")
                raise
            self.done[verb.__name__] += 1

    def _get(self, name: str, chance: random.Random) -> None:
        model = self._cache.get(name, timeout=10)
        if model.name != name:
            self.wrong.append(f"get of {name} gave {model.name}")

    def _lease(self, name: str, chance: random.Random) -> None:
        with self._cache.lease(name, timeout=10) as model:
            if model.name != name or model.unloads:
                self.wrong.append(f"lease of {name} gave {model.name}, unloaded {model.unloads} times")
            self._stop.wait(chance.random() / 500)
            if model.unloads:
                self.wrong.append(f"{name} was unloaded under a lease")

    def _nest(self, name: str, chance: random.Random) -> None:
        with self._cache.lease(name, timeout=10) as model, self._cache.lease(name, timeout=10) as same:
            if model is not same:
                self.wrong.append(f"two of {name} at once")

    def _unload(self, name: str, chance: random.Random) -> None:
        self._cache.unload(name)

    def _delete(self, name: str, chance: random.Random) -> None:
        self._cache.delete(name)

    def _prefetch(self, name: str, chance: random.Random) -> None:
        names = [f"m{chance.randrange(MODELS)}" for _ in range(4)]
        handle = self._cache.prefetch(names, tier=chance.choice(["memory", "disk"]))  # type: ignore[arg-type]
        if chance.random() < 0.5:
            handle.cancel()
        else:
            handle.wait(0.05)

    def _look(self, name: str, chance: random.Random) -> None:
        rows = self._cache.models()
        stats = self._cache.stats()
        if len({row.model for row in rows}) != len(rows) or stats.memory_reserved < 0:
            self.wrong.append(f"{rows} {stats}")

    def retune(self) -> None:
        """Change every setting again and again."""
        chance = random.Random(0)  # noqa: S311 - no secret
        while not self._stop.wait(0.02):
            which = chance.randrange(3)
            if which == 0:
                self._cache.memory.max_models = chance.randrange(20, 60)
            elif which == 1:
                self._cache.memory.budget = chance.randrange(1_000, 6_000) * 10
            else:
                self._watch.change(chance.choice([MOST, MOST, MOST, chance.randrange(LEAST, MOST)]))


def everything_at_once(folder: Path, seconds: float) -> None:
    """Run the crowd, and check what must hold."""
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=sys.__stderr__)
    threads, files = threading.active_count(), descriptors()
    done, told = Counting(), Counter[str]()
    source = DictSource()
    for number in range(MODELS):
        source.add(f"m{number}", size=500 + number * 37)
    stop = threading.Event()
    cache = small_cache(
        folder,
        source,
        done.load,
        unload=done.unload,
        size_of=lambda name, path: 1_000,
        memory={"max_models": 40},
        disk={"budget": MOST},
        loaders=4,
        retry_after=0,
    )
    cache.on(Event, lambda event: told.update([type(event).__name__]), background=True)
    cache.on(Unloaded, lambda event: None)
    watch = Watch(folder / "disk", cache, stop)
    crowd = Crowd(cache, watch, stop)
    calls = [Call(crowd.work, seed) for seed in range(THREADS)] + [Call(watch.run), Call(crowd.retune)]
    threading.Event().wait(seconds)
    stop.set()
    for call in calls:
        call.result(30)
    assert not crowd.wrong, crowd.wrong[:10]
    assert not watch.over, (len(watch.over), watch.samples, max(watch.over))
    assert cache.close(timeout=30) is True
    faulthandler.cancel_dump_traceback_later()
    assert not done.twice, "one model was loaded by two threads at once"
    assert len(done.unloaded) == len(done.loaded) == cache.stats().loads
    assert all(model.unloads == 1 for model in done.unloaded)
    assert len(set(map(id, done.unloaded))) == len(done.loaded)
    assert {verb for verb, count in crowd.done.items() if count} >= {"_get", "_lease", "_unload", "_prefetch", "_look"}
    assert watch.samples > seconds * 5
    assert not list((folder / "disk" / "tmp").iterdir())
    assert threading.active_count() <= threads
    assert descriptors() <= files
    assert sum(crowd.refused.values()) < sum(crowd.done.values()) / 100, (crowd.refused, crowd.done)
    left = small_cache(folder, DictSource(), done.load)
    for row in left.models():
        assert isinstance(left.get(row.model), Model)
    assert left.close()


@pytest.mark.timeout(90)
def test_everything_at_once_for_a_moment(tmp_path: Path) -> None:
    """32 threads on 200 models for three seconds: no deadlock, no wrong model, no budget exceeded, nothing left."""
    everything_at_once(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_everything_at_once(tmp_path: Path) -> None:
    """The same for half a minute."""
    everything_at_once(tmp_path, 30)
