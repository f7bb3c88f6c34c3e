"""What may befall one part of a download among several: its own part again, a typed error, nothing left behind.

Each is tried both ways that bytes take: in order out of a stream, and side by side into a file.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelcache.errors import AccessDenied, ArtifactChanged, ArtifactCorrupt, ModelCacheError, SourceUnavailable
from modelcache.openfiles import OpenFile
from modelcache.sources import s3_parts, s3_saving
from modelcache.sources.base import Artifact, RemoteFile
from modelcache.sources.s3 import S3Source
from modelcache.sources.s3_effort import Patience
from modelcache.sources.s3_file import File
from modelcache.sources.s3_saving import _Work
from tests.contracts.source_contract import content
from tests.support.proxy import Fault, FaultProxy, Request
from tests.support.racing import descriptors
from tests.support.s3 import Bucket, noise
from tests.support.saving import saved
from tests.support.waiting import Gate, eventually

PART = 300_000
SIZE = 7 * PART + 12_345
BODY = noise(SIZE, 11)


def offset_of(request: Request) -> int:
    """Return the offset from which a request reads on."""
    return int(request.range.removeprefix("bytes=").partition("-")[0]) if request.range else 0


def in_part(number: int) -> Callable[[Request], bool]:
    """Return what tells whether a request is for this part, its beginning or its rest."""
    return lambda request: request.reads_object and offset_of(request) // PART == number


@attrs.define
class Scene:
    """A model of one file in eight parts behind a proxy, and a source that reads it without pausing.

    Attributes:
        proxy: what breaks things.
        bucket: where it lies; reached without the proxy.
        source: reads through the proxy.
        way: how its bytes are read: ``"stream"`` or ``"save"``.
        folder: for what is saved.
        pauses: seconds that the source wanted to wait.
    """

    proxy: FaultProxy
    bucket: Bucket
    source: S3Source
    way: str
    folder: Path
    pauses: list[float]

    def read(self, artifact: Artifact | None = None, check: Callable[[], None] = lambda: None) -> bytes:
        """Return all bytes."""
        artifact = artifact or self.source.find("m.bin")
        (file,) = artifact.files
        if self.way == "stream":
            with self.source.open(artifact, file) as stream:
                stream.watch(check)  # type: ignore[attr-defined]
                return b"".join(iter(lambda: stream.read(70_001), b""))
        return saved(self.source, artifact, self.folder, check)[file.name]

    def ranges(self) -> list[str | None]:
        """Return the ranges that were asked for."""
        return [request.range for request in self.proxy.reads()]


@pytest.fixture(params=["stream", "save"])
def way(request: pytest.FixtureRequest) -> str:
    """Return each way in turn."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_parts, "PART", PART)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No thread, and no descriptor but those of kept connections, outlives a test."""
    yield
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "modelcache-fetch"])


@pytest.fixture
def scene(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path, way: str) -> Scene:
    """Return a scene without faults as yet; no answer for 1 s is silence."""
    bucket.put("m.bin", BODY)
    client = bucket.store.at(fault_proxy.endpoint).client(read_timeout=1, connect_timeout=5)
    source = S3Source(bucket.url, key="{model}", client=client)
    pauses: list[float] = []

    def wait(stop: threading.Event, seconds: float) -> bool:
        pauses.append(seconds)
        return stop.is_set()

    source._patience = Patience(draw=lambda low, high: high, wait=wait)
    return Scene(fault_proxy, bucket, source, way, tmp_path, pauses)


def test_parts_are_asked_for_once(scene: Scene) -> None:
    """Each part is one request, pinned to the version; together they are the whole, and every byte comes once."""
    assert scene.read() == BODY
    expected = [f"bytes={start}-{start + PART - 1}" for start in range(0, 7 * PART, PART)] + [f"bytes={7 * PART}-"]
    assert sorted(map(str, scene.ranges())) == sorted(expected)
    assert all(request.headers["if-match"] for request in scene.proxy.reads())
    eventually(lambda: scene.proxy.body_bytes == SIZE)  # it counts what it has sent


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("kind", ["cut", "reset", "silent"])
def test_f048_f058_broken_part(scene: Scene, kind: str, number: int) -> None:
    """F048, F058: a part that breaks off or falls silent goes on at its exact offset; no other is asked again."""
    scene.proxy.script(Fault(**{kind: 5_000}), applies=in_part(number))
    assert scene.read() == BODY
    assert len(scene.ranges()) == 9
    assert len([request for request in scene.proxy.reads() if in_part(number)(request)]) == 2


def test_f048_slow_part(scene: Scene) -> None:
    """F048: a part that is slow, but comes, is waited for; nothing is asked twice."""
    scene.proxy.script(Fault(slow=600_000), applies=in_part(2))
    assert scene.read() == BODY
    assert len(scene.ranges()) == 8


