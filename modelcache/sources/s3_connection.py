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
from typing import Protocol

import attrs

_BUFFER = 32 * 1024
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

    def answer(self) -> "Response":
        """Read the head of the answer."""
        response = Response(_Wide(self.http.sock), method="GET")  # type: ignore[arg-type] # asked for its file only
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


@attrs.frozen
class _Wide:
    """A socket whose file has a buffer that a small object fits into: it comes with one look."""

    socket: socket.socket

    def makefile(self, _mode: str) -> io.IOBase:
        return self.socket.makefile("rb", _BUFFER)


class Response(http.client.HTTPResponse):
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
