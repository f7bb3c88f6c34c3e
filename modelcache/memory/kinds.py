"""What kind an artifact is of: models of one format become alike in memory, those of another quite different."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_MOST = 64  # files that are looked at; the largest is rarely behind those


def kind_of(path: Path) -> str:
    """Return the suffix of the largest file at or below ``path``, without its dot; empty where there is none.

    Never raises; looks at a bounded number of files.
    """
    try:
        largest = max(islice(_files(path), _MOST), default=(0, ""))
    except OSError:
        return ""
    return Path(largest[1]).suffix.lower().removeprefix(".")


def _files(path: Path) -> Iterator[tuple[int, str]]:
    """Yield bytes and name of each file."""
    if not path.is_dir():
        yield 0, path.name
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name).stat().st_size, name
