"""``docs/examples/flask_app.py`` under gunicorn: two workers with threads, against an S3 store.

Every server here is ended with SIGTERM, and must then leave no process and no temporary file, whatever the test did.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import pickle
import signal
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import psutil
import pytest

from tests.support.processes import free_port, running, wait_until
from tests.support.proxy import FaultProxy
from tests.support.s3 import Bucket, Store, tar_gz
from tests.support.waiting import eventually

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
MISSING = [name for name in ("flask", "gunicorn", "joblib") if importlib.util.find_spec(name) is None]
MODELS = [f"team/m{number}" for number in range(6)]
WORKERS = 2

MODULE = '''
class Model:
    """Adds 1000 times its number; a row that is the path of a FIFO makes it wait until somebody has written there."""

    def __init__(self, number):
        self.number = number

    def predict(self, rows):
        for row in rows:
            if isinstance(row, str):
                with open(row) as gate:
                    gate.read()
        return [1000 * self.number + (0 if isinstance(row, str) else row) for row in rows]
'''

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(60),  # with the start of a store
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

Send = Callable[..., tuple[int, Any]]


class Client:
    """One kept-alive connection, and so one worker."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self.headers: Any = {}

    def begin(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request and return the answer, of which only the headers are here."""
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        self.headers = answer.headers
        return answer

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request and return status and JSON."""
        answer = self.begin(method, path, body)
        content = answer.read()
        return answer.status, json.loads(content) if answer.headers.get_content_type() == "application/json" else None

    def predict(self, model: str, *rows: Any) -> tuple[int, Any]:
        """Ask for predictions."""
        return self("POST", f"/models/{model}/predict", {"inputs": rows})

    def stream(self, model: str, *rows: Any) -> http.client.HTTPResponse:
        """Ask for a line for each row."""
        return self.begin("POST", f"/models/{model}/stream", {"inputs": rows})

    def leases(self, model: str) -> int:
        """Return how many leases this worker has on a model."""
        return sum(row["leases"] for row in self("GET", "/models")[1] if row["model"] == model)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@attrs.frozen
class Server:
    """Gunicorn, running.

    Attributes:
        process: its master.
        port: where it listens.
        disk: folder of the disk tier.
        log: what it has printed.
        open: connections to close in the end.
    """

    process: psutil.Popen
    port: int
    disk: Path
    log: Path
    open: contextlib.ExitStack

    def client(self) -> Client:
        """Return a new connection."""
        client = Client(self.port)
        self.open.callback(client.close)
        return client

    def clients(self, each: int) -> list[list[Client]]:
        """Return ``each`` connections to each of the workers."""
        found: dict[int, list[Client]] = {}

        def connect() -> bool:
            for client in [self.client() for _ in range(8)]:
                status, figures = client("GET", "/stats")
                assert status == 200
                found.setdefault(figures["pid"], []).append(client)
            return len(found) == WORKERS and min(map(len, found.values())) >= each

        eventually(connect)
        return [clients[:each] for clients in found.values()]


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[Store], Bucket]:
    """Give a function that makes a bucket with all models."""
    module = types.ModuleType("served_models")
    exec(MODULE, module.__dict__)  # noqa: S102 - above
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(store: Store) -> Bucket:
        bucket = store.bucket()
        for number, model in enumerate(MODELS):
            content = pickle.dumps(module.Model(number))
            bucket.put(f"{model}.tar.gz", tar_gz({"model.joblib": content}))
        return bucket

    return make


Serve = Callable[..., contextlib.AbstractContextManager[Server]]


