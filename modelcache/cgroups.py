"""The memory limit that the kernel holds this process to, and what counts against it: cgroup v1, v2 and both at once.

When these files are read, and what is read besides, is up to ``gauges``. What is missing, forbidden or garbled counts
as no limit and never raises. All paths are below one root folder, so that a test, or a sidecar, can point at a copied
tree.
"""

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import attrs

from modelcache.mounts import MOUNTINFO, parse_mounts

_FILES = {
    "v1": ("memory.limit_in_bytes",),
    "v2": ("memory.high", "memory.max"),  # above high the kernel stalls the process: as good as a limit
}
_USUAL = (("v1", "sys/fs/cgroup/memory"), ("v2", "sys/fs/cgroup"), ("v2", "sys/fs/cgroup/unified"))
_MOST_BYTES = 1 << 20
_MOST_FOLDERS = 4_096
_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_KERNEL = (b"kernel_stack", b"pagetables", b"sec_pagetables", b"percpu", b"vmalloc", b"slab_unreclaimable")


@attrs.frozen
class Limit:
    """A limit and where it was found.

    Attributes:
        bytes: above 0.
        source: path of the file that says so.
        kind: ``"v1"`` or ``"v2"``; empty where no cgroup limits.
        folder: of the cgroup whose use counts against it; the nearest that is seen, where the limit is one further up.
    """

    bytes: int
    source: str
    kind: str = ""
    folder: Path | None = None


@attrs.frozen
class _Mount:
    kind: str  # "v1" or "v2"
    top: str  # path, within the hierarchy, of the group that is mounted
    folder: Path
    usual: bool


def find_folders(root: Path, memberships: str) -> tuple[tuple[str, Path], ...]:
    """Return the cgroup folders that may hold a limit for this process, innermost first, with their kind.

    Looks below each mount (those of ``/proc/self/mountinfo``, and those that are usual) for the group in
    ``memberships``, and upwards from there to the mount's own top, which is an ancestor in any case: in a
    container the group's path is often the host's, and does not exist there. Some folders may not exist.

    Args:
        root: ``/``, or a copied tree.
        memberships: text of ``/proc/self/cgroup``; may be empty or garbled.

    Raises:
        OSError: no descriptor is left to read files with.
    """
    paths = _memberships(memberships)
    folders: dict[tuple[str, Path], None] = {}
    for mount in _mounts(root):
        for folder in _chain(mount, paths.get(mount.kind, "/")):
            folders[mount.kind, folder] = None
    return tuple(folders)


def read_limit(folders: tuple[tuple[str, Path], ...]) -> Limit | None:
    """Return the smallest limit that is set in these folders, the outermost among equals; None: none is.

    Raises:
        OSError: no descriptor is left to read files with.
    """
    best: Limit | None = None
    beyond: Limit | None = None  # what v1 groups know of ancestors outside the mount
    for kind, folder in folders:
        for name in _FILES[kind]:
            best = _smaller(best, _size(read_text(folder / name)), kind, folder, name)
        if kind == "v1":
            beyond = _smaller(beyond, _hierarchical(read_text(folder / "memory.stat")), kind, folder, "memory.stat")
    if best is None or (beyond is not None and beyond.bytes < best.bytes):
        return beyond
    return best


def read_used(kind: str, stat: bytes) -> int | None:
    """Return what a group uses that the kernel can't take back for free; None where ``stat`` does not tell.

    Anonymous memory, and the more of shared memory and mapped file pages (mapped shared memory is both). Under v2
    also socket buffers and kernel memory but the slabs that can be reclaimed. v1 tells only all kernel memory
    together, which 50,000 files raise by 66 MB: it is left out.

    Args:
        kind: of the group, ``"v1"`` or ``"v2"``.
        stat: text of its ``memory.stat``.
    """
    words = stat.split()
    found = dict(zip(words[::2], words[1::2], strict=False))
    if kind == "v1":
        anonymous, mapped, kernel = _bytes(found, b"total_rss"), _bytes(found, b"total_mapped_file"), 0
        shared = _bytes(found, b"total_shmem")
    else:
        anonymous, mapped, kernel = _bytes(found, b"anon"), _bytes(found, b"file_mapped"), _kernel(found)
        shared = _bytes(found, b"shmem")
    return None if anonymous is None else anonymous + max(shared or 0, mapped or 0) + kernel


