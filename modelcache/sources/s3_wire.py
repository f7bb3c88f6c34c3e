"""Kept-alive HTTP connections to one host, and the answers that come over them, straight into a buffer.

What is asked, and how it is signed, is ``s3_signing``; which answers are good is decided by ``s3_parts``.
"""

import contextlib
import http.client
import weakref
from collections import deque
from collections.abc import Mapping

from modelcache.sources.s3_connection import Connection, Grip, Host, Plain, Response


class Stale(ConnectionError):
    """The peer had closed a kept connection before a request came over it."""


class Wire:
    """Connections to one host.

    Concurrency: ``send`` may be called from all threads of one process. Idle connections are closed with the wire.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._idle: deque[Connection] = deque()
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def send(self, target: str, headers: Mapping[str, str]) -> "WireQuestion":
        """Send a GET, whose answer is taken later.

        Raises:
            OSError: no connection.
            ValueError: a header with a line break, or another character that does not belong in one.
        """
        kept = self.send_kept(target, headers)
        return kept or self._send(Connection(self._host), target, headers, None, used=False)

    def send_kept(self, target: str, headers: Mapping[str, str], brief: float | None = None) -> "WireQuestion | None":
        """Do the same over a connection that is kept; None where there is none.

        Args:
            target: path and query.
            headers: of the request.
            brief: seconds to wait for the next bytes, as long as ``be_patient`` is not called; None: as ``send``.

        Raises:
            ValueError: as ``send``.
        """
        while (connection := self._take()) is not None:
            with contextlib.suppress(ConnectionError):  # closed by the peer meanwhile
                return self._send(connection, target, headers, brief, used=True)
        return None

    def _send(
        self, connection: Connection, target: str, headers: Mapping[str, str], brief: float | None, *, used: bool
    ) -> "WireQuestion":
        try:
            connection.connect()
            connection.wait_up_to(brief)
            connection.send(target, headers)
        except BaseException:
            connection.close()
            raise
        return WireQuestion(self, connection, target, headers, used=used, brief=brief is not None)

    def _take(self) -> Connection | None:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = self._idle.pop()
                if connection.usable():
                    return connection
                connection.close()
        return None

    def keep(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end."""
        if len(self._idle) < self._host.most and self._finalizer.alive:
            self._idle.append(connection)
        else:
            connection.close()


class WireQuestion:
    """A request that was sent over a wire.

    Concurrency: one thread.
    """

    def __init__(
        self,
        wire: Wire,
        connection: Connection,
        target: str,
        headers: Mapping[str, str],
        *,
        used: bool,
        brief: bool,
    ) -> None:
        self._wire = wire
        self._connection = connection
        self._open = True  # until the answer is taken, or given up
        self._target = target
        self._headers = headers
        self._brief = brief
        self._used = used  # a connection that was kept: its peer may have closed it just before

    def fileno(self) -> int:
        """Return the descriptor that becomes readable with the answer."""
        return self._connection.fileno()

    def be_patient(self) -> None:
        """Wait for the next bytes as long as the user's client would."""
        self._brief = False
        self._connection.wait_up_to(None)

    def answer(self, grip: Grip) -> "WireAnswer":
        """Wait for the answer, and return it, whatever its status; asked once more where the connection was too old.

        Raises:
            Stale: the connection was too old, and the answer is not to be waited for.
            OSError, http.client.HTTPException: no answer.
        """
        self._open = False
        try:
            grip.hold(self._connection)
            return WireAnswer(self._wire, self._connection, self._connection.answer(), grip)
        except BaseException as error:
            grip.drop()
            self._connection.close()
            if not self._used or grip.torn or not isinstance(error, ConnectionError | http.client.BadStatusLine):
                raise
            if self._brief:
                raise Stale from error
        return self._wire.send(self._target, self._headers).answer(grip)

    def close(self) -> None:
        """Give up the answer, and the connection with it."""
        if self._open:
            self._open = False
            self._connection.close()


class WireAnswer:
    """An answer that comes over a wire.

    Attributes:
        status: HTTP status.
        headers: names in lower case.
        told: as :class:`Answer` has it; filled in by whoever knows the names.
    """

    def __init__(self, wire: Wire, connection: Connection, response: Plain | Response, grip: Grip) -> None:
        self._wire = wire
        self._connection: Connection | None = connection
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


def _close_all(idle: deque[Connection]) -> None:
    while idle:
        idle.pop().close()
