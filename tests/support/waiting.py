"""Waiting for what another thread or process does, without a sleep."""

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from modelcache import ModelCache

T = TypeVar("T")

WAIT = 10.0
"""Seconds after which a test gives up on what should have come about long ago."""


def eventually(check: Callable[[], T], timeout: float = WAIT, *, interval: float = 0.02) -> T:
    """Call ``check`` until it returns something true, and return that.

    Args:
        check: looks at what should come about.
        timeout: seconds after which it is too late.
        interval: seconds between two looks.

    Raises:
        AssertionError: it did not come about; says what ``check`` returned last.
    """
    never = threading.Event()
    deadline = time.monotonic() + timeout
    while not (result := check()):
        left = deadline - time.monotonic()
        assert left > 0, f"after {timeout} s still {result!r} from {check}"
        never.wait(min(interval, left))
    return result


class Gate:
    """Where a thread stands still until the test lets it go; call it from a loader, a source or a callback.

    Args:
        only: stop only calls with this first argument. None: stop every call.

    Attributes:
        entered: set once somebody stands there.
    """

    def __init__(self, only: Any = None) -> None:
        self.entered = threading.Event()
        self._only = only
        self._open = threading.Event()

    def __call__(self, *args: Any) -> None:
        """Stand still."""
        if self._only is not None and args[:1] != (self._only,):
            return
        self.entered.set()
        assert self._open.wait(WAIT), "nobody opened the gate"

    def wait(self) -> None:
        """Wait until somebody stands there."""
        assert self.entered.wait(WAIT), "nobody came to the gate"

    def open(self) -> None:
        """Let go whoever stands there, and all who come later."""
        self._open.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


class Spawn:
    """Runs functions on threads of the test's own; what they raise comes out of the future's ``result``."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Call ``function`` on a new thread."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                future.set_exception(error)

        thread = threading.Thread(target=run, name="test", daemon=True)
        self._threads.append(thread)
        thread.start()
        return future

    def join(self) -> None:
        """Wait for all; fail where one does not end."""
        deadline = time.monotonic() + WAIT
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        assert not any(thread.is_alive() for thread in self._threads), "a thread of the test hangs"


def is_unlocked(cache: ModelCache[Any]) -> bool:
    """Return whether another thread can look at the cache now: nobody holds its lock."""
    looked = threading.Event()

    def look() -> None:
        cache.models()
        cache.stats()
        looked.set()

    threading.Thread(target=look, name="test-look", daemon=True).start()
    return looked.wait(3.0)
