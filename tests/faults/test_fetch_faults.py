"""What a network, a store or a deployment may do to a download: every byte once, or a typed error."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from modelcache.errors import (
    AccessDenied,
    ArtifactChanged,
    ArtifactCorrupt,
    ModelCacheError,
    ModelNotFound,
    SourceUnavailable,
)
from modelcache.sources.base import Artifact
from modelcache.sources.s3 import S3Source
from modelcache.sources.s3_effort import Patience
from modelcache.sources.s3_parts import CHUNK
from tests.contracts.source_contract import content
from tests.support.proxy import Fault, FaultProxy, any_request
from tests.support.s3 import Bucket, Store, noise

SIZE = 1_000_003
BODY = noise(SIZE, 7)


@attrs.define
class Scene:
    """A model of one file behind a proxy, and a source that reads it without pausing.

    Attributes:
        proxy: what breaks things.
        bucket: where it lies; reached without the proxy.
        source: reads through the proxy.
        pauses: seconds that the source wanted to wait, in order.
    """

    proxy: FaultProxy
    bucket: Bucket
    source: S3Source
    pauses: list[float]

    def find(self) -> Artifact:
        """Return the artifact, and forget the requests for it."""
        artifact = self.source.find("m")
        self.proxy.forget()
        return artifact

    def read(self, artifact: Artifact | None = None) -> bytes:
        """Return all its bytes."""
        artifact = artifact or self.find()
        return content(self.source, artifact, artifact.files[0])

    def ranges(self) -> list[str | None]:
        """Return the ranges that were asked for, in order."""
        return [request.range for request in self.proxy.reads()]


@pytest.fixture
def scene(bucket: Bucket, fault_proxy: FaultProxy) -> Scene:
    """Return a scene without faults as yet; no answer for 0.5 s is silence."""
    bucket.put("m.tar.gz", BODY)
    client = bucket.store.at(fault_proxy.endpoint).client(read_timeout=0.5, connect_timeout=5)
    source = S3Source(bucket.url, client=client)
    pauses: list[float] = []

    def wait(stop: threading.Event, seconds: float) -> bool:
        pauses.append(seconds)
        return stop.is_set()

    source._patience = Patience(draw=lambda low, high: high, wait=wait)
    return Scene(fault_proxy, bucket, source, pauses)


def resumed(ranges: list[str | None]) -> Iterator[int]:
    """Yield the offsets from which a download went on."""
    for told in ranges:
        yield int(told.removeprefix("bytes=").removesuffix("-")) if told else 0


class TestBroken:
    """A connection that ends, breaks or falls silent."""

    @pytest.mark.parametrize("kind", ["cut", "reset", "silent"])
    @pytest.mark.parametrize("offset", [0, 1, 65_536, 500_001, SIZE - 1])
    def test_once(self, scene: Scene, kind: str, offset: int) -> None:
        """Wherever it breaks, it goes on at the exact offset: no byte twice, none missing, little sent again."""
        scene.proxy.script(Fault(**{kind: offset}))
        assert scene.read() == BODY
        assert len(scene.ranges()) == 2
        assert all(request.headers["if-match"] for request in scene.proxy.reads())
        assert list(resumed(scene.ranges()))[1] <= offset
        if kind != "reset":  # a reset also drops what had come, but was not read yet
            assert scene.proxy.body_bytes < SIZE + CHUNK + 65_536

    def test_again_and_again(self, scene: Scene) -> None:
        """It may break as often as it likes, as long as each connection brings something."""
        scene.proxy.script(*[Fault(cut=70_000) for _ in range(12)])
        artifact = scene.find()
        with scene.source.open(artifact, artifact.files[0]) as stream:
            assert b"".join(iter(lambda: stream.read(10_000), b"")) == BODY
        offsets = list(resumed(scene.ranges()))
        assert len(offsets) == 13
        assert offsets == sorted(set(offsets))
        assert scene.proxy.body_bytes < SIZE * 1.2
        assert set(scene.pauses) == {scene.source._patience.first}

    @pytest.mark.parametrize("kind", ["cut", "reset", "silent"])
    def test_no_progress(self, scene: Scene, kind: str) -> None:
        """After five requests in a row that brought nothing it is given up, with pauses that double."""
        scene.proxy.script(Fault(**{kind: 300_000}), always=Fault(**{kind: 0}))
        with pytest.raises(SourceUnavailable, match="'m'") as caught:
            scene.read()
        assert isinstance(caught.value, ConnectionError)
        assert len(scene.ranges()) == 1 + 4
        assert scene.pauses == [0.2, 0.4, 0.8, 1.6]

    def test_dead_pooled_connection(self, bucket: Bucket, fault_proxy: FaultProxy) -> None:
        """A kept connection that the peer has closed meanwhile costs nothing but a new one."""
        bucket.put("m.tar.gz", BODY)
        store = bucket.store.at(fault_proxy.endpoint)
        source = S3Source(bucket.url, session=store.session(), endpoint_url=store.endpoint)
        scene = Scene(fault_proxy, bucket, source, [])
        for kind in ("cut", "reset"):
            fault_proxy.script(Fault(**{kind: SIZE}))
            artifact = scene.find()
            with source.open(artifact, artifact.files[0]) as stream:
                got = b"".join(stream.read(CHUNK) for _ in range(4))
                assert got + b"".join(iter(lambda: stream.read(CHUNK), b"")) == BODY
            assert scene.read() == BODY

    def test_slow(self, scene: Scene) -> None:
        """A slow peer is not a silent one."""
        scene.proxy.script(Fault(slow=4_000_000))
        assert scene.read() == BODY
        assert len(scene.ranges()) == 1

    @pytest.mark.parametrize("by", [-1, 1, 100])
    def test_wrong_length(self, scene: Scene, by: int) -> None:
        """An answer that announces another length is not trusted; a right one after it is."""
        scene.proxy.script(Fault(lengthen=by))
        assert scene.read() == BODY
        scene.proxy.script(always=Fault(lengthen=by))
        with pytest.raises(ArtifactCorrupt, match="announced"):
            scene.read()

    @pytest.mark.parametrize("s3", ["moto"], indirect=True)  # Ceph refuses: the header is signed
    def test_ranges_ignored(self, scene: Scene) -> None:
        """A store that answers the whole where a range was asked for never makes a byte come twice."""
        scene.proxy.script(Fault(cut=300_000), always=Fault(drop_range=True))
        with pytest.raises((SourceUnavailable, ArtifactCorrupt)):
            scene.read()
        scene.proxy.script(Fault(cut=300_000), Fault(drop_range=True))
        assert scene.read() == BODY

    def test_flipped_after_resume(self, scene: Scene) -> None:
        """A bit that flips in a resumed part, which no client checks, is found."""
        scene.proxy.script(Fault(cut=300_000), Fault(flip=1000))
        with pytest.raises(ArtifactCorrupt, match="'m'"):
            scene.read()

    def test_every_request_in_turn(self, scene: Scene) -> None:
        """Whichever request of a look-up and a download breaks first, the next call is whole again."""
        for number in range(6):
            passed = [Fault() for _ in range(number)]
            scene.proxy.script(*passed, Fault(reset=0), applies=any_request)
            with contextlib.suppress(SourceUnavailable):
                assert scene.read() == BODY
            assert scene.read() == BODY


class TestBusy:
    """A store that has no time now."""

    @pytest.mark.parametrize(
        ("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError"), (502, "BadGateway")]
    )
    def test_midway(self, scene: Scene, status: int, code: str) -> None:
        """It is asked again after a pause, and the download goes on where it was."""
        busy = Fault(answer=(status, code))
        scene.proxy.script(busy, Fault(cut=300_000), busy, busy)
        assert scene.read() == BODY
        assert scene.pauses == [0.2, 0.2, 0.4, 0.8]

    def test_too_long(self, scene: Scene) -> None:
        """A store that stays busy is SourceUnavailable with its own code, after five requests."""
        scene.proxy.script(always=Fault(answer=(503, "SlowDown")))
        with pytest.raises(SourceUnavailable, match="SlowDown") as caught:
            scene.read()
        assert caught.value.code == "SlowDown"
        assert len(scene.ranges()) == 5

    def test_retry_after(self, scene: Scene) -> None:
        """What the store asks for by Retry-After is waited, up to a bound."""
        scene.proxy.script(
            Fault(answer=(429, "TooManyRequests"), headers={"Retry-After": "7"}),
            Fault(answer=(429, "TooManyRequests"), headers={"Retry-After": "86400"}),
            Fault(answer=(429, "TooManyRequests"), headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        )
        assert scene.read() == BODY
        assert scene.pauses == [7, 20, 0.8]

    def test_find(self, scene: Scene) -> None:
        """While a model is looked for, a busy store is no missing model."""
        scene.proxy.script(always=Fault(answer=(503, "SlowDown")), applies=any_request)
        with pytest.raises(SourceUnavailable, match="'m'") as caught:
            scene.source.find("m")
        assert not isinstance(caught.value, ModelNotFound)

    def test_jitter(self) -> None:
        """Pauses are drawn from zero up to twice the last bound, so that many clients do not knock in step."""
        drawn: list[tuple[float, float]] = []

        def draw(low: float, high: float) -> float:
            drawn.append((low, high))
            return low

        patience = Patience(draw=draw)
        assert [patience.pause(failures, 0) for failures in (1, 2, 3, 20)] == [0, 0, 0, 0]
        assert drawn == [(0, 0.2), (0, 0.4), (0, 0.8), (0, 20)]


class TestChanged:
    """An object that is replaced, or deleted, under a running download."""

    def test_before_resume(self, scene: Scene) -> None:
        """What was replaced is never mixed: the rest of the old version is refused."""
        other = noise(SIZE, 8)
        scene.proxy.script(Fault(cut=300_000), Fault(before=lambda: scene.bucket.put("m.tar.gz", other)))
        artifact = scene.find()
        with pytest.raises(ArtifactChanged, match="'m'") as caught:
            scene.read(artifact)
        assert caught.value.version == artifact.version
        assert scene.read() == other

    def test_deleted(self, scene: Scene) -> None:
        """What was deleted has changed too."""

        def delete() -> None:
            scene.bucket.client.delete_object(Bucket=scene.bucket.name, Key="m.tar.gz")

        scene.proxy.script(Fault(cut=300_000), Fault(before=delete))
        with pytest.raises(ArtifactChanged):
            scene.read()

    def test_other_etag(self, scene: Scene) -> None:
        """A store that ignores If-Match is caught by the ETag of its answer, first or resumed."""
        for faults in ([Fault(etag='"other"')], [Fault(cut=300_000), Fault(etag='"other"')]):
            scene.proxy.script(*faults)
            with pytest.raises(ArtifactChanged):
                scene.read()

    def test_shorter(self, scene: Scene) -> None:
        """A range past the end is a change, not an outage."""
        scene.proxy.script(Fault(cut=300_000), Fault(answer=(416, "InvalidRange")))
        with pytest.raises(ArtifactChanged):
            scene.read()

    def test_multipart(self, s3_ceph: Store) -> None:
        """A multipart object on Ceph is resumed with the ETag of the whole."""
        parts = [noise(5 * 1024 * 1024, 1), noise(300_000, 2)]
        bucket = s3_ceph.bucket()
        bucket.put_parts("m.tar.gz", *parts)
        with FaultProxy(s3_ceph.endpoint) as proxy:
            source = S3Source(bucket.url, client=s3_ceph.at(proxy.endpoint).client())
            source._patience = Patience(wait=lambda stop, seconds: False)
            proxy.script(Fault(cut=5 * 1024 * 1024 - 5), Fault(reset=1000))
            artifact = source.find("m")
            assert content(source, artifact, artifact.files[0]) == b"".join(parts)
            assert len(proxy.reads()) == 3


class TestRefused:
    """Credentials that end midway."""

    @pytest.mark.parametrize("status", [400, 403])
    def test_expired(self, scene: Scene, status: int) -> None:
        """An expired token is told at once, as such; nothing is remembered, the next call works."""
        scene.proxy.script(Fault(cut=300_000), Fault(answer=(status, "ExpiredToken")))
        with pytest.raises(AccessDenied, match="ExpiredToken") as caught:
            scene.read()
        assert caught.value.code == "ExpiredToken"
        assert len(scene.pauses) == 1
        assert scene.read() == BODY

    def test_missing_again(self, scene: Scene) -> None:
        """A source remembers no failure: each look-up asks, and finds the model once it is there."""
        for _ in range(2):
            with pytest.raises(ModelNotFound):
                scene.source.find("late")
        scene.bucket.put("late/x", b"1")
        assert scene.source.find("late").folder


class TestClose:
    """A download that is given up."""

    def test_in_pause(self, scene: Scene) -> None:
        """``close`` from another thread ends the pause before a retry at once."""
        pausing = threading.Event()

        def wait(stop: threading.Event, seconds: float) -> bool:
            pausing.set()
            return stop.wait(15)

        scene.source._patience = Patience(wait=wait)
        scene.proxy.script(always=Fault(cut=0))
        assert isinstance(_closed_while(scene, pausing), ValueError)

    def test_in_silence(self, bucket: Bucket, fault_proxy: FaultProxy) -> None:
        """``close`` from another thread wakes a reader that waits for a silent peer."""
        bucket.put("m.tar.gz", BODY)
        client = bucket.store.at(fault_proxy.endpoint).client(read_timeout=60)
        scene = Scene(fault_proxy, bucket, S3Source(bucket.url, client=client), [])
        fault_proxy.script(always=Fault(silent=300_000))
        assert isinstance(_closed_while(scene, fault_proxy.stalled), ValueError)

    def test_many(self, scene: Scene) -> None:
        """Streams that are closed halfway leave no connection behind: a pool of ten serves fifty."""
        artifact = scene.find()
        for _ in range(50):
            with scene.source.open(artifact, artifact.files[0]) as stream:
                assert stream.read(10) == BODY[:10]
        assert scene.read(artifact) == BODY


def _closed_while(scene: Scene, moment: threading.Event) -> BaseException | None:
    """Return how a read ends whose stream is closed from another thread at a moment."""
    artifact = scene.source.find("m")
    stream = scene.source.open(artifact, artifact.files[0])
    ended: list[Any] = []

    def run() -> None:
        try:
            while stream.read(1_000_000):
                pass
        except (ModelCacheError, ValueError) as error:
            ended.append(error)

    reader = threading.Thread(target=run)
    reader.start()
    assert moment.wait(10)
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    return ended[0] if ended else None
