"""The cache's own threads: started when there is work, ended when idle, never more than allowed.

What they run is given to them; here is only who runs it, and in which order: what somebody waits for goes
before what was only asked for in advance, which never takes the last thread where there is more than one.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("modelcache")


def most_ahead(threads: int) -> int:
    """Return how many of so many threads may run what nobody waits for."""
    return max(threads - 1, 1)


class Workers:
    """A bounded pool of daemon threads with two queues.

    Args:
        most: threads at most.
        idle: seconds after which a thread without work ends.
    """

    def __init__(self, most: int, idle: float = 10.0) -> None:
        self._most = most
        self._idle = idle
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew in a child, where none of the threads exists."""
        # guards the two queues, the set of threads and the counts; taken after no other lock
        # is held, and no job is run under it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # guards nothing of its own: it is the lock's
        self._urgent: deque[Callable[[], None]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._ahead = 0  # threads that run what stood in the later queue
        self._threads: set[threading.Thread] = set()
        self._waiting = 0
        self._starting = 0
        self._stopping: set[threading.Thread] = set()
        self._stopped = False

    def submit(self, job: Callable[[], None], *, urgent: bool, first: bool = False) -> None:
        """Have a job run by some thread; urgent ones go first.

        Args:
            job: what is run.
            urgent: whether somebody waits for it.
            first: before the others of its kind.

        Raises:
            RuntimeError: stopped, or the interpreter is shutting down and starts no more threads.
        """
        queue = self._urgent if urgent else self._later
        with self._lock:
            if self._stopped:
                raise RuntimeError("the cache's threads were stopped")
            self._hire(urgent or len(self._later) < self._places())
            (queue.appendleft if first else queue.append)(job)
            self._changed.notify()

    def _runnable(self) -> int:
        """Return how many jobs may begin now."""
        return len(self._urgent) + min(len(self._later), self._places())

    def _places(self) -> int:
        """Return how many jobs of the later queue may begin now, if there were so many."""
        return most_ahead(self._most) - self._ahead

    def _free(self) -> int:
        """Return how many threads have nothing to do yet."""
        return self._waiting + self._starting

    def _hire(self, coming: int = 0) -> None:
        """Start a thread where there is more to do, with what is ``coming``, than threads that wait for it."""
        if self._free() < self._runnable() + coming and len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="modelcache-loader", daemon=True)
            thread.start()
            self._threads.add(thread)
            self._starting += 1

    def own(self) -> bool:
        """Whether the calling thread is one of these: then it must not wait for another one of them."""
        return threading.current_thread() in self._threads

    def pressed(self) -> bool:
        """Whether something urgent waits for a thread; takes no lock, so at worst it is out of date."""
        return len(self._urgent) > self._free() + self._most - len(self._threads)

    def _work(self) -> None:
        with self._lock:
            self._starting -= 1
        while (found := self._next()) is not None:
            job, ahead = found
            try:
                job()
            except BaseException:  # noqa: BLE001 - a job reports its own errors: this is a bug, and must not cost the thread
                with contextlib.suppress(Exception):  # a log handler that raises
                    _log.exception("a job of the cache failed")
            del job, found  # an idle thread must not keep a model alive
            if ahead:
                self._end_ahead()

    def _end_ahead(self) -> None:
        """Give the place of a job back that stood in the later queue: another one may begin."""
        with self._lock:
            self._ahead -= 1
            self._changed.notify()

    def _next(self) -> tuple[Callable[[], None], bool] | None:
        """Return what to run, and whether it stood in the later queue; None: the thread is to end."""
        deadline = time.monotonic() + self._idle
        with self._lock:
            while not self._runnable():
                left = deadline - time.monotonic()
                if self._stopped or left <= 0:
                    self._threads.discard(threading.current_thread())
                    return None
                self._waiting += 1
                self._changed.wait(left)
                self._waiting -= 1
            ahead = not self._urgent
            job = (self._later if ahead else self._urgent).popleft()
            self._ahead += ahead
            if not self._stopped:
                with contextlib.suppress(RuntimeError):  # the interpreter ends: this thread does what there is
                    self._hire()  # what could not begin before may now, and whoever waited for it has ended
            return job, ahead

    def stop(self, timeout: float) -> bool:
        """Let the threads end once the queues are empty; return whether all did within ``timeout`` seconds."""
        with self._lock:
            self._stopped = True
            me = threading.current_thread()
            self._stopping.add(me)
            threads = self._threads - {me}
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        for thread in threads:
            while thread.is_alive() and thread not in self._stopping and (left := deadline - time.monotonic()) > 0:
                thread.join(min(left, 0.1))  # one that comes here itself, from a callback, does not end before us
        self._stopping.discard(me)
        return not any(thread.is_alive() for thread in threads)
