"""The folder of a disk tier: open, scan, stage, publish, pin, remove, sweep.

All of it is I/O and none of it decides: which artifact must go, and whether there is room, is ``disk.tier``.
What makes it safe between processes: names are random, a rename publishes or removes, and ``flock`` on a
folder's own descriptor says that somebody reads it (shared) or works in it (exclusive). The kernel drops
such a lock with its process, so the dead leave no lease behind.

Concurrency: no lock of our own is needed; every method may be called from any thread. After a fork the child
calls ``reset_after_fork`` before anything else.
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
from collections.abc import Iterator
from pathlib import Path

import attrs

from modelcache.disk.files import allocated, make_folder, same, sweep_one, sync, sync_tree
from modelcache.disk.layout import ARTIFACT, FORMAT, RECORD, Record, is_published
from modelcache.errors import AccessDenied, ConfigError

_log = logging.getLogger("modelcache")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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


class Pin:
    """A shared kernel lock on one published folder: while it is held, no process removes the folder."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Let go, once; a descriptor that a child inherited is closed, never unlocked."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


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
        self._workshop: Path | None = None
        self._workshop_lock = -1
        with _told(path):
            self._open()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=self.mode)
        for folder in (self._models, self.path / "tmp"):
            make_folder(folder, self.mode)
            self._check_owner(folder)
        workshop = self._open_workshop()
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

    def _open_workshop(self) -> Path:
        """Make this process's own folder under ``tmp/``, locked, so that others can tell it from leftovers."""
        while True:
            workshop = self.path / "tmp" / secrets.token_hex(8)
            make_folder(workshop, self.mode)
            descriptor = os.open(workshop, _FOLDER)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                    continue
                shutil.rmtree(workshop, ignore_errors=True)
                raise ConfigError(
                    f"disk folder {self.path} is on a file system without file locks ({error}): use a local one",
                    setting="path",
                    value=str(self.path),
                ) from error
            if same(descriptor, workshop):
                self._workshop, self._workshop_lock = workshop, descriptor
                return workshop
            os.close(descriptor)  # a sweeper took it between its creation and the lock

    def workshop(self) -> Path:
        """Return this process's own folder, made again where somebody removed it."""
        if self._workshop is None or not self._workshop.is_dir():
            self.path.mkdir(parents=True, exist_ok=True, mode=self.mode)
            for folder in (self._models, self.path / "tmp"):
                make_folder(folder, self.mode)
            self._release_workshop()
            return self._open_workshop()
        return self._workshop

    def _release_workshop(self) -> None:
        descriptor, self._workshop_lock = self._workshop_lock, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._workshop = None

    def reset_after_fork(self) -> None:
        """In a child: forget the parent's workshop; its lock is closed, never released."""
        self._release_workshop()

    def close(self) -> None:
        """Remove this process's workshop."""
        if self._workshop is not None:
            shutil.rmtree(self._workshop, ignore_errors=True)
        self._release_workshop()

    def stage(self) -> Path:
        """Return a new empty folder to build an artifact in, with ``artifact/`` in it."""
        folder = self.workshop() / secrets.token_hex(8)
        make_folder(folder, self.mode)
        make_folder(folder / ARTIFACT, self.mode)
        return folder

    def seal(self, staged: Path, record: Record) -> int:
        """Write the record of a staged folder, bring all of it to the disk, return the bytes allocated for it.

        Raises:
            OSError: the disk is full, or broken.
        """
        text = staged / RECORD
        text.write_text(record.to_json())
        text.chmod(self.mode & 0o666)
        sync_tree(staged)
        return allocated(staged)

    def publish(self, staged: Path, prefix: str) -> Path:
        """Make a sealed folder visible to all processes; return where it lies now."""
        folder = self._models / f"{prefix}{secrets.token_hex(4)}"
        staged.rename(folder)
        sync(self._models)
        return folder

    def names(self) -> set[str]:
        """Return the names of all published folders; what others put beside them is not looked at."""
        try:
            return {folder.name for folder in self._models.iterdir() if is_published(folder.name)}
        except FileNotFoundError:
            return set()

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
        """Lock a published folder against removal by any process; None where it is gone already."""
        try:
            descriptor = os.open(folder, _FOLDER)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if same(descriptor, folder):
                with contextlib.suppress(OSError):
                    os.utime(descriptor)  # the folder's own time is its recency, for the next start
                return Pin(descriptor)
        except BlockingIOError:
            pass  # somebody is removing it right now
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def remove(self, folder: Path) -> bool:
        """Remove a published folder unless some process has it pinned; return whether it is gone.

        Moved aside first, so that nobody ever sees half of it; what a crash leaves is swept by the next start.
        """
        try:
            descriptor = os.open(folder, _FOLDER)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same(descriptor, folder):
                return True
            aside = self.workshop() / secrets.token_hex(8)
            folder.rename(aside)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True
        finally:
            os.close(descriptor)
        self.discard(aside)
        return True

    def discard(self, folder: Path) -> None:
        """Delete a staged or moved-aside folder; what can't be deleted is left to the next sweep."""
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what dead processes, and only they, left under ``tmp/``."""
        for leftover in (self.path / "tmp").iterdir():
            if leftover == self._workshop:
                continue
            with contextlib.suppress(OSError):
                sweep_one(leftover)

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
            self.workshop()
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
