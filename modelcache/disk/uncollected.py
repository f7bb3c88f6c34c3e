"""Holds the collector of cyclic garbage off for a moment, in which very many objects are made that all stay.

It would look at all of them again and again: a fifth of the time in which a start takes in 100,000 models.
"""

import contextlib
import gc
from collections.abc import Iterator

_MANY = 1000


@contextlib.contextmanager
def uncollected(count: int) -> Iterator[None]:
    """Have no garbage collected inside, by any thread of the process: only around what neither waits nor takes long.

    Args:
        count: about how many objects are made; of a few nothing is to be feared.
    """
    if count <= _MANY:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
