"""The bytes of one S3 object, in order, while several connections bring its parts.

A part is read, resumed and examined by ``s3_parts``; here are the ring of buffers that bounds memory, the threads
that fill it, and the checksum of the whole.
"""

import threading
from collections.abc import Callable, Mapping

import attrs

from modelcache.sources.base import RemoteFile
from modelcache.sources.checksums import Digests, computable
from modelcache.sources.s3_effort import Effort, Patience, Requests, Stopped
from modelcache.sources.s3_errors import Place
from modelcache.sources.s3_get import Span
from modelcache.sources.s3_means import TICK, start_threads
from modelcache.sources.s3_parts import Piece, corrupt, spans_of
from modelcache.sources.streams import ClosableStream

CONNECTIONS = 4
"""Connections that bring one object: more gain nothing, and harm where Python reads what they bring."""
_SPARE = 2  # buffers more than connections: one is read from, one is about to be


@attrs.define(eq=False)
class _Part:
    """One part on its way, and where it lies.

    Attributes:
        span: which bytes.
        view: the buffer.
        filled: bytes of it that are there.
    """

    stream: "S3Stream"
    span: Span
    view: memoryview
    filled: int = 0

    def answered(self, told: Mapping[str, object]) -> None:
        self.stream.answered(told)

    def room(self, offset: int) -> memoryview:
        return self.view[offset - self.span.start :]

    def came(self, offset: int, size: int) -> None:
        self.stream.came(self, offset - self.span.start + size)


class S3Stream(ClosableStream):
    """One object's bytes; the first request is made by the first read.

    Concurrency: as :class:`ClosableStream`; pauses before a retry end at once on ``close``. The threads that read
    ahead end with the last byte, with an error, or with ``close``. A small object that nobody watches is read by
    the caller's own thread.

    Args:
        requests: how to ask the store.
        place: what is read, for messages.
        file: which version of it.
        patience: how often to try again.
    """

    def __init__(self, requests: Requests, place: Place, file: RemoteFile, patience: Patience) -> None:
        super().__init__()
        self._requests = requests
        self._place = place
        self._file = file
        self._effort = Effort(requests, patience)
        self._spans = spans_of(file.size)
        self._count = len(self._spans)
        self._check: Callable[[], None] = _nothing
        # Guards the parts, the free buffers, the error and the checksums told; nothing but waiting is done under
        # it. Reentrant, as a signal handler may close what its own thread is reading.
        self._changed = threading.Condition(threading.RLock())
        self._free: list[memoryview] = []
        self._parts: dict[int, _Part] = {}
        self._started = 0  # parts that a thread has begun
        self._front = 0  # the part that is read from
        self._taken = 0  # bytes of it that were read
        self._error: BaseException | None = None
        self._expected: dict[str, str] | None = file.checksums if computable(file.checksums) else None
        self._digests: Digests | None = None
        self._granted = 0
        self._threads: list[threading.Thread] = []
        self._done = False

    def watch(self, check: Callable[[], None]) -> None:
        """Have ``check`` called now and then while a read waits; what it raises ends the read."""
        self._check = check

    def answered(self, told: Mapping[str, object]) -> None:
        """Learn the checksums from the answer about a whole object, where they are not known yet."""
        if self._expected is None and self._count == 1:
            known = self._requests.known(told)
            if known.unchecked:
                self._requests.tell(self._place, known.unchecked)
            with self._changed:
                self._expected = known.checksums

    def came(self, part: _Part, filled: int) -> None:
        """Note that a part has grown."""
        with self._changed:
            part.filled = filled
            if self._parts.get(self._front) is part:
                self._changed.notify_all()

    def _read(self, size: int) -> bytes:
        if self._done:
            return b""
        if not self._granted:
            self._start()
        view = self._await(size)
        if view is None:
            self._finish()
            return b""
        if self._digests is None:
            self._digests = Digests(self._expected or {})
        self._digests.update(view)
        data = bytes(view)
        self._advance(len(data))
        return data

    def _await(self, size: int) -> memoryview | None:
        """Wait for the next bytes, and return up to ``size`` of them; None at the end."""
        while True:
            with self._changed:
                if self._stop.is_set():
                    raise ValueError("the stream was closed while it was read")
                if self._error is not None:
                    raise self._error
                part = self._parts.get(self._front)
                if part is not None and part.filled > self._taken:
                    return part.view[self._taken : min(self._taken + size, part.filled)]
                if self._front == self._count:
                    return None
                self._changed.wait(TICK)
            self._check()

    def _advance(self, size: int) -> None:
        """Go on behind so many bytes, and free the buffer of a part that was read to its end."""
        self._taken += size
        part = self._parts[self._front]
        if self._taken == part.span.end - part.span.start:
            self._taken = 0
            with self._changed:
                del self._parts[self._front]
                self._free.append(part.view)
                self._changed.notify_all()
                self._front += 1

    def _finish(self) -> None:
        for thread in self._threads:
            thread.join()
        with self._changed:
            if self._error is not None:  # of what follows the last byte
                raise self._error
        problem = self._digests.problem() if self._digests is not None else None
        if problem:
            raise corrupt(self._place, self._file, problem)
        self._done = True
        self._give_back()

    def _start(self) -> None:
        """Take buffers, and start the threads that fill them."""
        if self._expected is None and self._count > 1:
            known = self._requests.look(self._place, self._file)
            if known.unchecked:
                self._requests.tell(self._place, known.unchecked)
            self._expected = known.checksums
        wanted = min(self._count, CONNECTIONS + _SPARE)
        self._granted = self._requests.getter.means.grant(wanted)
        self._free = [memoryview(bytearray(self._spans[0].end)) for _ in range(self._granted)]
        if self._count == 1 and self._check is _nothing:  # no thread can help
            self._work()
            return
        start_threads(self._threads, min(self._granted, CONNECTIONS), self._work)

    def _work(self) -> None:
        """Bring parts, one after the other."""
        try:
            grip = self._effort.grip()
            while (part := self._next()) is not None:
                Piece(self._effort, grip, self._place, self._file, part.span, part).read()
                if part.span.start == part.span.end:  # an empty object
                    with self._changed:
                        self._front = self._count
                        self._changed.notify_all()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by the next read
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            self._effort.quit()

    def _next(self) -> _Part | None:
        """Return the next part to bring, once there is a buffer for it; None where there is nothing left to do."""
        with self._changed:
            while self._started < self._count and not self._free and not self._effort.stop.is_set():
                self._changed.wait()
            if self._started == self._count or self._effort.stop.is_set():
                return None
            part = self._parts[self._started] = _Part(self, self._spans[self._started], self._free.pop())
            self._started += 1
            return part

    def _interrupt(self) -> None:
        self._effort.quit()
        with self._changed:
            self._changed.notify_all()

    def _release(self) -> None:
        self._interrupt()
        for thread in self._threads:
            thread.join()
        self._give_back()

    def _give_back(self) -> None:
        with self._changed:
            granted, self._granted = self._granted, 0
            self._free, self._parts = [], {}
        if granted:
            self._requests.getter.means.give_back(granted)


def _nothing() -> None:
    """Check nothing."""
