"""``docs/examples/mms`` under AWS Multi Model Server: two workers of one router, against an S3 store.

Every server here is ended with SIGTERM, and must then leave no process and no temporary file.
"""

import os
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelcache import DiskTier, ModelCache, S3Source
from tests.support import mms
from tests.support.s3 import Bucket, Store, tar_gz
from tests.support.waiting import eventually

MODELS = [f"team/m{number}" for number in range(12)]
MIB = 2**20
SIZE = 8 * MIB

MODULE = '''
import os


class Model:
    """Adds 1000 times its number."""

    def __init__(self, number, size):
        self.number = number
        self.weights = bytes([number]) * size

    def predict(self, rows):
        return [1000 * self.number + row for row in rows]


class Fatal:
    """Ends the process that loads it."""

    def __reduce__(self):
        return os._exit, (3,)
'''

pytestmark = [
    pytest.mark.servers,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(mms.missing()), reason=f"not installed: {', '.join(mms.missing())}"),
]

Fill = Callable[..., Bucket]


@pytest.fixture(scope="module")
def module() -> Iterator[types.ModuleType]:
    """Give the module whose classes the models are of."""
    made = types.ModuleType("served_models")
    exec(MODULE, made.__dict__)  # noqa: S102 - above
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, made.__name__, made)
        yield made


@pytest.fixture(scope="module")
def bucket(s3_moto: Store, module: types.ModuleType) -> Bucket:
    """Return a bucket with all models."""
    bucket = s3_moto.bucket()
    for number, model in enumerate(MODELS):
        put(bucket, model, module.Model(number, SIZE))
    return bucket


def put(bucket: Bucket, model: str, value: Any) -> None:
    """Put one more model into a bucket."""
    bucket.put(f"{model}.tar.gz", tar_gz({"model.joblib": pickle.dumps(value)}))


@pytest.fixture
def server(bucket: Bucket, tmp_path: Path) -> Iterator[mms.Server]:
    """Run MMS with the router over the bucket."""
    (tmp_path / "served_models.py").write_text(MODULE)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": bucket.store.endpoint,
        "AWS_ACCESS_KEY_ID": bucket.store.access_key,
        "AWS_SECRET_ACCESS_KEY": bucket.store.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MODELCACHE_SOURCE": bucket.url,
    }
    with mms.mms(environment) as server:
        yield server


def answer(number: int, *rows: int) -> tuple[int, Any]:
    """Return what the router must say for one of MODELS."""
    return 200, {"model": MODELS[number], "outputs": [1000.0 * number + row for row in rows]}


def test_under_load(server: mms.Server) -> None:
    """Over more models than fit below ``high``, all answers are right, and each eviction is told with its figures."""
    plan = [0, 1, 0, 2, 1, 0, *range(3, 12)]  # three models that many ask for, and nine that few do

    def ask(thread: int) -> int:
        right = 0
        for turn in range(45):
            number = plan[(thread * 7 + turn * 11) % len(plan)]
            right += server.predict(MODELS[number], turn) == answer(number, turn)
        return right

    with ThreadPoolExecutor(8) as pool:
        server.limit(max_models=1)
        assert list(pool.map(server.predict, MODELS, range(12))) == [answer(number, number) for number in range(12)]
        server.limit(max_models=None, high=(high := most_used(server) + 4 * SIZE))
        assert sum(pool.map(ask, range(8))) == 8 * 45

    hits = eventually(lambda: all_hits(server, 12 + 8 * 45))
    eventually(lambda: server.log("model_log").count(" - loaded 'team/") == hits.count(0))
    assert 0.15 < sum(hits) / len(hits) < 0.9
    told = server.log("model_log")
    newcomer = r"( \+ \S+( MiB)? for 'team/m\d+')?"
    few = rf"max_models: used \d{newcomer} > 1"
    full = rf"watermark: used \S+ MiB{newcomer} > {high / MIB:.1f} MiB"
    assert len(re.findall(rf"evicted 'team/m\d+' \S+ MiB \(memory\): {full}", told)) > 20
    lines = [line for line in told.splitlines() if " - evicted " in line]
    assert all(re.search(rf"'team/m\d+' \S+ MiB \(memory\): ({few}|{full})$", line) for line in lines), lines
    assert most_used(server) < high + SIZE  # what is not a model may have grown since the last look


def all_hits(server: mms.Server, count: int) -> list[int]:
    """Return 1 for each request that found its model in memory, and 0 for each other, once all are in the log."""
    hits = [int(hit) for hit in re.findall(r"ModelCacheHit\.Count:(\d)", server.log("model_metrics"))]
    return hits if len(hits) == count else []


def most_used(server: mms.Server) -> int:
    """Return the resident bytes of the larger worker."""
    return max(psutil.Process(pid).memory_info().rss for pid in server.workers())


