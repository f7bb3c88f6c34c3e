"""What runs in the processes of a crowd: workers that share one disk folder, and a sampler of its bytes.

Who starts, kills and judges them is ``tests/stress/test_crowd.py``. Each writes to a log of its own, a line at a time,
so that what it did is known however it ends.
"""

import contextlib
import hashlib
import json
import os
import random
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from modelcache import DiskTier, Failed, Fetched, MemoryTier, ModelCache, S3Source, Timeout
from tests.support.fakes import FakeGauge
from tests.support.racing import takings
from tests.support.s3 import Store, noise

MODELS = 100
BLOCK = 16 * 1024
KEY = "{model}.bin"
LOADERS = 2

Rows = list[tuple[str, str | None, int]]


def content(number: int) -> bytes:
    """Return the bytes of one model: 32 to 96 KiB."""
    return noise(BLOCK * (2 + number % 5), seed=number)


def digests() -> dict[str, str]:
    """Return the digest of each model's bytes, by its id."""
    return {f"m{number}": hashlib.sha256(content(number)).hexdigest() for number in range(MODELS)}


@attrs.frozen
class Loaded:
    """A model that knows where it was read from, and what was read."""

    name: str
    path: Path
    digest: str


def load(path: Path, name: str) -> Loaded:
    """Read a model."""
    return Loaded(name, path, hashlib.sha256(path.read_bytes()).hexdigest())


@attrs.frozen
class Settings:
    """How a crowd's caches are made.

    Attributes:
        folder: of the disk tier.
        budget: bytes.
        endpoint: URL of the store.
        bucket: ``s3://`` URL of the models.
        threads: of each worker.
        timeout: seconds that a request waits.
    """

    folder: str
    budget: int
    endpoint: str
    bucket: str
    threads: int
    timeout: float

    def to_json(self) -> str:
        """Return them as text."""
        return json.dumps(attrs.asdict(self))

    def cache(self, owner: str) -> ModelCache[Loaded]:
        """Return a cache that names itself to the store by its access key, and keeps few models in memory."""
        store = Store("crowd", self.endpoint, owner, "secret")
        return ModelCache(
            S3Source(self.bucket, key=KEY, session=store.session(), endpoint_url=self.endpoint),
            load,
            disk=DiskTier(self.folder, budget=self.budget, min_free=0),
            memory=MemoryTier(gauge=FakeGauge(limit=2**40), max_models=2),
            size_of=lambda name, path: 1_000,
            loaders=LOADERS,
            retry_after=0,
            timeout=self.timeout,
        )


class Log:
    """Lines of JSON, each written at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def __call__(self, kind: str, **fields: Any) -> None:
        """Write one line."""
        os.write(self._file, json.dumps({"kind": kind, **fields}).encode() + b"\n")


def until_told(run: Callable[[threading.Event], None]) -> None:
    """Call ``run`` with an event that is set once standard input ends."""
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    run(stop)


class Worker:
    """Uses models on many threads, some of them more often, and compares what it gets with what there should be.

    Args:
        settings: ``Settings`` as text.
        owner: its name.
        log: path of its log.
    """

    def __init__(self, settings: str, owner: str, log: str) -> None:
        self._settings = Settings(**json.loads(settings))
        self._owner = owner
        self._log = Log(log)
        self._digests = digests()

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop, and close the cache."""
        cache = self._settings.cache(self._owner)
        cache.on(Fetched, lambda event: self._log("fetched", model=event.model, time=event.time))
        cache.on(Failed, lambda event: self._log("failed", model=event.model, message=event.message))
        self._log("ready")
        threads = [
            threading.Thread(target=self._work, args=(cache, stop, f"{self._owner}/{number}"))
            for number in range(self._settings.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._log("closed", whole=cache.close(timeout=30))

    def _work(self, cache: ModelCache[Loaded], stop: threading.Event, seed: str) -> None:
        chance = random.Random(seed)  # noqa: S311 - no secret
        while not stop.is_set():
            name = f"m{min(int(chance.expovariate(1 / 20)), MODELS - 1)}"
            try:
                if chance.random() < 0.3:
                    self._check(cache.get(name), name, "got")
                else:
                    self._lease(cache, name, stop, chance.random() / 50)
            except Timeout as error:
                self._log("timeout", model=name, state=error.state)
            except BaseException as error:  # noqa: BLE001 - told to whoever judges
                self._log("wrong", text=f"{name}: {error!r}")
            else:
                self._log("use")

    def _lease(self, cache: ModelCache[Loaded], name: str, stop: threading.Event, seconds: float) -> None:
        with cache.lease(name) as model:
            self._check(model, name, "leased")
            stop.wait(seconds)
            self._check(load(model.path, name), name, "read again under its lease")

    def _check(self, model: Loaded, name: str, how: str) -> None:
        if (model.name, model.digest) != (name, self._digests[name]):
            self._log("corrupt", text=f"{name} {how}: {model}")


def excess(booked: tuple[Rows, Rows], taken: dict[str, int]) -> dict[str, int]:
    """Return by how many bytes whoever takes more exceeds what is booked: a published folder, or a process.

    What a process brings and removes is one sum: who sees a folder does not see which booking it is for.
    """
    owners = {name: owner or name for name, owner, _ in booked[0]}
    left: Counter[str] = Counter()
    for name, owner, size in [*booked[0], *booked[1]]:
        left[owner or name] += size
    for path, size in taken.items():
        _, name, *_ = path.split("/")  # below models/ a published folder, below tmp/ a process
        left[owners.get(name, name)] -= size
    return {name: -size for name, size in left.items() if size < 0}


class Sampler:
    """Samples the bytes that are allocated for models, and compares them with what is booked.

    Args:
        settings: ``Settings`` as text.
        log: path of its log.
    """

    def __init__(self, settings: str, log: str) -> None:
        self._settings = Settings(**json.loads(settings))
        self._folder = Path(self._settings.folder)
        self._ledger = f"file:{self._folder / 'ledger.sqlite3'}?mode=ro"
        self._log = Log(log)

    def run(self, stop: threading.Event) -> None:
        """Look every 5 ms until told to stop; files lie in more pieces where all is brought to the disk meanwhile."""
        samples = compared = most = 0
        threading.Thread(target=self._sync, args=(stop,), daemon=True).start()
        self._log("ready")
        while not stop.wait(0.005):
            before, taken = self._booked(), takings(self._folder)
            booked, found = self._booked(), sum(taken.values())
            samples, most = samples + 1, max(most, found)
            if booked == before and booked is not None:  # as nearly always: this was so at that moment
                compared += 1
                uncounted = excess(booked, taken)
            else:
                uncounted = {}
            if found > self._settings.budget or uncounted:
                self._log("over", bytes=found, uncounted=uncounted, booked=booked, taken=taken)
        self._log("closed", samples=samples, compared=compared, most=most)

    def _booked(self) -> tuple[Rows, Rows] | None:
        """Return what the ledger has of folders and holds: name or id, owner, bytes; None where it can't say now."""
        try:
            with contextlib.closing(sqlite3.connect(self._ledger, uri=True, timeout=5)) as connection:
                connection.execute("BEGIN")
                query = "SELECT name, owner, bytes FROM artifacts WHERE state != 4 ORDER BY name"
                folders: Rows = connection.execute(query).fetchall()
                return folders, connection.execute("SELECT id, owner, reserved FROM holds ORDER BY id").fetchall()
        except sqlite3.Error:
            return None

    def _sync(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            os.sync()
