"""Waiting for what another thread or process does, without a sleep."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

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

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
