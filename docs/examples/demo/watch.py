"""Looking at the running server from outside: its figures and its events, several times a second."""

import threading
import time
from collections.abc import Callable
from typing import Any

import attrs
from load import Api

import modelcache
from modelcache import Event, Evicted, Loaded, Reason

INTERVAL = 0.2


@attrs.frozen
class Sample:
    """What ``GET /stats`` said at one moment; see ``modelcache.Stats``."""

    at: float
    used: int
    high: int
    low: int
    hits: int
    misses: int
    loads: int
    evictions: int


@attrs.define
class Watch:
    """What was seen so far.

    Attributes:
        api: the connection to look through.
        clock_offset: monotonic minus wall-clock seconds, to put events beside requests.
        samples: figures, oldest first.
        events: events, oldest first.
    """

    api: Api
    clock_offset: float = attrs.field(factory=lambda: time.monotonic() - time.time())
    samples: list[Sample] = attrs.field(factory=list)
    events: list[Event] = attrs.field(factory=list)
    _seq: int = 0

    def look(self) -> list[Event]:
        """Take a sample, and return the events since the last look."""
        figures, _ = self.api.call("GET", "/stats")
        self.samples.append(
            Sample(
                time.monotonic(),
                *(figures[f"memory_{name}"] for name in ("used", "high", "low")),
                *(figures[name] for name in ("hits", "misses", "loads", "evictions")),
            )
        )
        answer, _ = self.api.call("GET", f"/events?since={self._seq}")
        new = sorted((_event(fields) for fields in answer), key=lambda event: event.seq)
        if new:
            self._seq = new[-1].seq
        self.events += new
        return new

    def look_for(self, seconds: float, tell: Callable[[list[Event], float], None]) -> None:
        """Look again and again; ``tell`` gets what is new and the share of the time that has passed."""
        started, pause = time.monotonic(), threading.Event()
        while (passed := time.monotonic() - started) < seconds:
            tell(self.look(), passed / seconds)
            pause.wait(INTERVAL)
        tell(self.look(), 1.0)

    def moments(self, kind: type[Event]) -> list[float]:
        """Return the monotonic seconds at which events of a kind were decided."""
        return [event.time + self.clock_offset for event in self.events if isinstance(event, kind)]


def _event(fields: dict[str, Any]) -> Event:
    """Return an event as the server's cache made it, from its ``to_dict()``."""
    rest = dict(fields)
    kind = getattr(modelcache, rest.pop("event"))
    if "reason" in rest:
        rest["reason"] = Reason(rest["reason"])
    event: Event = kind(**rest)
    return event


def swaps(events: list[Event]) -> list[tuple[Loaded, list[Evicted]]]:
    """Return the loads among ``events``, each with the evictions that made room for it."""
    gone: dict[str | None, list[Evicted]] = {}
    found = []
    for event in events:
        if isinstance(event, Evicted):
            gone.setdefault(event.for_model, []).append(event)
        elif isinstance(event, Loaded):
            found.append((event, gone.pop(event.model, [])))
    return found
