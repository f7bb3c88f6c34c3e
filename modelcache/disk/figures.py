"""What a model took in memory, kept beside its artifact, so that a restart need not measure it anew.

One file of fixed size in each published folder: written in place, by whichever process unloads the model last. It is
a hint: damaged, or written by two at once, it reads as nothing, and nothing is lost but a measurement.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import attrs

NAME = "figures.json"
_SIZE = 512  # bytes, padded: what the file system allocated once stays as it is


@attrs.frozen
class Figures:
    """What is remembered of one model; bytes, seconds, and requests to the cache.

    Attributes:
        resident: bytes that it takes once loaded; None: not measured.
        peak: bytes while it loads; None: not measured.
        seconds: that its loads take.
        n: requests for it.
        age: requests to the cache since the first of these.
        idle: requests to the cache since the last of these.
    """

    resident: int | None = None
    peak: int | None = None
    seconds: float = 0.0
    n: float = 0.0
    age: float = 0.0
    idle: float = 0.0


def reserve(folder: Path, mode: int) -> None:
    """Make the file in a folder that is being staged.

    Raises:
        OSError: the disk is full, or broken.
    """
    path = folder / NAME
    path.write_bytes(_text(Figures()))
    path.chmod(mode & 0o666)


def write(folder: Path, figures: Figures) -> None:
    """Keep figures beside a published artifact; never raises: they are only a hint."""
    with contextlib.suppress(OSError, ValueError):
        file = os.open(folder / NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(file, _text(figures), 0)
        finally:
            os.close(file)


def read(folder: Path) -> Figures | None:
    """Return what is kept beside a published artifact; None where that is nothing, or damaged."""
    try:
        with (folder / NAME).open("rb") as file:
            fields: dict[str, Any] = json.loads(file.read(_SIZE))  # what lies behind is not ours
        figures = Figures(**fields)
    except (OSError, ValueError, TypeError):
        return None
    return figures if figures.seconds and _sound(figures) else None


def _sound(figures: Figures) -> bool:
    whole = [size for size in (figures.resident, figures.peak) if size is not None]
    rest: tuple[Any, ...] = (figures.seconds, figures.n, figures.age, figures.idle)
    numbers = all(isinstance(value, int | float) and 0 <= value < 2**63 for value in rest)
    return numbers and all(type(size) is int and 0 <= size < 2**63 for size in whole)


def _text(figures: Figures) -> bytes:
    text = json.dumps(attrs.asdict(figures)).encode()
    if len(text) > _SIZE:
        raise ValueError("figures of more than 512 bytes")
    return text.ljust(_SIZE)