@pytest.mark.parametrize("by", [-1, 100])
def test_f048_wrong_length_of_part(scene: Scene, by: int) -> None:
    """F048: a part that announces another length is asked again; if that repeats, the artifact is corrupt."""
    scene.proxy.script(Fault(lengthen=by), applies=in_part(4))
    assert scene.read() == BODY
    scene.proxy.script(always=Fault(lengthen=by), applies=in_part(4))
    with pytest.raises(ArtifactCorrupt, match="announced"):
        scene.read()


@pytest.mark.parametrize("number", [1, 7])
def test_f049_replaced_between_parts(scene: Scene, number: int) -> None:
    """F049: an object that is replaced while its parts are read has changed; the two are never mixed."""
    other = noise(SIZE, 12)
    artifact = scene.source.find("m.bin")
    scene.proxy.script(Fault(before=lambda: scene.bucket.put("m.bin", other)), applies=in_part(number))
    with pytest.raises(ArtifactChanged, match=r"'m\.bin'") as caught:
        scene.read(artifact)
    assert caught.value.version == artifact.version
    assert scene.read() == other


def test_f049_other_etag_of_part(scene: Scene) -> None:
    """F049: a store that ignores If-Match is caught by the ETag of any part's answer."""
    scene.proxy.script(Fault(etag='"other"'), applies=in_part(5))
    with pytest.raises(ArtifactChanged):
        scene.read()


@pytest.mark.parametrize("number", [0, 3, 7])
def test_f051_flipped_bit_in_part(scene: Scene, number: int) -> None:
    """F051: a bit that flips in one part, which no client checks, is found by the checksum of the whole."""
    scene.proxy.script(Fault(flip=4_321), applies=in_part(number))
    with pytest.raises(ArtifactCorrupt, match="not what the store promised") as caught:
        scene.read()
    assert caught.value.version


@pytest.mark.parametrize("status", [400, 403])
def test_f059_expired_midway(scene: Scene, status: int) -> None:
    """F059: a token that expires between two parts is told at once, as such; the next call works."""
    scene.proxy.script(always=Fault(answer=(status, "ExpiredToken")), applies=in_part(3))
    with pytest.raises(AccessDenied, match="ExpiredToken") as caught:
        scene.read()
    assert caught.value.code == "ExpiredToken"
    assert scene.pauses == []
    scene.proxy.script()
    assert scene.read() == BODY


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
def test_f060_busy_part(scene: Scene, status: int, code: str) -> None:
    """F060: a part that is refused for now is asked for again after a pause that grows."""
    busy = Fault(answer=(status, code), headers={"Retry-After": "3"})
    scene.proxy.script(busy, Fault(answer=(status, code)), applies=in_part(6))
    assert scene.read() == BODY
    assert scene.pauses == [3, 0.4]


def test_f060_shared_allowance(scene: Scene) -> None:
    """F060: a store that is down for good is not asked over and over by each part on its own."""
    scene.proxy.script(always=Fault(answer=(503, "SlowDown")))
    with pytest.raises(SourceUnavailable, match="SlowDown"):
        scene.read()
    assert len(scene.ranges()) <= 4 * scene.source._patience.attempts


def test_f057_slow_reader(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    """F057: where nobody takes the bytes, no more is fetched than the buffers hold."""
    bucket.put("m.bin", BODY)
    source = S3Source(bucket.url, key="{model}", client=bucket.store.at(fault_proxy.endpoint).client(), connections=2)
    artifact = source.find("m.bin")
    with source.open(artifact, artifact.files[0]) as stream:
        assert stream.read(10) == BODY[:10]
        eventually(lambda: len(fault_proxy.reads()) == 2)
        assert fault_proxy.body_bytes <= 2 * PART
        rest = b"".join(iter(lambda: stream.read(100_000), b""))
    assert BODY[:10] + rest == BODY


def test_connections_are_bounded(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    """All downloads of a source together have no more requests under way than ``connections`` says."""
    for number in range(12):
        bucket.put(f"m/{number}", noise(50_000, number))
    under_way: list[int] = []
    peak: list[int] = []

    def begin() -> None:
        under_way.append(1)
        peak.append(len(under_way))
        threading.Event().wait(0.02)
        under_way.pop()

    client = bucket.store.at(fault_proxy.endpoint).client()
    source = S3Source(bucket.url, client=client, connections=3)
    fault_proxy.script(always=Fault(before=begin))
    got = saved(source, source.find("m"), tmp_path)
    assert got == {str(number): noise(50_000, number) for number in range(12)}
    assert max(peak) <= 3


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "4", None])
def test_connections_setting(value: Any) -> None:
    """What is no number of connections is refused at construction."""
    from modelcache.errors import ConfigError  # noqa: PLC0415 - next to its use

    with pytest.raises(ConfigError) as caught:
        S3Source("s3://models", connections=value)
    assert caught.value.setting == "connections"


class _Told(Exception):
    """Told to stop."""


