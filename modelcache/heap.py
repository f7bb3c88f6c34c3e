"""Giving freed heap back to the system, where the process's allocator is one that we know how to ask.

When to do it (after a batch of evictions, never on the path of a hit) is decided by the memory tier, as is running
``gc`` before. Freed objects whose pages the allocator keeps still count as resident memory.
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

_MAPS = Path("/proc/self/maps")
_FOREIGN = re.compile(r"/lib(jemalloc|tcmalloc|mimalloc|snmalloc|hoard|asan)[^/\n]*\.so[^/\n]*$", re.MULTILINE)


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@attrs.frozen
class _Found:
    pid: int
    allocator: str
    trim: Callable[[int], int] | None


_found: _Found | None = None  # swapped whole, so that it needs no lock; two threads at worst look twice


def give_back() -> bool:
    """Give freed heap back to the system: ``malloc_trim(0)`` under glibc's own allocator.

    Does nothing under another allocator (jemalloc, tcmalloc, mimalloc), musl, macOS and Windows; never raises.
    ``gc`` is not run. Python's own small objects come back only where their whole arena (256 KiB, 1 MiB) is free.

    Cost: 15 to 20 milliseconds for 300 MB of fragmented heap, with the GIL released; other threads that allocate
    may wait as long. The first call in a process takes a millisecond more, to look at the allocator.

    Concurrency: any thread, several at once; no lock of ours. Looks at the allocator anew after a fork.

    Returns:
        Whether the allocator was asked; how much came back, only a gauge can tell.
    """
    found = _look()
    if found.trim is None:
        return False
    found.trim(0)
    return True


def allocator() -> str:
    """Return what serves ``malloc`` here: ``"glibc"``, which :func:`give_back` works with, or another name.

    Other names are those of known allocators (``"jemalloc"``, ...) and ``"unknown"``. Never raises.
    """
    return _look().allocator


def _look() -> _Found:
    global _found  # noqa: PLW0603 - one process, one allocator
    found = _found
    if found is None or found.pid != os.getpid():
        found = _found = _Found(os.getpid(), *_ask())
    return found


def _ask() -> tuple[str, Callable[[int], int] | None]:
    foreign = _foreign()
    if foreign is not None:
        return foreign, None
    trim = _glibc_trim() if sys.platform == "linux" else None
    return ("unknown" if trim is None else "glibc"), trim


def _foreign() -> str | None:
    """Return the name of another allocator that is mapped; there may be one in use that this does not see."""
    try:
        match = _FOREIGN.search(os.fsdecode(_MAPS.read_bytes()))
    except OSError:
        return None
    return match[1] if match else None


def _glibc_trim() -> Callable[[int], int] | None:
    """Return malloc_trim if the ``malloc`` that the process uses lies in the same file as glibc itself.

    An allocator that was preloaded or linked in comes first in the order of lookup, under whatever file name; to
    trim glibc's heap beside it has crashed processes.
    """
    try:
        process = ctypes.CDLL(None)
        trim = process.malloc_trim
        if _file_of(process, process.malloc) != _file_of(process, process.gnu_get_libc_version):
            return None
    except (AttributeError, OSError, TypeError, ValueError):  # no such symbol: musl, or no dladdr
        return None
    trim.argtypes = (ctypes.c_size_t,)
    trim.restype = ctypes.c_int
    return trim


def _file_of(process: ctypes.CDLL, function: object) -> bytes:
    symbol = _Symbol()
    address = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]  # ctypes
    process.dladdr.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Symbol))
    process.dladdr.restype = ctypes.c_int
    if not process.dladdr(address, ctypes.byref(symbol)) or not symbol.file:
        raise ValueError("dladdr does not know the symbol")
    return bytes(symbol.file)
