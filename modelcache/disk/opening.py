"""Whether a folder can be a disk tier: whose it is, where it lies, of which format, and what the system says of it."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from modelcache.disk.flocks import FolderPins
from modelcache.disk.layout import FORMAT, MARKER
from modelcache.disk.pins import Pins, RangePins
from modelcache.disk.workshop import no_locks
from modelcache.errors import AccessDenied, ConfigError
from modelcache.mounts import file_system
from modelcache.units import format_bytes

_log = logging.getLogger("modelcache")
_MEMORY = {"tmpfs", "ramfs"}
_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "orangefs"),
    *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.mountpoint-s3", "fuse.goofys", "fuse.rclone", "fuse.juicefs"),
    *("fuse.blobfuse", "fuse.blobfuse2", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse"),
}


def refuse_network(path: Path) -> None:
    """Let pass only folders on file systems of this machine.

    Raises:
        ConfigError: it is not.
    """
    if (kind := file_system(path)) in _NETWORK:
        raise ConfigError(
            f"disk folder {path} is on a network file system ({kind}), where locks and SQLite's log don't hold: "
            "give DiskTier a folder on a local one; LocalSource reads models from a network mount",
            setting="path",
            value=str(path),
        )


def warn_of_budgets(path: Path, mine: int | None, others: Iterable[str]) -> None:
    """Log where other caches, of which each says its settings, have the folder with another budget."""
    different = {json.loads(text).get("budget") for text in others} - {mine}
    if different:
        _log.warning(
            "%s is shared by caches with different budgets, here %s, elsewhere %s: each makes room by its own, so "
            "give all the same",
            path,
            _told(mine),
            " and ".join(sorted(map(_told, different))),
        )


def _told(budget: int | None) -> str:
    return "no budget" if budget is None else f"a budget of {format_bytes(budget)}"


def warn(path: Path, mode: int) -> None:
    """Say what is not as it should be, but works."""
    kind = file_system(path)
    if kind in _MEMORY:
        _log.warning(
            "%s lies on a %s: artifacts there take memory, also of the container's limit, which evicts models; "
            "give DiskTier a folder on a disk",
            path,
            kind,
        )
    if stat.S_IMODE(path.stat().st_mode) & 0o022 & ~mode:
        _log.warning("%s may be written to by others; what modelcache makes inside it is private", path)


def check_owner(folder: Path, mode: int) -> None:
    """Let pass only folders that nobody else may write to, as far as ``mode`` wants that.

    Raises:
        AccessDenied: somebody may.
    """
    status = folder.stat()
    shared = mode & 0o022
    foreign = status.st_uid != os.geteuid() and not shared
    if foreign or stat.S_IMODE(status.st_mode) & 0o022 & ~mode:
        whose = f"belongs to uid {status.st_uid}" if foreign else "may be written to by others"
        raise AccessDenied(
            f"disk folder {folder} {whose}, and a model from there would run their code: "
            "give DiskTier a folder of your own, or set mode= for one that is shared on purpose",
            source=str(folder),
        )


def check_format(path: Path) -> None:
    """Let pass only formats that are known here.

    Raises:
        ConfigError: a later modelcache has made it.
    """
    if (found := format_of(path / MARKER)) > FORMAT:
        raise ConfigError(
            f"disk folder {path} is of format {found}, this modelcache knows {FORMAT}: "
            "upgrade modelcache, or give it another folder",
            setting="path",
            value=str(path),
        )


def mark(path: Path, workshop: Path, mode: int) -> None:
    """Say of which format a folder is, where it does not say so yet; ``workshop`` is for a draft."""
    marker = path / MARKER
    if not marker.exists() or format_of(marker) < FORMAT:
        draft = workshop / marker.name
        draft.write_text(json.dumps({"format": FORMAT}))
        draft.chmod(mode & 0o666)
        draft.rename(marker)


def is_filled(path: Path) -> bool:
    """Whether a folder was a disk tier before, so that it is worth to be read from."""
    return (path / "models").is_dir() and (path / MARKER).is_file()


def make_pins(path: Path, mode: int, *, writable: bool) -> Pins:
    """Return the pins of a folder, by the locks that this system has.

    Raises:
        ConfigError: they do not hold there.
    """
    if not hasattr(fcntl, "F_OFD_SETLK"):
        return FolderPins()
    pins = RangePins(path / "leases", mode, writable=writable)
    if writable:
        try:
            pins.probe()
        except OSError as error:
            raise no_locks(path, error) from error
    return pins


def format_of(marker: Path) -> int:
    """Return the format that a folder's marker tells; 0 where it tells none."""
    try:
        found = json.loads(marker.read_text())["format"]
    except (ValueError, KeyError, TypeError):
        return 0
    return found if isinstance(found, int) else 0


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn what the system says of the folder into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, AccessDenied):
            raise
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise AccessDenied(
                f"disk folder {path} can't be written ({error.strerror}): give DiskTier a folder that this user "
                f"(uid {os.geteuid()}) may write to",
                source=str(path),
            ) from error
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise ConfigError(
            f"disk folder {path} can't be used ({error}): "
            + ("free some space there" if full else "give DiskTier a folder on a local file system"),
            setting="path",
            value=str(path),
        ) from error
