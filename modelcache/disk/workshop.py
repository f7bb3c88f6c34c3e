"""This process's own folder under ``tmp/``, in which it stages and removes; and the sweep of dead processes' ones.

A workshop is locked (``flock``) by its process for as long as it lives, so that others can tell it from leftovers:
the kernel drops the lock with the process.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from modelcache.disk.book import Hold
from modelcache.disk.files import make_folder, read_text, same, sweep_one, taken
from modelcache.disk.layout import RECORD, UNSEALED, Draft, Record
from modelcache.errors import ConfigError
from modelcache.openfiles import OpenFile

FOLDER = os.O_RDONLY | os.O_DIRECTORY
"""How a folder is opened to lock it."""

_TOLD_APART = 32 + 1 + 8  # last characters of the name of a published folder; no two have the same
_LONG = 34  # bytes of a name: tmp/<16>/<68> is as long as models/ with the longest name there


class Workshop:
    """One process's temporary folder.

    Args:
        root: ``tmp/`` of the tier; made again where somebody removed it.
        mode: permissions of folders.

    Concurrency: any thread. After a fork the child calls ``reset_after_fork`` before anything else.
    """

    def __init__(self, root: Path, mode: int) -> None:
        self._root = root
        self._mode = mode
        self._held: OpenFile | None = None
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """In a child: forget the parent's folder; its lock is closed, never released."""
        # guards which folder is this process's own: making it (mkdir, flock) is all that happens under it.
        self._lock = threading.RLock()
        self._close_lock()
        self._folder: Path | None = None
        self._process = os.getpid()

    def _close_lock(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def folder(self) -> Path:
        """Return the folder, made where it is missing.

        Raises:
            ConfigError: the file system has no file locks.
            OSError: it can't be made.
        """
        with self._lock:
            if self._folder is None or not self._folder.is_dir():
                self._close_lock()
                self._make_root()
                self._folder = self._make()
            return self._folder

    def _make_root(self) -> None:
        self._root.parent.parent.mkdir(parents=True, exist_ok=True)
        make_folder(self._root.parent, self._mode)
        make_folder(self._root, self._mode)

    def _make(self) -> Path:
        while True:
            folder = self._root / secrets.token_hex(8)
            try:
                make_folder(folder, self._mode)
                held = OpenFile(folder, FOLDER)
            except FileNotFoundError:  # a sweeper took it before it was locked, or somebody removed tmp/
                self._make_root()
                continue
            try:
                fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if same(held.descriptor, folder):
                    _probe(folder)
                    self._held = held
                    return folder
                held.close()  # a sweeper took it between its creation and the lock
            except BlockingIOError:  # a sweeper has it
                held.close()
                continue
            except OSError as error:
                held.close()
                shutil.rmtree(folder, ignore_errors=True)
                if error.errno not in {errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
                raise no_locks(self._root.parent, error) from error

    def name(self) -> Path:
        """Return a path in the folder that nobody else uses; as long as the longest below ``models/``.

        So a file whose path the system finds too long there is found out before it is published.
        """
        return self.folder() / secrets.token_hex(_LONG)

    def aside(self, name: str) -> Path:
        """Return the path in the folder to which a published folder is moved before it is deleted."""
        return self.folder() / name[-_TOLD_APART:]

    def taker(self, name: str) -> str | None:
        """Return the process that has moved a published folder aside, if one has."""
        return next((at.name for at in _listed(self._root) if os.path.lexists(at / name[-_TOLD_APART:])), None)

    def under_way(self) -> Iterator[Hold]:
        """Yield what is to be set aside for what all processes stage and remove, as their folders tell.

        Of a folder that says nothing (any more), and is being removed, what it takes now.
        """
        for owner in _listed(self._root):
            for folder in filter(_is_folder, _listed(owner)):
                draft, record = _read(folder / RECORD)
                if record is not None and record.digest == UNSEALED:
                    draft = Draft(folder.name, record.source, record.model, 0)
                size = max(taken(folder), record.bytes if record is not None else 0)
                if draft is None:
                    yield Hold(folder.name, owner.name, "", "", size, size, 0)
                else:
                    reserved = max(draft.reserved, size)
                    yield Hold(draft.hold, owner.name, draft.source, draft.model, reserved, size, 0)

    def taken_by(self, owner: str) -> int:
        """Return the bytes of what a process has in its folder."""
        return sum(map(taken, _listed(self._root / owner)))

    @property
    def mine(self) -> bool:
        """Whether this is no child that was forked and has not used the tier."""
        return self._process == os.getpid()

    def others(self) -> set[str]:
        """Return the names of other processes' folders, as far as this one can say now."""
        return {folder.name for folder in _listed(self._root) if folder != self._folder}

    def all(self) -> set[str]:
        """Return the names of all processes' folders."""
        self.folder()
        return {folder.name for folder in self._root.iterdir()}

    def sweep(self) -> dict[str, bool]:
        """Delete what dead processes, and only they, left beside this folder; return the names, and whether it went."""
        mine, swept = self.folder(), dict[str, bool]()
        for leftover in self._root.iterdir():
            if leftover != mine:
                with contextlib.suppress(OSError):
                    sweep_one(leftover)
                    swept[leftover.name] = not os.path.lexists(leftover)
        return swept

    def close(self) -> None:
        """Remove the folder."""
        if not self.mine:  # the folder is its parent's
            return
        with self._lock:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._close_lock()
            self._folder = None


def _listed(folder: Path) -> list[Path]:
    try:
        return [*folder.iterdir()]
    except OSError:  # gone meanwhile, or none
        return []


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of somebody else, or on a bad disk
        return False


def _read(path: Path) -> tuple[Draft | None, Record | None]:
    try:
        text = read_text(str(path))
    except (OSError, UnicodeDecodeError):
        return None, None
    return Draft.from_json(text), Record.from_json(text)


def _probe(folder: Path) -> None:
    """Make sure that a lock on a folder, which is held, excludes others: some network file systems say yes to all."""
    second = OpenFile(folder, FOLDER)
    try:
        fcntl.flock(second.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        second.close()
    raise OSError(errno.ENOLCK, "a lock there excludes nobody")


def no_locks(folder: Path, error: OSError) -> ConfigError:
    """Return the error for a file system without locks that hold."""
    return ConfigError(
        f"disk folder {folder} has no file locks ({error}): use a local file system", setting="path", value=str(folder)
    )