def _kernel(found: dict[bytes, bytes]) -> int:
    sockets, together = _bytes(found, b"sock") or 0, _bytes(found, b"kernel")
    if together is None:  # before Linux 5.18
        return sockets + sum(_bytes(found, name) or 0 for name in _KERNEL)
    return sockets + max(together - (_bytes(found, b"slab_reclaimable") or 0), 0)  # not summed at the same instant


def _bytes(found: dict[bytes, bytes], name: bytes) -> int | None:
    text = found.get(name, b"")
    return int(text) if text.isdigit() and len(text) < 20 else None  # noqa: PLR2004


def read_text(path: Path) -> str:
    """Return what a small file says; empty where it can't be read.

    Raises:
        OSError: no descriptor is left to read it with: then nothing is known of it.
    """
    try:
        with path.open("rb") as file:
            return os.fsdecode(file.read(_MOST_BYTES))
    except OSError as error:
        if error.errno in _OUT_OF:
            raise
    except ValueError:
        pass
    return ""


def _smaller(best: Limit | None, size: int | None, kind: str, folder: Path, name: str) -> Limit | None:
    if size is None or (best is not None and best.bytes < size):
        return best
    return Limit(size, str(folder / name), kind, folder)


def _size(text: str) -> int | None:
    """Return a size above 0; None for ``max``, nonsense and nothing."""
    text = text.strip()
    return (int(text) or None) if text.isascii() and text.isdigit() and len(text) < 20 else None  # noqa: PLR2004


def _hierarchical(text: str) -> int | None:
    match = re.search(r"^hierarchical_memory_limit (\d+)$", text, re.MULTILINE | re.ASCII)
    return _size(match[1]) if match else None


def _memberships(text: str) -> dict[str, str]:
    paths: dict[str, str] = {}
    for line in text.split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths["v1"] = path
        elif number == "0" and not controllers:
            paths["v2"] = path
    return paths


def _mounts(root: Path) -> list[_Mount]:
    usual = {root / folder: kind for kind, folder in _USUAL}
    mounts: dict[Path, _Mount] = {}
    for mount in parse_mounts(read_text(root / MOUNTINFO)):
        if mount.kind == "cgroup2" or (mount.kind == "cgroup" and "memory" in mount.options.split(",")):
            kind = "v2" if mount.kind == "cgroup2" else "v1"
            folder = root / mount.point.lstrip("/")
            mounts[folder] = _Mount(kind, mount.top, folder, usual=folder in usual)
    for folder, kind in usual.items():
        mounts.setdefault(folder, _Mount(kind, "/", folder, usual=True))
    return list(mounts.values())


def _chain(mount: _Mount, path: str) -> Iterator[Path]:
    """Return the folders of the process's groups below one mount, innermost first; some may not exist."""
    place, top = PurePosixPath(path), PurePosixPath(mount.top)
    if ".." in place.parts:  # outside our cgroup namespace: only the mount's top is surely an ancestor
        leaf = mount.folder
    elif place.is_relative_to(top):
        leaf = mount.folder / place.relative_to(top)
    elif ".." in top.parts:
        leaf = _search(mount, str(place).lstrip("/"))
    elif mount.usual:
        leaf = mount.folder / str(place).lstrip("/")
    else:  # somebody else's group, mounted here for whatever reason
        return
    while leaf != mount.folder:
        yield leaf
        leaf = leaf.parent
    yield mount.folder


def _search(mount: _Mount, below: str) -> Path:
    """Find ourselves below a mount that was made outside our cgroup namespace, by our pid.

    Its top reads ``/../..``: our namespace starts two levels below it, under names that nobody tells.
    """
    wild = "/".join("*" for part in PurePosixPath(mount.top).parts if part == "..") + "/"
    with contextlib.suppress(OSError):
        for folder in itertools.islice(mount.folder.glob(wild), _MOST_FOLDERS):
            if str(os.getpid()) in read_text(folder / below / "cgroup.procs").split():
                return folder / below
    return mount.folder
