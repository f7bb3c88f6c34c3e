"""A crowd: processes that share one disk folder and one byte budget, while some are killed and some stopped.

What must hold: nobody reads anything but what the store has, the budget holds at every moment, one download serves
all, and nothing of the dead stays. What one process does with many threads is ``test_everything_at_once.py``.
"""

import contextlib
import http.client
import itertools
import json
import random
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import attrs
import pytest

from tests.support.children import KILLED, start
from tests.support.crowd import BLOCK, LOADERS, MODELS, Settings, content, digests
from tests.support.proxy import Fault, FaultProxy, Request
from tests.support.racing import allocated
from tests.support.s3 import Bucket, Store
from tests.support.waiting import eventually

ROOM = 30
"""Models for which the disk budget is enough, at their mean size."""

OVERHEAD = 4 * 4096  # the published folder, artifact/ in it, the record, and the figures

WORKER = """
from tests.support.crowd import Worker, until_told
until_told(Worker(*sys.argv[1:]).run)
"""
SAMPLER = """
from tests.support.crowd import Sampler, until_told
until_told(Sampler(*sys.argv[1:]).run)
"""


@attrs.define
class Download:
    """One download, as the store saw it; times in seconds since the epoch.

    Attributes:
        owner: who downloaded.
        model: what.
        began: when it was asked for.
        ended: when the last byte was sent, or the client gone.
        whole: whether all of it was sent.
    """

    owner: str
    model: str
    began: float
    ended: float = 0.0
    whole: bool = False


