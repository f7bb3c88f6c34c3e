"""The thread that watches for memory growth from outside, and books uses while nothing is missed."""

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
        # guards the thread handle alone, so that there is one thread; nothing else is done under it.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()

    def start(self) -> None:
        """Make sure that the thread runs and watches."""
        self._wake.set()
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="modelcache-monitor", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._wake.clear()  # before the look: a load that lands during it wakes us again
            if not self._look_safely():
                self._wake.wait()

    def _look_safely(self) -> bool:
        try:
            return self._look()
        except BaseException:  # noqa: BLE001 - a monitor that dies is worse than one that missed a look
            _log.exception("the memory monitor could not look; it tries again in %s s", self._interval)
            return True

    def stop(self, timeout: float = 0.0) -> bool:
        """End the thread; return whether it did within ``timeout`` seconds."""
        self._stop.set()
        self._wake.set()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(max(timeout, 0))
        return not thread.is_alive()
