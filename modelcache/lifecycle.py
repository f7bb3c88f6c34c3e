"""What happens to every cache of a process at a fork and at exit.

At a fork the guard of each cache is held across it, so that the child never inherits half a decision; the guard
is never held over I/O, logging or a user's code, so this waits for microseconds. In the child only state is
reset: no I/O but closing inherited descriptors, no logging, no other lock.
"""

import atexit
import contextlib
import os
import threading
from typing import Protocol

_AT_EXIT = 5.0  # seconds that a fetch or load under way may still take when the interpreter ends


class Living(Protocol):
    """What of a cache matters here."""

    def before_fork(self) -> None:
        """Make sure that no decision is half made."""
        ...

    def after_fork_in_parent(self) -> None:
        """Go on."""
        ...

    def after_fork_in_child(self) -> None:
        """Forget threads that do not exist here."""
        ...

    def close(self, timeout: float | None) -> bool:
        """Unload everything; return whether all is gone."""
        ...

    def abandon(self) -> None:
        """Leave no temporary files, whatever is still under way."""
        ...


_living: set[Living] = set()
_forking = threading.local()  # .caches: whose guards this thread holds while it forks


def enrol(cache: Living) -> None:
    """Look after a cache until it is closed: one that nobody closes is closed at exit."""
    _living.add(cache)


def discharge(cache: Living) -> None:
    """Forget a cache that has nothing left."""
    _living.discard(cache)


def _before() -> None:
    _forking.caches = sorted(_living, key=id)  # one order, whoever forks
    for cache in _forking.caches:
        cache.before_fork()


def _in_parent() -> None:
    for cache in _forking.caches:
        cache.after_fork_in_parent()
    _forking.caches = []


def _in_child() -> None:
    for cache in _forking.caches:
        with contextlib.suppress(Exception):  # others must not be left with a guard that nobody releases
            cache.after_fork_in_child()
    _forking.caches = []


def _at_exit() -> None:
    for cache in list(_living):
        try:
            gone = cache.close(_AT_EXIT)
        except BaseException:  # noqa: BLE001 - the interpreter ends anyway, and other caches are to be closed
            gone = False
        if not gone:
            cache.abandon()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
atexit.register(_at_exit)
