"""A proxy before an S3 store that breaks things on purpose: cut, reset, silent, slow, wrong, busy.

It sits where the endpoint is (no CONNECT, no ``HTTP_PROXY``) and hands each request on as it came, Host header
included, so that signatures hold. One thread a connection; connections are kept alive.
"""

import contextlib
import http.client
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import attrs

CHUNK = 16 * 1024


@attrs.frozen
class Fault:
    """What goes wrong with one request; several things may.

    Attributes:
        before: called before the request is handed on.
        answer: status and S3 code to answer instead of asking the store.
        headers: headers to add to such an answer.
        cut: close the connection after so many bytes of the body.
        reset: the same with a TCP reset.
        silent: send no more after so many bytes, and keep the connection.
        slow: bytes a second.
        flip: flip one bit of the byte at this offset of the body.
        lengthen: add so much to the Content-Length.
        etag: an ETag to answer instead of the store's.
        drop_range: hand the request on without its Range header.
    """

    before: Callable[[], object] | None = None
    answer: tuple[int, str] | None = None
    headers: dict[str, str] = attrs.field(factory=dict)
    cut: int | None = None
    reset: int | None = None
    silent: int | None = None
    slow: int | None = None
    flip: int | None = None
    lengthen: int = 0
    etag: str | None = None
    drop_range: bool = False


@attrs.frozen
class Request:
    """One request that came in.

    Attributes:
        method: its method.
        path: path and query.
        range: its Range header; None without one.
        headers: all of them, names in lower case.
        connection: number of the connection that it came on, counted from 1.
    """

    method: str
    path: str
    range: str | None
    headers: dict[str, str]
    connection: int

    @property
    def reads_object(self) -> bool:
        """Whether it is a GET of an object."""
        url = urlsplit(self.path)
        return self.method == "GET" and "list-type" not in url.query and url.path.count("/") > 1


class _Gone(Exception):
    """The connection to the client is over."""


