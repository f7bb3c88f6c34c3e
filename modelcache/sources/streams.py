"""What the streams of all sources share: one reader, and a ``close`` that may come from any thread at any time.

Where the bytes come from is told by ``s3_stream`` and ``local``.
"""

import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class ClosableStream(ABC):
    """A :class:`~modelcache.sources.base.Stream` that closes under a running read.

    Concurrency: one thread reads at a time. ``close`` never waits for it: it wakes the reader, which then
    fails with ValueError, as reading a closed file does, and gives the connection back itself.
    """

    def __init__(self) -> None:
        # Guards _reading, and that _stop is set once: who finds both decides who releases. Nothing else
        # happens under it, no I/O. Reentrant, as a signal handler may close what its own thread is reading.
        self._turn = threading.RLock()
        self._stop = threading.Event()
        self._reading = False

    @abstractmethod
    def _read(self, size: int) -> bytes:
        """Read as promised by ``Stream.read``."""

    @abstractmethod
    def _release(self) -> None:
        """Give the connection back; called once, and never during a read."""

    def _interrupt(self) -> None:  # noqa: B027 - optional: not every stream can be woken
        """Wake the reader, as far as that is possible; called from another thread."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; ``b""`` at the end, once all was found right.

        Raises:
            ValueError: the stream is closed, or ``size`` is below 1.
            ModelCacheError: as ``Stream.read`` says.
        """
        if size < 1:
            raise ValueError(f"read({size}): ask for at least one byte")
        with self._turn:
            if self._stop.is_set():
                raise ValueError("read from a closed stream")
            if self._reading:
                raise RuntimeError("one stream is read by two threads at once; open one for each")
            self._reading = True
        try:
            return self._read(size)
        finally:
            with self._turn:
                self._reading = False
                late = self._stop.is_set()
            if late:
                self._release()

    def close(self) -> None:
        """Give the connection back; may be called at any time, from any thread, more than once."""
        with self._turn:
            first = not self._stop.is_set()
            self._stop.set()
            reading = self._reading
        if first and reading:
            self._interrupt()
        elif first:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()
