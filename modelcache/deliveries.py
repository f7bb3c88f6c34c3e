"""How one callback is called: isolated, timed, counted, and on the background thread where that is wanted.

Who listens for what is known to ``hooks``, which is the only user of this module.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import attrs

from modelcache.events import Event

SLOW_SECONDS = 1.0
"""A callback on the caller's own thread that takes longer is told on, once."""

Callback = Callable[[Any], object]
"""Takes one event; what it returns is ignored."""

_log = logging.getLogger("modelcache")
_log.addHandler(logging.NullHandler())  # here, as every cache has hooks: no words on stderr unless logging is set up


@attrs.define(eq=False)
class Hook:
    """One registration.

    Attributes:
        event_type: what it hears, subclasses included.
        callback: the user's.
        background: whether it is called on the background thread.
        live: False from ``off`` on: what still waits in the queue for it is not delivered.
        told_slow: whether the log has said that it is slow.
    """

    event_type: type[Event]
    callback: Callback
    background: bool
    live: bool = True
    told_slow: bool = False


class Calls:
    """Calls callbacks and lets nothing out of them; counts what went wrong.

    Args:
        clock: seconds, monotonic.

    Attributes:
        errors: calls that raised.
        dropped: deliveries that the background queue did not take.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        # Guards the counters. Nothing but adding to them happens under it. Reentrant: a callback's event
        # may be handed on by a signal handler or a finalizer that interrupted this very thread.
        self.lock = threading.RLock()
        self.errors = 0
        self.dropped = 0
        self._clock = clock

    def call(self, hook: Hook, event: Event) -> BaseException | None:
        """Call one callback; return the KeyboardInterrupt or SystemExit that it raised, if so."""
        start = self._clock()
        try:
            hook.callback(event)
        except (KeyboardInterrupt, SystemExit) as error:
            if not hook.background:
                return error
            self._raised(hook, event, error)
        except BaseException as error:  # noqa: BLE001 - whatever a stranger's code raises ends here
            self._raised(hook, event, error)
        took = self._clock() - start
        if took > SLOW_SECONDS and not hook.background and not hook.told_slow:
            hook.told_slow = True
            how = "callback %s took %.1f s for %s and held up the request; register it with background=True"
            with contextlib.suppress(Exception):
                _log.warning(how, name_of(hook.callback), took, type(event).__name__)
        return None

    def drop(self) -> None:
        """Count one delivery that will not be made."""
        with self.lock:
            self.dropped += 1

    def _raised(self, hook: Hook, event: Event, error: BaseException) -> None:
        with self.lock:
            self.errors += 1
        with contextlib.suppress(Exception):  # a log handler is a stranger's code as well
            _log.error("callback %s raised on: %s", name_of(hook.callback), event, exc_info=error)


class Background:
    """The bounded queue and its one daemon thread, started with the first event and ended by :meth:`close`.

    Args:
        calls: makes the calls, on the thread.
        limit: events that may wait.

    Attributes:
        closed: whether :meth:`close` was called; what comes later is dropped.
    """

    def __init__(self, calls: Calls, limit: int) -> None:
        # Guards: that nothing is put behind the end mark, and that one thread is started. No callback
        # and no logging under it. Reentrant, as a signal handler may emit or close on this very thread.
        self._lock = threading.RLock()
        self._queue: queue.SimpleQueue[tuple[Hook, Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._calls = calls
        self._limit = limit
        self._told_no_thread = False
        self.closed = False

    def put(self, hook: Hook, event: Event) -> None:
        """Queue one delivery, or drop it where the queue is full or closed; never waits."""
        failed = None
        with self._lock:
            if self.closed or self._queue.qsize() >= self._limit:
                self._calls.drop()
                return
            self._queue.put((hook, event))
            if self._thread is None:
                failed = self._start()
        if failed is not None and not self._told_no_thread:
            self._told_no_thread = True
            with contextlib.suppress(Exception):
                _log.error("the thread for background callbacks did not start, each event tries again: %s", failed)

    def _start(self) -> RuntimeError | None:
        # The thread knows the queue, not the Hooks: a cache that is dropped unclosed is collected.
        thread = threading.Thread(
            target=_deliver, args=(self._queue, self._calls), daemon=True, name="modelcache-hooks"
        )
        self._thread = thread  # before start(): a signal handler that comes by there must not start another
        try:
            thread.start()
        except RuntimeError as error:  # no more threads: at a limit of the system, or the interpreter is ending
            self._thread = None
            return error
        return None

    def close(self, timeout: float) -> bool:
        """See :meth:`modelcache.hooks.Hooks.close`."""
        with self._lock:
            self.closed = True
            thread = self._thread
            while thread is None and not self._queue.empty():  # it could never be started
                if self._queue.get_nowait() is not None:
                    self._calls.drop()
        self.end()
        if thread is None:
            return True
        if thread is threading.current_thread():
            return False
        with contextlib.suppress(RuntimeError):  # from a signal handler, in the middle of start()
            thread.join(max(0.0, timeout))
            return not thread.is_alive()
        return False

    def end(self) -> None:
        """Put the end mark; safe in a finalizer."""
        self._queue.put(None)


def _deliver(events: "queue.SimpleQueue[tuple[Hook, Event] | None]", calls: Calls) -> None:
    while (item := events.get()) is not None:
        if item[0].live:
            calls.call(*item)
        del item  # or it would keep callback and event alive until the next one


def name_of(callback: object) -> str:
    """Return how a log line calls a callback; never raises."""
    name = getattr(callback, "__qualname__", None)
    if isinstance(name, str):
        return name
    try:
        return f"{callback!r:.200}"
    except Exception:  # noqa: BLE001 - a user's repr
        return type(callback).__name__
