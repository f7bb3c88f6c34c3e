"""Stand-ins at the seams that a user may replace: a source in memory, and a gauge that adds models up."""

import io
import tarfile
import threading
from collections.abc import Callable
from typing import Any

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


class _Stream(io.BytesIO):
    def __init__(self, data: bytes, gate: Callable[[], Any] | None) -> None:
        super().__init__(data)
        self._gate = gate

    def read(self, size: int = -1, /) -> bytes:
        if self._gate is not None:
            self._gate()
        return super().read(size)


class DictSource:
    """A source that keeps its artifacts in a dict, and counts what it is asked.

    Attributes:
        artifacts: id to the bytes of a ``.tar.gz``.
        finds: ids asked for, in order.
        opens: ids streamed, in order.
        gate: called before each read of each stream; may block or raise.
    """

    url = "dict://tests"

    def __init__(self, artifacts: dict[str, bytes] | None = None) -> None:
        self.artifacts = dict(artifacts or {})
        self.finds: list[str] = []
        self.opens: list[str] = []
        self.gate: Callable[[], Any] | None = None
        self._lock = threading.Lock()  # guards the two lists in tests that ask from many threads

    def add(self, *models: str, size: int = 10) -> "DictSource":
        """Add models whose one file, ``model.txt``, holds the id and then zeros up to ``size`` bytes."""
        for model in models:
            self.artifacts[model] = tar({"model.txt": model.encode().ljust(size, b"\0")})
        return self

    def find(self, model: str) -> Artifact:
        with self._lock:
            self.finds.append(model)
        data = self.artifacts.get(model)
        if data is None:
            raise ModelNotFound(f"no model {model!r}", model=model, source=self.url, tried=(model,))
        version = str(hash(data))
        return Artifact(model, version, (RemoteFile(f"{model}.tar.gz", len(data), version, model),))

    def open(self, artifact: Artifact, file: RemoteFile) -> _Stream:
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
        return Reading(self.used() if callable(self.used) else self.used, self.limit)
