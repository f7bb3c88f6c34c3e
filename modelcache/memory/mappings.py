"""Files that this process maps: a model that maps its weights reads small until it is used.

Linux tells it in ``/proc/self/maps`` and ``smaps`` (proc(5)); elsewhere nothing is known, and nothing is mapped.
"""

import os
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_SMAPS = Path("/proc/self/smaps")


def untouched(path: Path) -> int:
    """Return the bytes of files at or below ``path`` that are mapped, but not yet resident; never raises.

    Cost: a millisecond or so; some more for a process of many mappings that has one of these.
    """
    wanted = os.fsencode(os.path.realpath(path))
    try:
        if wanted not in _MAPS.read_bytes():
            return 0
        return sum(size - resident for name, size, resident in _mappings() if _below(name, wanted))
    except (OSError, ValueError, IndexError):
        return 0


def _below(name: bytes, wanted: bytes) -> bool:
    return name == wanted or name.startswith(wanted + b"/")


def _mappings() -> Iterator[tuple[bytes, int, int]]:
    """Yield path, bytes and resident bytes of each mapping."""
    name, size = b"", 0
    for line in _SMAPS.read_bytes().split(b"\n"):
        head, _, rest = line.partition(b" ")
        if not head.endswith(b":"):
            fields = line.split(None, 5)
            name = fields[5] if len(fields) > 5 else b""  # noqa: PLR2004 - address perms offset dev inode path
        elif head == b"Size:":
            size = int(rest.split()[0]) * 1024
        elif head == b"Rss:":
            yield name, size, int(rest.split()[0]) * 1024