def test_refusals(server: mms.Server, bucket: Bucket, module: types.ModuleType) -> None:
    """Each refusal has its status and an error of its own, whatever is sent, and no worker ends for it."""
    put(bucket, "team/large", module.Model(99, 5 * SIZE))
    put(bucket, "team/broken", "no model")
    server.limit(budget=2 * SIZE)
    before = server.workers()

    def refusal(status: int, reply: Any) -> tuple[int, str]:
        return status, reply["error"]

    assert refusal(*server.predict("team/none", 1)) == (404, "ModelNotFound")
    assert refusal(*server.predict("../m1", 1)) == (400, "InvalidModelId")
    assert refusal(*server.predict("team/large", 1)) == (507, "TooLarge")
    assert refusal(*server.predict("team/broken", 1)) == (500, "AttributeError")
    for body in (b'{"inputs": [', b"", b"[1]", b'{"inputs": 1}', b'{"inputs": [1]}', b"\xff"):
        assert refusal(*server.request("POST", "/predictions/router", body)) == (400, "Refused")
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl says if it is told nothing
    _, reply = server.request("POST", "/predictions/router", b'{"inputs": [1]}', form)
    assert "send it with Content-Type: application/json" in reply["message"]
    server.limit(height=1)  # told in the log, and of no other effect
    for _ in range(4):
        assert server.predict(MODELS[1], 5) == answer(1, 5)
    eventually(lambda: "limits.json: 'height' is not one of high, low, budget, max_models" in server.log("model_log"))
    assert server.workers() == before


def test_limits(server: mms.Server) -> None:
    """Limits in the file replace those before, in whatever order they come; what can't all work changes nothing."""

    def told(text: str) -> bool:
        server.predict(MODELS[1], 5)
        return text in server.log("model_log")

    for low, high in ((4, 5), (1, 2), (6, 7)):
        server.limit(low=low * 2**30, high=high * 2**30)
        eventually(lambda: told(f"limits are now {{'high': {high * 2**30}, 'low': {low * 2**30}"))  # noqa: B023 - at once
    server.limit(high="5 GiB", max_models="many")
    eventually(lambda: told("limits.json: max_models='many' must be a whole number above 0"))
    server.limit(max_models=3)
    eventually(
        lambda: told(f"limits are now {{'high': {7 * 2**30}, 'low': {6 * 2**30}, 'budget': None, 'max_models': 3")
    )


def test_model_named_in_the_body(server: mms.Server) -> None:
    """Without the header the model is the one that the body names; the header goes first, in any case of letters."""
    body = {"model": MODELS[1], "inputs": [5]}
    assert server.request("POST", "/invocations", body) == answer(1, 5)  # as SageMaker sends it
    header = {"x-amzn-sagemaker-target-MODEL": MODELS[2]}
    assert server.request("POST", "/models/router/invoke", body, header) == answer(2, 5)


def test_f103_unregistering_gives_all_back(server: mms.Server, bucket: Bucket) -> None:
    """Once a model of MMS's is unregistered, its processes are gone, the others stay, and the disk tier is whole."""
    first = server.processes()
    server.register("second", initial_workers=1)
    second = [process for process in server.processes() if process not in first]
    assert (len(first), len(second)) == (3, 2)
    assert server.predict(MODELS[1], 5) == answer(1, 5)
    assert server.request("DELETE", "/models/router")[0] == 200
    eventually(lambda: not any(map(mms.runs, first)))
    assert server.predict(MODELS[2], 5, router="second") == answer(2, 5)
    assert all(map(mms.runs, second))
    assert server.request("DELETE", "/models/second")[0] == 200
    eventually(lambda: not any(map(mms.runs, second)))
    assert not list((server.disk / "tmp").iterdir())
    assert on_disk(server, bucket) == [MODELS[1], MODELS[2]]


def test_f104_model_that_ends_its_worker(server: mms.Server, bucket: Bucket, module: types.ModuleType) -> None:
    """A loader that ends its process costs that request and that worker; another serves on, and MMS starts anew."""
    put(bucket, "team/fatal", module.Fatal())
    for number in (1, 1, 2, 2):
        assert server.predict(MODELS[number], 5) == answer(number, 5)
    before = server.workers()
    for _ in range(2):
        status, reply = server.predict("team/fatal", 1)
        assert (status, reply["message"]) == (500, "Worker died.")
        assert server.predict(MODELS[3], 5) == answer(3, 5)
        eventually(lambda: len(server.workers()) == 2)  # after MMS's first pause, of one second
    assert before - server.workers()
    assert "Retry worker" in server.log("mms_log")
    for number in (0, 1, 2, 3):
        assert server.predict(MODELS[number], 5) == answer(number, 5)
    server.stop()
    assert on_disk(server, bucket) == ["team/fatal", *MODELS[:4]]


def on_disk(server: mms.Server, bucket: Bucket) -> list[str]:
    """Return the models that a new cache finds on the servers' disk tier; it can read each of them."""
    source = S3Source(bucket.url, client=bucket.store.client())
    with ModelCache(source, lambda path: (path / "model.joblib").read_bytes(), disk=DiskTier(server.disk)) as cache:
        models = [row.model for row in cache.models()]
        assert all(cache.get(model) for model in models)
    return models
