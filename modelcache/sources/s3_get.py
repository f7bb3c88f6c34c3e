"""One GET of a range of one object: over a wire of our own where that loses nothing, else by the client's own call.

How connections are kept is ``s3_wire``, how requests are signed ``s3_signing``; what is done with the answer, and
when it is asked again, ``s3_parts``.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import attrs

from modelcache.sources.base import RemoteFile
from modelcache.sources.s3_client import Clients, Extra, Process
from modelcache.sources.s3_means import Means
from modelcache.sources.s3_signing import Pattern, host_of, pattern_of
from modelcache.sources.s3_wire import Answer, Grip, Wire, WireAnswer

_GOOD = (200, 206)
_ERROR_TEXT = 65_536  # bytes of an error's body that are read
_CHECKSUM = "x-amz-checksum-"
_TOLD = {
    "etag": "ETag",
    "content-range": "ContentRange",
    "x-amz-checksum-type": "ChecksumType",
    "x-amz-server-side-encryption": "ServerSideEncryption",
    "x-amz-server-side-encryption-customer-algorithm": "SSECustomerAlgorithm",
}


@attrs.frozen
class Span:
    """A piece of an object.

    Attributes:
        start, end: offsets of its first byte and of the one after its last.
        size: bytes of the whole object.
    """

    start: int
    end: int
    size: int

    @property
    def range(self) -> str | None:
        """The Range header that asks for it; None where it is the whole."""
        if self.start == 0 and self.end == self.size:
            return None
        return f"bytes={self.start}-" if self.end == self.size else f"bytes={self.start}-{self.end - 1}"


class Getter:
    """Asks for objects of one bucket.

    Concurrency: may be called from all threads, and in a forked child, where all is made anew.

    Args:
        bucket: its name.
        clients: hands out the client.
        extra: the user's arguments.
        connections: requests at once.
    """

    def __init__(self, bucket: str, clients: Clients, extra: Extra, connections: int) -> None:
        self._bucket = bucket
        self._clients = clients
        self._extra = extra
        self._connections = connections
        self._means: tuple[Process, Means] | None = None
        self._line: tuple[Process, Any, tuple[Pattern, Wire] | None] | None = None

    @property
    def means(self) -> Means:
        """The bounds of all that is fetched at once, of this process."""
        process = self._clients.process
        held = self._means
        if held is None or held[0] is not process:
            with process.lock:
                held = self._means
                if held is None or held[0] is not process:
                    held = self._means = (process, Means(self._connections))
        return held[1]

    def get(self, file: RemoteFile, span: Span, grip: Grip, *, checksums: bool) -> Answer:
        """Ask for a piece of a file, pinned to its version; the caller holds a slot until the answer is closed.

        Raises:
            Exception: what the client, or the network, raises; ``s3_errors`` tells what it means.
        """
        key, pin = json.loads(file.address)
        match = None if file.version.startswith("W/") else file.version  # weak ETags match nothing
        mode = "ENABLED" if checksums else None
        client = self._clients.get()
        line = self._line_of(client, key)
        if line is None:
            wanted = {"Key": key, "VersionId": pin, "IfMatch": match, "Range": span.range, "ChecksumMode": mode}
            return self._by_client(client, wanted, grip)
        pattern, wire = line
        told = {"If-Match": match, "Range": span.range, "x-amz-checksum-mode": mode}
        headers = {name: value for name, value in told.items() if value is not None}
        answer = wire.ask(*pattern.request(key, pin, headers), grip)
        if answer.status not in _GOOD:
            raise _refusal(answer)
        answer.told = _told(answer.headers)
        return answer

    def _line_of(self, client: Any, key: str) -> tuple[Pattern, Wire] | None:
        """Return the wire for this client, where it can have one."""
        process = self._clients.process
        held = self._line
        if held is None or held[0] is not process or held[1] is not client:
            extra = self._extra.of("GetObject", client)
            with process.lock:
                held = self._line
                if held is None or held[0] is not process or held[1] is not client:
                    pattern = pattern_of(client, {"Bucket": self._bucket, "Key": key, **extra})
                    made = None
                    if pattern is not None:
                        made = (pattern, Wire(host_of(client, pattern, self._connections)))
                    held = self._line = (process, client, made)
        return held[2]

    def _by_client(self, client: Any, wanted: Mapping[str, str | None], grip: Grip) -> Answer:
        given = {name: value for name, value in wanted.items() if value is not None}
        answer = client.get_object(Bucket=self._bucket, **given, **self._extra.of("GetObject", client))
        return ClientAnswer(answer, grip)


class ClientAnswer:
    """An answer that the client itself fetched.

    Attributes:
        told: as :class:`Answer` has it.
    """

    def __init__(self, answer: Mapping[str, Any], grip: Grip) -> None:
        self.told = answer
        self._body = answer["Body"]
        self._grip = grip
        try:
            grip.hold(self)
        except BaseException:
            self.close()
            raise

    def readinto(self, view: memoryview, /) -> int:
        """Fill a buffer from the body."""
        data: bytes = self._body.read(len(view))
        view[: len(data)] = data
        return len(data)

    def interrupt(self) -> None:
        """Wake whoever reads."""
        # urllib3's way to wake a reader; without it (before 2.3, or another client) the read ends by its timeout.
        shutdown = getattr(getattr(self._body, "_raw_stream", None), "shutdown", None)
        if shutdown is not None:
            with contextlib.suppress(ValueError, RuntimeError, OSError):  # the reader was faster
                shutdown()

    def close(self) -> None:
        """Give the connection back."""
        self._grip.drop()
        with contextlib.suppress(Exception):  # the connection is given up; how it ends is of no interest
            self._body.close()


def _told(headers: Mapping[str, str]) -> dict[str, object]:
    told: dict[str, object] = {}
    for name, value in headers.items():
        if name in _TOLD:
            told[_TOLD[name]] = value
        elif name == "content-length" and value.isdecimal():
            told["ContentLength"] = int(value)
        elif name.startswith(_CHECKSUM):
            told[f"Checksum{name.removeprefix(_CHECKSUM).upper()}"] = value
    return told


def _refusal(answer: WireAnswer) -> Exception:
    """Return what the client would raise for an answer that is no object."""
    from botocore.awsrequest import HeadersDict  # noqa: PLC0415 - late: slow to import
    from botocore.exceptions import ClientError  # noqa: PLC0415 - the same
    from botocore.parsers import create_parser  # noqa: PLC0415 - the same

    body = bytearray(_ERROR_TEXT)
    view, size = memoryview(body), 0
    with contextlib.closing(answer):
        while size < len(body) and (got := answer.readinto(view[size:])):
            size += got
    headers = HeadersDict(answer.headers)
    response = {"status_code": answer.status, "headers": headers, "body": bytes(body[:size])}
    error: Exception = ClientError(create_parser("rest-xml").parse(response, None), "GetObject")
    return error