class Till(FaultProxy):
    """A proxy that keeps account of downloads, each of which takes some time."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.downloads: list[Download] = []
        self.script(always=Fault(slow=1_000_000))

    def _relay(
        self, connection: socket.socket, request: Request, answer: http.client.HTTPResponse, fault: Fault
    ) -> None:
        if not request.reads_object or answer.status not in {200, 206}:
            super()._relay(connection, request, answer, fault)
            return
        owner = request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
        model = request.path.rpartition("/")[2].partition(".")[0]
        download = Download(owner, model, time.time())
        self.downloads.append(download)
        try:
            super()._relay(connection, request, answer, fault)
            download.whole = request.range is None
        finally:
            download.ended = time.time()


class Crowd:
    """Workers and a sampler, each a process of its own, and what becomes of them.

    Attributes:
        killed: when each worker that was killed was, by its name.
        paused: how many were stopped for some seconds.
    """

    def __init__(self, folder: Path, settings: Settings, workers: int) -> None:
        self.killed: dict[str, float] = {}
        self.paused = 0
        self._folder, self._settings = folder, settings
        self._chance = random.Random(0)  # noqa: S311 - no secret
        self._never = threading.Event()
        self._started = 0
        self._sampler = self._start(SAMPLER, "sampler", folder / "sampler")
        self._workers: dict[str, subprocess.Popen[str]] = {}
        for _ in range(workers):
            self._add()

    def _start(self, script: str, *arguments: object) -> "subprocess.Popen[str]":
        text = self._settings.to_json()
        names = arguments if script is WORKER else arguments[1:]
        return start(script, text, *names, watchdog=180, stdin=subprocess.PIPE)

    def _add(self) -> str:
        self._started += 1
        owner = f"worker{self._started}"
        self._workers[owner] = self._start(WORKER, owner, self._folder / owner)
        return owner

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in [*self._workers.values(), self._sampler]:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGCONT)
            child.kill()
            if child.stdout is not None and not child.stdout.closed:
                child.communicate()

    def said(self, owner: str, kind: str) -> list[dict[str, Any]]:
        """Return what a process has written of one kind."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._folder / owner).read_text().splitlines()
            return [line for line in map(json.loads, lines) if line["kind"] == kind]
        return []

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return what all processes have written of one kind."""
        owners = ["sampler", *(f"worker{number + 1}" for number in range(self._started))]
        return [line for owner in owners for line in self.said(owner, kind)]

    def rage(self, seconds: float) -> None:
        """Once all work: kill one every 2 s and start another, and stop one for 3 s, one after the other."""
        eventually(lambda: all(self.said(owner, "ready") for owner in [*self._workers, "sampler"]), timeout=60)
        stopped, until = "", 0.0
        begin = time.monotonic()
        kill = begin + 2
        while (now := time.monotonic()) < begin + seconds:
            if now >= kill:
                self._kill(self._chance.choice([owner for owner in self._workers if owner != stopped]))
                kill += 2
            if now >= until:
                self._resume(stopped)
                stopped, until = self._chance.choice(list(self._workers)), now + 3
                self._workers[stopped].send_signal(signal.SIGSTOP)
                self.paused += 1
            self._never.wait(max(min(kill, until, begin + seconds) - time.monotonic(), 0))
        self._resume(stopped)

    def _kill(self, owner: str) -> None:
        child = self._workers.pop(owner)
        self.killed[owner] = time.time()
        child.kill()
        child.communicate()
        assert child.returncode == KILLED, owner
        self._add()

    def _resume(self, owner: str) -> None:
        if owner in self._workers:
            self._workers[owner].send_signal(signal.SIGCONT)

    def finish(self) -> list[str]:
        """Let all end; return what they wrote to their outputs, which is nothing where all is well."""
        for child in self._workers.values():
            assert child.stdin is not None
            child.stdin.close()
            child.stdin = None
        said = []
        for owner, child in self._workers.items():
            out, err = child.communicate(timeout=90)
            closed = [line["whole"] for line in self.said(owner, "closed")]
            if out or err or child.returncode or closed != [True]:
                said.append(f"{owner} ended with {child.returncode}, closed {closed}: {out}{err}")
        self._sampler.communicate(timeout=30)
        return said


@pytest.fixture
def till(s3_moto: Store) -> Iterator[Till]:
    """Give a proxy before moto that keeps account of downloads."""
    with Till(s3_moto.endpoint) as proxy:
        yield proxy


def crowd(folder: Path, bucket: Bucket, till: Till, seconds: float, workers: int, threads: int) -> None:
    """Run a crowd, judge it, and print one line of figures."""
    for number in range(MODELS):
        bucket.put(f"m{number}.bin", content(number))
    budget = ROOM * (4 * BLOCK + OVERHEAD)
    settings = Settings(str(folder / "disk"), budget, till.endpoint, bucket.url, threads, timeout=15)
    with Crowd(folder, settings, workers) as some:
        some.rage(seconds)
        said = some.finish()
        lost, twice, unexplained = account(till.downloads, some)
        (sampled,) = some.said("sampler", "closed")
        over, uses = some.all("over"), len(some.all("use"))
        timeouts = Counter(line["state"] for line in some.all("timeout"))
        wrong = [line for kind in ("corrupt", "wrong", "failed") for line in some.all(kind)]
    print(  # noqa: T201 - the figures
        f"\ncrowd: {workers} processes of {threads} threads, {seconds} s, {len(some.killed)} killed, {some.paused} "
        f"stopped: {uses} uses, {len(till.downloads)} downloads ({sum(at.whole for at in till.downloads)} whole) for "
        f"{len(some.all('fetched'))} fetches, {len(lost)} lost with their process, {len(unexplained)} unexplained, "
        f"{len(twice)} doubled; {len(wrong)} wrong; {len(over)} of {sampled['samples']} samples over {budget} bytes "
        f"(most {sampled['most']}), or over what is booked ({sampled['compared']} compared); timeouts {dict(timeouts)}"
    )
    assert not wrong, wrong[:10]
    assert not over, over[:10]
    assert not twice, twice[:10]
    assert not unexplained, unexplained[:10]
    assert not said, "\n".join(said)
    assert sampled["samples"] > seconds * 10
    assert sampled["compared"] > seconds * 3
    assert uses > seconds * 3
    assert sum(timeouts.values()) < uses / 20, timeouts
    last_start(settings, till)


def account(
    downloads: list[Download], some: Crowd
) -> tuple[list[Download], list[tuple[Download, Download]], list[str]]:
    """Compare what the store saw with what the workers say that they fetched.

    Returns:
        Whole downloads that nobody told of since their process was killed; pairs of processes that were at one model
        at once; and what no kill explains.
    """
    lost: list[Download] = []
    unexplained: list[str] = []
    spans: list[Download] = []
    for owner in sorted({at.owner for at in downloads}):
        told = [(line["model"], line["time"]) for line in some.said(owner, "fetched")]
        died = some.killed.get(owner)
        for at in sorted((at for at in downloads if at.owner == owner), key=lambda at: at.began):
            later = [pair for pair in told if pair[0] == at.model and pair[1] >= at.began]
            if at.whole and later:
                told.remove(later[0])
                at.ended = later[0][1]  # from then on it is published
            elif died is not None:
                lost += [at] if at.whole else []
                at.ended = died
            else:
                unexplained.append(f"nobody told of {at}")
            spans.append(at)
        unexplained += [f"{owner} told of {pair} without a download" for pair in told]
        if sum(at.owner == owner for at in lost) > LOADERS:
            unexplained.append(f"{owner} had more to lose than it can fetch at once")
    spans.sort(key=lambda at: (at.model, at.began))
    pairs = itertools.pairwise(spans)
    twice = [(one, two) for one, two in pairs if one.model == two.model and two.began < one.ended]
    return lost, twice, unexplained


def last_start(settings: Settings, till: Till) -> None:
    """Start once more, and check that nothing of the dead is left."""
    disk, before = Path(settings.folder), len(till.downloads)
    with settings.cache("last") as cache:
        rows = cache.models()
        assert cache.stats().disk_used == allocated(disk) <= settings.budget
        assert len(list((disk / "tmp").iterdir())) == 1  # its own
        for row in rows:
            assert cache.get(row.model).digest == digests()[row.model]
        assert len(till.downloads) == before
        cache.disk.budget = 1
        assert [row for row in cache.models() if row.tier == "disk"] == []  # no lease of the dead keeps one
    assert not list((disk / "tmp").iterdir())
    with contextlib.closing(sqlite3.connect(disk / "ledger.sqlite3")) as connection:
        for table in ("holds", "processes"):
            assert connection.execute(f"SELECT * FROM {table}").fetchall() == [], table  # noqa: S608 - no input


@pytest.mark.timeout(150)
def test_crowd_for_a_moment(tmp_path: Path, s3_moto: Store, till: Till) -> None:
    """Three processes of 6 threads for six seconds: no wrong byte, no budget exceeded, one download for all."""
    crowd(tmp_path, s3_moto.bucket(), till, 6, workers=3, threads=6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_crowd(tmp_path: Path, s3_moto: Store, till: Till) -> None:
    """Eight processes of 16 threads for a minute."""
    crowd(tmp_path, s3_moto.bucket(), till, 60, workers=8, threads=16)
