"""What happens to every cache of a process at a fork and at exit.

At a fork the guard of each cache is held across it, so that the child never inherits half a decision; the guard
is never held over I/O, logging or a user's code, so this waits for microseconds. In the child only state is
reset: no I/O but closing inherited descriptors, no logging, no other lock.

A child of ``multiprocessing`` ends without the handlers of ``atexit`` that its parent has registered, and before Python
3.13 without its own, but it runs what ``multiprocessing.util.Finalize`` has registered. A process that a signal kills,
or that ends itself by ``os._exit``, closes nothing.
"""

import atexit
import contextlib
import multiprocessing
import os
import sys
import threading
from multiprocessing import util
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
        _living.discard(cache)  # a forkserver's child on Python 3.13 comes here twice


def _in_multiprocessing_child(_: object = None) -> None:
    """See to it that caches are closed at the end of this child, those too that the parent made before a fork."""
    if multiprocessing.get_start_method(allow_none=True) != "spawn":  # which ends like any interpreter, with atexit
        util.Finalize(None, _at_end_of_child, exitpriority=1)  # before it waits for children of its own, as at exit


def _at_end_of_child() -> None:
    if sys.version_info < (3, 13) and _others():  # later versions have waited for them already
        threading.Thread(target=_after_others, name="modelcache-exit", daemon=False).start()
    else:
        _at_exit()


def _after_others() -> None:
    """Close once all other threads have ended: like at any exit, they may use a cache until then."""
    while others := _others():
        others[0].join()
    _at_exit()


def _others() -> list[threading.Thread]:
    """Return the threads that the end of this process waits for, this one and the main thread aside."""
    mine = {threading.current_thread(), threading.main_thread()}
    return [thread for thread in threading.enumerate() if not (thread.daemon or thread in mine) and thread.is_alive()]


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
atexit.register(_at_exit)
util.register_after_fork(_at_exit, _in_multiprocessing_child)
if multiprocessing.parent_process() is not None:  # a child that imports this only now
    _in_multiprocessing_child()
