"""Faults of fetching that take a process of its own: forks, memory, exits, credentials of the machine, by number.

What may befall one connection or part is ``test_fetch_faults`` and ``test_fetch_parts``.
"""

import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelcache import DiskTier, ModelCache, ModelNotFound, S3Source, SourceUnavailable
from tests.support.children import injecting, run
from tests.support.fakes import tar
from tests.support.proxy import Fault, FaultProxy
from tests.support.racing import Call, Gate
from tests.support.s3 import Bucket, Store, noise

S3 = """
import hashlib, json
from tests.support.s3 import Store
STORE, BUCKET = Store("moto", sys.argv[2], "testing-access", "testing-secret"), sys.argv[3]
def load(path, name):
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
def cache_of(source=None, **settings):
    source = source or S3Source(BUCKET, key="{model}", session=STORE.session(), endpoint_url=STORE.endpoint)
    return ModelCache(source, load, disk=DiskTier(Path(sys.argv[1]) / "disk", min_free=0), **settings)
"""


@pytest.fixture
def moto_bucket(s3_moto: Store) -> Bucket:
    """Give a new bucket in moto."""
    return s3_moto.bucket()


def run_s3(tmp_path: Path, bucket: Bucket, script: str, *arguments: Any, **settings: Any) -> str:
    """Run a script that has ``cache_of``, over a bucket."""
    return run(S3 + script, tmp_path, bucket.store.endpoint, bucket.url, *arguments, **settings)


CRT = """
import awscrt.io, awscrt.http
loops = awscrt.io.EventLoopGroup(1)
started = awscrt.io.ClientBootstrap(loops, awscrt.io.DefaultHostResolver(loops))
cache = cache_of()
first = cache.get("a.bin")
if not os.fork():
    signal.alarm(10)
    assert cache.get("b.bin") == sys.argv[4]
    os._exit(0 if cache.close() else 1)
assert os.wait()[1] == 0
assert cache.get("b.bin") == sys.argv[4]
assert cache.close()
"""


def test_f055_crt_in_a_forked_child(tmp_path: Path, moto_bucket: Bucket) -> None:
    """F055: where awscrt is installed and used before a fork, a download in the child ends, as it never uses that."""
    if importlib.util.find_spec("awscrt") is None:
        pytest.skip("needs awscrt")
    for name in ("a.bin", "b.bin"):
        moto_bucket.put(name, noise(9 * 2**20, 1))
    import hashlib  # noqa: PLC0415 - next to its use

    run_s3(tmp_path, moto_bucket, CRT, hashlib.sha256(noise(9 * 2**20, 1)).hexdigest())


IMPORTED = """
import importlib, time, tempfile
modules = tempfile.mkdtemp()
Path(modules, "app_of_test.py").write_text('''
import __main__
cache = __main__.cache_of()
MODEL = cache.get("a.bin")
def loader_helper(): return 1
''')
sys.path.insert(0, modules)
plain = load
def load(path, name):
    import colorsys, wave  # a module of its own, while another one is being imported
    return plain(path, name)
started = time.monotonic()
import app_of_test
assert app_of_test.MODEL and time.monotonic() - started < 10
print(app_of_test.cache.prefetch(["b.bin"]).progress is not None)
"""


def test_f056_get_while_an_app_is_imported(tmp_path: Path, moto_bucket: Bucket) -> None:
    """F056: a lookup while a module is imported works, though all is imported on other threads only then."""
    for name in ("a.bin", "b.bin"):
        moto_bucket.put(name, noise(50_000, 1))
    assert run_s3(tmp_path, moto_bucket, IMPORTED) == "True\n"
    assert not list((tmp_path / "disk" / "tmp").iterdir())


PEAK = """
import re
import modelcache.sources.s3_parts as parts
parts.PART = 2**20
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
source = S3Source(BUCKET, key="{model}", session=STORE.session(), endpoint_url=STORE.endpoint, connections=4)
def load(path, name): return path.stat().st_size
with cache_of(source, loaders=4) as cache:
    cache.get("m0.bin"), cache.get("m0.tar")
    before = peak()
    for suffix in (".bin", ".tar"):
        assert cache.prefetch([f"m{number}{suffix}" for number in range(1, 5)], tier="disk").wait(30)
    print(peak() - before)
"""


def test_f057_slow_disk(tmp_path: Path, moto_bucket: Bucket) -> None:
    """F057: with a disk slower than the network, four downloads at once take no more memory than their buffers."""
    body = noise(10 * 2**20, 3)
    for number in range(5):
        data = body if number else b"small"
        moto_bucket.put(f"m{number}.bin", data)
        moto_bucket.put(f"m{number}.tar", untarred(data))
    slow = injecting("pwrite64:delay_exit=1000", "write:delay_exit=1000")
    grown = int(run_s3(tmp_path, moto_bucket, PEAK, under=slow, watchdog=40, timeout=45))
    assert grown < 25  # of 40 MiB each time: (4 + 3) buffers of 1 MiB, and what else it takes to run


def untarred(data: bytes) -> bytes:
    """Return a plain ``.tar`` with one file."""
    import gzip  # noqa: PLC0415 - next to its use

    return gzip.decompress(tar({"weights": data}))