FORKS = pytest.mark.parametrize("preload", [False, True], ids=["fork first", "preload"])
"""Workers are forked before the cache is made, or after."""


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Give a function that runs the example on a bucket."""
    (tmp_path / "served_models.py").write_text(MODULE)

    @contextlib.contextmanager
    def run(bucket: Bucket, endpoint: str, *, preload: bool = False, **settings: str) -> Iterator[Server]:
        port, disk, log = free_port(), tmp_path / "disk", tmp_path / "gunicorn.log"
        command = [
            *(sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--worker-class", "gthread"),
            *("--workers", str(WORKERS), "--threads", "8", "--keep-alive", "60", "--graceful-timeout", "10"),
            *("--config", "/dev/null", "--worker-tmp-dir", str(tmp_path)),
            *(["--preload"] if preload else []),
            "flask_app:create_app()",
        ]
        environment = {
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(tmp_path), *filter(None, sys.path)]),
            "HOME": str(tmp_path),
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": bucket.store.access_key,
            "AWS_SECRET_ACCESS_KEY": bucket.store.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MODELCACHE_SOURCE": bucket.url,
            "MODELCACHE_DISK": str(disk),
            **{f"MODELCACHE_{name.upper()}": value for name, value in settings.items()},
        }
        env = ["env", *(f"{name}={value}" for name, value in environment.items())]
        with running([*env, *command], log) as process, contextlib.ExitStack() as stack:
            stack.callback(lambda: sys.stdout.write(log.read_text()))  # for the report of a failure
            stack.callback(_kill_group, process.pid)  # after a failure a worker may wait at a gate for ever
            wait_until(lambda: _answers(port), process, log)
            yield Server(process, port, disk, log, stack)
            if process.poll() is None:  # else the test has done it
                assert_ends_clean(process, disk)

    return run


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _answers(port: int) -> bool:
    client = Client(port)
    try:
        return client("GET", "/stats")[0] == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        client.close()


def assert_ends_clean(process: Any, disk: Path) -> None:
    """Ask gunicorn to end; it does, with all its processes, and the disk tier has no temporary file."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    assert process.wait(timeout=12) == 0
    _, alive = psutil.wait_procs(family[1:], timeout=3)
    assert not alive
    assert [str(path) for path in (disk / "tmp").iterdir()] == []


def wait_at(gate: Path) -> Path:
    """Return a new FIFO, for a model to wait at."""
    os.mkfifo(gate)
    return gate


def let_go(gate: Path) -> None:
    """Let everybody go who waits at a FIFO; waits until somebody does."""
    gate.write_text("")


@FORKS
def test_answers_are_the_models_own(s3: Store, fill: Callable[[Store], Bucket], serve: Serve, preload: bool) -> None:
    """Under concurrent load over more models than fit, every answer comes from the model that was asked."""
    with serve(fill(s3), s3.endpoint, preload=preload, max_models="2") as server:

        def ask(thread: int) -> int:
            client, right = server.client(), 0
            for turn in range(30):
                number = (thread * 7 + turn * 5) % len(MODELS)
                if turn % 5 == thread % 5:
                    lines = client.stream(MODELS[number], turn, turn + 1).read().split()
                    right += [float(line) for line in lines] == [1000 * number + turn, 1000 * number + turn + 1]
                else:
                    answer = client.predict(MODELS[number], turn)
                    right += answer == (200, {"model": MODELS[number], "outputs": [1000 * number + turn]})
            return right

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(ask, range(8))) == 8 * 30
        every = [figures for (client,) in server.clients(1) for _, figures in [client("GET", "/stats")]]
        assert all(figures["models"] <= 2 for figures in every)
        assert all(figures["leases"] == 0 for figures in every)
        assert all(figures["hook_errors"] == 0 for figures in every)
        assert sum(figures["evictions"] for figures in every) > 0


def test_refusals(s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve) -> None:
    """A model that is not there is 404, an id or a body that can't be 400, a setting that can't work 400."""
    with serve(fill(s3_moto), s3_moto.endpoint) as server:
        client = server.client()
        status, answer = client.predict("team/none", 1)
        assert (status, answer["error"]) == (404, "ModelNotFound")
        status, answer = client.predict("team/%2e%2e/m1", 1)
        assert (status, answer["error"]) == (400, "InvalidModelId")
        assert client("POST", "/models/team/m1/predict", [1])[0] == 400
        assert client("PATCH", "/memory", {"high": "most of it"})[0] == 400
        assert client("PATCH", "/memory", {"height": 1})[0] == 400
        assert client("PATCH", "/memory", ["high"])[0] == 400
        assert client("PATCH", "/memory", {"high": "5 GiB", "max_models": "many"})[0] == 400  # all or none
        for low, high in ((4, 5), (1, 2), (6, 7)):  # a pair beside the last one
            _, limits = client("PATCH", "/memory", {"low": f"{low} GiB", "high": f"{high} GiB"})
            assert (limits["low"], limits["high"]) == (low * 2**30, high * 2**30)
        assert client("PATCH", "/memory", {"low": None})[0] == 200
        status, answer = client("PATCH", "/memory", {"high": "3 GiB", "max_models": 4})
        assert (status, answer["high"], answer["max_models"]) == (200, 3 * 2**30, 4)


