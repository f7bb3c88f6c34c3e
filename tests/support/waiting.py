"""Waiting for what another thread or process does, without a sleep."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(check: Callable[[], T], timeout: float = 10.0, *, interval: float = 0.02) -> T:
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
