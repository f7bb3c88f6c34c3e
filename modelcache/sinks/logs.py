"""One structured line in a log for each event.

How the line looks in the end is up to the handlers and formatters that the application has set up; which callbacks
failed is logged by ``hooks`` itself.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from modelcache import events
from modelcache.errors import ConfigError
from modelcache.events import Event, Failed, Hit, Missed, Unloaded


class Observable(Protocol):
    """A cache, as far as a sink sees it."""

    def on(self, event_type: type[Any], callback: Callable[[Any], object], *, background: bool = ...) -> object:
        """Register a callback."""


def log(
    cache: Observable,
    *,
    logger: str | logging.Logger = "modelcache",
    level: int = logging.INFO,
    background: bool = False,
    hits: bool = False,
) -> Callable[[Event], None]:
    """Write one line for each event of ``cache``: ``str(event)``, with all its fields as ``record.modelcache``.

    ::

        # INFO modelcache: evicted 'fraud/v3' 1.2 GiB (memory): watermark: used 5.9 GiB + 1.0 GiB for 'b' > 6.4 GiB

    The fields are ``event.to_dict()``, JSON-ready. A failed fetch, load or unload is logged as WARNING at least.

    Concurrency: lines are written on the thread that caused the event, with no lock of the cache held; with
    ``background``, on the one thread for background callbacks.

    Args:
        cache: anything with ``on(event_type, callback, background=...)``.
        logger: a logger or its name.
        level: of all other lines.
        background: write them on the background thread, which drops what is too much.
        hits: also log ``Hit`` and ``Missed``. Without it, ``Hit`` is not even made.

    Returns:
        The callback, for ``cache.off``.

    Raises:
        ConfigError: ``logger`` or ``level`` is of another type.
    """
    target = _logger(logger)
    _check_level(level)

    def write(event: Event) -> None:
        severity = max(level, logging.WARNING) if _went_wrong(event) else level
        if target.isEnabledFor(severity):
            target.log(severity, "%s", event, extra={"modelcache": event.to_dict()})

    for event_type in _types(hits=hits):
        cache.on(event_type, write, background=background)
    return write


def _logger(logger: object) -> logging.Logger:
    if isinstance(logger, str):
        return logging.getLogger(logger)
    if not isinstance(logger, logging.Logger):
        raise ConfigError(f"logger={logger!r:.100} must be a logger or its name", setting="logger", value=logger)
    return logger


def _check_level(level: object) -> None:
    if not isinstance(level, int) or isinstance(level, bool):
        raise ConfigError(f"level={level!r:.100} must be an int, like logging.INFO", setting="level", value=level)


def _types(*, hits: bool) -> list[type[Event]]:
    """Return the types to register for, one by one: whoever hears ``Event`` makes the cache make ``Hit``."""
    known = [value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event)]
    return [kind for kind in known if kind is not Event and (hits or kind not in (Hit, Missed))]


def _went_wrong(event: Event) -> bool:
    return isinstance(event, Failed) or (isinstance(event, Unloaded) and event.error is not None)
