"""What all pieces of one artifact share: how the store is asked, how often in vain, and when to stop.

One piece is read by ``s3_parts``.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping

import attrs

from modelcache.errors import ModelCacheError
from modelcache.sources.base import RemoteFile
from modelcache.sources.checksums import Known
from modelcache.sources.s3_connection import Grip
from modelcache.sources.s3_errors import Place
from modelcache.sources.s3_get import Getter

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
        getter: asks for pieces of files, within the bounds that all downloads share.
        known: reads the checksums from an answer about a whole file.
        look: asks for the checksums of a file, without its bytes; raises as the getter.
        tell: hears that (and why) no checksum of the object can be compared.
        heed: hears of each error that ends a download.
    """

    getter: Getter
    known: Callable[[Mapping[str, object]], Known]
    look: Callable[[Place, RemoteFile], Known]
    tell: Callable[[Place, str], None]
    heed: Callable[[ModelCacheError], None]


class Stopped(Exception):
    """The download was told to stop; nobody waits for more."""


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

    @contextlib.contextmanager
    def gripped(self) -> Iterator[Grip]:
        """Have a grip for the length of a block."""
        grip = self.grip()
        try:
            yield grip
        finally:
            with self._lock:
                self._grips.discard(grip)

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
