"""The one lock of a cache, with the condition that room or state may have changed.

Decide under it, act outside: what is to be unloaded, deleted or announced is returned from under the lock.
Nothing that waits, reads, writes or runs a user's code may happen while it is held; the one exception, a
user's ``Policy``, is told so in its docstring.
"""

import threading
from types import TracebackType
from typing import Self


class Guard:
    """A reentrant lock and its condition, for ``with`` statements.

    Reentrant, since a signal handler or a finalizer may run in the middle of a decision of its own thread:
    it may look (``models()``), and ``busy`` tells it when it must not wait.
    """

    def __init__(self) -> None:
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew in a child: threads that could release the old lock do not exist there."""
        # guards all mutable state of one cache: residents, shelf, flights, failures, counters;
        # no I/O, no user code (but Policy), no logging, no other lock may be taken under it.
        self._changed = threading.Condition(threading.RLock())
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        self._changed.acquire()
        self._owner = threading.get_ident()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._changed.release()

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision (then it must not start another)."""
        return self._owner == threading.get_ident()

    def wait(self, timeout: float) -> None:
        """Let go of the lock until ``notify`` or for ``timeout`` seconds, then take it again."""
        depth, self._depth, self._owner = self._depth, 0, None
        try:
            self._changed.wait(timeout)
        finally:
            self._depth, self._owner = depth, threading.get_ident()

    def notify(self) -> None:
        """Wake all who wait, since room or state may have changed; the lock is held."""
        self._changed.notify_all()
