"""One memory limit, four workers, one of which turns hot: who has the room that the others do not use?

    python -m benchmarks.shared_limit [--rows agreement,container,quarter] [--even 60] [--hot 120]

gunicorn with four workers in a memory cgroup of 1 GiB, each with a cache of its own over one disk folder that has all
models. For a minute each worker gets as many requests as any other; then the first gets nine of twelve. Each has its
own favourites, as behind a balancer that hashes. The same requests come at the same times in each row:

- agreement: the default; the container's gauge, and all four agree on whose model goes;
- container: the container's gauge, and each evicts its own;
- quarter: each by its own gauge, with a fourth of ``high``, as one had to do without an agreement.

Reload seconds are what requests waited for models that had been in memory before. Where nobody turns hot, a quarter
each is as good.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import queue
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from benchmarks.cgroup import Group, Unavailable, own_group
from benchmarks.grid import grid
from benchmarks.report import machine
from modelcache import DiskTier, Evicted, LocalSource, MemoryTier, ModelCache, gauges
from modelcache.policies import Policy

LIMIT = 2**30
WORKERS = 4
THREADS = 4  # of each worker, and connections to it
MODELS = 120
SMALLEST, LARGEST = 4 * 10**6, 48 * 10**6
RATE = 12.0  # requests a second, to all workers
HOT = 9 / 12  # share of them that the first worker gets once it is hot
SKEW = 0.9
ROWS = ("agreement", "container", "quarter")
MB = 1e6
_PATIENCE = 90.0  # seconds until a server answers, or an answer comes
_SAMPLE = 0.02


class _Alone(gauges.ContainerGauge):
    """The container's gauge, of which nobody is told that it is shared."""

    @property
    def shared(self) -> str | None:
        """None."""
        return None


def make_memory(row: str, policy: str | Policy = "worth") -> MemoryTier:
    """Return the memory tier of one worker."""
    if row == "agreement":
        return MemoryTier(policy=policy)
    if row == "container":
        return MemoryTier(policy=policy, gauge=_Alone())
    return MemoryTier(policy=policy, gauge=gauges.ProcessGauge(), high=f"{80 // WORKERS}%")


def load(path: Path) -> Any:
    """Decode a model's weights: for a moment its bytes twice, and some milliseconds for each megabyte."""
    with (path / "weights.z").open("rb") as file:
        size = int.from_bytes(file.read(8))
        plain = zlib.decompress(file.read(), bufsize=size)
    return np.frombuffer(plain, dtype=np.float32).copy()


