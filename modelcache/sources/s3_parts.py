"""Reading one piece of one object into a buffer: resumed where a connection broke, refused where it has changed.

How one request is made is ``s3_get``, what its errors mean ``s3_errors``. Which pieces there are, and what
becomes of their bytes, is ``s3_stream`` and ``s3_saving``.
"""

import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

import attrs

from modelcache.errors import ArtifactChanged, ArtifactCorrupt, ModelCacheError, SourceUnavailable
from modelcache.sources.base import RemoteFile
from modelcache.sources.checksums import Known
from modelcache.sources.s3_errors import Place, Verdict, judge
from modelcache.sources.s3_get import Span
from modelcache.sources.s3_means import Means
from modelcache.sources.s3_wire import Answer, Grip

_log = logging.getLogger(__name__)

CHUNK = 256 * 1024
"""Most bytes asked of a connection at once: as many are fetched twice, at most, where it breaks."""
PART = 8 * 2**20
"""Bytes of one ranged request; a smaller object is fetched whole."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_SHARES = 4  # times the attempts of one piece: what all pieces of an artifact may fail together


@attrs.frozen
class Patience:
    """How often, and after which pauses, a broken download goes on.

    Attributes:
        attempts: requests in a row that brought no byte, before it is given up.
        first: longest first pause, in seconds; doubled each time (full jitter: each pause is drawn from 0 to that).
        longest: longest pause, in seconds; also of what a store asks for by ``Retry-After``.
        draw: ``random.uniform``; an argument for tests.
        wait: waits for an event, at most for so many seconds, and returns whether it was set; for tests.
    """

    attempts: int = 5
    first: float = 0.2
    longest: float = 20.0
    draw: Callable[[float, float], float] = random.uniform
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait

    def pause(self, failures: int, told: float) -> float:
        """Return the seconds to wait after so many failures in a row."""
        jitter = self.draw(0, min(self.longest, self.first * 2 ** (failures - 1)))
        return max(jitter, min(told, self.longest))


@attrs.frozen
class Requests:
    """What a download needs of its source; all callables may be called from any thread.

    Attributes:
        get: asks for a piece of a file and returns the answer; raises what the client or the network raises.
        known: reads the checksums from an answer about a whole file.
        look: asks for the checksums of a file, without its bytes; raises as ``get``.
        tell: hears that (and why) no checksum of the object can be compared.
        heed: hears of each error that ends a download.
        means: returns the bounds that all downloads share.
    """

    get: Callable[[RemoteFile, Span, Grip], Answer]
    known: Callable[[Mapping[str, object]], Known]
    look: Callable[[Place, RemoteFile], Known]
    tell: Callable[[Place, str], None]
    heed: Callable[[ModelCacheError], None]
    means: Callable[[], Means]


class Stopped(Exception):
    """The download was told to stop; nobody waits for more."""


class SinkBroken(Exception):
    """The bytes could not be stored; its cause says why."""


class Effort:
    """What all pieces of one artifact share: when to stop, and how many failures there may be.

    A request that brought nothing takes one from the allowance, a finished piece gives one back. So a store that
    is down for good is not asked over and over by each piece on its own.

    Args:
        requests: how to ask the store.
        patience: how often to try again.
    """

    def __init__(self, requests: Requests, patience: Patience) -> None:
        self.requests = requests
        self.patience = patience
        self.stop = threading.Event()
        self._most = patience.attempts * _SHARES
        # Guards the allowance and the set of grips; under it nothing but the shutdown of sockets. Reentrant, as a
        # signal handler may close the stream that its own thread is reading.
        self._lock = threading.RLock()
        self._left = self._most
        self._grips: set[Grip] = set()

    def grip(self) -> Grip:
        """Return a new grip, torn with the others."""
        grip = Grip()
        with self._lock:
            self._grips.add(grip)
        if self.stop.is_set():
            grip.tear()
        return grip

    def quit(self) -> None:
        """Stop all pieces, now; may be called from any thread."""
        self.stop.set()
        with self._lock:
            grips = list(self._grips)
        for grip in grips:
            grip.tear()

    def spend(self) -> bool:
        """Take one from the allowance; whether there was one."""
        with self._lock:
            self._left -= 1
            return self._left > 0

    def earn(self) -> None:
        """Give one back."""
        with self._lock:
            self._left = min(self._left + 1, self._most)


class Sink(Protocol):
    """Where the bytes of one piece go."""

    def answered(self, told: Mapping[str, object]) -> None:
        """Hear what a good answer says of the file, before its bytes."""
        ...

    def room(self, offset: int, /) -> memoryview:
        """Return where the bytes from this offset of the file on go: one at least."""
        ...

    def came(self, offset: int, size: int) -> None:
        """Hear that so many bytes lie there now.

        Raises:
            SinkBroken: they can't be stored.
        """
        ...


class Piece:
    """One piece of one file on its way.

    Concurrency: one thread.

    Args:
        effort: what it shares with the other pieces.
        grip: of the thread that reads it.
        place: what is read, for messages.
        file: which version of it.
        span: which bytes of it.
        sink: where they go.
    """

    def __init__(self, effort: Effort, grip: Grip, place: Place, file: RemoteFile, span: Span, sink: Sink) -> None:
        self._effort = effort
        self._requests = effort.requests
        self._grip = grip
        self._place = place
        self._file = file
        self._span = span
        self._sink = sink
        self._offset = span.start
        self._failures = 0
        self._asked = False

    def read(self) -> None:
        """Bring all its bytes.

        Raises:
            Stopped: the download was stopped meanwhile.
            ModelCacheError: as ``Stream.read`` says.
        """
        while self._offset < self._span.end or not self._asked:
            try:
                self._request()
            except Exception as error:  # noqa: BLE001 - raised again unless it can be mended
                self._recover(error)
        self._effort.earn()

    def _request(self) -> None:
        """Ask for what is missing, and read it as far as it comes."""
        span = Span(self._offset, self._span.end, self._span.size)
        with self._requests.means().connection(self._grip):
            answer = self._requests.get(self._file, span, self._grip)
            try:
                self._examine(answer.told, span)
                self._sink.answered(answer.told)
                self._asked = True
                while self._offset < span.end:
                    self._step(answer)
                if span.end == span.size:
                    self._end(answer)
            finally:
                answer.close()

    def _step(self, answer: Answer) -> None:
        view = self._sink.room(self._offset)
        size = answer.readinto(view[: min(CHUNK, self._span.end - self._offset)])
        if not size:
            raise self._broken(f"ended after {self._offset} of {self._file.size} bytes")
        self._offset += size
        self._failures = 0
        self._sink.came(self._offset - size, size)
        if self._effort.stop.is_set():
            raise Stopped

    def _end(self, answer: Answer) -> None:
        """Make sure that nothing follows the last byte."""
        more = 0
        try:
            more = answer.readinto(memoryview(bytearray(1)))  # the client compares checksums here, if it was told to
        except Exception as error:  # all bytes are here: only a checksum error counts
            verdict = self._judge(error)
            if verdict is not None and isinstance(verdict.error, ArtifactCorrupt):
                raise
        if more:
            raise self._corrupt(f"more than the {self._file.size} bytes promised")

    def _examine(self, told: Mapping[str, object], span: Span) -> None:
        """Make sure that the answer is about the version, and the bytes, that were asked for."""
        etag = told.get("ETag")
        if etag and bare(str(etag)) != bare(self._file.version):
            raise ArtifactChanged(
                f"{self._place}: was replaced while it was read; version {self._file.version} is gone",
                model=self._place.model,
                source=self._place.source,
                version=self._file.version,
            )
        if span.range is not None:
            said = _RANGE.fullmatch(str(told.get("ContentRange", "")))
            if said is None or int(said[1]) != span.start or said[3] not in ("*", str(span.size)):
                raise self._broken(f"the store does not answer ranges as asked (from byte {span.start})")
        length = told.get("ContentLength")
        if isinstance(length, int) and length != span.end - span.start:
            raise self._corrupt(f"{span.start + length} bytes are announced, not {span.end}")

    def _recover(self, error: Exception) -> None:
        """Wait before the next try; raise where there is none."""
        if self._effort.stop.is_set():
            raise Stopped from error
        if isinstance(error, SinkBroken) and error.__cause__ is not None:
            raise error.__cause__
        verdict = self._judge(error)
        if verdict is None:
            raise error
        self._failures += 1
        fruitless = self._failures > 1 or self._offset == self._span.start
        allowed = not fruitless or self._effort.spend()
        if not verdict.retry or self._failures >= self._effort.patience.attempts or not allowed:
            self._requests.heed(verdict.error)
            if verdict.error is error:
                raise error
            raise verdict.error from error
        pause = self._effort.patience.pause(self._failures, verdict.after)
        _log.debug("%s: going on from byte %d in %.1f s (%s)", self._place, self._offset, pause, type(error).__name__)
        if self._effort.patience.wait(self._effort.stop, pause):
            raise Stopped from error

    def _judge(self, error: Exception) -> Verdict | None:
        if isinstance(error, ModelCacheError):
            # A wrong length may be one bad answer of a proxy; wrong content is wrong for good.
            complete = self._asked and self._offset == self._span.end
            return Verdict(error, retry=isinstance(error, SourceUnavailable | ArtifactCorrupt) and not complete)
        return judge(error, self._place, pinned=self._file.version)

    def _broken(self, text: str) -> SourceUnavailable:
        return SourceUnavailable(f"{self._place}: {text}", model=self._place.model, source=self._place.source)

    def _corrupt(self, text: str) -> ArtifactCorrupt:
        return corrupt(self._place, self._file, text)


def spans_of(size: int) -> tuple[Span, ...]:
    """Return the pieces in which an object of so many bytes is fetched: one at least."""
    return tuple(Span(start, min(start + PART, size), size) for start in range(0, max(size, 1), PART))


def corrupt(place: Place, file: RemoteFile, text: str) -> ArtifactCorrupt:
    """Return the error for bytes that are not those that were promised."""
    return ArtifactCorrupt(
        f"{place}: not what the store promised: {text}; upload it again if this repeats",
        model=place.model,
        source=place.source,
        version=file.version,
    )


def bare(etag: str) -> str:
    """Return an ETag without quotes and weakness mark, to compare it."""
    return etag.removeprefix("W/").strip('"')
