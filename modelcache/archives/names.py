"""Untrusted names: the parts of a member's path, and the name of a single file.

Covers names alone. Whether a link leads outside, or two names clash, depends on the whole archive: see ``tree``.
"""

import os
import re

from modelcache.archives.job import Job
from modelcache.sources.base import ARCHIVE_SUFFIXES

_NAME_MAX = 255
_REPLACED = re.compile(r"[\x00-\x1f\x7f/]")


def split(name: str, job: Job, member: str | None = None) -> tuple[str, ...]:
    """Return the parts of a member's path below the folder; none for the folder itself.

    Args:
        name: the path, as the archive has it.
        job: for limits and errors.
        member: whom to blame where ``name`` is another's (the goal of a hard link).

    Raises:
        UnsafeArtifact: it is empty, absolute, has ``..`` or NUL, or is too long or too deep.
    """
    member = name if member is None else member
    if not name:
        raise job.unsafe("a member without a name", member)
    if "\0" in name:
        raise job.unsafe("a NUL in a name", member)
    if name.startswith("/"):
        raise job.unsafe("an absolute name", member)
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise job.unsafe("a name with '..'", member)
    _check_length(name, parts, job, member)
    return parts


def _check_length(name: str, parts: tuple[str, ...], job: Job, member: str) -> None:
    limits = job.limits
    try:
        if len(os.fsencode(name)) > limits.path:
            raise job.unsafe(f"a path over {limits.path} bytes", member)
        if len(parts) > limits.depth:
            raise job.unsafe(f"more than {limits.depth} folders inside one another", member)
        if any(len(os.fsencode(part)) > limits.part for part in parts):
            raise job.unsafe(f"a name over {limits.part} bytes", member)
    except UnicodeEncodeError as error:
        raise job.unsafe("a name that this file system can't store", member) from error


def archive_suffix(name: str) -> str | None:
    """Return the archive suffix that ``name`` ends in, or None."""
    return next((suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)), None)


def has_suffix(name: str) -> bool:
    """Return whether ``name`` has a suffix of any kind; ``.profile`` and ``model.`` have none."""
    return bool(_suffix(name))


def single_name(name: str) -> str:
    """Return a safe name for a single file: one part, storable, its suffix kept for loaders that look at it."""
    name = _REPLACED.sub("_", name.rpartition("/")[2])
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        name = name.encode("ascii", "replace").decode("ascii")
    if name in ("", ".", ".."):
        return "model"
    suffix = _suffix(name)
    if len(os.fsencode(suffix)) > _NAME_MAX // 2:
        suffix = ""  # no loader's suffix: cut like any other text
    stem = os.fsencode(name)[: len(os.fsencode(name)) - len(os.fsencode(suffix))]
    return _cut(stem, _NAME_MAX - len(os.fsencode(suffix))) + suffix


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return dot + suffix if stem.strip(".") and suffix else ""


def _cut(text: bytes, size: int) -> str:
    """Return at most ``size`` bytes of ``text``, never half a character."""
    if len(text) <= size:
        return os.fsdecode(text)
    return text[:size].decode("utf-8", "ignore")
