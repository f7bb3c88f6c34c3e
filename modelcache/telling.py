"""From decision to callback: numbers events, keeps the recent ones, hands them to the hooks.

Callbacks and their isolation are ``hooks``. Here is what happens to a KeyboardInterrupt or SystemExit that a
callback, or an ``unload=``, raises: it is kept until the verb that caused it has left everything consistent. And how
errors of strangers are told, and kept from keeping things alive.
"""

import contextlib
import itertools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Iterable

from modelcache.events import Event
from modelcache.hooks import Hooks

_log = logging.getLogger("modelcache")
_KEPT = 1000


def complain(message: str, *facts: object, error: BaseException | None = None) -> None:
    """Log an error of somebody's; never raises: a log handler is somebody's code as well."""
    with contextlib.suppress(Exception):
        _log.error(message, *facts, exc_info=error)


def text_of(error: BaseException) -> str:
    """Return the text of a stranger's error, whose ``__str__`` may itself raise."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - see above
        return "(an error that has no text)"


class Teller:
    """The events of one cache.

    Concurrency: any thread, never under the cache's guard, except for ``number``, which takes no lock.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._numbers = itertools.count(1)
        self._pending = threading.local()
        self.recent: deque[Event] = deque(maxlen=_KEPT)

    def number(self) -> int:
        """Return the next ``seq``."""
        return next(self._numbers)

    def tell(self, events: Iterable[Event]) -> None:
        """Keep and deliver events; never raises."""
        events = list(events)
        self.recent.extend(events)
        try:
            self._hooks.emit(events)
        except (KeyboardInterrupt, SystemExit) as stop:
            self.keep(stop)

    def keep(self, stop: BaseException) -> None:
        """Keep an interrupt for ``pass_on`` of this thread; the first one counts."""
        if getattr(self._pending, "stop", None) is None:
            self._pending.stop = stop

    def pass_on(self) -> None:
        """Raise what was kept on this thread, now that the state is consistent."""
        stop = getattr(self._pending, "stop", None)
        if stop is not None:
            self._pending.stop = None
            raise stop

    def drop(self) -> None:
        """Log what was kept on a thread of our own, which nobody could catch it on."""
        stop = getattr(self._pending, "stop", None)
        if stop is not None:
            self._pending.stop = None
            complain("a callback raised %r on a thread of the cache: ignored", stop)


def clear_frames(error: BaseException | None) -> None:
    """Drop the local variables that an error's traceback keeps alive: a half-loaded model may be among them."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        error = queue.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        queue += [error.__cause__, error.__context__]
        if isinstance(error, BaseExceptionGroup):
            queue += error.exceptions
