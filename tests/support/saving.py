"""All files of an artifact, written by their source."""

import os
from collections.abc import Callable
from pathlib import Path

from modelcache.openfiles import OpenFile
from modelcache.sources.base import Artifact, RemoteFile
from modelcache.sources.s3 import S3Source


def saved(
    source: S3Source, artifact: Artifact, folder: Path, check: Callable[[], None] = lambda: None
) -> dict[str, bytes]:
    """Save all files of an artifact; return name to content, and make sure that all bytes were counted."""
    counted: list[int] = []

    def put(file: RemoteFile) -> Callable[[], OpenFile]:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return lambda: OpenFile(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    source.save(artifact, put, count=counted.append, check=check)
    assert sum(counted) == artifact.size
    assert all(size > 0 for size in counted)
    return {file.name: (folder / file.name).read_bytes() for file in artifact.files}
