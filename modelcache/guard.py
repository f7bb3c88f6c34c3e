"""The one lock of a cache, with the condition that room or state may have changed.

Decide under it, act outside: what is to be unloaded, deleted or announced is returned from under the lock.
Nothing that waits, reads, writes or runs a user's code may happen while it is held; the one exception, a
user's ``Policy``, is told so in its docstring.
"""

import threading

_RLock: type = type(threading.RLock())  # guards nothing: only its type is wanted


class Guard(_RLock):  # type: ignore[misc]
    """A reentrant lock and its condition, for ``with`` statements.

    Reentrant, since a signal handler or a finalizer may run in the middle of a decision of its own thread:
    it may look (``models()``), and ``busy`` tells it when it must not decide. A subclass of the C lock, since
    ``with`` on that is one step: an interrupt (Ctrl-C) can't fall between taking the lock and releasing it.
    """

    # guards all mutable state of one cache: residents, shelf, flights, failures, counters;
    # no I/O, no user code (but Policy), no logging, no other lock may be taken under it.

    def __init__(self) -> None:
        self._changed = threading.Condition(self)  # guards nothing of its own: it is this lock's

    def reset_after_fork(self) -> None:
        """In a child that was forked while this thread held it: let go; threads that waited do not exist here."""
        self._changed = threading.Condition(self)  # guards nothing of its own: it is this lock's
        self.release()

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a decision (then it must not start another)."""
        return bool(self._is_owned())

    def wait(self, timeout: float) -> None:
        """Let go of the lock until ``notify`` or for ``timeout`` seconds, then take it again."""
        self._changed.wait(timeout)

    def notify(self) -> None:
        """Wake all who wait, since room or state may have changed; the lock is held."""
        self._changed.notify_all()
