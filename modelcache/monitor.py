"""The thread that watches for memory growth from outside, and books uses while nothing is missed."""

import contextlib
import logging
import threading
from collections.abc import Callable

_log = logging.getLogger("modelcache")


class Monitor:
    """Calls ``look`` every ``interval`` seconds from a daemon thread, and sleeps while there is nothing to watch.

    Args:
        look: one look; returns whether there is anything left to watch. Called on the monitor's thread.
        interval: seconds between two looks.
    """

    def __init__(self, look: Callable[[], bool], interval: float) -> None:
        self._look = look
        self._interval = interval
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Start anew in a child, where the thread does not exist; the first load or use there starts it."""
        # guards the thread and the two flags below; no look is made under it. Reentrant, so that a signal handler
        # that closes the cache does not wait for the very frame it interrupted.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # guards nothing of its own: it is the lock's
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._awake = False

    def start(self) -> None:
        """Make sure that the thread runs and watches; where none can be started, the next load tries again."""
        with self._lock:
            self._awake = True
            self._changed.notify_all()
            if self._thread is not None or self._stopped:
                return
            thread = threading.Thread(target=self._run, name="modelcache-monitor", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had, or the interpreter ends
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._stopped, self._interval)
                if self._stopped:
                    return
                self._awake = False  # before the look: a load that lands during it wakes us again
            if not self._look_safely():
                with self._lock:
                    self._changed.wait_for(lambda: self._stopped or self._awake)

    def _look_safely(self) -> bool:
        try:
            return self._look()
        except BaseException:  # noqa: BLE001 - a monitor that dies is worse than one that missed a look
            with contextlib.suppress(Exception):  # a log handler that raises
                _log.exception("the memory monitor could not look; it tries again in %s s", self._interval)
            return True

    def stop(self, timeout: float = 0.0) -> bool:
        """End the thread; return whether it did within ``timeout`` seconds."""
        with self._lock:
            self._stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(max(timeout, 0))
        return not thread.is_alive()
