"""Kept-alive HTTP connections to one host, and the answers that come over them, straight into a buffer.

What is asked, and how it is signed, is ``s3_signing``; which answers are good is decided by ``s3_parts``.
"""

import contextlib
import http.client
import re
import select
import socket
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Protocol

import attrs

_PLAIN = re.compile(rb"HTTP/1\.1 (200|206) ([^\r\n]*)\r\n((?:[!#-'*+.^-z|~\w-]+:[^\r\n\0]*\r\n)+)\r\n")
_HEADER = re.compile(r"([^:]+):[ \t]*([^\r]*?)[ \t]*\r\n")


class Answer(Protocol):
    """One answer of the store whose body has not been read yet.

    Attributes:
        told: what its headers say, named as boto3 names them (``ETag``, ``ContentLength``, ``ChecksumCRC32``...).
    """

    @property
    def told(self) -> Mapping[str, object]:
        """What its headers say."""
        ...

    def readinto(self, view: memoryview, /) -> int:
        """Fill a buffer from the body, as far as there is any; 0 at its end."""
        ...

    def close(self) -> None:
        """Give the connection back, for further use where the body was read to its end."""
        ...

    def interrupt(self) -> None:
        """Wake whoever reads; called from another thread, before ``close``."""
        ...


class Grip:
    """What one reader holds, so that another thread can wake it: the reader's wait then ends in an error.

    Concurrency: ``hold`` and ``drop`` are the reader's, ``tear`` may come from any thread.
    """

    def __init__(self) -> None:
        # Guards what is held, so that nothing is woken that was given back meanwhile. Under it only the
        # shutdown of a socket, which does not wait. Reentrant, as a signal handler may tear its own thread's.
        self._lock = threading.RLock()
        self._held: _Connection | Answer | None = None
        self._torn = False

    @property
    def torn(self) -> bool:
        """Whether the reader was told to stop."""
        return self._torn

    def hold(self, what: "_Connection | Answer") -> None:
        """Note what the next wait is for.

        Raises:
            ConnectionAbortedError: it was torn before.
        """
        with self._lock:
            self._held = what
        if self._torn:
            raise ConnectionAbortedError("told to stop")

    def drop(self) -> None:
        """Note that there is no wait any more."""
        with self._lock:
            self._held = None

    def tear(self) -> None:
        """Wake the reader, now and whenever it wants to wait again."""
        self._torn = True
        with self._lock:
            if self._held is not None:
                self._held.interrupt()


@attrs.frozen
class Host:
    """Where a wire leads, and how long it waits.

    Attributes:
        name, port: of the server.
        tls: for HTTPS.
        connect: seconds to wait for a connection; None: for ever.
        read: seconds to wait for the next bytes; None: for ever.
        keepalive: whether the kernel looks after silent peers.
        most: idle connections kept.
    """

    name: str
    port: int
    tls: ssl.SSLContext | None
    connect: float | None
    read: float | None
    keepalive: bool
    most: int


