"""Models in S3, or in any store that speaks its API: finding a model's artifact and its present version.

How a client is made and survives a fork is ``s3_client``; reading, resuming and verifying ``s3_stream``;
addresses ``s3_url``; what errors mean ``s3_errors``.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelcache.errors import ConfigError, ModelNotFound, SourceUnavailable, UnsafeArtifact
from modelcache.sources.base import Artifact, Output, RemoteFile, Stream
from modelcache.sources.checksums import Known, told_by
from modelcache.sources.keys import Key, KeyRule, ask, check_names, folder_version
from modelcache.sources.s3_client import OPERATIONS, Clients, Extra
from modelcache.sources.s3_effort import Effort, Patience, Requests
from modelcache.sources.s3_errors import Place, answer_of, judge
from modelcache.sources.s3_get import Getter
from modelcache.sources.s3_multipart import with_parts
from modelcache.sources.s3_saving import save
from modelcache.sources.s3_stream import S3Stream
from modelcache.sources.s3_url import parse_s3_url

if TYPE_CHECKING:
    import boto3.session
    import botocore.config

_log = logging.getLogger(__name__)

CONNECTIONS = 16
"""Requests under way at once, unless set: enough for small files from S3, where each answer takes some 30 ms."""
_LONGEST_KEY = 1024  # bytes of UTF-8; no store holds a longer one
_ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")


class S3Source:
    """A bucket, or a prefix in one.

    Nothing is asked of the network at construction, and boto3 is imported on first use.

    Args:
        url: ``s3://bucket``, ``s3://bucket/prefix``, or an access point's ARN in the place of the bucket.
        key: a template like ``"{model}/model.tar.gz"``, or a function from model id to key, both relative to the
            prefix; a key that ends in ``/`` is a prefix, fetched as a folder. None: an id with an archive suffix
            is the key as it stands, any other is ``{model}.tar.gz`` where that exists, else the prefix ``{model}/``.
        client: a boto3 S3 client, used as given.
        session: a boto3 session to make the client from; None: a new one with the default credentials.
        endpoint_url: URL of another store than AWS.
        config: botocore Config; what it sets goes before our defaults (5 s to connect, 20 s without a byte,
            standard retries, 32 connections).
        extra: arguments for every call, such as ``RequestPayer``, ``ExpectedBucketOwner``,
            ``SSECustomerAlgorithm`` and ``SSECustomerKey``; each goes to the operations that take it.
        version: a function from model id to the VersionId to fetch, or to None for the latest.
        connections: requests for bytes under way at once, those of all models together; an object that is
            fetched alone takes up to 4 of them. On the way through memory are at most so many parts of 8 MiB,
            and one of each object.

    Raises:
        ConfigError: an address, template or combination of arguments that can't work.

    Concurrency: ``find`` and ``open`` may be called from many threads. One client serves a process; it is made
    on first use, under a lock of its own. ``key`` and ``version`` are called on the thread that calls
    ``find``, with no lock held. A forked child makes its own client; of a client that was given, it closes the
    inherited connections before it asks for anything.
    """

    def __init__(
        self,
        url: str,
        *,
        key: Key = None,
        client: Any = None,
        session: "boto3.session.Session | None" = None,
        endpoint_url: str | None = None,
        config: "botocore.config.Config | None" = None,
        extra: Mapping[str, Any] | None = None,
        version: Callable[[str], str | None] | None = None,
        connections: int = CONNECTIONS,
    ) -> None:
        self._address = parse_s3_url(url)
        self._rule = KeyRule(key)
        self._clients = Clients(client, session, endpoint_url, config)
        self._extra = Extra(extra)
        if version is not None and not callable(version):
            raise ConfigError("version= must be a function from model id to VersionId", setting="version")
        self._version = version
        self._patience = Patience()
        # Guards no state: taken once, never waited for, never given back. Who gets it writes the one line about
        # what can't be checked.
        self._told_unchecked = threading.Lock()
        self._connections = _checked(connections)
        self._getter = Getter(self._address.bucket, self._clients, self._extra, connections)
        self._requests = Requests(self._getter, self._known, self._look, self._tell_unchecked, self._clients.heed)

    @property
    def url(self) -> str:
        """Bucket and prefix, without secrets."""
        return self._address.url()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def find(self, model: str) -> Artifact:
        """Return the present version of a model's artifact.

        One HeadObject for each key that may hold it, two more for an object that was uploaded in parts, then, for a
        prefix, one ListObjectsV2 for 1,000 objects.

        Raises:
            ModelNotFound: there is no such object or prefix, or no such version of it.
            SourceUnavailable: no bucket of that name, no answer, or one that says: not now.
            AccessDenied: the credentials were refused; without the right to list, also for a missing key.
            UnsafeArtifact: a prefix with names that can't become files.
            ConfigError: ``key`` or ``version`` returned nonsense, or ``extra`` has an unknown argument.
        """
        pin = self._pin(model)
        keys = self._rule.keys(model)
        tried = []
        for position, key in enumerate(keys):
            place = Place(model, self.url, self._address.url(key))
            tried.append(place.url)
            full = self._address.key(key)
            if len(full.encode("utf-8", "replace")) > _LONGEST_KEY or (pin and key.endswith("/")):
                continue  # no such key can be; a version is of one object, never of a prefix
            try:
                if key.endswith("/"):
                    return self._find_prefix(place, full)
                return self._find_object(place, full, pin, last=bool(pin) or position == len(keys) - 1)
            except ModelNotFound:
                continue
        version = f" (version {pin})" if pin else ""
        raise ModelNotFound(
            f"model {model!r}: nothing at {' or '.join(tried)}{version}; upload it there, or set S3Source(key=)",
            model=model,
            source=self.url,
            tried=tuple(tried),
        )

    def open(self, artifact: Artifact, file: RemoteFile) -> Stream:
        """Return the bytes of one file, pinned to its version; the first read makes the first request."""
        return S3Stream(self._requests, self._place(artifact, file), file, self._patience)

    def save(
        self,
        artifact: Artifact,
        put: Callable[[RemoteFile], Callable[[], Output]],
        *,
        count: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        """Write all files of an artifact, as :class:`~modelcache.sources.base.Saving` says."""
        files = [(self._place(artifact, file), file) for file in artifact.files]
        save(files, put, Effort(self._requests, self._patience), self._connections, count=count, check=check)

    def _place(self, artifact: Artifact, file: RemoteFile) -> Place:
        key, _ = json.loads(file.address)
        return Place(artifact.model, self.url, f"s3://{self._address.bucket}/{key}")

    def _pin(self, model: str) -> str | None:
        if self._version is None:
            return None
        pin = ask(self._version, "version", model)
        if pin is not None and (not isinstance(pin, str) or not pin):
            raise ConfigError(
                f"model {model!r}: the function given as version= returned {pin!r:.200}, which is no VersionId",
                model=model,
                setting="version",
                value=pin,
            )
        return pin

    def _find_object(self, place: Place, key: str, pin: str | None, *, last: bool) -> Artifact:
        with self._mapped(place):
            answer = self._head(key, pin, explain_missing=last)
        if answer.get("StorageClass") in _ARCHIVED and 'ongoing-request="false"' not in str(answer.get("Restore")):
            raise SourceUnavailable(
                f"{place}: lies in storage class {answer['StorageClass']}; restore it first",
                model=place.model,
                source=self.url,
                code="InvalidObjectState",
            )
        size, etag = answer.get("ContentLength"), answer.get("ETag")
        if size is None or not etag:
            raise SourceUnavailable(f"{place}: the store tells no size or no ETag", model=place.model, source=self.url)
        name = key.rpartition("/")[2]
        check_names(place.model, place.url.removesuffix(name), (name,))
        known = self._with_parts(self._known(answer), answer, key, pin)
        if known.unchecked:
            self._tell_unchecked(place, known.unchecked)
        file = RemoteFile(name, size, etag, json.dumps([key, pin]), known.checksums)
        return Artifact(place.model, _joined(etag, pin), (file,))

    def _head(self, key: str, pin: str | None, *, explain_missing: bool) -> dict[str, Any]:
        arguments = {"Key": key} | ({"VersionId": pin} if pin else {})
        asked = {"ChecksumMode": "ENABLED"} if self._getter.asks_checksums else {}
        try:
            return self._call("HeadObject", **arguments, **asked)
        except Exception as error:
            _, status = answer_of(error) or ("", 0)
            if asked and status in (400, 501):  # a store that does not know the question, or a bare refusal
                try:
                    answer = self._call("HeadObject", **arguments)
                except Exception as again:
                    raise self._reason(arguments, again) from again
                self._getter.asks_checksums = False
                return answer
            if status in (400, 403) or (status == 404 and explain_missing):  # noqa: PLR2004 - HTTP
                raise self._reason(arguments, error) from error
            raise

    def _reason(self, arguments: Mapping[str, Any], error: Exception) -> Exception:
        """Return the error with its code: answers to HEAD have no body, so GET is asked for the same."""
        try:
            self._call("GetObject", **arguments, Range="bytes=0-0")["Body"].close()
        except Exception as told:  # noqa: BLE001 - whatever it is says more than the bare status
            return told if answer_of(told) else error
        return error

    def _find_prefix(self, place: Place, prefix: str) -> Artifact:
        with self._mapped(place):
            found = list(self._list(prefix))
        files = []
        for entry in found:
            name = entry["Key"].removeprefix(prefix)
            if name.endswith("/") or not name:  # a folder marker
                if entry["Size"]:
                    raise UnsafeArtifact(
                        f"{place}{name} is an object named like a folder", model=place.model, member=name
                    )
                continue
            files.append(RemoteFile(name, entry["Size"], entry["ETag"], json.dumps([entry["Key"], None])))
        if not files:
            raise ModelNotFound(f"{place}: nothing there", model=place.model, source=self.url, tried=(place.url,))
        check_names(place.model, place.url, [file.name for file in files])
        files.sort(key=lambda file: file.name)
        return Artifact(place.model, folder_version(files), tuple(files), folder=True)

    def _list(self, prefix: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._call("ListObjectsV2", Prefix=prefix, **token)
            yield from page.get("Contents", ())
            following = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not following or following == token.get("ContinuationToken"):
                return
            token = {"ContinuationToken": following}

    def _look(self, place: Place, file: RemoteFile) -> Known:
        """Ask for the checksums of a file that is fetched in parts, whose answers have none."""
        key, pin = json.loads(file.address)
        with self._mapped(place):
            answer = self._head(key, pin, explain_missing=True)
        return self._with_parts(self._known(answer), answer, key, pin)

    def _with_parts(self, known: Known, answer: Mapping[str, Any], key: str, pin: str | None) -> Known:
        arguments = {"Key": key} | ({"VersionId": pin} if pin else {})
        return with_parts(known, answer, lambda number: self._call("HeadObject", PartNumber=number, **arguments))

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        client = self._clients.get()
        extra = self._extra.of(operation, client)
        answer: dict[str, Any] = getattr(client, OPERATIONS[operation])(
            Bucket=self._address.bucket, **arguments, **extra
        )
        return answer

    @contextmanager
    def _mapped(self, place: Place) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            verdict = judge(error, place)
            if verdict is None:
                raise
            self._clients.heed(verdict.error)
            raise verdict.error from error

    def _known(self, answer: Mapping[str, Any]) -> Known:
        return told_by(answer, directory_bucket=self._address.is_directory_bucket)

    def _tell_unchecked(self, place: Place, why: str) -> None:
        if self._told_unchecked.acquire(blocking=False):
            _log.info("%s: only its length is checked: %s (said once for %s)", place, why, self.url)


def _checked(connections: object) -> int:
    if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
        raise ConfigError(
            f"connections={connections!r:.200} must be a whole number, 1 or more",
            setting="connections",
            value=connections,
        )
    return connections


def _joined(etag: str, pin: str | None) -> str:
    return f"{etag} {hashlib.sha256(pin.encode()).hexdigest()[:16]}" if pin else etag
