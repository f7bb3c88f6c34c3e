"""Where file systems are mounted, as ``/proc/self/mountinfo`` says it (proc(5))."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import attrs

MOUNTINFO = "proc/self/mountinfo"
"""The file, below the root."""

_ESCAPE = re.compile(r"\\([0-7]{3})")  # how blanks and backslashes are written there


@attrs.frozen
class Mount:
    """One file system at one place.

    Attributes:
        kind: its type: ``"ext4"``, ``"tmpfs"``, ``"cgroup"``.
        top: path, within it, of the folder that is mounted.
        point: where that lies.
        options: of the file system, separated by commas.
    """

    kind: str
    top: str
    point: str
    options: str


def parse_mounts(text: str) -> Iterator[Mount]:
    """Yield what the file says, in its order: of two at one place the later one hides the other."""
    for line in text.split("\n"):
        before, _, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(more) >= 3:  # noqa: PLR2004 - fields of proc(5)
            yield Mount(more[0], _unescape(fields[3]), _unescape(fields[4]), more[2])


def file_system(path: Path) -> str:
    """Return the type of the file system that a folder lies on; empty where that is not told."""
    found, real = Mount("", "", "", ""), os.path.realpath(path)
    try:
        text = os.fsdecode(Path("/", MOUNTINFO).read_bytes())
    except OSError:
        return ""
    for mount in parse_mounts(text):
        inside = real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
        if inside and len(mount.point) >= len(found.point):
            found = mount
    return found.kind


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