class Wire:
    """Connections to one host.

    Concurrency: ``ask`` may be called from all threads of one process. Idle connections are closed with the wire.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._idle: deque[_Connection] = deque()
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def ask(self, target: str, headers: Mapping[str, str], grip: Grip) -> "WireAnswer":
        """Send a GET and return the answer, whatever its status.

        Raises:
            OSError, http.client.HTTPException: no connection, or no answer.
        """
        while (connection := self._take()) is not None:
            with contextlib.suppress(ConnectionError, http.client.BadStatusLine):  # closed by the peer meanwhile
                return self._ask(connection, target, headers, grip)
            grip.drop()
            if grip.torn:
                raise ConnectionAbortedError("told to stop")
        return self._ask(_Connection(self._host), target, headers, grip)

    def _ask(self, connection: "_Connection", target: str, headers: Mapping[str, str], grip: Grip) -> "WireAnswer":
        try:
            connection.connect()
            grip.hold(connection)
            connection.send(target, headers)
            return WireAnswer(self, connection, connection.answer(), grip)
        except BaseException:
            grip.drop()
            connection.close()
            raise

    def _take(self) -> "_Connection | None":
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.usable():
                    return connection
                connection.close()
        return None

    def keep(self, connection: "_Connection") -> None:
        """Keep a connection whose answer was read to its end."""
        if len(self._idle) < self._host.most and self._finalizer.alive:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection:
    """One connection, and what wakes who waits for it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        if host.tls is None:
            self.http = http.client.HTTPConnection(host.name, host.port, timeout=host.connect)
        else:
            self.http = http.client.HTTPSConnection(host.name, host.port, timeout=host.connect, context=host.tls)
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect, unless it is done."""
        if self._socket is None:
            self.http.connect()
            self._socket = self.http.sock
            self._socket.settimeout(self._host.read)
            if self._host.keepalive:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, target: str, headers: Mapping[str, str]) -> None:
        """Send a GET.

        Raises:
            ValueError: a header with a line break, or another character that does not belong in one.
        """
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if not "".join(lines).isprintable():
            raise ValueError("a request with a line break, or another character that does not belong in a header")
        self.http.send("\r\n".join((*lines, "", "")).encode("latin-1"))

    def answer(self) -> "_Response":
        """Read the head of the answer."""
        response = _Response(self.http.sock, method="GET")
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        return response

    def usable(self) -> bool:
        """Whether the peer has neither closed it nor said what nobody asked for."""
        if self._socket is None or self._socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """Wake who waits for it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has gone already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which pulls its state away

    def close(self) -> None:
        """Close it."""
        self.http.close()


class _Response(http.client.HTTPResponse):
    """An answer whose head is read by one look at it, if that shows it to be whole and plain.

    The parser that ``http.client`` has for all others is the one for e-mail: a quarter of a small file's time.

    Attributes:
        told: its headers, names in lower case; of a name that comes twice the last.
    """

    def begin(self) -> None:
        """Read the head."""
        if not self._is_plain(self.fp.peek(1)):
            super().begin()
            self.told = {name.lower(): str(value) for name, value in self.headers.raw_items()}

    def _is_plain(self, ahead: bytes) -> bool:
        """Whether this was the head of an answer of known length on a connection that stays."""
        head = _PLAIN.match(ahead)
        if head is None:
            return False
        found = _HEADER.findall(head[3].decode("latin-1"))
        self.told = {name.lower(): value for name, value in found}
        length = self.told.get("content-length", "")
        stays = self.told.get("connection", "keep-alive").lower() == "keep-alive"
        if len(self.told) < len(found) or "transfer-encoding" in self.told or not stays or not length.isdecimal():
            return False
        self.fp.read(head.end())
        self.version, self.reason = 11, head[2].decode("latin-1")
        self.code = self.status = int(head[1])
        self.chunked = self.will_close = False
        self.length = int(length)
        return True


class WireAnswer:
    """An answer that comes over a wire.

    Attributes:
        status: HTTP status.
        headers: names in lower case.
        told: as :class:`Answer` has it; filled in by whoever knows the names.
    """

    def __init__(self, wire: Wire, connection: _Connection, response: _Response, grip: Grip) -> None:
        self._wire = wire
        self._connection: _Connection | None = connection
        self._response = response
        self._grip = grip
        self.status = response.status
        self.headers = response.told
        self.told: Mapping[str, object] = {}

    def readinto(self, view: memoryview, /) -> int:
        """Fill a buffer from the body."""
        return self._response.readinto(view)

    def interrupt(self) -> None:
        """Wake whoever reads."""
        if self._connection is not None:
            self._connection.interrupt()

    def close(self) -> None:
        """Give the connection back."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._grip.drop()
        whole = self._response.isclosed() or self._response.length == 0
        reusable = whole and not self._response.will_close and not self._grip.torn
        self._response.close()
        if reusable:
            self._wire.keep(connection)
        else:
            connection.close()


def _close_all(idle: deque[_Connection]) -> None:
    while idle:
        idle.pop().close()
