"""S3Source's own connections: they keep to the client's settings, and are not used where they would lose some."""

import contextlib
import gc
import json
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import boto3.session
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.stub import Stubber

from modelcache.errors import ArtifactChanged, SourceUnavailable
from modelcache.sources import s3_signing
from modelcache.sources.base import Artifact, RemoteFile
from modelcache.sources.s3 import S3Source
from modelcache.sources.s3_client import Clients
from modelcache.sources.s3_connection import Grip
from modelcache.sources.s3_effort import Patience
from modelcache.sources.s3_listing import take_entries
from modelcache.sources.s3_means import Means
from tests.contracts.source_contract import BODY, content
from tests.support.proxy import Fault, FaultProxy
from tests.support.s3 import Bucket, Store
from tests.support.tls import certificate
from tests.support.waiting import eventually

OURS = "amz-sdk-invocation-id"
"""A header that only the client itself sends."""


@pytest.fixture
def moto_bucket(s3_moto: Store) -> Bucket:
    """Return a bucket with one model."""
    bucket = s3_moto.bucket()
    bucket.put("a.tar.gz", BODY)
    return bucket


def test_tls(moto_bucket: Bucket, tmp_path: Path) -> None:
    """TLS peers are checked against the client's CA bundle, and refused where it does not know them."""
    context, trusted = certificate(tmp_path)
    plain = S3Source(moto_bucket.url, client=moto_bucket.store.client()).find("a")
    with FaultProxy(moto_bucket.store.endpoint, context) as proxy:
        for verify, works in ((str(trusted), True), (False, True), (None, False)):
            client = moto_bucket.store.session().client(
                "s3", endpoint_url=proxy.endpoint, verify=verify, config=Config(s3={"addressing_style": "path"})
            )
            source = S3Source(moto_bucket.url, client=client)
            source._patience = Patience(wait=lambda stop, seconds: False)
            proxy.forget()
            if not works:
                with pytest.raises(SourceUnavailable, match="SSL"):
                    content(source, plain, plain.files[0])
                assert not proxy.reads()
                continue
            assert content(source, plain, plain.files[0]) == BODY
            assert [OURS in request.headers for request in proxy.reads()] == [False]


