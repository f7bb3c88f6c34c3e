"""From a bucket to a model in memory, over real sockets, on each store, through a proxy that breaks things."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import boto3.session
import pytest
from botocore.config import Config

from modelcache import (
    AccessDenied,
    ArtifactCorrupt,
    DiskTier,
    Event,
    Evicted,
    Fetched,
    LoadFailed,
    MemoryTier,
    ModelCache,
    ModelNotFound,
    S3Source,
    SourceUnavailable,
)
from tests.support.proxy import Fault, FaultProxy, any_request
from tests.support.s3 import Bucket, noise, tar_gz

BODY = noise(300_000, 5)
pytestmark = pytest.mark.servers


def load(path: Path) -> bytes:
    """Return the model: the bytes of its one file."""
    return (path / "model.bin").read_bytes() if path.is_dir() else path.read_bytes()


@attrs.define
class Scene:
    """A bucket behind a proxy, and caches over it that are closed in the end."""

    bucket: Bucket
    proxy: FaultProxy
    folder: Path
    caches: list[ModelCache[Any]]

    def source(self, **arguments: Any) -> S3Source:
        """Return a source that reads through the proxy."""
        client = self.bucket.store.at(self.proxy.endpoint).client(read_timeout=1, connect_timeout=5)
        return S3Source(self.bucket.url, **{"client": client, **arguments})

    def cache(self, source: S3Source | None = None, *, disk: str = "disk", **settings: Any) -> ModelCache[bytes]:
        """Return a cache over the proxy."""
        cache: ModelCache[bytes] = ModelCache(
            source or self.source(), load, disk=DiskTier(self.folder / disk, min_free=0), **settings
        )
        self.caches.append(cache)
        return cache


@pytest.fixture
def scene(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path) -> Iterator[Scene]:
    """Return a bucket with one model in it, behind a proxy without faults as yet."""
    bucket.put("fraud/v1.tar.gz", tar_gz({"model.bin": BODY}))
    scene = Scene(bucket, fault_proxy, tmp_path, [])
    yield scene
    for cache in scene.caches:
        assert cache.close()
        assert not list((cache.disk.path / "tmp").iterdir())


def test_every_kind_of_artifact(scene: Scene) -> None:
    """An archive, a prefix and a single file each become what the loader expects."""
    scene.bucket.put("folder/model.bin", b"from a prefix")
    scene.bucket.put("folder/more/weights.bin", noise(5_000))
    cache = scene.cache()
    assert cache.get("fraud/v1") == BODY
    assert cache.get("folder") == b"from a prefix"
    scene.bucket.put("one.joblib", b"a single file")
    single = scene.cache(scene.source(key="{model}.joblib"), disk="single")
    assert single.get("one") == b"a single file"


def test_restart_with_s3_down(scene: Scene, tmp_path: Path) -> None:
    """What is on disk is found by the next cache, and served without one request to S3."""
    scene.cache().get("fraud/v1")
    scene.caches.pop().close()
    scene.proxy.forget()
    scene.proxy.script(always=Fault(answer=(503, "SlowDown")), applies=any_request)
    cache = scene.cache(timeout=15)
    assert [(row.model, row.tier) for row in cache.models()] == [("fraud/v1", "disk")]
    assert cache.get("fraud/v1") == BODY
    assert not scene.proxy.requests
    with pytest.raises(SourceUnavailable, match="fraud/v2"):
        cache.get("fraud/v2")


def test_events_tell_every_move(scene: Scene) -> None:
    """Fetch, load, evict and unload are told in the order of their decision, with figures and for whom."""
    scene.bucket.put("b.tar.gz", tar_gz({"model.bin": b"b"}))
    cache = scene.cache(memory=MemoryTier(max_models=1))
    told: list[Event] = []
    cache.on(Event, told.append)
    cache.get("fraud/v1")
    cache.get("b")
    names = [type(event).__name__ for event in told]
    assert names == ["Missed", "Fetched", "Loaded", "Missed", "Fetched", "Evicted", "Unloaded", "Reclaimed", "Loaded"]
    (evicted,) = (event for event in told if isinstance(event, Evicted))
    assert (evicted.model, evicted.for_model, evicted.used, evicted.high) == ("fraud/v1", "b", 1, 1)
    fetched = next(event for event in told if isinstance(event, Fetched))
    assert fetched.bytes == len(tar_gz({"model.bin": BODY}))
    assert [event.seq for event in told] == sorted(event.seq for event in told)


@pytest.mark.parametrize("fault", [Fault(cut=100_000), Fault(reset=70_000), Fault(silent=10), Fault(flip=200_000)])
def test_f048_broken_connection(scene: Scene, fault: Fault) -> None:
    """A connection that is cut, reset or silent is resumed; a flipped bit is never published."""
    scene.proxy.script(fault)
    cache = scene.cache(retry_after=0)
    if fault.flip is None:
        assert cache.get("fraud/v1") == BODY
        return
    with pytest.raises(ArtifactCorrupt, match="fraud/v1"):
        cache.get("fraud/v1")
    assert cache.models() == []
    assert cache.get("fraud/v1") == BODY


def test_f049_object_replaced_during_the_download(scene: Scene) -> None:
    """The fetch starts again with the new version; nothing of the old one is in it."""
    new = noise(300_000, 6)

    def replace() -> None:
        scene.bucket.put("fraud/v1.tar.gz", tar_gz({"model.bin": new}))

    scene.proxy.script(Fault(cut=100_000), Fault(before=replace))
    assert scene.cache().get("fraud/v1") == new


def test_f061_missing_model_asked_a_thousand_times(scene: Scene) -> None:
    """Within ``retry_after`` a missing model costs S3 the requests of one look; it is found once that is over."""
    cache = scene.cache(retry_after=0.5)
    for _ in range(1000):
        with pytest.raises(ModelNotFound, match="nobody") as caught:
            cache.get("nobody")
    assert len(scene.proxy.requests) <= 3 * cache.stats().failures < 30
    assert "nobody.tar.gz" in str(caught.value)
    scene.bucket.put("nobody.tar.gz", tar_gz({"model.bin": b"here"}))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert cache.get("nobody") == b"here"
        except ModelNotFound:
            continue
        return
    pytest.fail("the model was not found after it appeared")


def test_f063_object_that_was_cut_at_upload(scene: Scene) -> None:
    """A verified object with broken content is one typed error, and is not downloaded again at each request."""
    whole = tar_gz({"model.bin": BODY})
    scene.bucket.put("cut.tar.gz", whole[: len(whole) // 2])
    cache = scene.cache(retry_after=60)
    for _ in range(100):
        with pytest.raises(ArtifactCorrupt, match="cut"):
            cache.get("cut")
    assert scene.proxy.body_bytes <= len(whole)


def test_not_an_archive(scene: Scene) -> None:
    """An error page under an archive's name is told as what it looks like."""
    scene.bucket.put("page.tar.gz", b"<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(ArtifactCorrupt, match=r"(?i)html"):
        scene.cache().get("page")


def test_missing_bucket(scene: Scene) -> None:
    """A bucket that is not there is not taken for a missing model."""
    client = scene.bucket.store.client()
    cache = scene.cache(S3Source("s3://no-such-bucket-here/prod", client=client))
    with pytest.raises(SourceUnavailable, match="no-such-bucket-here"):
        cache.get("fraud/v1")


def test_wrong_credentials(scene: Scene) -> None:
    """Credentials that the store does not know are no missing model, and no outage."""
    if scene.bucket.store.name == "moto":
        pytest.skip("moto takes any credentials")
    session = boto3.session.Session("wrong", "credentials", region_name="us-east-1")
    config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
    source = S3Source(scene.bucket.url, session=session, endpoint_url=scene.bucket.store.endpoint, config=config)
    with pytest.raises(AccessDenied, match="fraud/v1"):
        scene.cache(source).get("fraud/v1")


def test_f059_token_expires(scene: Scene) -> None:
    """An expired token is AccessDenied, not remembered as a missing model; the next try with a good one works."""
    scene.proxy.script(Fault(answer=(403, "ExpiredToken")), Fault(answer=(403, "ExpiredToken")), applies=any_request)
    cache = scene.cache(retry_after=0)
    with pytest.raises(AccessDenied, match="fraud/v1"):
        cache.get("fraud/v1")
    assert cache.get("fraud/v1") == BODY


def test_loader_fails_on_good_bytes(scene: Scene) -> None:
    """A loader that raises is told with the model and its own error; the artifact stays on disk."""
    scene.bucket.put("empty.tar.gz", tar_gz({"other.bin": b"x"}))
    cache = scene.cache()
    with pytest.raises(LoadFailed, match=r"empty.*FileNotFoundError") as caught:
        cache.get("empty")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert [(row.model, row.tier) for row in cache.models()] == [("empty", "disk")]
