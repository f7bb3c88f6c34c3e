"""Others' code misbehaves: errors without text, log handlers, threads that can't start, callbacks that wait."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import Failed, Loaded, LoadFailed, NoRoom
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import Call, Counting, load_model, small_cache
from tests.support.waiting import Gate, eventually


class Unspeakable(Exception):
    """An error whose text can't be had."""

    def __str__(self) -> str:
        return self.nothing  # type: ignore[attr-defined]


class Raising(logging.Handler):
    """A log handler that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise."""
        raise OSError(28, "No space left on device")


@pytest.fixture
def raising_log() -> Iterator[None]:
    """Let every line of the library's log raise."""
    handler = Raising()
    logging.getLogger("modelcache").addHandler(handler)
    yield
    logging.getLogger("modelcache").removeHandler(handler)


@pytest.mark.usefixtures("raising_log")
def test_error_without_text(tmp_path: Path) -> None:
    """A source whose error has no text, beside a log handler that raises, ends the flight all the same."""
    source = DictSource().add("a")
    source.down = Unspeakable()
    with small_cache(tmp_path, source, load_model, retry_after=0) as cache:
        assert isinstance(Call(cache.get, "a", timeout=None).error(), LoadFailed)
        source.down = None
        assert cache.get("a").name == "a"


@pytest.mark.usefixtures("raising_log")
def test_unload_that_raises_beside_a_raising_log(tmp_path: Path) -> None:
    """A batch goes on: every model is unloaded, and close() has nothing left to wait for."""
    unloaded: list[str] = []

    def unload(model: Any) -> None:
        unloaded.append(model.name)
        raise RuntimeError("stuck")

    with small_cache(tmp_path, DictSource().add("a", "b", "c"), load_model, unload=unload) as cache:
        for name in "abc":
            with cache.lease(name):
                pass
        assert cache.close(timeout=None)
    assert sorted(unloaded) == ["a", "b", "c"]


def test_monitor_that_can_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread limit met after a load costs the monitor, not the model, its files or the end of the cache."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "modelcache-monitor":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = Counting()
    with small_cache(tmp_path, DictSource().add("a", "b"), done.load, unload=done.unload) as cache:
        with cache.lease("a") as model:
            monkeypatch.undo()
            cache.disk.budget = 1
            assert model.name == "a"
            assert [row.model for row in cache.models()] == ["a"]
            assert any(path.name.startswith("a-") for path in (cache.disk.path / "models").iterdir())
        cache.disk.budget = None
        cache.get("b")
        assert cache.stats().failures == 0


def test_prefetch_waited_for_by_a_lease_holder(tmp_path: Path) -> None:
    """Who holds the lease that is in the way and waits for a prefetch counts as waiting: NoRoom, not for ever."""
    with small_cache(tmp_path, DictSource().add("a", "b"), load_model, memory={"max_models": 1}) as cache:

        def hold() -> Any:
            with cache.lease("a"):
                handle = cache.prefetch(["b"])
                assert handle.wait()
                return handle.errors["b"]

        assert isinstance(Call(hold).result(), NoRoom)


def test_loader_waits_for_a_prefetch(tmp_path: Path) -> None:
    """A loader may wait for a prefetch of its parts, also where it takes the only thread there is."""

    def load(path: Path, model: str) -> Any:
        if model == "whole":
            handle = cache.prefetch(["part"])
            assert handle.wait(10)
            assert not handle.errors
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("whole", "part"), load, loaders=1) as cache:
        assert Call(cache.get, "whole").result().name == "whole"


def test_loaded_callback_needs_who_waits_for_the_landed_one(tmp_path: Path) -> None:
    """A callback for Loaded may look up a model whose loader waits for the very model that was loaded."""
    gate, asked = Gate(), threading.Event()

    def load(path: Path, model: str) -> Any:
        if model == "whole":
            asked.set()
            cache.get("part", timeout=None)
        else:
            gate()
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("whole", "part"), load) as cache:

        def told(event: Loaded) -> None:
            if event.model == "part":
                cache.get("whole", timeout=None)

        cache.on(Loaded, told)
        part = Call(cache.get, "part", timeout=None)
        gate.wait()
        whole = Call(cache.get, "whole", timeout=None)
        asked.wait(10)
        eventually(lambda: cache.stats().waiters == 3)
        gate.open()
        assert (part.result().name, whole.result().name) == ("part", "whole")


def test_two_callbacks_close(tmp_path: Path) -> None:
    """Two callbacks on two threads of the cache that both close it do not wait for each other."""
    both = threading.Barrier(2)

    def load(path: Path) -> Any:
        both.wait(10)
        raise ValueError(path.name)

    with small_cache(tmp_path, DictSource().add("a", "b"), load) as cache:
        cache.on(Failed, lambda _: cache.close(timeout=None))
        calls = [Call(cache.get, name) for name in "ab"]
        assert all(isinstance(call.error(), LoadFailed) for call in calls)


class Sulking(FakeGauge):
    """A gauge that reads well, and says nothing else."""

    @property
    def shared(self) -> str:
        """Raise."""
        raise OSError(24, "Too many open files")

    @property
    def limit_source(self) -> str:
        """Raise."""
        raise ValueError("no idea")


class Mumbling(FakeGauge):
    """A gauge that reads well, and talks nonsense else."""

    shared = 7
    limit_source = b"here"


@pytest.mark.parametrize("gauge", [Sulking(), Mumbling()], ids=["raises", "no text"])
def test_gauge_says_nothing_beside_its_readings(tmp_path: Path, gauge: FakeGauge) -> None:
    """Under which limit a user's gauge stands is of use where it says so, and breaks no request where it does not."""
    with small_cache(tmp_path, DictSource().add("a"), memory={"gauge": gauge}) as cache:
        assert cache.get("a").name == "a"
        assert "limit 1000 B" in cache.explain("a")
        assert "set by" not in cache.explain("a")
