"""Events in the log: one structured line each."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import events, sinks
from modelcache.errors import ConfigError
from modelcache.events import Event, Evicted, Failed, Fetched, Hit, Loaded, Missed, Reason, Reclaimed, Unloaded
from modelcache.hooks import Hooks

WAIT = 10.0
EVICTED = Evicted(seq=7, time=1.5, model="a/b", tier="memory", reason=Reason.WATERMARK, bytes=2048, used=10, high=9)


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    """Give something to subscribe to."""
    made = Hooks()
    yield made
    assert made.close(WAIT)


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


def test_one_line_an_event(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """A line says what str(event) says, and carries all fields, ready for JSON."""
    sinks.log(hooks)
    hooks.emit([EVICTED])
    (record,) = caplog.records
    assert record.name == "modelcache"
    assert record.levelno == logging.INFO
    assert record.getMessage() == str(EVICTED)
    assert record.modelcache == EVICTED.to_dict()  # type: ignore[attr-defined]
    assert json.loads(json.dumps(record.modelcache))["reason"] == "watermark"  # type: ignore[attr-defined]


def test_every_kind_but_lookups(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """Every kind of event is logged but Hit and Missed, and Hit is not wanted."""
    sinks.log(hooks)
    kinds = [value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event)]
    kinds.remove(Event)
    assert {Fetched, Loaded, Unloaded, Evicted, Reclaimed, Failed, Hit, Missed} <= set(kinds)
    hooks.emit([kind(seq=1, time=0.0) for kind in kinds])
    told = [record.modelcache["event"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told == [kind.__name__ for kind in kinds if kind not in (Hit, Missed)]
    assert not hooks.listens_hit
    assert not hooks.wants(Missed)


def test_hits_on_request(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """With hits=True lookups are logged as well."""
    sinks.log(hooks, hits=True)
    assert hooks.listens_hit
    hooks.emit([Hit(seq=1, time=0.0), Missed(seq=2, time=0.0)])
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("event", "level", "expected"),
    [
        (Failed(seq=1, time=0.0), logging.INFO, logging.WARNING),
        (Failed(seq=1, time=0.0), logging.ERROR, logging.ERROR),
        (Unloaded(seq=1, time=0.0, error="no"), logging.INFO, logging.WARNING),
        (Unloaded(seq=1, time=0.0), logging.INFO, logging.INFO),
        (EVICTED, logging.DEBUG, logging.DEBUG),
    ],
)
def test_levels(hooks: Hooks, caplog: pytest.LogCaptureFixture, event: Event, level: int, expected: int) -> None:
    """What went wrong is a warning at least; all else has the level asked for."""
    sinks.log(hooks, level=level)
    hooks.emit([event])
    assert [record.levelno for record in caplog.records] == [expected]


@pytest.mark.parametrize("logger", ["app.models", logging.getLogger("app.models")], ids=["name", "logger"])
def test_another_logger(hooks: Hooks, caplog: pytest.LogCaptureFixture, logger: Any) -> None:
    """Lines go to the logger that is given, by name or itself."""
    sinks.log(hooks, logger=logger)
    hooks.emit([EVICTED])
    assert [record.name for record in caplog.records] == ["app.models"]


def test_disabled_level_costs_nothing(hooks: Hooks, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Below the logger's level an event is not even turned into fields."""
    caplog.set_level(logging.WARNING, "modelcache")
    sinks.log(hooks)
    monkeypatch.setattr(Event, "to_dict", lambda event: pytest.fail("made for nobody"))
    hooks.emit([EVICTED])
    assert not caplog.records
    assert hooks.errors == 0


def test_background(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """With background=True lines are written on the background thread."""
    sinks.log(hooks, background=True)
    hooks.emit([EVICTED])
    assert hooks.close(WAIT)
    (record,) = caplog.records
    assert record.threadName == "modelcache-hooks"
    assert record.thread != threading.get_ident()


def test_returned_callback_ends_it(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """off() with what log() returned ends the lines."""
    hooks.off(sinks.log(hooks))
    hooks.emit([EVICTED])
    assert not caplog.records


def test_two_subscriptions_are_two(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """One cache can be logged to two loggers."""
    sinks.log(hooks, logger="one")
    sinks.log(hooks, logger="two")
    hooks.emit([EVICTED])
    assert [record.name for record in caplog.records] == ["one", "two"]


@pytest.mark.parametrize("settings", [{"logger": None}, {"logger": 3}, {"level": "INFO"}, {"level": True}], ids=repr)
def test_bad_settings_are_refused(hooks: Hooks, settings: dict[str, Any]) -> None:
    """A logger or a level of another type is refused, and nothing is registered."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        sinks.log(hooks, **settings)
    assert not hooks.wants(Evicted)


def test_silent_unless_logging_is_set_up() -> None:
    """In a program that has not set up logging, a warning of the library does not reach stderr."""
    code = (
        "from modelcache.hooks import Hooks; from modelcache.events import Evicted; from modelcache import sinks;"
        "hooks = Hooks(); sinks.log(hooks, level=40); hooks.emit([Evicted(seq=1, time=0.0)])"
    )
    root = Path(events.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=15
    )
    assert done.stdout == done.stderr == ""
