"""One HTTP connection: its answers come straight into a buffer, and whoever waits for one can be woken.

Which connections are kept, and for whom, is ``s3_wire``.
"""

import contextlib
import http.client
import io
import re
import select
import socket
import ssl
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_BUFFER = 32 * 1024  # bytes: a small object comes with one look
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
        self._held: Connection | Answer | None = None
        self._torn = False

    @property
    def torn(self) -> bool:
        """Whether the reader was told to stop."""
        return self._torn

    def hold(self, what: "Connection | Answer") -> None:
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


class Connection:
    """One connection, and what wakes who waits for it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        if host.tls is None:
            self.http = http.client.HTTPConnection(host.name, host.port, timeout=host.connect)
        else:
            self.http = http.client.HTTPSConnection(host.name, host.port, timeout=host.connect, context=host.tls)
        self._socket: socket.socket | None = None
        self._buffer = bytearray(_BUFFER)
        self._poll = select.poll()

    def connect(self) -> None:
        """Connect, unless it is done."""
        if self._socket is None:
            self.http.connect()
            self._socket = self.http.sock
            if self._host.keepalive:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._poll.register(self._socket, select.POLLIN)

    def wait_up_to(self, seconds: float | None) -> None:
        """Wait no longer for the next bytes, nor than the user's client would; None: as long as that."""
        read = self._host.read
        wanted = read if seconds is None else min(seconds, read or seconds)
        if self._socket is not None and self._socket.gettimeout() != wanted:  # to set it takes a call of the system
            self._socket.settimeout(wanted)

    def send(self, target: str, headers: Mapping[str, str]) -> None:
        """Send a GET.

        Raises:
            ValueError: a header with a line break, or another character that does not belong in one.
        """
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if not "".join(lines).isprintable():
            raise ValueError("a request with a line break, or another character that does not belong in a header")
        self.http.send("\r\n".join((*lines, "", "")).encode("latin-1"))

    def answer(self) -> "Plain | Response":
        """Read the head of the answer, and what comes with it."""
        came = memoryview(self._buffer)[: self.http.sock.recv_into(self._buffer)]
        plain = _plain(self.http.sock, came)
        if plain is not None:
            return plain
        response = Response(_Resumed(self.http.sock, came), method="GET")  # type: ignore[arg-type] # for its file only
        try:
            response.begin()
        except BaseException:
            response.close()
            raise
        return response

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._socket.fileno() if self._socket is not None else -1

    def usable(self) -> bool:
        """Whether the peer has neither closed it nor said what nobody asked for."""
        return self.fileno() >= 0 and not self._poll.poll(0)

    def interrupt(self) -> None:
        """Wake who waits for it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has gone already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which pulls its state away

    def close(self) -> None:
        """Close it."""
        self.http.close()


class Plain:
    """An answer of known length on a connection that stays, whose head came at once.

    ``http.client`` has the parser for e-mail for the heads of all answers: a quarter of a small file's time.

    Attributes:
        status: HTTP status.
        told: its headers, names in lower case.
        length: bytes still to come.
        will_close: whether the connection can't be used again.
    """

    def __init__(self, at: socket.socket, status: int, told: dict[str, str], length: int, came: memoryview) -> None:
        self._socket = at
        self._came = came
        self.status = status
        self.told = told
        self.length = length
        self.will_close = len(came) > length  # what nobody asked for

    def readinto(self, view: memoryview, /) -> int:
        """Fill a buffer from the body; 0 at its end."""
        view = view[: self.length]
        if self._came:
            size = min(len(view), len(self._came))
            view[:size] = self._came[:size]
            self._came = self._came[size:]
        else:
            size = self._socket.recv_into(view) if view else 0
        self.length -= size
        return size

    def isclosed(self) -> bool:
        """Whether nothing more is to come."""
        return not self.length

    def close(self) -> None:
        """Do nothing: there is nothing beside the connection."""


def _plain(at: socket.socket, came: memoryview) -> Plain | None:
    """Return the answer whose head this is, if it is whole and plain."""
    head = _PLAIN.match(came)
    if head is None:
        return None
    found = _HEADER.findall(str(head[3], "latin-1"))
    told = {name.lower(): value for name, value in found}
    length = told.get("content-length", "")
    stays = told.get("connection", "keep-alive").lower() == "keep-alive"
    if len(told) < len(found) or "transfer-encoding" in told or not stays or not length.isdecimal():
        return None
    return Plain(at, int(head[1]), told, int(length), came[head.end() :])


@attrs.frozen
class _Resumed:
    """A socket of which something has been read already."""

    socket: socket.socket
    came: memoryview

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Joined(self.socket, bytes(self.came)), _BUFFER)


class _Joined(io.RawIOBase):
    """What came of an answer, then what comes."""

    def __init__(self, at: socket.socket, came: bytes) -> None:
        self._socket = at
        self._came = came

    def readable(self) -> bool:
        return True

    def readinto(self, view: "Buffer", /) -> int:
        view = memoryview(view)
        if not self._came:
            return self._socket.recv_into(view)
        size = min(len(view), len(self._came))
        view[:size] = self._came[:size]
        self._came = self._came[size:]
        return size


class Response(http.client.HTTPResponse):
    """Any other answer.

    Attributes:
        told: its headers, names in lower case; of a name that comes twice the last.
    """

    def begin(self) -> None:
        """Read the head."""
        super().begin()
        self.told = {name.lower(): str(value) for name, value in self.headers.raw_items()}