def test_tells_hits_and_events(s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve) -> None:
    """An answer says whether its model was in memory, and the events since a number can be asked for."""
    with serve(fill(s3_moto), s3_moto.endpoint) as server:
        for (client,) in server.clients(1):
            found = []
            for _ in range(2):
                assert client.predict("team/m1", 1)[0] == 200
                found.append(client.headers["Server-Timing"].split(";")[1])
            assert found == ["desc=miss", "desc=hit"]
            events = client("GET", "/events")[1]
            assert [event["event"] for event in events if event["event"] != "Fetched"] == ["Missed", "Loaded"]
            assert client("GET", f"/events?since={events[-1]['seq']}")[1] == []


@FORKS
def test_stream_holds_its_model(
    s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve, tmp_path: Path, preload: bool
) -> None:
    """A streamed answer leases its model until the last chunk; meanwhile another that does not fit beside it is 507."""
    with serve(fill(s3_moto), s3_moto.endpoint, preload=preload, max_models="1", timeout="2") as server:
        for worker, (streaming, other) in enumerate(server.clients(2)):
            for model in ("team/m2", "team/m1"):  # so that nothing but a lease can be in the way later
                eventually(lambda other=other, model=model: other.predict(model, 1)[0] == 200)
            gate = wait_at(tmp_path / f"gate-{worker}")
            answer = streaming.stream("team/m1", 1, str(gate), 2)
            assert float(answer.readline()) == 1001
            assert other.leases("team/m1") == 1
            status, refusal = other.predict("team/m2", 1)
            assert (status, refusal["error"]) == (507, "NoRoom")
            assert "team/m1" in refusal["message"]
            assert other.leases("team/m1") == 1
            let_go(gate)
            assert answer.read().split() == [b"1000.0", b"1002.0"]
            eventually(lambda other=other: other.leases("team/m1") == 0)
            assert other.predict("team/m2", 1)[0] == 200


def test_stream_whose_client_left(
    s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve, tmp_path: Path
) -> None:
    """A client that leaves in the middle of a stream leaves no lease behind."""
    with serve(fill(s3_moto), s3_moto.endpoint) as server:
        (streaming, other), _ = server.clients(2)
        gate = wait_at(tmp_path / "gate")
        answer = streaming.stream("team/m1", 1, str(gate), *range(200))
        answer.readline()
        assert other.leases("team/m1") == 1
        answer.close()
        streaming.close()
        let_go(gate)
        eventually(lambda: other.leases("team/m1") == 0)


@FORKS
def test_serves_from_disk_without_s3(
    s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve, preload: bool
) -> None:
    """With S3 down, models on disk are loaded and served as ever, and any other is 503 with a time to come back."""
    bucket = fill(s3_moto)
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(FaultProxy(s3_moto.endpoint))
        server = stack.enter_context(serve(bucket, proxy.endpoint, preload=preload, max_models="1"))
        assert server.client().predict("team/m1", 1)[0] == 200
        assert server.client().predict("team/m2", 1)[0] == 200
        proxy.__exit__(None, None, None)
        for (client,) in server.clients(1):
            for number in (1, 2, 1):
                assert client.predict(f"team/m{number}", 5) == (
                    200,
                    {"model": f"team/m{number}", "outputs": [1000 * number + 5]},
                )
            status, answer = client.predict("team/m3", 1)
            assert (status, answer["error"]) == (503, "SourceUnavailable")
            assert client.headers["Retry-After"] == "5"


@FORKS
def test_sigterm_lets_a_stream_finish(
    s3_moto: Store, fill: Callable[[Store], Bucket], serve: Serve, tmp_path: Path, preload: bool
) -> None:
    """On SIGTERM a stream under way goes on to its end, then all is gone."""
    with serve(fill(s3_moto), s3_moto.endpoint, preload=preload) as server:
        gate = wait_at(tmp_path / "gate")
        answer = server.client().stream("team/m1", 1, str(gate), 2)
        assert float(answer.readline()) == 1001
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(assert_ends_clean, server.process, server.disk)
            eventually(lambda: "Handling signal: term" in server.log.read_text())
            let_go(gate)
            assert answer.read().split() == [b"1000.0", b"1002.0"]
            ended.result()