def test_f058_stopped_in_silence(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path, way: str) -> None:
    """F058: a download that is told to stop ends at once, though its peers are silent; nothing is left."""
    bucket.put("m.bin", BODY)
    client = bucket.store.at(fault_proxy.endpoint).client(read_timeout=60)
    scene = Scene(fault_proxy, bucket, S3Source(bucket.url, key="{model}", client=client), way, tmp_path, [])
    fault_proxy.script(always=Fault(silent=100))
    before = descriptors()

    def check() -> None:
        if fault_proxy.stalled.is_set():
            raise _Told

    with pytest.raises(_Told):
        scene.read(check=check)
    del scene, client
    eventually(lambda: descriptors() <= before + 2)


def test_f053_f054_wire_is_used(scene: Scene) -> None:
    """Requests for bytes go over kept connections of our own; a client with hooks of its user's sends its own."""
    assert scene.read() == BODY
    assert not any("amz-sdk-invocation-id" in request.headers for request in scene.proxy.reads())
    assert len({request.connection for request in scene.proxy.reads()}) <= 4
    client = scene.bucket.store.at(scene.proxy.endpoint).client()
    asked: list[str] = []
    client.meta.events.register("before-sign.s3.GetObject", lambda **about: asked.append(about["operation_name"]))
    scene.proxy.forget()
    scene.source = S3Source(scene.bucket.url, key="{model}", client=client)
    assert scene.read() == BODY
    assert len(asked) == len(scene.ranges()) == 8
    assert all("amz-sdk-invocation-id" in request.headers for request in scene.proxy.reads())


def test_folder_of_all_sizes(bucket: Bucket, tmp_path: Path) -> None:
    """Files of all sizes below a prefix are saved whole: empty, small, of one part exactly, of several."""
    bodies = {
        "empty": b"",
        "one": b"1",
        "deep/er/part": noise(PART, 1),
        "parts": noise(3 * PART, 2),
        "more": noise(PART + 1, 3),
    }
    for name, body in bodies.items():
        bucket.put(f"m/{name}", body)
    source = S3Source(bucket.url, client=bucket.store.client())
    assert saved(source, source.find("m"), tmp_path) == bodies


def test_f057_disk_error_is_no_network_error(bucket: Bucket, tmp_path: Path) -> None:
    """A disk that fails is told as such, at once, and not taken for a connection that breaks."""
    bucket.put("m.bin", BODY)
    source = S3Source(bucket.url, key="{model}", client=bucket.store.client())
    artifact = source.find("m.bin")
    (tmp_path / "read-only").write_bytes(b"")

    def put(file: RemoteFile) -> Callable[[], OpenFile]:
        return lambda: OpenFile(tmp_path / "read-only", os.O_RDONLY)

    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        source.save(artifact, put, count=lambda size: None, check=lambda: None)
    assert not isinstance(caught.value, ModelCacheError)


def test_many_at_once(bucket: Bucket) -> None:
    """More streams than buffers are read side by side: each has one buffer at least, and none waits for another."""
    bucket.put("m.bin", BODY)
    source = S3Source(bucket.url, key="{model}", client=bucket.store.client(), connections=2)
    artifact = source.find("m.bin")
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(source.open(artifact, artifact.files[0])) for _ in range(5)]
        begun = [stream.read(10) for stream in streams]
        assert begun == [BODY[:10]] * 5
        assert content(source, artifact, artifact.files[0]) == BODY


def test_last_parts_at_once(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads that find the last part checked, one closes the file; the other leaves its number alone."""
    bucket.put("m.bin", BODY)
    source = S3Source(bucket.url, key="{model}", client=bucket.store.client())
    artifact = source.find("m.bin")
    checking, gate, over = threading.Event(), Gate(), threading.Event()
    is_last, in_order, read_back = _Work._is_last, _Work._in_order, s3_saving.read_back
    ends: list[bool] = []

    def late_end(work: _Work, file: File, number: int, buffer: memoryview) -> bool:
        if number:
            assert checking.wait(10)  # the first part is read back
        ends.append(last := is_last(work, file, number, buffer))
        if last and not over.is_set():
            over.set()
            gate.open()
            eventually(lambda: len(ends) == len(file.spans))
        return last

    def late_look(work: _Work, file: File) -> Iterator[Any]:
        yield from in_order(work, file)
        if len(file.done) == len(file.spans) and not over.is_set() and file.checked < len(file.spans):
            gate()

    def late_read(file: File, *arguments: Any) -> None:
        checking.set()
        gate.wait()
        read_back(file, *arguments)

    monkeypatch.setattr(_Work, "_is_last", late_end)
    monkeypatch.setattr(_Work, "_in_order", late_look)
    monkeypatch.setattr(s3_saving, "read_back", late_read)
    assert saved(source, artifact, tmp_path) == {"m.bin": BODY}
    assert sorted(ends) == [False] * (len(ends) - 1) + [True]
    assert len(ends) > 1
