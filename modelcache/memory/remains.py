"""Whether anything inside a model outlives it, as reference cycles do: what a collection is run for.

A model that can be referenced weakly tells of its own end (``memory.lingering``), but not of what it is made of; a dict
or a list tells nothing. So its parts are held for a moment while it goes: one that something else holds lives on.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

_MOST = 30_000  # references that are followed, some milliseconds; a larger model is taken to leave something
_PASSES = 4  # one is enough for a tree; in others an inner part may stand before an outer one that holds it
_SIZED = (list, tuple, dict, set, frozenset, deque)
_SHARED = (type, ModuleType, FunctionType, BuiltinFunctionType)  # a module holds them, whatever becomes of a model


class Remains:
    """The parts of a model that is about to be dropped, as far as a cycle may go through them.

    They are held from here until ``left``, which is to be called as soon as the model is dropped.
    """

    def __init__(self, value: object) -> None:
        self._whole = True
        self._parts = self._look(value) if gc.is_tracked(value) else []

    def _look(self, value: object) -> list[Any]:
        """Return the parts from the outside inwards, without running code of theirs, as isinstance() and len() may."""
        known: dict[int, Any] = {id(value): value}
        layer, followed, sizes = [value], 0, _Sizes()
        while layer:
            followed += sum(sizes[type(part)](part) for part in layer)
            if followed > _MOST:
                self._whole = False
                break
            outer, layer = layer, []
            for part in filter(gc.is_tracked, gc.get_referents(*outer)):
                if id(part) not in known and not issubclass(type(part), _SHARED):
                    known[id(part)] = part
                    layer.append(part)
        return list(known.values())

    def left(self) -> bool:
        """Give the parts up; return whether one lives on, or may, as the model was too large to be looked at whole."""
        parts, self._parts = self._parts, []
        for _ in range(_PASSES):
            parts = _held(parts)
        return bool(parts) or not self._whole


class _Sizes(dict[type, Callable[[Any], int]]):
    """How many references an object of a type has."""

    def __missing__(self, kind: type) -> Callable[[Any], int]:
        self[kind] = next((base.__len__ for base in _SIZED if issubclass(kind, base)), lambda _: 1)
        return self[kind]


def _held(parts: list[Any]) -> list[Any]:
    """Empty ``parts``; return those that something else holds than what went before them."""
    held = []
    parts.reverse()
    while parts:
        part = parts.pop()
        if sys.getrefcount(part) > _ALONE:
            held.append(part)
        del part
    return held


def _holders(parts: list[Any]) -> int:
    """Return the reference count of the last of ``parts`` as ``_held`` sees it."""
    part = parts.pop()
    return sys.getrefcount(part)


_ALONE = _holders([object()])
