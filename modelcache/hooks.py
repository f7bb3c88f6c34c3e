"""Who listens to a cache: the registry of callbacks, and handing events on to them.

What happened is told by ``events``; how one callback is called, isolated and queued is ``deliveries``; lines in
a log are made by ``sinks``. When an event is made, and that no lock is held while it is handed on, is the
business of whoever calls :meth:`Hooks.emit`.
"""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from modelcache.calling import is_async
from modelcache.deliveries import Background, Callback, Calls, Hook, name_of
from modelcache.errors import ConfigError
from modelcache.events import Event, Hit

QUEUE_LIMIT = 10_000
"""Events that may wait for the background thread."""

E = TypeVar("E", bound=Event)
R = TypeVar("R")


class _Table:
    """One state of the registry; replaced as a whole, so that it is read without a lock."""

    def __init__(self, hooks: tuple[Hook, ...]) -> None:
        self.hooks = hooks
        self._found: dict[type[Event], tuple[Hook, ...]] = {}  # filled on demand; equal whoever fills it

    def of(self, event_type: type[Event]) -> tuple[Hook, ...]:
        """Return who hears this type, each callback once, in order of registration."""
        found = self._found.get(event_type)
        if found is None:
            hooks: list[Hook] = []
            for hook in self.hooks:
                known = any(hook.callback == other.callback for other in hooks)
                if issubclass(event_type, hook.event_type) and not known:
                    hooks.append(hook)
            found = self._found[event_type] = tuple(hooks)
        return found


