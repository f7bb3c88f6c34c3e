"""The folder of a disk tier: open, scan, stage, publish, pin, remove.

All of it is I/O and none of it decides: which artifact must go, and whether there is room, is ``disk.index``.
What makes it safe between processes: names are random, and a rename publishes or removes; kernel locks say that
somebody reads a folder (``disk.pins``) or works in one (``disk.workshop``).

Concurrency: every method may be called from any thread. After a fork the child calls ``reset_after_fork`` before
anything else.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from modelcache.disk import figures
from modelcache.disk.files import allocated, make_folder, same, sync, sync_tree
from modelcache.disk.layout import ARTIFACT, FORMAT, RECORD, Record, is_published
from modelcache.disk.pins import Pin, Pins
from modelcache.disk.workshop import FOLDER, Workshop
from modelcache.errors import AccessDenied, ConfigError
from modelcache.mounts import file_system

_log = logging.getLogger("modelcache")
_MEMORY = {"tmpfs", "ramfs"}


@attrs.frozen
class Published:
    """One published folder, as found.

    Attributes:
        record: what it says of itself.
        folder: where it lies.
        bytes: what the file system allocated for it, all files and folders.
        used: seconds since the epoch of its last use.
    """

    record: Record
    folder: Path
    bytes: int
    used: float

    @property
    def path(self) -> Path:
        """What the loader gets."""
        return self.record.path(self.folder)


class Store:
    """The files of one disk tier.

    Args:
        path: the folder; made, with its parents, where it is missing.
        mode: permissions of all folders made here; files get the same without the execute bits.

    Raises:
        AccessDenied: the folder can't be read or written, or what lies in it belongs to somebody else.
        ConfigError: it is no folder, of a newer format, or on a file system without file locks.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.mode = mode
        self._models = path / "models"
        self._workshop = Workshop(path / "tmp", mode)
        self._pins = Pins()
        with _told(path):
            self._open()
        weakref.finalize(self, self._workshop.close)  # for a tier that never gets a cache to close it

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=self.mode)
        for folder in (self._models, self.path / "tmp"):
            make_folder(folder, self.mode)
            self._check_owner(folder)
        workshop = self._workshop.folder()
        marker = self.path / "modelcache.json"
        if not marker.exists():
            draft = workshop / marker.name
            draft.write_text(json.dumps({"format": FORMAT}))
            draft.chmod(self.mode & 0o666)
            draft.rename(marker)
        try:
            self._check_format(marker)
        except ConfigError:
            self.close()
            raise
        if (kind := file_system(self.path)) in _MEMORY:
            _log.warning(
                "%s lies on a %s: artifacts there take memory, also of the container's limit, which evicts models; "
                "give DiskTier a folder on a disk",
                self.path,
                kind,
            )
        if stat.S_IMODE(self.path.stat().st_mode) & 0o022 & ~self.mode:
            _log.warning("%s may be written to by others; what modelcache makes inside it is private", self.path)

    def _check_owner(self, folder: Path) -> None:
        status = folder.stat()
        shared = self.mode & 0o022
        foreign = status.st_uid != os.geteuid() and not shared
        if foreign or stat.S_IMODE(status.st_mode) & 0o022 & ~self.mode:
            whose = f"belongs to uid {status.st_uid}" if foreign else "may be written to by others"
            raise AccessDenied(
                f"disk folder {folder} {whose}, and a model from there would run their code: "
                "give DiskTier a folder of your own, or set mode= for one that is shared on purpose",
                source=str(folder),
            )

    def _check_format(self, marker: Path) -> None:
        try:
            found = json.loads(marker.read_text())["format"]
        except (ValueError, KeyError, TypeError):
            found = None
        if isinstance(found, int) and found > FORMAT:
            raise ConfigError(
                f"disk folder {self.path} is of format {found}, this modelcache knows {FORMAT}: "
                "upgrade modelcache, or give it another folder",
                setting="path",
                value=str(self.path),
            )

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: the parent's temporary folder and pins are not ours, but for those in ``kept``."""
        self._workshop.reset_after_fork()
        self._pins.reset_after_fork(kept)

    def close(self) -> None:
        """Remove this process's temporary folder."""
        self._workshop.close()

    def stage(self) -> Path:
        """Return a new empty folder to build an artifact in, with ``artifact/`` in it."""
        make_folder(self._models, self.mode)  # somebody may have removed it
        folder = self._workshop.name()
        make_folder(folder, self.mode)
        make_folder(folder / ARTIFACT, self.mode)
        return folder

    def seal(self, staged: Path, record: Record) -> int:
        """Write the record of a staged folder and bring all of it to the disk; return the bytes allocated for it.

        Raises:
            OSError: the disk is full, or broken.
        """
        text = staged / RECORD
        text.write_text(record.to_json())
        text.chmod(self.mode & 0o666)
        figures.reserve(staged, self.mode)
        sync_tree(staged)
        return allocated(staged)

    def publish(self, staged: Path, prefix: str) -> Path:
        """Make a sealed folder visible to all processes; return where it lies now."""
        folder = self._models / f"{prefix}{secrets.token_hex(4)}"
        staged.rename(folder)
        sync(self._models)
        return folder

    def names(self) -> set[str] | None:
        """Return the names of all published folders; what others put beside them is not looked at.

        None where the system can't say now (no descriptor left, an I/O error).
        """
        try:
            return {folder.name for folder in self._models.iterdir() if is_published(folder.name)}
        except FileNotFoundError:
            return set()
        except OSError:
            return None

    def folder(self, name: str) -> Path:
        """Return where the published folder of that name lies."""
        return self._models / name

    def read(self, name: str) -> Published | None:
        """Return the published folder of that name; None where it is gone, damaged or not ours to trust."""
        folder = self._models / name
        try:
            status = folder.lstat()
            record = Record.from_json((folder / RECORD).read_text())
            if record is None or not stat.S_ISDIR(status.st_mode) or not os.path.lexists(record.path(folder)):
                return None
            return Published(record, folder, allocated(folder), status.st_mtime)
        except (OSError, UnicodeDecodeError):
            return None

    def pin(self, folder: Path) -> Pin | None:
        """Lock a published folder against removal by any process; None where it is gone already.

        Raises:
            OSError: the system has no descriptor left, or can't read the folder.
        """
        return self._pins.take(folder)

    def remove(self, folder: Path) -> Path | None:
        """Move a published folder aside, so that nobody ever sees half of it, and return where to ``discard`` it.

        None where some process has it pinned. What a crash leaves is swept by the next start.

        Raises:
            OSError: the system refuses; the folder is still there.
        """
        aside = self._workshop.name()
        try:
            descriptor = os.open(folder, FOLDER | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                raise
            with contextlib.suppress(FileNotFoundError):
                folder.rename(aside)  # a file or a link in place of a folder: nobody can have it pinned
            return aside
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if same(descriptor, folder):
                folder.rename(aside)
        except BlockingIOError:
            return None
        except FileNotFoundError:
            pass
        finally:
            os.close(descriptor)
        return aside

    def discard(self, folder: Path) -> bool:
        """Delete a staged or moved-aside folder; return whether it is gone, or must be tried again."""
        if folder.is_symlink() or folder.is_file():
            folder.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return not os.path.lexists(folder)

    def sweep(self) -> None:
        """Delete what dead processes, and only they, left under ``tmp/``."""
        self._workshop.sweep()

    def free(self) -> int:
        """Return the bytes that the file system has left for this user."""
        status = self._status()
        return status.f_bavail * status.f_frsize

    def total(self) -> int:
        """Return the size of the file system in bytes."""
        status = self._status()
        return status.f_blocks * status.f_frsize

    def _status(self) -> os.statvfs_result:
        try:
            return os.statvfs(self.path)
        except FileNotFoundError:  # somebody removed the folder under us: make it again
            self._workshop.folder()
            return os.statvfs(self.path)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
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
        raise ConfigError(
            f"disk folder {path} can't be used ({error}): give DiskTier a folder on a local file system",
            setting="path",
            value=str(path),
        ) from error