class App:
    """One worker: a WSGI application that sums a part of a model, or tells its figures."""

    def __init__(self, row: str, folder: str) -> None:
        self._cache = ModelCache(
            LocalSource(Path(folder, "models")), load, disk=DiskTier(Path(folder, "tier"), min_free=0),
            memory=make_memory(row),
        )  # fmt: skip
        self._given = 0
        self._cache.on(Evicted, self._count)

    def _count(self, event: Evicted) -> None:
        self._given += event.reason == "another process"

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer ``/pid``, ``/stats`` or ``/<model>``."""
        asked = environ["PATH_INFO"].strip("/")
        status = "200 OK"
        if asked == "pid":
            answer: Any = os.getpid()
        elif asked == "stats":
            stats = self._cache.stats()
            names = ("hits", "misses", "loads", "reloads", "reload_seconds", "evictions", "memory_models")
            answer = {**{name: getattr(stats, name) for name in names}, "given": self._given}
        else:
            try:
                with self._cache.lease(asked) as model:
                    answer = float(model[:65_536].sum())
            except Exception as error:  # noqa: BLE001 - counted by who asks, whatever it is
                status, answer = "500 Error", f"{type(error).__name__}: {error}"
        body = json.dumps(answer).encode()
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def make_app() -> App:
    """Return what gunicorn serves."""
    return App(os.environ["ROW"], os.environ["FOLDER"])


def sizes() -> dict[str, int]:
    """Return the bytes that each model takes: many small, few large."""
    shares = ((number * 61_803 % 100_000 + 0.5) / 100_000 for number in range(MODELS))
    return {
        f"m{number:03}": int(1 / (1 / SMALLEST - share * (1 / SMALLEST - 1 / LARGEST)))
        for number, share in enumerate(shares)
    }


def build(folder: Path) -> None:
    """Write the models, and bring all into the disk tier."""
    levels = np.linspace(-1, 1, 16, dtype=np.float32)
    for number, (model, size) in enumerate(sizes().items()):
        target = folder / "models" / model
        target.mkdir(parents=True)
        codes = np.random.default_rng(number).integers(0, 16, size // 4, dtype=np.uint8)
        plain = levels[codes].tobytes()
        (target / "weights.z").write_bytes(len(plain).to_bytes(8) + zlib.compress(plain, 1))
    source = LocalSource(folder / "models")
    with ModelCache(source, lambda _: 0, disk=DiskTier(folder / "tier", min_free=0)) as cache:
        cache.prefetch(sizes(), tier="disk").wait(600)
        assert cache.stats().fetches == MODELS, cache.stats()


@attrs.frozen
class Asked:
    """One request: seconds after the start, to which worker, for which model."""

    at: float
    worker: int
    model: str


def schedule(even: float, hot: float, seed: int = 7) -> list[Asked]:
    """Return all requests in their order."""
    chance = random.Random(seed)  # noqa: S311 - load, not secrets
    favourites = [chance.sample(sorted(sizes()), MODELS) for _ in range(WORKERS)]
    weights = list(itertools.accumulate(1 / rank**SKEW for rank in range(1, MODELS + 1)))
    asked, at = [], 0.0
    while (at := at + chance.expovariate(RATE)) < even + hot:
        shares = [1.0] * WORKERS if at < even else [HOT, *[(1 - HOT) / (WORKERS - 1)] * (WORKERS - 1)]
        (worker,) = chance.choices(range(WORKERS), shares)
        (model,) = chance.choices(favourites[worker], cum_weights=weights)
        asked.append(Asked(at, worker, model))
    return asked


class Client:
    """Connections that stay with one worker each.

    Args:
        port: where gunicorn listens.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.lines: list[list[http.client.HTTPConnection]] = []

    def connect(self) -> None:
        """Open connections until each worker has ``THREADS`` of them."""
        found: dict[int, list[http.client.HTTPConnection]] = {}
        end = time.monotonic() + _PATIENCE
        while len(found) < WORKERS or any(len(line) < THREADS - 1 for line in found.values()):
            assert time.monotonic() < end, f"workers and connections: {[len(line) for line in found.values()]}"
            line = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE)
            try:
                pid = int(ask(line, "pid")[1])
            except OSError:  # it does not listen yet
                time.sleep(0.1)
                continue
            if len(found.setdefault(pid, [])) < THREADS - 1:  # one thread stays for those that try
                found[pid].append(line)
            else:
                line.close()
        self.lines = list(found.values())

    def stats(self) -> list[dict[str, float]]:
        """Return the figures of each worker."""
        return [json.loads(ask(line[0], "stats")[1]) for line in self.lines]


def ask(line: http.client.HTTPConnection, what: str) -> tuple[int, str]:
    """Return status and text of an answer."""
    line.request("GET", f"/{what}")
    answer = line.getresponse()
    return answer.status, answer.read().decode()


@attrs.define
class Result:
    """What came of one row; bytes and seconds."""

    row: str
    kills: int = 0
    failed: list[str] = attrs.Factory(list)
    peak: int = 0
    waits: list[float] = attrs.Factory(list)
    hot_waits: list[float] = attrs.Factory(list)
    stats: list[dict[str, float]] = attrs.Factory(list)


