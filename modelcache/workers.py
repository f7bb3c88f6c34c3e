"""The cache's own threads: started when there is work, ended when idle, never more than allowed.

What they run is given to them; here is only who runs it, and in which order: what somebody waits for goes
before what was only asked for in advance.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger("modelcache")


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
        # guards the two queues, the set of threads and the count of idle ones; taken after no other lock
        # is held, and no job is run under it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # guards nothing of its own: it is the lock's
        self._urgent: deque[Callable[[], None]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._waiting = 0
        self._stopping: set[threading.Thread] = set()
        self._stopped = False

    def submit(self, job: Callable[[], None], *, urgent: bool) -> None:
        """Have a job run by some thread; urgent ones go first.

        Raises:
            RuntimeError: stopped, or the interpreter is shutting down and starts no more threads.
        """
        with self._lock:
            if self._stopped:
                raise RuntimeError("the cache's threads were stopped")
            if self._waiting <= len(self._urgent) + len(self._later) and len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name="modelcache-loader", daemon=True)
                thread.start()
                self._threads.add(thread)
            (self._urgent if urgent else self._later).append(job)
            self._changed.notify()

    def own(self) -> bool:
        """Whether the calling thread is one of these: then it must not wait for another one of them."""
        return threading.current_thread() in self._threads

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except BaseException:  # noqa: BLE001 - a job reports its own errors: this is a bug, and must not cost the thread
                with contextlib.suppress(Exception):  # a log handler that raises
                    _log.exception("a job of the cache failed")
            del job  # an idle thread must not keep a model alive

    def _next(self) -> Callable[[], None] | None:
        deadline = time.monotonic() + self._idle
        with self._lock:
            while not self._urgent and not self._later:
                left = deadline - time.monotonic()
                if self._stopped or left <= 0:
                    self._threads.discard(threading.current_thread())
                    return None
                self._waiting += 1
                self._changed.wait(left)
                self._waiting -= 1
            return self._urgent.popleft() if self._urgent else self._later.popleft()

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