def test_connections_are_kept(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    """Requests one after the other take one connection, also after one that was closed in the middle."""
    bucket.put("a.tar.gz", BODY)
    source = S3Source(bucket.url, client=bucket.store.at(fault_proxy.endpoint).client())
    artifact = source.find("a")
    fault_proxy.forget()
    for _ in range(3):
        assert content(source, artifact, artifact.files[0]) == BODY
    assert len({request.connection for request in fault_proxy.reads()}) == 1
    fault_proxy.script(Fault(cut=len(BODY)))
    assert content(source, artifact, artifact.files[0]) == BODY
    assert content(source, artifact, artifact.files[0]) == BODY
    assert len(fault_proxy.reads()) == 5


@contextlib.contextmanager
def _answering(answer: bytes, piece: int = 2**20) -> Iterator[tuple[S3Source, list[bool]]]:
    """Give a source that gets this answer to each request, and the requests: whether each was a connection's first."""
    asked: list[bool] = []

    def answer_all(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as came, contextlib.suppress(ConnectionError):
            first = True
            while came.readline():
                while came.readline() != b"\r\n":
                    pass
                asked.append(first)
                first = False
                for start in range(0, len(answer), piece):
                    connection.sendall(answer[start : start + piece])
                if b"close" in answer or b"HTTP/1.0" in answer:
                    return

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed by who made it
            while True:
                threading.Thread(target=answer_all, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        session = boto3.session.Session("access", "secret", region_name="us-east-1")
        config = Config(s3={"addressing_style": "path"})
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        source = S3Source("s3://models", session=session, endpoint_url=endpoint, config=config)
        source._patience = Patience(wait=lambda stop, seconds: False)
        yield source, asked
        server.shutdown(socket.SHUT_RDWR)


def _artifact(body: bytes, etag: str = '"1"') -> Artifact:
    return Artifact("m", etag, (RemoteFile("m.bin", len(body), etag, json.dumps(["m.bin", None])),))


_LENGTH = b"Content-Length: 5\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("head", "body", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\n" + _LENGTH, b"12345", True),
        (b"HTTP/1.1 200 OK\r\n" + _LENGTH, b"12345HTTP/1.1 200 OK", False),
        (b"HTTP/1.1 200 \r\nX-Amz-Meta-A:\r\nconnection:  Keep-Alive \r\ncontent-length:5 \r\n", b"12345", True),
        (b"HTTP/1.1 200\r\n" + _LENGTH, b"12345", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + _LENGTH, b"12345", True),
        (b"HTTP/1.1 200 OK\r\nX-Amz-Meta-A: " + 9000 * b"a" + b"\r\n" + _LENGTH, b"12345", True),
        (b"HTTP/1.1 200 OK\r\nX-Amz-Meta-A: a\r\n Content-Length: 4\r\n" + _LENGTH, b"12345", True),
        (b"HTTP/1.1 200 OK\r\n" + _LENGTH + _LENGTH, b"12345", True),
        (b"HTTP/1.1 200 OK\r\n" + _CHUNKED, b"2\r\n12\r\n3\r\n345\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\n" + _CHUNKED + _LENGTH, b"5\r\n12345\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + _LENGTH, b"12345", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", b"12345", False),
        (b"HTTP/1.0 200 OK\r\n" + _LENGTH, b"12345", False),
    ],
    ids=[
        "plain",
        "more than asked for",
        "spaces",
        "bare",
        "continue",
        "long",
        "folded",
        "twice",
        "chunked",
        "both",
        "close",
        "no length",
        "1.0",
    ],
)
def test_heads(head: bytes, body: bytes, kept: bool) -> None:
    """A head is understood in whichever way a server may write it, and the connection used again where it may be."""
    with _answering(head + b'ETag: "1"\r\n\r\n' + body) as (source, asked):
        artifact = _artifact(b"12345")
        assert content(source, artifact, artifact.files[0]) == b"12345"
        assert content(source, artifact, artifact.files[0]) == b"12345"
        assert asked == [True, not kept]


@pytest.mark.parametrize("piece", [1, 7, 60])
@pytest.mark.parametrize("head", [b"", _CHUNKED], ids=["plain", "chunked"])
def test_head_in_pieces(head: bytes, piece: int) -> None:
    """A head may come in pieces of any size, with or without the first bytes of the body."""
    body = b"2\r\n12\r\n3\r\n345\r\n0\r\n\r\n" if head else b"12345"
    answer = b'HTTP/1.1 200 OK\r\nETag: "1"\r\n' + (head or _LENGTH) + b"\r\n" + body
    with _answering(answer, piece) as (source, asked):
        artifact = _artifact(b"12345")
        for _ in range(20):
            assert content(source, artifact, artifact.files[0]) == b"12345"
        assert asked == [True] + [False] * 19


@pytest.mark.parametrize("etag", ['"2"', 'W/"2"'])
def test_head_of_another_version(etag: str) -> None:
    """The ETag of a plain head is looked at."""
    with _answering(f"HTTP/1.1 200 OK\r\neTAG: {etag}\r\nContent-Length: 5\r\n\r\n12345".encode()) as (source, asked):
        artifact = _artifact(b"12345")
        with pytest.raises(ArtifactChanged):
            content(source, artifact, artifact.files[0])
        assert asked == [True]


def test_no_header_in_a_header() -> None:
    """An ETag with a line break, as a listing may have one, is sent to nobody."""
    with _answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345") as (source, asked):
        artifact = _artifact(b"12345", '"1"\r\nX-A: 1')
        with pytest.raises(ValueError, match="line break"):
            content(source, artifact, artifact.files[0])
        assert not asked


