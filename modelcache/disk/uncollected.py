"""Holds the collector of cyclic garbage off for a moment, in which very many objects are made that all stay.

It would look at all of them again and again: a fifth of the time in which a start takes in 100,000 models.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Have no garbage collected inside, by any thread of the process: only around what neither waits nor takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
