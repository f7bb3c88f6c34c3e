"""S3Source: addresses and settings, finding, versions, checksums, clients, credentials, forks."""

import base64
import copy
import hashlib
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import attrs
import boto3.session
import pytest
from botocore import UNSIGNED
from botocore.config import Config

from modelcache.errors import (
    AccessDenied,
    ArtifactCorrupt,
    ConfigError,
    ModelNotFound,
    SourceUnavailable,
    UnsafeArtifact,
)
from modelcache.sources import checksums, s3_client
from modelcache.sources.s3 import S3Source
from modelcache.sources.s3_effort import Patience
from modelcache.sources.s3_multipart import with_parts
from modelcache.sources.s3_url import parse_s3_url
from tests.contracts.source_contract import BODY, content
from tests.support.processes import free_port
from tests.support.proxy import Fault, FaultProxy, any_request
from tests.support.s3 import Bucket, Store, noise, tar_gz
from tests.support.tls import certificate

MIB = 1024 * 1024


def source_of(bucket: Bucket, prefix: str = "", **arguments: Any) -> S3Source:
    """Return a source with a client of its own, without retries inside."""
    return S3Source(f"{bucket.url}{prefix}", client=bucket.store.client(), **arguments)


def whole(source: S3Source, model: str) -> bytes:
    """Return the bytes of a model of one file."""
    artifact = source.find(model)
    return content(source, artifact, artifact.files[0])


class TestAddress:
    """Which URLs name a bucket."""

    ARN = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"

    @pytest.mark.parametrize(
        ("url", "bucket", "prefix"),
        [
            ("s3://models", "models", ""),
            ("s3://models/", "models", ""),
            ("S3://models/prod/v1", "models", "prod/v1/"),
            ("s3://models/prod/", "models", "prod/"),
            ("s3://models/a b%20#x?y", "models", "a b%20#x?y/"),
            (f"s3://{ARN}", ARN, ""),
            (f"s3://{ARN}/prod/x", ARN, "prod/x/"),
            ("s3://arn:aws:s3::123456789012:accesspoint/a.mrap/x", "arn:aws:s3::123456789012:accesspoint/a.mrap", "x/"),
            ("s3://m--use1-az4--x-s3/x", "m--use1-az4--x-s3", "x/"),
        ],
    )
    def test_accepted(self, url: str, bucket: str, prefix: str) -> None:
        """Bucket and prefix are taken literally; an access point's ARN may stand for the bucket."""
        address = parse_s3_url(url)
        assert (address.bucket, address.prefix) == (bucket, prefix)
        assert S3Source(url).url == f"s3://{bucket}/{prefix}".removesuffix("/")

    @pytest.mark.parametrize(
        ("url", "hint"),
        [
            ("", "begins with s3://"),
            ("models/prod", "begins with s3://"),
            ("s3:/models", "begins with s3://"),
            ("s3a://models", "begins with s3://"),
            ("https://models.s3.amazonaws.com/prod", "endpoint_url="),
            ("s3://", "bucket name"),
            ("s3:///prod", "bucket name"),
            ("s3://x", "bucket name"),
            ("s3://mo dels/x", "bucket name"),
            ("s3://models:80/x", "bucket name"),
            ("s3://models//x", "empty part"),
            ("s3://models/x//", "empty part"),
            ("s3://models/a\nb", "control character"),
            ("s3://models/x?versionId=3", "version="),
            ("s3://arn:aws:iam::123456789012:role/x", "access point"),
            (7, "must be a str"),
            (None, "must be a str"),
        ],
    )
    def test_refused(self, url: object, hint: str) -> None:
        """What names no bucket is refused at construction, and the message says what to write."""
        with pytest.raises(ConfigError, match=hint) as caught:
            S3Source(url)  # type: ignore[arg-type]
        assert caught.value.setting == "url"

    @pytest.mark.parametrize("url", ["s3://KEY:hush@models/x", "https://KEY:hush@host/models"])
    def test_secrets_not_shown(self, url: str) -> None:
        """Credentials in a URL are refused and not repeated."""
        with pytest.raises(ConfigError) as caught:
            S3Source(url)
        assert "hush" not in f"{caught.value!r}{caught.value.__dict__}"


