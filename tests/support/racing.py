"""Racing threads against each other at the seams: gates, calls on threads, a loader that keeps count."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelcache import DiskTier, MemoryTier, ModelCache
from tests.support.fakes import DictSource, FakeGauge


class Gate:
    """A point in somebody else's code where whoever comes by stops until it is opened.

    Attributes:
        reached: set once somebody has come by.
        passed: how many have come by.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.passed = 0
        self._open = threading.Event()

    def __call__(self, *_: object) -> None:
        """Stop here until it is opened."""
        self.passed += 1
        self.reached.set()
        assert self._open.wait(15), "nobody opened the gate"

    def wait(self) -> None:
        """Wait until somebody has come by."""
        assert self.reached.wait(10), "nobody came by the gate"

    def open(self) -> None:
        """Let everybody go on, now and later."""
        self._open.set()


class Call:
    """One call on a thread of its own, begun at once.

    Args:
        function: what is called, with ``arguments``.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
        self._job = functools.partial(function, *arguments, **settings)
        self._returned: Any = None
        self._raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._returned = self._job()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._raised = error

    @property
    def over(self) -> bool:
        """Whether it has returned or raised."""
        return not self._thread.is_alive()

    def error(self, timeout: float = 10.0) -> BaseException | None:
        """Wait for its end, and return what it raised."""
        self._thread.join(timeout)
        assert self.over, f"{self._job} still runs after {timeout} s"
        return self._raised

    def result(self, timeout: float = 10.0) -> Any:
        """Wait for its end; return what it returned, or raise what it raised."""
        error = self.error(timeout)
        if error is not None:
            raise error
        return self._returned


def together(*calls: Callable[[], Any], timeout: float = 15.0) -> list[Any]:
    """Make all calls at one moment, each on a thread of its own; return what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def start(call: Callable[[], Any]) -> Any:
        barrier.wait(timeout)
        return call()

    running = [Call(start, call) for call in calls]
    errors = [call.error(timeout) for call in running]
    return [error or call.result() for call, error in zip(running, errors, strict=True)]


class Model:
    """A model that knows its id, and can be weakly referenced."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.unloads = 0

    def __repr__(self) -> str:
        return f"Model({self.name!r})"


def load_model(path: Path) -> Model:
    """Load what ``DictSource.add`` made."""
    return Model((path / "model.txt").read_bytes().rstrip(b"\0").decode())


class Counting:
    """A loader that keeps count, with a gate for each model that has one.

    Attributes:
        loaded: ids in the order in which their loads began.
        running: ids being loaded now.
        twice: ids that were being loaded by two threads at once.
        unloaded: models in the order in which ``unload`` was called.
        gates: id to what is called in the middle of its load.
    """

    def __init__(self, **gates: Callable[..., Any]) -> None:
        self.loaded: list[str] = []
        self.running: set[str] = set()
        self.twice: list[str] = []
        self.unloaded: list[Model] = []
        self.gates = gates
        self._lock = threading.Lock()  # guards the lists

    def load(self, path: Path, name: str) -> Model:
        """Load a model."""
        with self._lock:
            self.loaded.append(name)
            if name in self.running:
                self.twice.append(name)
            self.running.add(name)
        try:
            gate = self.gates.get(name)
            if gate is not None:
                gate()
            model = load_model(path)
            assert model.name == name
            return model
        finally:
            with self._lock:
                self.running.discard(name)

    def unload(self, model: Model) -> None:
        """Take note of the end of a model."""
        with self._lock:
            model.unloads += 1
            self.unloaded.append(model)


def small_cache(
    folder: Path, source: DictSource, load: Callable[..., Any] = load_model, **settings: Any
) -> ModelCache[Any]:
    """Return a cache on fakes: no watermark, no ``min_free``; ``memory`` and ``disk`` are dicts of settings."""
    memory = {"gauge": FakeGauge(limit=2**40), "interval": 0.05, **settings.pop("memory", {})}
    disk = {"min_free": 0, **settings.pop("disk", {})}
    return ModelCache(source, load, memory=MemoryTier(**memory), disk=DiskTier(folder / "disk", **disk), **settings)


def allocated(folder: Path) -> int:
    """Return the bytes allocated for models at one moment, never too many; see ``takings``."""
    return sum(takings(folder).values())


def takings(folder: Path) -> dict[str, int]:
    """Return the bytes allocated for all that is below ``models/`` and ``tmp/*/`` at one moment, by its path in there.

    Only what is found by one walk and still there after it counts, so a concurrent rename or removal makes it
    less than there was, and never more.
    """
    found: dict[int, tuple[str, int]] = {}
    workshops = [str(folder / "models")]
    with contextlib.suppress(OSError):
        workshops += [entry.path for entry in os.scandir(folder / "tmp")]
    while workshops:
        with contextlib.suppress(OSError), os.scandir(workshops.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    found[status.st_ino] = entry.path, status.st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        workshops.append(entry.path)
    taken: dict[str, int] = {}
    for inode, (path, blocks) in found.items():
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if status.st_ino == inode:
                taken[os.path.relpath(path, folder)] = min(blocks, status.st_blocks) * 512
    return taken


def descriptors() -> int:
    """Return how many files this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