class Hooks:
    """The callbacks of one cache.

    Concurrency: all methods may be called from any thread, from callbacks, signal handlers and finalizers;
    :meth:`emit` and :meth:`wants` take no lock unless a background callback listens. Callbacks run with no
    lock of ours held, on the thread that called :meth:`emit`, so they may overlap across threads
    (``Event.seq`` tells the order); one that blocks delays that thread only. Background callbacks share one
    daemon thread and run there in the order of :meth:`emit`. After a fork: :meth:`reset_after_fork`.

    Args:
        limit: events that may wait for the background thread.
        clock: seconds, monotonic; to tell slow callbacks.

    Attributes:
        listens_hit: whether anybody hears ``Hit``; a plain attribute for the hot path.
    """

    def __init__(self, *, limit: int = QUEUE_LIMIT, clock: Callable[[], float] = time.monotonic) -> None:
        # Guards the swap of _table and listens_hit. Nothing else happens under it: comparing callbacks
        # may run a user's __eq__, so that is done before.
        self._lock = threading.RLock()
        self._table = _Table(())
        self._limit = limit
        self._calls = Calls(clock)
        self._background = Background(self._calls, limit)
        self.listens_hit = False

    @property
    def errors(self) -> int:
        """How many calls of callbacks raised."""
        return self._calls.errors

    @property
    def dropped(self) -> int:
        """How many deliveries to background callbacks were dropped: queue full, or closed."""
        return self._calls.dropped

    @overload
    def on(self, event_type: type[E], callback: Callable[[E], R], *, background: bool = ...) -> Callable[[E], R]: ...
    @overload
    def on(
        self, event_type: type[E], callback: None = None, *, background: bool = ...
    ) -> Callable[[Callable[[E], R]], Callable[[E], R]]: ...
    def on(self, event_type: type[Any], callback: Callback | None = None, *, background: bool = False) -> Any:
        """Have ``callback`` called with each event of this type, subclasses included.

        A callback registered twice for one type is one registration, in its old place, with the latest
        ``background``. One that is registered for several types hears each event once, by the first of
        its registrations that fits.

        Args:
            event_type: :class:`~modelcache.events.Event`, to hear all, or one of its subclasses.
            callback: takes the event; what it returns is ignored. Kept alive until :meth:`off`. None: a
                decorator is returned.
            background: call it on the background thread; when 10,000 events wait there, the newest is
                dropped and counted in :attr:`dropped`.

        Returns:
            The callback, so that this works as a decorator.

        Raises:
            ConfigError: not an event type, not callable, or a coroutine function.
        """
        _check_type(event_type)
        if callback is None:
            return lambda function: self.on(event_type, function, background=background)
        _check_callback(callback)
        new = Hook(event_type, callback, bool(background))

        def add(hooks: tuple[Hook, ...]) -> tuple[Hook, ...]:
            same = [hook for hook in hooks if hook.event_type is event_type and hook.callback == callback]
            return tuple(new if hook in same else hook for hook in hooks) if same else (*hooks, new)

        self._change(add)
        return callback

    def off(self, callback: Callback) -> bool:
        """Remove ``callback`` from all types; what waits in the background for it is not delivered.

        Returns:
            Whether it was registered. A call that is under way is not waited for.
        """
        gone: list[Hook] = []

        def drop(hooks: tuple[Hook, ...]) -> tuple[Hook, ...]:
            gone[:] = [hook for hook in hooks if hook.callback == callback]
            return tuple(hook for hook in hooks if hook not in gone)

        self._change(drop)
        for hook in gone:
            hook.live = False
        return bool(gone)

    def wants(self, event_type: type[Event]) -> bool:
        """Whether anybody hears events of this very type; takes no lock."""
        return bool(self._table.of(event_type))

    def emit(self, events: Iterable[Event]) -> None:
        """Hand events on, in order: call the callbacks, queue for the background ones.

        Call it with no lock held. What a callback raises is logged and counted.

        Raises:
            KeyboardInterrupt, SystemExit: the first that a callback on this thread raised, once all
                deliveries are made.
        """
        kept: BaseException | None = None
        for event in events:
            for hook in self._table.of(type(event)):
                if hook.background:
                    self._background.put(hook, event)
                elif (error := self._calls.call(hook, event)) is not None and kept is None:
                    kept = error
        if kept is not None:
            try:
                raise kept
            finally:
                del kept

    def close(self, timeout: float) -> bool:
        """End the background thread once it has delivered what waits; later background events are dropped.

        Callbacks on the caller's thread go on being called. May be called again, to wait longer.

        Args:
            timeout: seconds to wait for the thread.

        Returns:
            Whether the thread has ended; False from the thread itself, which ends after its queue.
        """
        return self._background.close(timeout)

    def reset_after_fork(self) -> None:
        """Make locks and queue anew in the child; callbacks, counters and being closed stay.

        What waited for the parent's thread is delivered there, not here. Takes no lock, does no I/O.
        """
        closed = self._background.closed
        self._lock = threading.RLock()  # guards what it did before
        self._calls.lock = threading.RLock()  # guards what it did before
        self._background = Background(self._calls, self._limit)
        self._background.closed = closed
        self.listens_hit = bool(self._table.of(Hit))

    def __del__(self) -> None:
        self._background.end()

    def _change(self, change: Callable[[tuple[Hook, ...]], tuple[Hook, ...]]) -> None:
        while True:
            old = self._table
            new = _Table(change(old.hooks))
            listens = bool(new.of(Hit))
            with self._lock:
                if self._table is old:  # else somebody was faster: again, from what is there now
                    self._table = new
                    self.listens_hit = listens
                    return


def _check_type(event_type: object) -> None:
    if not (isinstance(event_type, type) and issubclass(event_type, Event)):
        raise ConfigError(
            f"on({event_type!r:.100}) needs an event type, like Evicted, or Event to hear all",
            setting="event_type",
            value=event_type,
        )


def _check_callback(callback: object) -> None:
    if not callable(callback):
        problem = "is not callable"
    elif is_async(callback):
        problem = "is a coroutine function, which nobody would await; give a plain function that starts it"
    else:
        return
    raise ConfigError(f"callback {name_of(callback)} {problem}", setting="callback", value=callback)
