"""Scripts with models that take real memory, loaded where they lie, in a process of their own."""

import textwrap
from pathlib import Path
from typing import Any

from tests.support.children import run

_MODELS = """
import mmap
import psutil
MIB = 2**20
folder = Path(sys.argv[1])

def rss():
    return psutil.Process().memory_info().rss

def models(count, size):
    names = [f"m{number}" for number in range(count)]
    for name in names:
        path = folder / "source" / name / "weights.bin"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size)
    return names

def cache_of(load, high, memory={}, **settings):
    return ModelCache(LocalSource(folder / "source", copy=False), load, disk=DiskTier(folder / "disk", min_free=0),
                      memory=MemoryTier(**{"high": high, "interval": 0.05} | memory), **settings)

class Weights:
    def __init__(self, value):
        self.value = value
"""


def run_real(script: str, folder: Path, *arguments: Any, prelude: str = "", **settings: Any) -> str:
    """Run a script to its end; see ``children.run``.

    Args:
        script: Python; it has ``models`` and ``cache_of``, whose monitor looks every 50 ms, ``rss``, ``Weights``, a
            model that can be referenced weakly, and ``MIB``.
        folder: of the test; ``folder`` in the script.
        prelude: what goes before it, indented by itself.
        arguments: its ``sys.argv[2:]``.
        settings: of ``children.run``.
    """
    return run(_MODELS + textwrap.dedent(prelude) + textwrap.dedent(script), folder, *arguments, **settings)