def test_connections_end_with_the_source(bucket: Bucket) -> None:
    """A source that nobody holds any more closes its connections, without a warning."""
    bucket.put("a.tar.gz", BODY)
    source = S3Source(bucket.url, client=bucket.store.client())
    artifact = source.find("a")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert content(source, artifact, artifact.files[0]) == BODY
        del source
        gc.collect()
    assert not [warning for warning in told if issubclass(warning.category, ResourceWarning)]


def _hooked(client: Any) -> None:
    client.meta.events.register("request-created.s3", lambda **about: None)


def _stubbed(client: Any) -> None:
    Stubber(client).activate()


def _replaced(client: Any) -> None:
    class Session:
        pass

    client._endpoint.http_session = Session()


@pytest.mark.parametrize("change", [_hooked, _stubbed, _replaced])
def test_no_pattern_of_a_changed_client(s3_moto: Store, change: Callable[[Any], None]) -> None:
    """A client with a hook, a stub, or another way to send is no pattern: it sends its own requests."""
    client = s3_moto.client()
    assert s3_signing.pattern_of(client, {"Bucket": "models", "Key": "a b/ü"}) is not None
    change(client)
    assert s3_signing.pattern_of(client, {"Bucket": "models", "Key": "a b/ü"}) is None


@pytest.mark.parametrize(
    "config",
    [
        Config(signature_version="s3"),
        Config(proxies={"http": "http://127.0.0.1:1"}),
    ],
    ids=["version 2", "proxy"],
)
def test_no_pattern_of_other_settings(s3_moto: Store, config: Config) -> None:
    """Another signature, or a proxy, is the client's own business."""
    client = s3_moto.session().client("s3", endpoint_url=s3_moto.endpoint, config=config)
    assert s3_signing.pattern_of(client, {"Bucket": "models", "Key": "a"}) is None


