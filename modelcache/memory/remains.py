"""Whether anything inside a model outlives it, as reference cycles do: what a collection is run for.

A model that can be referenced weakly tells of its own end (``memory.lingering``), but not of what it is made of; a dict
or a list tells nothing. So its parts are held for a moment while it goes: one that something else holds lives on.
"""

import contextlib
import gc
import sys
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from logging import Logger
from re import Pattern
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

_MOST = 30_000  # references that are followed, some milliseconds; a larger model is taken to leave something
_STEP = 10  # references that take as long as one more layer does
_PASSES = 4  # one is enough for a tree; in others an inner part may stand before an outer one that holds it
_SIZED = (list, tuple, dict, set, frozenset, deque)
_PLAIN = set(map(id, _SIZED))
_SHARED = (type, FunctionType, BuiltinFunctionType, ModuleType, Enum, Logger, Pattern)  # others hold them, mostly
_name_of_type = type.__dict__["__qualname__"].__get__  # a metaclass may have an attribute of that name


class Remains:
    """The parts of a model that is about to be dropped, as far as a cycle may go through them.

    They are held from here until ``left``, which is to be called as soon as the model is dropped.
    """

    def __init__(self, value: object) -> None:
        parts = None
        with contextlib.suppress(MemoryError):  # an error that is logged would keep the model
            parts = _look(value)
        self._whole = parts is not None
        self._parts = parts or []

    def left(self) -> bool:
        """Give the parts up; return whether one lives on, or may, as the model was too large to be looked at whole."""
        parts, self._parts = self._parts, []
        for _ in range(_PASSES):  # from the outside inwards, then from the other end, and so on
            parts = _held(parts)
        return bool(parts) or not self._whole


def _look(value: object) -> list[Any] | None:
    """Return the parts from the inside outwards, None if there are too many.

    No code of theirs is run, as isinstance(), len() and hash() may.
    """
    known: dict[int, Any] = {}
    found, followed = [value], 0
    while found:
        followed += len(found) + _STEP
        if followed > _MOST:
            return None
        time.sleep(0)  # a request that waits for the interpreter has it now, not only when all is looked through
        fresh = {id(part): part for part in filter(gc.is_tracked, found)}
        for key in known.keys() & fresh.keys():
            del fresh[key]
        kinds = {id(kind): kind for kind in map(type, fresh.values())}
        layer: list[Any] = [*fresh.values()]
        if kinds.keys() <= _PLAIN:
            ahead = sum(len(part) for part in layer)
        else:
            lengths = {key: _length(kind) for key, kind in kinds.items()}
            ahead = sum(lengths[id(type(part))](part) for part in layer)
            shared = {key for key, kind in kinds.items() if issubclass(kind, _SHARED)}
            own = [_own(fresh.pop(id(part))) for part in layer if id(type(part)) in shared]
            layer = [*fresh.values(), *own]
        if followed + ahead > _MOST:
            return None
        known |= fresh
        found = gc.get_referents(*layer)
    return list(reversed(known.values()))


def _own(part: Any) -> list[Any]:
    """Return what of a class, a function or the like is a model's own: nothing where a module holds it."""
    if type(part) is BuiltinFunctionType:
        return [part.__self__]
    if type(part) is FunctionType:
        return [part.__closure__, part.__defaults__] if "<locals>" in part.__qualname__ else []
    return gc.get_referents(part) if issubclass(type(part), type) and "<locals>" in _name_of_type(part) else []


def _length(kind: type) -> Callable[[Any], int]:
    """Return what tells how many references an object of a type has."""
    return next((base.__len__ for base in _SIZED if issubclass(kind, base)), lambda _: 1)


def _held(parts: list[Any]) -> list[Any]:
    """Empty ``parts`` from the end; return those that something else holds than what went before them."""
    held = []
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