class FaultProxy:
    """A proxy until the block ends.

    Args:
        upstream: URL of the store (http).
        tls: context of a TLS server; the endpoint is https then.

    Attributes:
        requests: all that came in, in order.
    """

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        url = urlsplit(upstream)
        self._upstream = (url.hostname or "", url.port or 80)
        self._tls = tls
        # Guards requests, the faults, the counters and the connections. No I/O under it.
        self._lock = threading.Lock()
        self.requests: list[Request] = []
        self._faults: deque[Fault] = deque()
        self._always: Fault | None = None
        self._applies: Callable[[Request], bool] = _reads_object
        self._body_bytes = 0
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self.stalled = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    @property
    def endpoint(self) -> str:
        """URL to give to a client instead of the store's."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def body_bytes(self) -> int:
        """Bytes of bodies of objects that were sent to clients."""
        with self._lock:
            return self._body_bytes

    def script(
        self, *faults: Fault, always: Fault | None = None, applies: Callable[[Request], bool] | None = None
    ) -> None:
        """Let each fault befall one request, in order; all after them pass, or suffer ``always``.

        Args:
            *faults: one a request.
            always: for all requests after these.
            applies: which requests count; those that read an object unless given.
        """
        with self._lock:
            self._faults = deque(faults)
            self._always = always
            self._applies = applies or _reads_object

    def reads(self) -> list[Request]:
        """Return the requests that read an object, in order."""
        with self._lock:
            return [request for request in self.requests if request.reads_object]

    def forget(self) -> None:
        """Forget requests and counts so far."""
        with self._lock:
            self.requests.clear()
            self._body_bytes = 0

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="fault-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        number = 0
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            with self._lock:
                self._connections.add(connection)
            self._start(self._serve, connection, number)

    def _serve(self, plain: socket.socket, number: int) -> None:
        connection = plain
        try:
            with contextlib.suppress(_Gone, OSError, http.client.HTTPException):
                if self._tls is not None:
                    connection = self._tls.wrap_socket(plain, server_side=True)
                    with self._lock:
                        self._connections.discard(plain)
                        self._connections.add(connection)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with connection.makefile("rb") as reader:
                    while not self._closing.is_set():
                        self._one(connection, reader, number)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _one(self, connection: socket.socket, reader: object, number: int) -> None:
        """Serve one request."""
        line = reader.readline(65537).decode("latin-1").split()  # type: ignore[attr-defined]
        if len(line) != 3:
            raise _Gone
        headers = list(_headers(reader))
        known = {name.lower(): value for name, value in headers}
        length = int(known.get("content-length", 0))
        if known.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = reader.read(length) if length else b""  # type: ignore[attr-defined]
        request = Request(line[0], line[1], known.get("range"), known, number)
        fault = self._next(request)
        if fault.before is not None:
            fault.before()
        if fault.answer is not None:
            _refuse(connection, request, fault)
            return
        skipped = {"expect", "connection"} | ({"range"} if fault.drop_range else set())
        passed = [(name, value) for name, value in headers if name.lower() not in skipped]
        with contextlib.closing(http.client.HTTPConnection(*self._upstream)) as upstream:
            upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in passed:
                upstream.putheader(name, value)
            upstream.endheaders(body)
            self._relay(connection, request, upstream.getresponse(), fault)

    def _next(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
            if not self._applies(request):
                return Fault()
            return self._faults.popleft() if self._faults else self._always or Fault()

    def _relay(
        self, connection: socket.socket, request: Request, answer: http.client.HTTPResponse, fault: Fault
    ) -> None:
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "keep-alive")
            and not (fault.etag is not None and name.lower() == "etag")
        ]
        if fault.etag is not None:
            headers.append(("ETag", fault.etag))
        told = answer.getheader("Content-Length")
        body = None
        if told is None:
            body = answer.read()
            told = str(len(body))
        headers.append(("Content-Length", str(int(told) + fault.lengthen)))
        text = f"HTTP/1.1 {answer.status} {answer.reason}\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers
        )
        connection.sendall(text.encode("latin-1") + b"\r\n")
        if request.method == "HEAD":
            return
        sent = 0
        ends = [end for end in (fault.cut, fault.reset, fault.silent) if end is not None]
        while True:
            self._break(connection, fault, sent)
            size = min([CHUNK, *(end - sent for end in ends)])
            data = answer.read(size) if body is None else body[sent : sent + size]
            if not data:
                break
            self._send(connection, request, _flipped(data, sent, fault.flip), fault)
            sent += len(data)
        if fault.lengthen:
            raise _Gone

    def _send(self, connection: socket.socket, request: Request, data: bytes, fault: Fault) -> None:
        if fault.slow is not None:
            self._closing.wait(len(data) / fault.slow)
        connection.sendall(data)
        if request.reads_object:
            with self._lock:
                self._body_bytes += len(data)

    def _break(self, connection: socket.socket, fault: Fault, sent: int) -> None:
        """End the connection, or fall silent, where the fault wants it."""
        if fault.reset == sent:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise _Gone
        if fault.cut == sent:
            raise _Gone
        if fault.silent == sent:
            self.stalled.set()
            connection.recv(1)  # until the client gives up, or the proxy ends
            raise _Gone


def _reads_object(request: Request) -> bool:
    return request.reads_object


def any_request(request: Request) -> bool:
    """Let faults befall each request; for ``script(applies=...)``."""
    return True


def _headers(reader: object) -> Iterator[tuple[str, str]]:
    while True:
        line = reader.readline(65537).decode("latin-1")  # type: ignore[attr-defined]
        if line in ("\r\n", "\n", ""):
            return
        name, _, value = line.partition(":")
        yield name, value.strip()


def _flipped(data: bytes, start: int, offset: int | None) -> bytes:
    if offset is None or not start <= offset < start + len(data):
        return data
    changed = bytearray(data)
    changed[offset - start] ^= 1
    return bytes(changed)


def _refuse(connection: socket.socket, request: Request, fault: Fault) -> None:
    assert fault.answer is not None
    status, code = fault.answer
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    extra = "".join(f"{name}: {value}\r\n" for name, value in fault.headers.items())
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    connection.sendall(head.encode() + (b"" if request.method == "HEAD" else body))