@contextlib.contextmanager
def serving(row: str, folder: Path, group: Group, port: int) -> Iterator[None]:
    """Run gunicorn in a cgroup until the block ends."""
    command = [sys.executable, "-m", "gunicorn", "benchmarks.shared_limit:make_app()", f"--bind=127.0.0.1:{port}"]
    command += [f"--workers={WORKERS}", "--worker-class=gthread", f"--threads={THREADS}", "--keep-alive=600"]
    command += ["--timeout=120", "--graceful-timeout=5", "--no-control-socket", "--log-level=error"]
    join = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group.path)]
    environment = {
        **os.environ,
        "ROW": row,
        "FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with subprocess.Popen([*join, *command], env=environment) as server:
        try:
            yield
        finally:
            server.terminate()


class Load:
    """Sends requests to workers at their times, each worker's by its own connections.

    Args:
        result: takes what came of them.
        lines: the connections of each worker.
        even: seconds after which the first worker is hot.
    """

    def __init__(self, result: Result, lines: list[list[http.client.HTTPConnection]], even: float) -> None:
        self._result = result
        self._lines = lines
        self._even = even
        self._queues: list[queue.SimpleQueue[Asked | None]] = [queue.SimpleQueue() for _ in lines]
        self._start = 0.0

    def run(self, asked: list[Asked]) -> None:
        """Send all, and wait for the answers."""
        for one in asked:
            self._queues[one.worker].put(one)
        for waiting, lines in zip(self._queues, self._lines, strict=True):
            for _ in lines:
                waiting.put(None)
        self._start = time.monotonic()
        pairs = zip(self._queues, self._lines, strict=True)
        threads = [threading.Thread(target=self._send, args=(line, todo)) for todo, lines in pairs for line in lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, line: http.client.HTTPConnection, todo: "queue.SimpleQueue[Asked | None]") -> None:
        while (one := todo.get()) is not None:
            time.sleep(max(self._start + one.at - time.monotonic(), 0))
            try:
                status, text = ask(line, one.model)
            except (OSError, http.client.HTTPException) as error:  # also where its worker was killed
                status, text = 0, repr(error)
                line.close()
            wait = time.monotonic() - self._start - one.at
            (self._result.waits if one.at < self._even else self._result.hot_waits).append(wait)
            if status != http.HTTPStatus.OK:
                self._result.failed.append(text[:300])


def serve(row: str, folder: Path, asked: list[Asked], even: float, port: int) -> Result:
    """Send all requests to four workers in a cgroup of their own."""
    result, stop = Result(row), threading.Event()
    with Group("shared", LIMIT) as group, serving(row, folder, group, port):
        client = Client(port)
        client.connect()

        def watch() -> None:
            while not stop.wait(_SAMPLE):
                result.peak = max(result.peak, group.used())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            Load(result, client.lines, even).run(asked)
            with contextlib.suppress(OSError, http.client.HTTPException):
                result.stats = client.stats()
        finally:
            stop.set()
            watcher.join()
        result.kills = group.kills()
    return result


def reload_seconds(result: Result) -> float:
    """Return what requests waited, at all workers, for models that had been in memory before."""
    return sum(stats["reload_seconds"] for stats in result.stats)


def line_of(result: Result, limit: int, peer: Result | None) -> list[str]:
    """Return a row of the table; ``peer``: whose reload seconds it is compared with."""
    total = {name: sum(stats[name] for stats in result.stats) for name in (result.stats or [{}])[0]}
    hot = result.stats[0] if result.stats else {}
    quick = sorted(result.hot_waits)
    return [
        result.row,
        str(result.kills),
        str(len(result.failed)),
        f"{result.peak / MB:.0f}",
        f"{(result.peak - 0.8 * limit) / MB:.0f}",
        f"{total.get('hits', 0) / max(total.get('hits', 0) + total.get('misses', 0), 1):.1%}",
        f"{total.get('reloads', 0):.0f}",
        f"{reload_seconds(result):.1f}",
        f"{reload_seconds(result) / reload_seconds(peer):.2f}" if peer is not None and reload_seconds(peer) else "-",
        f"{hot.get('reload_seconds', 0):.1f}",
        f"{hot.get('memory_models', 0) / MB:.0f}",
        f"{total.get('given', 0):.0f} of {total.get('evictions', 0):.0f}",
        f"{1000 * sum(quick) / max(len(quick), 1):.0f}",
        f"{1000 * quick[int(len(quick) * 0.99)]:.0f}" if quick else "-",
    ]


_HEADS = (
    "",
    "OOM kills",
    "failed",
    "peak MB",
    "above high MB",
    "hit ratio",
    "reloads",
    "reload s",
    "x quarter",
    "of the hot one",
    "its models MB",
    "gave way",
    "mean wait ms (hot)",
    "p99",
)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas")
    parser.add_argument("--even", type=float, default=60.0, help="seconds before the first worker turns hot")
    parser.add_argument("--hot", type=float, default=120.0, help="seconds after that")
    options = parser.parse_args(arguments)
    try:
        own_group()
    except Unavailable as why:
        sys.stdout.write(f"not run: {why}\n")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="modelcache-shared-"))
    try:
        build(folder)
        asked = schedule(options.even, options.hot)
        hot = sum(one.worker == 0 for one in asked if one.at >= options.even)
        sys.stdout.write(
            f"{machine()}; {MODELS} models of {sum(sizes().values()) / MB:.0f} MB; {WORKERS} workers in "
            f"{LIMIT / MB:.0f} MB, high {0.8 * LIMIT / MB:.0f}; {len(asked):,} requests, {hot:,} to the hot one\n"
        )
        results = []
        for row in options.rows.split(","):
            try:
                results.append(serve(row, folder, asked, options.even, free_port()))
            except Unavailable as why:
                sys.stdout.write(f"not run: {why}\n")
                return 0
            sys.stdout.write(f"served by {row}\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    peer = next((each for each in results if each.row == ROWS[-1]), None)
    grid(
        f"{options.even:.0f} s even, {options.hot:.0f} s hot",
        [_HEADS, *(line_of(each, LIMIT, peer) for each in results)],
    )
    for result in results:
        for text in sorted(set(result.failed))[:3]:
            sys.stdout.write(f"{result.row}: {text}\n")
    bad = sum(result.kills + len(result.failed) for result in results if result.row == "agreement")
    sys.stdout.write(f"{'MISS' if bad else 'PASS'} agreement: no OOM kill, no failed request\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