def test_no_pattern_behind_a_proxy_of_the_environment(s3_moto: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy from the environment is honoured too."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert s3_signing.pattern_of(s3_moto.client(), {"Bucket": "models", "Key": "a"}) is None


def test_pattern_leaves_the_client_as_it_was(s3_moto: Store) -> None:
    """Taking a pattern sends nothing, and leaves no handler behind."""
    client = attrs.evolve(s3_moto, endpoint="http://127.0.0.1:1").client()
    pattern = s3_signing.pattern_of(client, {"Bucket": "models", "Key": "a", "RequestPayer": "requester"})
    assert pattern is not None
    assert pattern.headers["x-amz-request-payer"] == "requester"
    assert s3_signing._is_plain(client)
    target, headers = pattern.request("x y/ü", "v+1", {"Range": "bytes=0-1"})
    assert target == "/models/x%20y/%C3%BC?versionId=v%2B1"
    assert (headers["Host"], headers["Range"]) == ("127.0.0.1:1", "bytes=0-1")
    assert "x-amz-request-payer" in headers["Authorization"]


@pytest.mark.parametrize("key", ["a", "x y/ü~'()*", "a//b/../c"])
@pytest.mark.parametrize("pin", [None, "v+/1="])
@pytest.mark.parametrize("token", [None, "some/token=="])
def test_signature_is_botocores(s3_moto: Store, key: str, pin: str | None, token: str | None) -> None:
    """A signature is the one that botocore gives to the same request without our short cuts."""
    session = boto3.session.Session("access", "secret", token, region_name="eu-west-1")
    client = session.client("s3", endpoint_url="http://127.0.0.1:1", config=Config(s3={"addressing_style": "path"}))
    pattern = s3_signing.pattern_of(client, {"Bucket": "models", "Key": "a"})
    assert pattern is not None
    target, headers = pattern.request(key, pin, {"If-Match": '"1"', "x-amz-checksum-mode": "ENABLED"})
    amz = {name: value for name, value in headers.items() if name.lower().startswith("x-amz-")}
    request = AWSRequest("GET", pattern.base + target, headers=amz)
    request.context["timestamp"] = headers["X-Amz-Date"]
    auth = S3SigV4Auth(session.get_credentials().get_frozen_credentials(), "s3", "eu-west-1")
    assert amz["X-Amz-Content-SHA256"] == auth.payload(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    assert headers["Authorization"].endswith(f"Signature={auth.signature(text, request)}")


@pytest.mark.parametrize("most", [1000, 3])
def test_listings(moto_bucket: Bucket, most: int) -> None:
    """A client of ours reads what botocore would of each entry, as far as anybody needs it, and of the page."""
    store = moto_bucket.store
    for name in ("a b", "a+b", "a&b<c>", "50%", "\u00e4/\u65e5\u672c", "quote'\""):
        moto_bucket.put(f"odd/{name}", b"12345")
    session = boto3.session.Session("access", "secret", region_name="us-east-1")
    listing: dict[str, Any] = {"Bucket": moto_bucket.name, "Prefix": "odd/", "MaxKeys": most}
    ours = Clients(None, session, store.endpoint, None).get().list_objects_v2(**listing)
    theirs = store.client().list_objects_v2(**listing)
    for entry in theirs["Contents"]:
        for name in set(entry) - {"Key", "Size", "ETag"}:
            del entry[name]
    for answer in (ours, theirs):
        del answer["ResponseMetadata"]
    assert len(ours["Contents"]) == min(most, 6)
    assert ours == theirs


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<Error><Code>NoSuchBucket</Code></Error>"),
        (200, b""),
        (200, b"<ListBucketResult><Contents><Key>a</Key>"),
        (200, b"<ListBucketResult></ListBucketResult>"),
        (200, b"<ListBucketResult><Contents><Key>a</Key><Size>1</Size></Contents></ListBucketResult>"),
        (200, b"<L><Contents><Key>a</Key><Size>x</Size><ETag>e</ETag></Contents></L>"),
        (200, b"<L><Contents><Key>a</Key><Size/><ETag>e</ETag></Contents></L>"),
        (200, b"<ListBucketResult><Contents><Key/><Size>1</Size><ETag>e</ETag></Contents></ListBucketResult>"),
        (200, b"<ListBucketResult><Contents><Key>a</Key><Size>1</Size><ETag></ETag></Contents></ListBucketResult>"),
        (200, b"<ListBucketResult><Contents><Key>a</Key><Size>x</Size><ETag>e</ETag></Contents></ListBucketResult>"),
    ],
)
def test_odd_listings_are_left_to_botocore(status: int, body: bytes) -> None:
    """What is not as expected is not touched."""
    answer, taken = {"status_code": status, "body": body}, dict[str, Any]()
    take_entries(answer, taken)
    assert (answer, taken) == ({"status_code": status, "body": body}, {})


def test_means_are_given_back() -> None:
    """Buffers and connections that were given back can be had again; each gets one buffer at least."""
    means = Means(3)
    assert [means.grant(6), means.grant(6)] == [3, 1]
    means.give_back(1)
    means.give_back(3)
    assert means.grant(2) == 2
    grip = Grip()
    means.take(grip)
    assert means.take_now(0)
    means.take(grip)
    assert not means.take_now(0)
    grip.tear()
    with pytest.raises(ConnectionAbortedError):
        means.take(grip)
    means.give()
    means.take(grip)
    for _ in range(3):
        means.give()
    assert [means.take_now(0) for _ in range(4)] == [True, True, True, False]


def test_means_are_shared() -> None:
    """Each fetch that takes connections ahead has its share of them, rounded up."""
    means = Means(5)
    means.join()
    assert means.may_take(4)
    means.join()
    assert [means.may_take(held) for held in (2, 3)] == [True, False]
    means.leave()
    assert means.may_take(4)


def test_who_waits_for_a_connection_gets_it() -> None:
    """A connection that somebody waits for is not taken by who need not have it now."""
    means = Means(1)
    grip = Grip()
    means.take(grip)
    taker = threading.Thread(target=means.take, args=(grip,))
    taker.start()
    eventually(lambda: means._waiting == 1)
    means.give()
    assert not means.take_now(0)
    taker.join(10)
    assert not taker.is_alive()
