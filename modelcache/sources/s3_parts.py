"""Reading one piece of one object into a buffer: resumed where a connection broke, refused where it has changed.

How one request is made is ``s3_get``, what its errors mean ``s3_errors``. Which pieces there are, and what
becomes of their bytes, is ``s3_stream`` and ``s3_saving``.
"""

import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Protocol

from modelcache.errors import ArtifactChanged, ArtifactCorrupt, ModelCacheError, SourceUnavailable
from modelcache.sources.base import RemoteFile
from modelcache.sources.s3_connection import Answer, Grip
from modelcache.sources.s3_effort import Effort, Stopped
from modelcache.sources.s3_errors import Place, Verdict, judge
from modelcache.sources.s3_get import Question, Span
from modelcache.sources.s3_wire import Stale

_log = logging.getLogger(__name__)

CHUNK = 256 * 1024
"""Most bytes asked of a connection at once: as many are fetched twice, at most, where it breaks."""
PART = 8 * 2**20
"""Bytes of one ranged request; a smaller object is fetched whole."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class SinkBroken(Exception):
    """The bytes could not be stored; its cause says why."""


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
        question: what was asked already; closed here.

    Attributes:
        stalled: whether ``begin`` waited in vain.
    """

    def __init__(
        self,
        effort: Effort,
        grip: Grip,
        place: Place,
        file: RemoteFile,
        span: Span,
        sink: Sink,
        question: Question | None = None,
    ) -> None:
        self._effort = effort
        self._requests = effort.requests
        self._grip = grip
        self._place = place
        self._file = file
        self._span = span
        self._sink = sink
        self._question = question
        self._offset = span.start
        self._failures = 0
        self._asked = False
        self._error: Exception | None = None
        self.stalled = False

    def begin(self) -> bool:
        """Try once; whether that brought all its bytes. What went wrong is ``read``'s to mend, or to raise."""
        try:
            self._request()
        except (TimeoutError, Stale):  # what is no failure yet is not waited for here
            self.stalled = True
            return False
        except Exception as error:  # noqa: BLE001 - raised again by ``read`` unless it can be mended
            self._error = error
            return False
        self._effort.earn()
        return True

    def read(self) -> None:
        """Bring all its bytes, or those that ``begin`` did not bring.

        Raises:
            Stopped: the download was stopped meanwhile.
            ModelCacheError: as ``Stream.read`` says.
        """
        if self._error is not None:
            self._recover(self._error)
        while self._offset < self._span.end or not self._asked:
            try:
                self._request()
            except Exception as error:  # noqa: BLE001 - raised again unless it can be mended
                self._recover(error)
        self._effort.earn()

    def pass_on(self, grip: Grip) -> None:
        """Let the thread with this grip do the rest."""
        self._grip = grip

    def _request(self) -> None:
        """Ask for what is missing, and read it as far as it comes."""
        span = Span(self._offset, self._span.end, self._span.size)
        question, self._question = self._question, None
        with contextlib.closing(question or self._requests.getter.ask(self._file, span, self._grip)) as asked:
            answer = asked.answer(self._grip)
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