class TestSettings:
    """Arguments that can't work are refused at construction."""

    @pytest.mark.parametrize(
        ("arguments", "setting"),
        [
            ({"key": "{name}"}, "key"),
            ({"client": object()}, "client"),
            ({"session": object()}, "session"),
            ({"config": {"read_timeout": 3}}, "config"),
            ({"endpoint_url": "localhost:9000"}, "endpoint_url"),
            ({"endpoint_url": "http://u:p@h"}, "endpoint_url"),
            ({"endpoint_url": 9000}, "endpoint_url"),
            ({"extra": ["RequestPayer"]}, "extra"),
            ({"extra": {1: 2}}, "extra"),
            ({"extra": {"Bucket": "x"}}, "extra"),
            ({"extra": {"VersionId": "x"}}, "extra"),
            ({"version": "3"}, "version"),
        ],
    )
    def test_refused(self, arguments: dict[str, Any], setting: str) -> None:
        """Each is told by its name."""
        with pytest.raises(ConfigError) as caught:
            S3Source("s3://models", **arguments)
        assert caught.value.setting == setting

    @pytest.mark.parametrize(
        "other", [{"session": boto3.session.Session()}, {"endpoint_url": "http://h"}, {"config": Config()}]
    )
    def test_client_and_more(self, other: dict[str, Any], s3_moto: Store) -> None:
        """A client is used as it is, so nothing that would make one goes with it."""
        with pytest.raises(ConfigError, match="client="):
            S3Source("s3://models", client=s3_moto.client(), **other)

    def test_unknown_extra(self, s3_moto: Store) -> None:
        """An argument that no operation takes is told at the first call, without its value."""
        source = S3Source("s3://models", client=s3_moto.client(), extra={"RequestPayr": "hush"})
        with pytest.raises(ConfigError, match="RequestPayr") as caught:
            source.find("a")
        assert "hush" not in f"{caught.value}{caught.value.__dict__}{source!r}{source.url}"

    def test_extra_goes_where_taken(self, s3_moto: Store) -> None:
        """Each argument goes to the operations that take it, and to no other."""
        bucket = s3_moto.bucket()
        bucket.put("a/x", BODY)
        extra = {"RequestPayer": "requester", "SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
        with FaultProxy(s3_moto.endpoint) as proxy:
            source = source_of(attrs.evolve(bucket, store=s3_moto.at(proxy.endpoint)), extra=extra)
            artifact = source.find("a")
            content(source, artifact, artifact.files[0])
            head, listing, get = proxy.requests
        assert all(request.headers["x-amz-request-payer"] == "requester" for request in (head, listing, get))
        encrypted = ["x-amz-server-side-encryption-customer-key" in request.headers for request in (head, listing, get)]
        assert encrypted == [True, False, True]

    def test_import_is_light(self) -> None:
        """Importing the module and making a source imports neither boto3 nor botocore, nor does it need a network."""
        code = (
            "import sys; from modelcache.sources.s3 import S3Source; S3Source('s3://models');"
            "sys.exit(any(name.partition('.')[0] in ('boto3', 'botocore', 'urllib3') for name in sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=20).returncode == 0


class TestFind:
    """Finding a model's artifact."""

    @pytest.mark.parametrize("key", ["{model}/model.bin", lambda model: f"{model}/model.bin"])
    def test_key(self, bucket: Bucket, key: Any) -> None:
        """A template or a function says where it lies, below the prefix."""
        bucket.put("prod/fraud/model.bin", BODY)
        artifact = source_of(bucket, "/prod", key=key).find("fraud")
        assert (artifact.files[0].name, artifact.folder) == ("model.bin", False)

    def test_key_prefix(self, bucket: Bucket) -> None:
        """A key that ends in a slash is fetched as a folder, even beside an archive."""
        bucket.put("fraud.tar.gz", BODY)
        bucket.put("fraud/x", BODY)
        assert source_of(bucket, key="{model}/").find("fraud").folder

    def test_many_files(self, bucket: Bucket) -> None:
        """A prefix of several pages is listed whole, markers left out, other prefixes too."""
        names = [f"{number // 10}/{number}" for number in range(25)]
        for name in names:
            bucket.put(f"m/{name}", b"x")
        for key in ("m/", "m/0/", "m/empty/", "m2/x"):
            bucket.put(key, b"")
        client = bucket.store.client()
        pages: list[int] = []

        def small_pages(params: dict[str, Any], **rest: Any) -> dict[str, Any]:
            pages.append(1)
            return {**params, "MaxKeys": 4}

        client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
        artifact = S3Source(bucket.url, client=client).find("m")
        assert [file.name for file in artifact.files] == sorted(names)
        assert len(pages) == 7

    @pytest.mark.parametrize(
        "keys", [["m/a", "m/a/b"], ["m/../x"], ["m//x"], ["m/./x"], ["m/a/..", "m/b"], ["m/a/", "m/a"]]
    )
    def test_bad_names(self, bucket: Bucket, keys: list[str]) -> None:
        """Names that can't become files are refused; a marker beside a file of its name can."""
        for key in keys:
            bucket.put(key, b"" if key.endswith("/") else b"x")
        if keys == ["m/a/", "m/a"]:
            assert [file.name for file in source_of(bucket).find("m").files] == ["a"]
            return
        with pytest.raises(UnsafeArtifact, match="'m'") as caught:
            source_of(bucket).find("m")
        assert caught.value.member is not None

    def test_object_like_folder(self, s3_moto: Store) -> None:
        """A folder marker that has content is refused: it could be neither."""
        bucket = s3_moto.bucket()
        bucket.put("m/a/", b"x")
        with pytest.raises(UnsafeArtifact, match="like a folder"):
            source_of(bucket).find("m")

    def test_only_markers(self, bucket: Bucket) -> None:
        """A prefix with nothing but markers holds no model."""
        bucket.put("m/", b"")
        bucket.put("m/a/", b"")
        with pytest.raises(ModelNotFound):
            source_of(bucket).find("m")

    def test_requests(self, bucket: Bucket, fault_proxy: FaultProxy) -> None:
        """An archive costs one request, a prefix or a missing model two."""
        bucket.put("a.tar.gz", BODY)
        bucket.put("b/x", BODY)
        source = source_of(attrs.evolve(bucket, store=bucket.store.at(fault_proxy.endpoint)))
        counts = []
        for model in ("a", "b"):
            fault_proxy.forget()
            source.find(model)
            counts.append(len(fault_proxy.requests))
        fault_proxy.forget()
        with pytest.raises(ModelNotFound) as caught:
            source.find("c")
        assert caught.value.tried == (f"{bucket.url}/c.tar.gz", f"{bucket.url}/c/")
        assert [*counts, len(fault_proxy.requests)] == [1, 2, 2]

    def test_longest_key(self, bucket: Bucket) -> None:
        """A key longer than any store takes is not asked for."""
        with pytest.raises(ModelNotFound):
            source_of(bucket, "/prod").find("ü" * 512)

    @pytest.mark.parametrize("model", ["a", "a.zip"])
    def test_missing_bucket(self, s3: Store, model: str) -> None:
        """A bucket that is not there is no missing model: SourceUnavailable, and it says so."""
        source = S3Source("s3://no-such-bucket-here", client=s3.client())
        with pytest.raises(SourceUnavailable, match="no such bucket") as caught:
            source.find(model)
        assert (caught.value.code, caught.value.model) == ("NoSuchBucket", model)

    def test_no_server(self) -> None:
        """Where nobody answers, the message tells the reason and the model, and the cause is kept."""
        client = Store("none", f"http://127.0.0.1:{free_port()}", "a", "b").client()
        with pytest.raises(SourceUnavailable, match=r"'a'.*refused") as caught:
            S3Source("s3://models", client=client).find("a")
        assert type(caught.value.__cause__).__name__ == "EndpointConnectionError"
        assert isinstance(caught.value, ConnectionError)

    def test_archived(self, s3_moto: Store) -> None:
        """An object in an archive storage class is told as such, before anything is fetched."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY, StorageClass="GLACIER")
        with pytest.raises(SourceUnavailable, match="restore it") as caught:
            source_of(bucket).find("a")
        assert caught.value.code == "InvalidObjectState"
        bucket.put("b/x", BODY, StorageClass="DEEP_ARCHIVE")
        artifact = source_of(bucket).find("b")
        with pytest.raises(SourceUnavailable, match="restore it"):
            content(source_of(bucket), artifact, artifact.files[0])

    def test_store_refuses_checksum_mode(self, bucket: Bucket, fault_proxy: FaultProxy) -> None:
        """A store that refuses to be asked for checksums is asked without, and only once with."""
        bucket.put("a.tar.gz", BODY)
        fault_proxy.script(
            always=Fault(answer=(400, "InvalidArgument")),
            applies=lambda request: "x-amz-checksum-mode" in request.headers,
        )
        client = bucket.store.at(fault_proxy.endpoint).client(response_checksum_validation="when_required")
        source = S3Source(bucket.url, client=client)
        assert whole(source, "a") == BODY
        fault_proxy.forget()
        assert whole(source, "a") == BODY
        assert [request.method for request in fault_proxy.requests] == ["HEAD", "GET"]

    def test_wrong_type(self, s3_moto: Store) -> None:
        """An argument of a type that boto3 refuses is a setting that can't work."""
        with pytest.raises(ConfigError, match="RequestPayer"):
            S3Source("s3://models", client=s3_moto.client(), extra={"RequestPayer": 7}).find("a")

    @pytest.mark.parametrize(
        ("status", "code", "kind", "hint"),
        [
            (400, "AuthorizationHeaderMalformed", SourceUnavailable, "region"),
            (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
            (403, "InvalidObjectState", SourceUnavailable, "restore"),
            (401, "Unauthorized", AccessDenied, "s3:GetObject"),
            (501, "NotImplemented", SourceUnavailable, "broken"),
            (400, "KMS.DisabledException", SourceUnavailable, "refuses"),
        ],
    )
    def test_answers(
        self, bucket: Bucket, fault_proxy: FaultProxy, status: int, code: str, kind: type[Exception], hint: str
    ) -> None:
        """What a store answers becomes an error of the fitting kind that says what to do."""
        bucket.put("a/x", BODY)
        source = source_of(attrs.evolve(bucket, store=bucket.store.at(fault_proxy.endpoint)))
        artifact = source.find("a")
        fault_proxy.script(always=Fault(answer=(status, code)))
        source._patience = Patience(attempts=1)
        with pytest.raises(kind, match=hint) as caught:
            content(source, artifact, artifact.files[0])
        assert (caught.value.code, caught.value.model) == (code, "a")  # type: ignore[attr-defined]

    def test_etags(self, bucket: Bucket, fault_proxy: FaultProxy) -> None:
        """A weak ETag pins by comparison only, as it matches nothing; without any ETag nothing is fetched."""
        bucket.put("a.tar.gz", BODY)
        source = source_of(attrs.evolve(bucket, store=bucket.store.at(fault_proxy.endpoint)))
        fault_proxy.script(always=Fault(etag='W/"1-f"'), applies=any_request)
        assert whole(source, "a") == BODY
        assert not any("if-match" in request.headers for request in fault_proxy.requests)
        fault_proxy.script(always=Fault(etag=""), applies=any_request)
        with pytest.raises(SourceUnavailable, match="no ETag"):
            source.find("a")


class TestVersions:
    """Pinned versions of objects."""

    def test_version(self, bucket: Bucket) -> None:
        """``version`` says which version to fetch; None is the latest."""
        client = bucket.client
        client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
        first = bucket.put("a.tar.gz", b"first")["VersionId"]
        bucket.put("a.tar.gz", b"second")
        pins: dict[str, str | None] = {"a": first}
        source = source_of(bucket, version=pins.get)
        artifact = source.find("a")
        assert whole(source, "a") == b"first"
        client.delete_object(Bucket=bucket.name, Key="a.tar.gz")
        assert content(source, artifact, artifact.files[0]) == b"first"
        pins["a"] = None
        with pytest.raises(ModelNotFound):
            source.find("a")
        pins["a"] = "no-such-version"
        with pytest.raises((ModelNotFound, SourceUnavailable)):
            source.find("a")

    def test_marker(self, bucket: Bucket) -> None:
        """A version that is a delete marker is no model."""
        client = bucket.client
        client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
        bucket.put("a.zip", b"first")
        marker = client.delete_object(Bucket=bucket.name, Key="a.zip")["VersionId"]
        with pytest.raises(ModelNotFound):
            source_of(bucket, version=lambda model: marker).find("a.zip")

    def test_never_a_prefix(self, bucket: Bucket) -> None:
        """A version is of one object: where one is asked for, no prefix is taken instead."""
        bucket.put("a/x", BODY)
        with pytest.raises(ModelNotFound, match="version"):
            source_of(bucket, version=lambda model: "null").find("a")

    @pytest.mark.parametrize("value", ["", 3, b"x"])
    def test_nonsense(self, s3_moto: Store, value: object) -> None:
        """What the function returns is checked."""
        source = S3Source("s3://models", client=s3_moto.client(), version=lambda model: value)  # type: ignore[arg-type,return-value]
        with pytest.raises(ConfigError, match="'a'"):
            source.find("a")


class TestChecksums:
    """What S3 tells of the bytes is compared with them."""

    @pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
    def test_full_object(self, s3_moto: Store, algorithm: str) -> None:
        """A checksum of the whole object is known before it is fetched, in hex, and found right."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY, ChecksumAlgorithm=algorithm)
        source = source_of(bucket)
        known = source.find("a").files[0].checksums
        name = algorithm.lower()
        assert list(known) == [name]
        assert name == "crc32" or known[name] == hashlib.new(name, BODY).hexdigest()
        assert whole(source, "a") == BODY

    @pytest.mark.parametrize("told", [{}, {"ChecksumType": "COMPOSITE"}])
    @pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
    def test_f050_composite(self, s3_moto: Store, algorithm: str, told: dict[str, str]) -> None:
        """F050: a checksum of checksums is not mistaken for one of the object; it is compared part by part."""
        bucket = s3_moto.bucket()
        parts = [noise(5 * MIB, 1), noise(5 * MIB, 3), noise(1000, 2)]
        bucket.put_parts("a.tar.gz", *parts, ChecksumAlgorithm=algorithm, **told)
        with FaultProxy(s3_moto.endpoint) as proxy:
            source = source_of(attrs.evolve(bucket, store=s3_moto.at(proxy.endpoint)))
            file = source.find("a").files[0]
            assert list(file.checksums) == [f"md5/{5 * MIB}"]  # moto does not tell how many parts its own is of
            assert whole(source, "a") == b"".join(parts)
            proxy.script(Fault(flip=7))
            with pytest.raises(ArtifactCorrupt, match="MD5"):
                whole(source, "a")

    @pytest.mark.parametrize("algorithm", ["CRC32", "SHA1", "SHA256"])
    def test_f050_composite_known_values(self, algorithm: str) -> None:
        """F050: the checksum of the parts' checksums is as S3 defines it, however the bytes come in."""
        parts = [noise(1000, 1), noise(1000, 2), noise(10, 3)]

        def raw(data: bytes) -> bytes:
            return (
                zlib.crc32(data).to_bytes(4, "big") if algorithm == "CRC32" else hashlib.new(algorithm, data).digest()
            )

        value = base64.b64encode(raw(b"".join(map(raw, parts)))).decode()
        answer = {f"Checksum{algorithm}": f"{value}-3", "ChecksumType": "COMPOSITE", "ContentLength": 2010}
        known = checksums.told_by(answer, directory_bucket=False)
        sizes = {1: 1000, 3: 10}
        learnt = with_parts(known, answer, lambda number: {"PartsCount": 3, "ContentLength": sizes[number]})
        assert (known.checksums, learnt.unchecked) == ({}, None)
        digests = checksums.Digests(learnt.checksums)
        data = b"".join(parts)
        for start in range(0, len(data), 700):
            digests.update(memoryview(data)[start : start + 700])
        assert digests.problem() is None
        assert digests.any
        for other in ({1: 1000, 3: 1000}, {1: 0, 3: 2010}):
            assert with_parts(known, answer, lambda n, o=other: {"PartsCount": 3, "ContentLength": o[n]}) == known  # type: ignore[misc]
        assert with_parts(known, answer, lambda number: {"PartsCount": 4, "ContentLength": sizes.get(number)}) == known
        assert with_parts(known, answer, lambda number: sizes[7]) == known  # type: ignore[arg-type,return-value]

    def test_f050_composite_of_unequal_parts(self, s3_moto: Store, caplog: pytest.LogCaptureFixture) -> None:
        """F050: where the sizes of the parts can't be known, a good object is not refused; one line says so."""
        bucket = s3_moto.bucket()
        parts = [noise(5 * MIB, 1), noise(6 * MIB, 2)]
        for model in ("a", "b"):
            bucket.put_parts(f"{model}.tar.gz", *parts, ChecksumAlgorithm="SHA256")
        source = source_of(bucket)
        with caplog.at_level(logging.INFO, "modelcache"):
            for model in ("a", "b", "a"):
                assert whole(source, model) == b"".join(parts)
        assert source.find("a").files[0].checksums == {}
        lines = [record for record in caplog.records if record.levelno >= logging.INFO and "modelcache" in record.name]
        assert len(lines) == 1
        assert "multipart" in lines[0].getMessage()

    def test_multipart_full_object(self, s3_moto: Store) -> None:
        """A multipart object whose checksum is of the whole is compared with it."""
        bucket = s3_moto.bucket()
        parts = [noise(5 * MIB, 1), noise(1000, 2)]
        bucket.put_parts("a.tar.gz", *parts, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT")
        source = source_of(bucket)
        assert source.find("a").files[0].checksums == {"crc32": f"{zlib.crc32(b''.join(parts)):08x}"}
        assert whole(source, "a") == b"".join(parts)

    def test_etag(self, s3_ceph: Store) -> None:
        """Where a store tells no checksum, the ETag of a simple upload serves as MD5, also below a prefix."""
        bucket = s3_ceph.bucket()
        bucket.put("a.tar.gz", BODY)
        source = source_of(bucket)
        assert source.find("a").files[0].checksums == {"md5": hashlib.md5(BODY, usedforsecurity=False).hexdigest()}
        assert whole(source, "a") == BODY

    def test_multipart_on_ceph(self, s3_ceph: Store) -> None:
        """A multipart object is pinned by its whole ETag, which is not mistaken for an MD5."""
        bucket = s3_ceph.bucket()
        parts = [noise(5 * MIB, 1), noise(MIB, 2)]
        bucket.put_parts("a.tar.gz", *parts)
        source = source_of(bucket)
        file = source.find("a").files[0]
        assert file.version.strip('"').endswith("-2")
        assert file.checksums == {}
        assert whole(source, "a") == b"".join(parts)

    @pytest.mark.parametrize("layout", ["a.tar.gz", "a/x"])
    def test_flipped_bit(self, bucket: Bucket, fault_proxy: FaultProxy, layout: str) -> None:
        """One bit that flips on the way is found, before the end is told, also in a file below a prefix."""
        bucket.put(layout, BODY)
        source = source_of(attrs.evolve(bucket, store=bucket.store.at(fault_proxy.endpoint)))
        fault_proxy.script(always=Fault(flip=100_001))
        artifact = source.find("a")
        with pytest.raises(ArtifactCorrupt, match="'a'") as caught:
            content(source, artifact, artifact.files[0])
        assert caught.value.version == artifact.files[0].version

    def test_client_that_checks(self, s3_moto: Store) -> None:
        """A client that compares checksums itself tells the same error."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY)
        with FaultProxy(s3_moto.endpoint) as proxy:
            client = s3_moto.at(proxy.endpoint).client(response_checksum_validation="when_supported")
            source = S3Source(bucket.url, client=client)
            artifact = source.find("a")
            assert content(source, artifact, artifact.files[0]) == BODY
            proxy.script(always=Fault(flip=5))
            blind = attrs.evolve(artifact.files[0], checksums={"unknown": "00"})
            with pytest.raises(ArtifactCorrupt, match="not what the store promised"):
                content(source, artifact, blind)

    @pytest.mark.parametrize("encoding", ["gzip", "zstd", "identity"])
    def test_content_encoding(self, bucket: Bucket, encoding: str) -> None:
        """The bytes come as stored, whatever encoding the object claims."""
        body = tar_gz({"x": b"1" * 100_000})
        bucket.put("a.tar.gz", body, ContentEncoding=encoding)
        assert whole(source_of(bucket), "a") == body

    @pytest.mark.parametrize(
        "answer",
        [
            {"ServerSideEncryption": "aws:kms"},
            {"ServerSideEncryption": "aws:kms:dsse"},
            {"SSECustomerAlgorithm": "AES256"},
            {"ETag": '"0123456789abcdef0123456789abcdef-2"'},
            {"ETag": '"65a1b2-1f"'},
            {"ChecksumCRC32": "AAAAAA==-3"},
            {"ChecksumCRC32": "no base64", "ServerSideEncryption": "aws:kms"},
            {"ChecksumSHA256": "AAAAAA==", "ServerSideEncryption": "aws:kms"},
        ],
    )
    def test_not_comparable(self, answer: dict[str, str]) -> None:
        """What is no checksum of the whole object is never taken for one."""
        known = checksums.told_by({"ETag": '"0123456789abcdef0123456789abcdef"', **answer}, directory_bucket=False)
        assert set(known.checksums) <= ({"md5"} if answer == {"ChecksumCRC32": "AAAAAA==-3"} else set())

    def test_directory_bucket(self) -> None:
        """ETags of directory buckets are no MD5."""
        known = checksums.told_by({"ETag": '"0123456789abcdef0123456789abcdef"'}, directory_bucket=True)
        assert known.checksums == {}
        assert known.unchecked

    def test_crc_known_values(self) -> None:
        """Checksums that need awscrt are computed where it is installed, and named where it is not."""
        # "123456789": the check values of the catalogue of CRC algorithms.
        digests = checksums.Digests({"crc32": "cbf43926", "crc32c": "e3069283", "crc64nvme": "ae8b14860a799888"})
        for byte in b"123456789":
            digests.update(bytes([byte]))
        assert digests.problem() is None
        known = checksums.told_by({"ChecksumCRC64NVME": "rosUhgp5mIg="}, directory_bucket=False)
        assert known.checksums == {"crc64nvme": "ae8b14860a799888"}
        try:
            import awscrt  # noqa: F401, PLC0415 - is it there?
        except ImportError:
            assert "crt" in (known.unchecked or "")
        else:
            assert known.unchecked is None


class TestCredentials:
    """Refused credentials are no missing model."""

    def test_wrong(self, s3_ceph: Store) -> None:
        """Wrong keys are AccessDenied with the store's own code, though HEAD tells none."""
        bucket = s3_ceph.bucket()
        bucket.put("a.tar.gz", BODY)
        for store, code in (
            (attrs.evolve(s3_ceph, secret_key="hush"), "SignatureDoesNotMatch"),  # noqa: S106 - wrong on purpose
            (attrs.evolve(s3_ceph, access_key="nobody"), "InvalidAccessKeyId"),
        ):
            with pytest.raises(AccessDenied, match=code) as caught:
                S3Source(bucket.url, client=store.client()).find("a")
            assert (caught.value.code, caught.value.model) == (code, "a")
            assert "hush" not in str(caught.value)

    def test_forbidden(self, s3_ceph: Store) -> None:
        """A private object is AccessDenied; the message says that a missing one looks the same."""
        bucket = s3_ceph.bucket()
        bucket.put("a.tar.gz", BODY)
        source = S3Source(
            bucket.url,
            session=s3_ceph.session(),
            endpoint_url=s3_ceph.endpoint,
            config=Config(signature_version=UNSIGNED),
        )
        with pytest.raises(AccessDenied, match="ListBucket") as caught:
            source.find("a")
        assert caught.value.code == "AccessDenied"
        for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
            assert (str(twin), twin.code) == (str(caught.value), "AccessDenied")

    def test_anonymous(self, s3_ceph: Store) -> None:
        """A public object is read without credentials."""
        bucket = s3_ceph.bucket()
        bucket.put("a.tar.gz", BODY, ACL="public-read")
        config = Config(signature_version=UNSIGNED)
        assert whole(S3Source(bucket.url, endpoint_url=s3_ceph.endpoint, config=config), "a") == BODY

    def test_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """No credentials at all is AccessDenied too, and names what botocore missed."""
        _no_credentials(monkeypatch, tmp_path)
        with pytest.raises(AccessDenied) as caught:
            S3Source("s3://models", endpoint_url="http://127.0.0.1:1").find("a")
        assert caught.value.code == "NoCredentialsError"

    def test_profile_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A profile that is not there is told as missing credentials."""
        _no_credentials(monkeypatch, tmp_path)
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(AccessDenied, match="nobody") as caught:
            S3Source("s3://models", endpoint_url="http://127.0.0.1:1").find("a")
        assert caught.value.code == "ProfileNotFound"

    def test_renewed(self, s3_ceph: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """After a refusal the next call looks for new credentials: no restart is needed."""
        bucket = s3_ceph.bucket()
        bucket.put("a.tar.gz", BODY)
        _no_credentials(monkeypatch, tmp_path)
        source = S3Source(bucket.url, endpoint_url=s3_ceph.endpoint)
        with pytest.raises(AccessDenied):
            source.find("a")
        for secret in ("wrong", s3_ceph.secret_key):
            (tmp_path / "credentials").write_text(
                f"[default]\naws_access_key_id={s3_ceph.access_key}\naws_secret_access_key={secret}\n"
            )
            if secret == "wrong":  # noqa: S105 - wrong on purpose
                with pytest.raises(AccessDenied, match="SignatureDoesNotMatch"):
                    source.find("a")
        assert whole(source, "a") == BODY

    @pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "RequestExpired"])
    @pytest.mark.parametrize("status", [400, 403])
    def test_expired(self, s3_moto: Store, code: str, status: int) -> None:
        """An expired token is AccessDenied with its code, whichever status the store gives it."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY)
        with FaultProxy(s3_moto.endpoint) as proxy:
            source = source_of(attrs.evolve(bucket, store=s3_moto.at(proxy.endpoint)))
            proxy.script(always=Fault(answer=(status, code)), applies=any_request)
            with pytest.raises(AccessDenied, match=code) as caught:
                source.find("a")
            assert caught.value.code == code
            proxy.script()
            assert whole(source, "a") == BODY

    def test_customer_key(self, s3_ceph: Store) -> None:
        """An object encrypted with the customer's key is found and read with it, and its key is never shown."""
        bucket = s3_ceph.bucket()
        extra = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "hush" * 8}
        bucket.put("a.tar.gz", BODY, **extra)
        source = source_of(bucket, extra=extra)
        assert whole(source, "a") == BODY
        with pytest.raises(SourceUnavailable) as caught:
            source_of(bucket).find("a")
        assert caught.value.code in ("InvalidRequest", "InvalidArgument")
        assert "hush" not in repr(source)


class TestClient:
    """Whose client is used, and when it is made."""

    def test_one_client(self, s3_moto: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fifty threads that ask for the first time at once share one client, made once."""
        bucket = s3_moto.bucket()
        for number in range(50):
            bucket.put(f"m{number}.tar.gz", b"%d" % number)
        made: list[object] = []
        session = s3_moto.session()
        make = session.client

        def counting(*arguments: Any, **named: Any) -> Any:
            made.append(make(*arguments, **named))
            return made[-1]

        session.client = counting
        source = S3Source(bucket.url, session=session, endpoint_url=s3_moto.endpoint)
        barrier = threading.Barrier(50)
        got: dict[int, bytes] = {}

        def run(number: int) -> None:
            barrier.wait()
            got[number] = whole(source, f"m{number}")

        threads = [threading.Thread(target=run, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {number: b"%d" % number for number in range(50)}
        assert len(made) == 1

    def test_defaults_and_config(self, s3_moto: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Our defaults apply where the user's Config says nothing; what it says, and the environment, wins."""
        _no_credentials(monkeypatch, tmp_path)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
        config = (
            S3Source("s3://models", config=Config(read_timeout=3, max_pool_connections=2))._clients.get().meta.config
        )
        assert (config.connect_timeout, config.read_timeout, config.max_pool_connections) == (5, 3, 2)
        assert config.retries == {"mode": "standard", "total_max_attempts": 7}
        assert config.tcp_keepalive
        monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
        assert S3Source("s3://models")._clients.get().meta.config.retries["mode"] == "adaptive"

    def test_endpoint_from_environment(self, s3_moto: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """What boto3 reads from the environment works."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY)
        _no_credentials(monkeypatch, tmp_path)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_moto.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        assert whole(S3Source(bucket.url), "a") == BODY

    def test_given_client(self, s3_moto: Store) -> None:
        """A client that is given is the one that asks."""
        bucket = s3_moto.bucket()
        bucket.put("a.tar.gz", BODY)
        client = s3_moto.client()
        asked: list[str] = []
        client.meta.events.register("before-call.s3", lambda model, **rest: asked.append(model.name))
        assert whole(S3Source(bucket.url, client=client), "a") == BODY
        assert asked == ["HeadObject", "GetObject"]

    def test_users_error(self, s3_moto: Store) -> None:
        """An error of the user's own hook on the client passes as it is."""
        client = s3_moto.client()

        def broken(**arguments: Any) -> None:
            raise KeyError("mine")

        client.meta.events.register("before-call.s3", broken)
        with pytest.raises(KeyError, match="mine"):
            S3Source("s3://models", client=client).find("a")


_FORK = """
import hashlib, json, os, sys
import boto3.session
from modelcache.sources.s3 import S3Source
endpoint, bucket, access, secret, given = json.loads(sys.argv[1])
session = boto3.session.Session(access, secret, region_name="us-east-1")
if given:
    source = S3Source("s3://" + bucket, client=session.client("s3", endpoint_url=endpoint))
else:
    source = S3Source("s3://" + bucket, session=session, endpoint_url=endpoint)

def fetch(number):
    artifact = source.find(f"m{number}")
    with source.open(artifact, artifact.files[0]) as stream:
        return hashlib.sha256(b"".join(iter(lambda: stream.read(65536), b""))).hexdigest()

def tell(line):
    os.write(1, (line + "\\n").encode())  # whole lines, whoever else writes

tell(fetch(0))  # warm: one connection lies in the pool now
pids = []
for number in range(1, 9):
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(3):
                tell(fetch(number))
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    pids.append(pid)
tell(fetch(9))
sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
"""


class TestFork:
    """A source made, and used, before a fork."""

    @pytest.mark.parametrize("tls", [False, True])
    @pytest.mark.parametrize("given", [True, False])
    def test_children(self, bucket: Bucket, given: bool, tls: bool, tmp_path: Path) -> None:
        """Eight children each read their own model on connections of their own, never on an inherited one."""
        bodies = [noise(200_000, number) for number in range(10)]
        for number, body in enumerate(bodies):
            bucket.put(f"m{number}.tar.gz", body)
        context, trusted = certificate(tmp_path) if tls else (None, None)
        with FaultProxy(bucket.store.endpoint, context) as proxy:
            store = bucket.store.at(proxy.endpoint)
            argument = json.dumps([store.endpoint, bucket.name, store.access_key, store.secret_key, given])
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", _FORK, argument],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
                env=os.environ | ({"AWS_CA_BUNDLE": str(trusted)} if trusted else {}),
            )
        assert (done.returncode, done.stderr) == (0, "")
        hashes = [hashlib.sha256(body).hexdigest() for body in bodies]
        assert sorted(done.stdout.split()) == sorted([hashes[0], hashes[9], *hashes[1:9] * 3])
        used: dict[int, set[str]] = {}
        for request in proxy.requests:
            used.setdefault(request.connection, set()).add(request.path)
        parents = {f"/{bucket.name}/m0.tar.gz", f"/{bucket.name}/m9.tar.gz"}
        assert parents in used.values()  # the parent went on with its own
        assert all(len(paths) == 1 or paths == parents for paths in used.values())

    def test_state_is_collectable(self) -> None:
        """The hook for forks keeps no source alive."""
        import gc  # noqa: PLC0415 - next to its use
        import weakref  # noqa: PLC0415 - the same

        source = S3Source("s3://models")
        gone = weakref.ref(source)
        del source
        gc.collect()
        assert gone() is None
        assert s3_client._process.lock.acquire(blocking=False)
        s3_client._process.lock.release()


def _no_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Hide the credentials and settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