class _Metadata(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def _answer(self) -> None:
        self.server.asked.append(self.path)
        status, body = 200, b"token"
        if self.server.fails(len(self.server.asked)):
            status, body = 500, b"no"
        elif self.path.endswith("/security-credentials/"):
            body = b"role"
        elif self.path.endswith("/role"):
            keys = {"AccessKeyId": "testing", "SecretAccessKey": "secret", "Token": "t", "Code": "Success"}
            body = json.dumps({**keys, "Expiration": "2099-01-01T00:00:00Z"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = _answer  # noqa: N815 - as http.server calls them

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    asked: list[str]
    fails: Any


@pytest.fixture
def metadata() -> Iterator[_Server]:
    """Give a metadata service of a machine, which works until told otherwise."""
    with _Server(("127.0.0.1", 0), _Metadata) as server:
        server.asked, server.fails = [], lambda number: False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BORN = """
for name in [name for name in os.environ if name.startswith("AWS_")]: del os.environ[name]
os.environ.update(AWS_SHARED_CREDENTIALS_FILE="/nowhere", AWS_CONFIG_FILE="/nowhere", AWS_METADATA_SERVICE_TIMEOUT="2",
                  AWS_EC2_METADATA_SERVICE_ENDPOINT=sys.argv[4], AWS_METADATA_SERVICE_NUM_ATTEMPTS=sys.argv[5])
names = [f"m{number}.bin" for number in range(12)]
refused = 0
with cache_of(S3Source(BUCKET, key="{model}", endpoint_url=STORE.endpoint), retry_after=0) as cache:
    left = names
    for turn in range(40):
        found = together(*[lambda name=name: cache.get(name) for name in left])
        errors = [error for error in found if isinstance(error, BaseException)]
        assert all(isinstance(error, AccessDenied) and "redential" in str(error) for error in errors), errors
        left = [name for name, error in zip(left, found) if isinstance(error, BaseException)]
        refused += len(errors)
        if not left: break
    assert not left
print(refused)
"""


@pytest.mark.parametrize("when", ["works", "starts late", "one in three"])
def test_f059_metadata_service(tmp_path: Path, moto_bucket: Bucket, metadata: _Server, when: str) -> None:
    """F059: a metadata service that fails is no missing model and is not stormed; once it answers, all is found."""
    for number in range(12):
        moto_bucket.put(f"m{number}.bin", noise(1000, number))
    if when == "starts late":
        metadata.fails = lambda number: number <= 5
    elif when == "one in three":
        metadata.fails = lambda number: number % 3
    endpoint = f"http://127.0.0.1:{metadata.server_address[1]}"
    refused = int(run_s3(tmp_path, moto_bucket, BORN, endpoint, 3 if when == "one in three" else 1))
    assert refused == 0 or when == "starts late"
    if when == "works":
        assert len(metadata.asked) == 3
    assert len(metadata.asked) <= 3 * 3 + 2 * refused


@attrs.define
class Scene:
    """A bucket behind a proxy, and a cache over it."""

    bucket: Bucket
    proxy: FaultProxy
    cache: ModelCache[int]


@pytest.fixture
def scene(moto_bucket: Bucket, tmp_path: Path) -> Iterator[Scene]:
    """Give one without faults as yet."""
    with FaultProxy(moto_bucket.store.endpoint) as proxy:
        source = S3Source(moto_bucket.url, key="{model}", client=moto_bucket.store.at(proxy.endpoint).client())
        disk = DiskTier(tmp_path / "disk", min_free=0)
        with ModelCache(source, lambda path: path.stat().st_size, disk=disk, retry_after=60) as cache:
            yield Scene(moto_bucket, proxy, cache)


def test_f060_other_models_go_on(scene: Scene) -> None:
    """F060: while one object answers 503 for ever, others are fetched; it is asked a few times, and then left alone."""
    for name in ("busy.bin", "good.bin", "fine.bin"):
        scene.bucket.put(name, noise(5000, 1))
    gate = Gate()
    busy = Fault(before=gate, answer=(503, "SlowDown"))
    scene.proxy.script(busy, always=Fault(answer=(503, "SlowDown")), applies=lambda request: "busy" in request.path)
    waiting = Call(scene.cache.get, "busy.bin")
    gate.wait()
    try:
        assert scene.cache.get("good.bin") == 5000
    finally:
        gate.open()
    assert scene.cache.get("fine.bin") == 5000
    assert isinstance(waiting.error(30), SourceUnavailable)
    asked = len(scene.proxy.requests)
    for _ in range(100):
        with pytest.raises(SourceUnavailable, match="too busy"):
            scene.cache.get("busy.bin")
    assert len(scene.proxy.requests) == asked < 25


def test_f061_refresh_looks_at_once(scene: Scene) -> None:
    """F061: a model that was missing a moment ago is found at once where ``refresh`` is asked."""
    with pytest.raises(ModelNotFound):
        scene.cache.get("late.bin")
    scene.bucket.put("late.bin", noise(5000, 1))
    with pytest.raises(ModelNotFound):
        scene.cache.get("late.bin")
    scene.cache.refresh("late.bin")
    assert scene.cache.get("late.bin") == 5000
