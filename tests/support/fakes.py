"""Stand-ins at the seams that a user may replace: a source in memory, a gauge, and a loader that keeps books."""

import io
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from modelcache import ModelCache
from modelcache.errors import ModelNotFound
from modelcache.gauges import Reading
from modelcache.sources.base import Artifact, RemoteFile


def tar(files: dict[str, bytes]) -> bytes:
    """Return a ``.tar.gz`` with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


MakeCache = Callable[..., ModelCache[Any]]
"""The fixture ``make_cache``."""


def allocated(disk: Path) -> int:
    """Return the bytes that the file system allocated for all published folders below a disk tier's folder."""
    total = 0
    for folder in (disk / "models").iterdir():
        total += sum(path.lstat().st_blocks * 512 for path in (folder, *folder.rglob("*")))
    return total


class _Stream(io.BytesIO):
    def __init__(self, data: bytes, gate: Callable[[], Any] | None) -> None:
        super().__init__(data)
        self._gate = gate

    def read(self, size: int | None = -1, /) -> bytes:
        if self._gate is not None:
            self._gate()
        return super().read(size)


class DictSource:
    """A source that keeps its artifacts in a dict, and counts what it is asked.

    Attributes:
        artifacts: id to the bytes of a ``.tar.gz``, or of the file that ``names`` says.
        names: id to the name of its file, where that is not ``{model}.tar.gz``.
        finds: ids asked for, in order.
        opens: ids streamed, in order.
        gate: called before each read of each stream; may block or raise.
        down: raised by each ``find``, where it is set.
    """

    url = "dict://tests"

    def __init__(self, artifacts: dict[str, bytes] | None = None) -> None:
        self.artifacts = dict(artifacts or {})
        self.names: dict[str, str] = {}
        self.finds: list[str] = []
        self.opens: list[str] = []
        self.gate: Callable[[], Any] | None = None
        self.down: Exception | None = None
        self._lock = threading.Lock()  # guards the two lists in tests that ask from many threads

    def add(self, *models: str, size: int = 10) -> "DictSource":
        """Add models whose one file, ``model.txt``, holds the id and then zeros up to ``size`` bytes."""
        for model in models:
            self.artifacts[model] = tar({"model.txt": model.encode().ljust(size, b"\0")})
        return self

    def add_file(self, model: str, name: str, data: bytes) -> "DictSource":
        """Add a model whose artifact is stored as one file of this name."""
        self.artifacts[model] = data
        self.names[model] = name
        return self

    def closed(self) -> AbstractContextManager[object]:
        """Return what keeps all threads out of the two lists, so that a child forked meanwhile can go on with them."""
        return self._lock

    def find(self, model: str) -> Artifact:
        """Return the one version there is."""
        with self._lock:
            self.finds.append(model)
        if self.down is not None:
            raise self.down
        data = self.artifacts.get(model)
        if data is None:
            raise ModelNotFound(f"no model {model!r}", model=model, source=self.url, tried=(model,))
        version = str(hash(data))
        name = self.names.get(model, f"{model}.tar.gz")
        return Artifact(model, version, (RemoteFile(name, len(data), version, model),))

    def open(self, artifact: Artifact, file: RemoteFile) -> _Stream:
        """Return its bytes."""
        with self._lock:
            self.opens.append(artifact.model)
        return _Stream(self.artifacts[file.address], self.gate)


class FakeGauge:
    """A gauge whose reading the test decides.

    Attributes:
        used: bytes in use, or a function that returns them.
        limit: bytes there are.
    """

    def __init__(self, used: int | Callable[[], int] = 0, limit: int = 1000) -> None:
        self.used = used
        self.limit = limit

    def read(self) -> Reading:
        """Return what the test says."""
        return Reading(self.used() if callable(self.used) else self.used, self.limit)


class Model:
    """What the loader of ``Book`` makes: knows its id, its bytes, and where it came from."""

    def __init__(self, model: str, size: int, path: Path) -> None:
        self.model = model
        self.size = size
        self.path = path

    def __repr__(self) -> str:
        """Say which."""
        return f"<Model {self.model}>"


class Book:
    """Keeps the books of one cache's ``load=`` and ``unload=``: what was loaded, what left, what is there.

    Args:
        load: the loader, called with path and id. None: one that makes a ``Model`` of what lies there.
        unload: called after the booking of each unload. None: nothing more.

    Attributes:
        loads: ids whose load ended well, in order.
        unloads: ids that were unloaded, in order.
        gate: called before each load with its id; may block or raise.
    """

    def __init__(
        self, load: Callable[[Path, str], Any] | None = None, unload: Callable[[Any], object] | None = None
    ) -> None:
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.gate: Callable[[str], Any] | None = None
        self._load = load
        self._unload = unload
        self._lock = threading.Lock()  # guards the books; nothing of a test runs under it
        self._values: list[tuple[str, Any]] = []  # kept, so that no two have one address
        self._left: Counter[int] = Counter()

    def load(self, path: Path, model: str) -> Any:
        """Load, and book it."""
        if self.gate is not None:
            self.gate(model)
        if self._load is not None:
            value = self._load(path, model)
        else:
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            value = Model(model, sum(file.stat().st_size for file in files), path)
        with self._lock:
            self.loads.append(model)
            self._values.append((model, value))
        return value

    def unload(self, value: Any) -> None:
        """Book an unload, then run the test's own."""
        with self._lock:
            self._left[id(value)] += 1
            self.unloads.append(next((model for model, one in self._values if one is value), "?"))
        if self._unload is not None:
            self._unload(value)

    @property
    def alive(self) -> list[str]:
        """Ids of what is loaded now, oldest first."""
        with self._lock:
            return [model for model, value in self._values if not self._left[id(value)]]

    @property
    def values(self) -> list[Any]:
        """What is loaded now, oldest first."""
        with self._lock:
            return [value for _, value in self._values if not self._left[id(value)]]

    @property
    def bytes(self) -> int:
        """Bytes of the ``Model`` objects that are loaded now: for a gauge that follows them."""
        with self._lock:
            return sum(value.size for _, value in self._values if not self._left[id(value)])

    def gauge(self, limit: int = 1000) -> FakeGauge:
        """Return a gauge whose reading is the bytes of what is loaded."""
        return FakeGauge(lambda: self.bytes, limit)

    def closed(self) -> AbstractContextManager[object]:
        """Return what keeps all threads out of the books, so that a child forked meanwhile can go on with them."""
        return self._lock

    def check(self) -> None:
        """Assert that each load had exactly one unload."""
        with self._lock:
            loads = Counter(id(value) for _, value in self._values)
            wrong = {
                model: (loads[id(value)], self._left[id(value)])
                for model, value in self._values
                if loads[id(value)] != self._left[id(value)]
            }
            strangers = set(self._left) - set(loads)
        assert not wrong, f"model: (loads, unloads) {wrong}"
        assert not strangers, "unloaded what was never loaded"
