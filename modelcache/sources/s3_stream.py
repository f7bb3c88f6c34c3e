"""The bytes of one S3 object, resumed where a connection broke, compared with what S3 promised.

Which object that is, and how a request is made, is told by ``s3``; what an error means by ``s3_errors``.
"""

import contextlib
import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from modelcache.errors import ArtifactChanged, ArtifactCorrupt, ModelCacheError, SourceUnavailable
from modelcache.sources.base import RemoteFile
from modelcache.sources.checksums import Digests, Known
from modelcache.sources.s3_errors import Place, Verdict, judge
from modelcache.sources.streams import ClosableStream

_log = logging.getLogger(__name__)

CHUNK = 256 * 1024
"""Most bytes asked of the connection at once: as many are fetched twice, at most, where it breaks."""

_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


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
    """What a stream needs of its source; all callables may be called from any thread.

    Attributes:
        get: makes a GetObject from an offset on and returns the client's answer; raises what the client raises.
        known: reads the checksums from an answer.
        tell: hears that (and why) no checksum of the object can be compared.
        heed: hears of each error that ends a stream.
    """

    get: Callable[[RemoteFile, int], Mapping[str, Any]]
    known: Callable[[Mapping[str, Any]], Known]
    tell: Callable[[Place, str], None]
    heed: Callable[[ModelCacheError], None]


class S3Stream(ClosableStream):
    """One object's bytes; the first request is made by the first read.

    Concurrency: as :class:`ClosableStream`; pauses before a retry end at once on ``close``.

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
        self._patience = patience
        self._offset = 0
        self._failures = 0
        self._body: Any = None
        self._digests: Digests | None = None  # None until the first answer
        self._done = False

    def _read(self, size: int) -> bytes:
        while not self._done:
            try:
                data = self._step(min(size, CHUNK))
            except Exception as error:  # noqa: BLE001 - raised again unless it can be mended
                self._recover(error)
            else:
                if data:
                    return data
        return b""

    def _step(self, size: int) -> bytes:
        """Return the next bytes; ``b""`` once all are read and compared."""
        if self._body is None and (self._digests is None or self._offset < self._file.size):
            self._connect()
        left = self._file.size - self._offset
        if left == 0:
            self._finish()
            return b""
        data: bytes = self._body.read(min(size, left))
        if not data:
            raise self._broken(f"ended after {self._offset} of {self._file.size} bytes")
        if self._digests is not None:
            self._digests.update(data)
        self._offset += len(data)
        self._failures = 0
        return data

    def _connect(self) -> None:
        answer = self._requests.get(self._file, self._offset)
        self._body = answer["Body"]
        self._examine(answer)
        if self._digests is None:
            checksums = self._file.checksums
            if not checksums:
                known = self._requests.known(answer)
                checksums = known.checksums
                if known.unchecked:
                    self._requests.tell(self._place, known.unchecked)
            self._digests = Digests(checksums)

    def _examine(self, answer: Mapping[str, Any]) -> None:
        """Make sure that the answer is about the version, and the bytes, that were asked for."""
        etag = answer.get("ETag")
        if etag and bare(etag) != bare(self._file.version):
            raise ArtifactChanged(
                f"{self._place}: was replaced while it was read; version {self._file.version} is gone",
                model=self._place.model,
                source=self._place.source,
                version=self._file.version,
            )
        if self._offset:
            told = _RANGE.fullmatch(str(answer.get("ContentRange", "")))
            if told is None or int(told[1]) != self._offset or told[2] not in ("*", str(self._file.size)):
                raise self._broken(f"the store does not answer ranges as asked (from byte {self._offset})")
        length = answer.get("ContentLength")
        if length is not None and length != self._file.size - self._offset:
            raise self._corrupt(f"{self._offset + length} bytes are announced, not {self._file.size}")

    def _finish(self) -> None:
        """Compare the checksums, and make sure that nothing follows."""
        problem = self._digests.problem() if self._digests is not None else None
        if problem:
            raise self._corrupt(problem)
        more = b""
        body, self._body = self._body, None
        if body is not None:
            try:
                more = body.read(1)  # the client compares checksums itself here, where it was told to
            except Exception as error:  # all bytes are here and right: only a checksum error counts
                verdict = judge(error, self._place)
                if verdict is not None and isinstance(verdict.error, ArtifactCorrupt):
                    raise
            finally:
                _close(body)
        if more:
            raise self._corrupt(f"more than the {self._file.size} bytes promised")
        self._done = True

    def _recover(self, error: Exception) -> None:
        """Wait before the next try; raise where there is none."""
        body, self._body = self._body, None
        _close(body)
        if self._stop.is_set():
            raise ValueError("the stream was closed while it was read") from error
        verdict = self._judge(error)
        if verdict is None:
            raise error
        self._failures += 1
        if not verdict.retry or self._failures >= self._patience.attempts:
            self._requests.heed(verdict.error)
            if verdict.error is error:
                raise error
            raise verdict.error from error
        pause = self._patience.pause(self._failures, verdict.after)
        _log.debug("%s: going on from byte %d in %.1f s (%s)", self._place, self._offset, pause, type(error).__name__)
        if self._patience.wait(self._stop, pause):
            raise ValueError("the stream was closed while it was read") from error

    def _judge(self, error: Exception) -> Verdict | None:
        if isinstance(error, ModelCacheError):
            # A wrong length may be one bad answer of a proxy; wrong content is wrong for good.
            return Verdict(error, retry=isinstance(error, SourceUnavailable | ArtifactCorrupt) and not self._complete)
        return judge(error, self._place, pinned=self._file.version)

    @property
    def _complete(self) -> bool:
        return self._digests is not None and self._offset == self._file.size

    def _broken(self, text: str) -> SourceUnavailable:
        return SourceUnavailable(f"{self._place}: {text}", model=self._place.model, source=self._place.source)

    def _corrupt(self, text: str) -> ArtifactCorrupt:
        return ArtifactCorrupt(
            f"{self._place}: not what the store promised: {text}; upload it again if this repeats",
            model=self._place.model,
            source=self._place.source,
            version=self._file.version,
        )

    def _release(self) -> None:
        body, self._body = self._body, None
        _close(body)

    def _interrupt(self) -> None:
        # urllib3's way to wake a reader; without it (before 2.3, or another client) the read ends by its timeout.
        shutdown = getattr(getattr(self._body, "_raw_stream", None), "shutdown", None)
        if shutdown is not None:
            with contextlib.suppress(ValueError, RuntimeError, OSError):  # the reader was faster
                shutdown()


def bare(etag: str) -> str:
    """Return an ETag without quotes and weakness mark, to compare it."""
    return etag.removeprefix("W/").strip('"')


def _close(body: Any) -> None:
    if body is not None:
        with contextlib.suppress(Exception):  # the connection is given up; how it ends is of no interest
            body.close()
