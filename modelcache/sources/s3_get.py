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
from modelcache.sources.checksums import computable
from modelcache.sources.s3_client import Clients, Extra, Process
from modelcache.sources.s3_connection import Answer, Grip
from modelcache.sources.s3_means import Means
from modelcache.sources.s3_signing import Pattern, host_of, pattern_of
from modelcache.sources.s3_wire import Wire, WireAnswer, WireQuestion

_GOOD = (200, 206)
_ERROR_TEXT = 65_536  # bytes of an error's body that are read
BRIEF = 2.0
"""Seconds without a byte after which an answer that was asked for ahead is silent."""
_CHECKSUM = "x-amz-checksum-"
_HEADERS = {"IfMatch": "If-Match", "Range": "Range", "ChecksumMode": "x-amz-checksum-mode"}
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

    Attributes:
        asks_checksums: whether to ask for them; False once the store refused the question. Written by any thread.
    """

    def __init__(self, bucket: str, clients: Clients, extra: Extra, connections: int) -> None:
        self._bucket = bucket
        self._clients = clients
        self._extra = extra
        self._connections = connections
        self.asks_checksums = True
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

    def ask(self, file: RemoteFile, span: Span, grip: Grip) -> "Question":
        """Ask for a piece of a file, pinned to its version, once a connection is free.

        Raises:
            Exception: what the client, or the network, raises; ``s3_errors`` tells what it means.
        """
        means = self.means
        means.take(grip)
        try:
            client = self._clients.get()
            line = self._line_of(client, file)
            return Question(means, self._request(client, line, self._wanted(file, span)))
        except BaseException:
            means.give()
            raise

    def ask_ahead(self, file: RemoteFile, span: Span, held: int) -> "Question | None":
        """Do the same at once, for an answer that is taken later, and waited for only briefly.

        None where no open connection is free, or no wire: to connect takes as long as many answers.

        Args:
            file: whose bytes are wanted.
            span: which of them.
            held: answers that the same fetch waits for.

        Raises:
            Exception: as ``ask``.
        """
        means = self.means
        line = self._line_of(self._clients.get(), file)
        if line is None or not means.take_now(held):
            return None
        pattern, wire = line
        asked = None
        try:
            asked = wire.send_kept(*_signed(pattern, self._wanted(file, span)), BRIEF)
        finally:
            if asked is None:
                means.give()
        return None if asked is None else Question(means, asked)

    def can_ask_ahead(self, file: RemoteFile) -> bool:
        """Whether that can ever be, as far as is known."""
        try:
            return self._line_of(self._clients.get(), file) is not None
        except Exception:  # noqa: BLE001 - told where the file is asked for
            return False

    def should_connect(self, file: RemoteFile, held: int) -> bool:
        """Whether a file that can't be asked for ahead could be, over one more connection; ``held`` as there."""
        return self.can_ask_ahead(file) and self.means.may_take(held)

    def _wanted(self, file: RemoteFile, span: Span) -> dict[str, str]:
        """Return the arguments of a GetObject."""
        key, pin = json.loads(file.address)
        match = None if file.version.startswith("W/") else file.version  # weak ETags match nothing
        asked = self.asks_checksums and span.range is None and not computable(file.checksums)
        mode = "ENABLED" if asked else None
        wanted = {"Key": key, "VersionId": pin, "IfMatch": match, "Range": span.range, "ChecksumMode": mode}
        return {name: value for name, value in wanted.items() if value is not None}

    def _request(
        self, client: Any, line: tuple[Pattern, Wire] | None, wanted: dict[str, str]
    ) -> "WireQuestion | _Unsent":
        if line is None:
            return _Unsent(client, {"Bucket": self._bucket, **wanted, **self._extra.of("GetObject", client)})
        pattern, wire = line
        return wire.send(*_signed(pattern, wanted))

    def _line_of(self, client: Any, file: RemoteFile) -> tuple[Pattern, Wire] | None:
        """Return the wire for this client, where it can have one."""
        process = self._clients.process
        held = self._line
        if held is None or held[0] is not process or held[1] is not client:
            extra = self._extra.of("GetObject", client)
            key, _ = json.loads(file.address)
            with process.lock:
                held = self._line
                if held is None or held[0] is not process or held[1] is not client:
                    pattern = pattern_of(client, {"Bucket": self._bucket, "Key": key, **extra})
                    made = None
                    if pattern is not None:
                        made = (pattern, Wire(host_of(client, pattern, self._connections)))
                    held = self._line = (process, client, made)
        return held[2]


def _signed(pattern: Pattern, wanted: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return target and headers of a request."""
    headers = {_HEADERS[name]: value for name, value in wanted.items() if name in _HEADERS}
    return pattern.request(wanted["Key"], wanted.get("VersionId"), headers)


@attrs.frozen
class _Unsent:
    """A request that the client itself sends, and waits for."""

    client: Any
    arguments: dict[str, Any]

    def answer(self, grip: Grip, /) -> Answer:
        return ClientAnswer(self.client.get_object(**self.arguments), grip)

    def close(self) -> None:
        pass


class Question:
    """A request for a piece of an object, and the connection that is held for it.

    Concurrency: one thread.
    """

    def __init__(self, means: Means, request: WireQuestion | _Unsent) -> None:
        self._means = means
        self._request = request
        self._closed = False

    def fileno(self) -> int:
        """Return the descriptor that becomes readable with the answer; of what was asked ahead."""
        return self._request.fileno() if isinstance(self._request, WireQuestion) else -1

    def be_patient(self) -> None:
        """Wait for what was asked ahead as for anything else."""
        if isinstance(self._request, WireQuestion):
            self._request.be_patient()

    def answer(self, grip: Grip) -> Answer:
        """Wait for the answer.

        Raises:
            Exception: as ``Getter.ask``.
        """
        answer = self._request.answer(grip)
        if isinstance(answer, WireAnswer):
            if answer.status not in _GOOD:
                raise _refusal(answer)
            answer.told = _told(answer.headers)
        return answer

    def close(self) -> None:
        """Let others have the connection, after the answer was closed; may be called more than once."""
        if not self._closed:
            self._closed = True
            self._request.close()
            self._means.give()


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
