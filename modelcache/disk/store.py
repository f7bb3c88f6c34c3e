"""The folder of a disk tier: open, scan, stage, publish, pin, remove.

All of it is I/O and none of it decides: which artifact must go, and whether there is room, is ``disk.index``.
What makes it safe between processes: names are random, and a rename publishes or removes; kernel locks say that
somebody reads a folder (``disk.pins``) or works in one (``disk.workshop``).

Concurrency: every method may be called from any thread. After a fork the child calls ``reset_after_fork`` before
anything else.
"""

import contextlib
import errno
import logging
import os
import secrets
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

from modelcache.blocks import Blocks, look_at
from modelcache.disk import figures
from modelcache.disk.book import Book, Made
from modelcache.disk.digests import digest_of
from modelcache.disk.files import allocated, delete, make_folder, move_aside, sync, sync_tree, taken, unmake
from modelcache.disk.flocks import FolderPins
from modelcache.disk.layout import ARTIFACT, RECORD, UNSEALED, Record, published
from modelcache.disk.ledger import Ledger
from modelcache.disk.opening import (
    check_format,
    check_owner,
    is_filled,
    make_pins,
    mark,
    refuse_network,
    told,
    warn,
)
from modelcache.disk.pins import Pin, Pins
from modelcache.disk.published import Published, raise_short, read_records, read_whole
from modelcache.disk.states import State
from modelcache.disk.workshop import Workshop
from modelcache.errors import AccessDenied, ConfigError

_log = logging.getLogger("modelcache")
_SETTLED = 2 * 10**9  # nanoseconds after which a change would have a time of its own on any file system
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class Store:
    """The files of one disk tier.

    Attributes:
        blocks: how its file system allocates.
        workshop: where this process stages and removes.

    Args:
        path: the folder; made, with its parents, where it is missing.
        mode: permissions of all folders made here; files get the same without the execute bits.

    Raises:
        AccessDenied: the folder can't be read, or can't be written and is no tier yet, or what lies in it belongs to
            somebody else.
        ConfigError: it is no folder, of a newer format, or on a file system without file locks.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.mode = mode
        self.writable = True
        self.made: Made | None = None  # until somebody has learned it
        self._listed: list[str] | None = None  # what that was made from, until somebody asks for it
        self._seen = 0  # when the folder had last changed before it was listed, in nanoseconds; 0: not to be relied on
        self.blocks = Blocks()
        self._models = path / "models"
        self.workshop = Workshop(path / "tmp", mode)
        self._pins: Pins = FolderPins()  # which has nothing open yet
        self.ledger = Ledger(path / "ledger.sqlite3", mode, self._fill)
        with told(path):
            self._open()
        weakref.finalize(self, self.workshop.close)  # for a tier that never gets a cache to close it

    def _open(self) -> None:
        try:
            self._prepare()
        except OSError as error:
            if isinstance(error, AccessDenied) or error.errno not in _READ_ONLY or not is_filled(self.path):
                raise
            self.writable = False
            self.ledger = Ledger(None, self.mode, self._fill)
            _log.warning("%s can only be read: models in it are served, others can't be fetched", self.path)
        try:
            check_format(self.path)
            self._pins = make_pins(self.path, self.mode, writable=self.writable)
        except ConfigError:
            self.close()
            raise
        warn(self.path, self.mode)

    def _prepare(self) -> None:
        """Make what is missing, and make sure that it can be written to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        make_folder(self.path, self.mode)
        refuse_network(self.path)
        for folder in (self._models, self.path / "tmp"):
            make_folder(folder, self.mode)
            check_owner(folder, self.mode)
        mark(self.path, self.workshop.folder(), self.mode)
        self.blocks = look_at(self.path / "tmp" / secrets.token_hex(8))  # whatever is left of that is swept

    @property
    def owner(self) -> str:
        """The name under which the ledger knows this process: of its temporary folder, which it has locked."""
        return self.workshop.folder().name if self.writable else "reader"

    def adopt(self) -> None:
        """In a child of a process that opened this and gave it no cache: have a temporary folder of our own."""
        if not self.workshop.mine:
            self.reset_after_fork(())

    def before_fork(self, *, guarded: bool) -> None:
        """Close what must not come over a fork; see ``Ledger.before_fork``."""
        self.ledger.before_fork(guarded=guarded)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self.ledger.after_fork_in_parent()

    def reset_after_fork(self, kept: Iterable[Pin]) -> None:
        """In a child: the parent's temporary folder and pins are not ours, but for those in ``kept``."""
        self.workshop.reset_after_fork()
        self._pins.reset_after_fork(kept)
        self.ledger.reset_after_fork()

    def adopted(self) -> None:
        """In a child: all that was ``kept`` has pins of its own now."""
        self._pins.adopted()

    def close(self) -> None:
        """Remove this process's temporary folder, and close all files."""
        if self.workshop.mine:
            self.ledger.close()
            self._pins.close()
        self.workshop.close()

    def stage(self, draft: str) -> Path:
        """Return a new folder to build an artifact in, with an empty ``artifact/`` and a draft in place of its record.

        Raises:
            OSError: the disk is full, or broken; nothing is left behind.
        """
        make_folder(self._models, self.mode)  # somebody may have removed it
        folder = self.workshop.name()
        try:
            make_folder(folder, self.mode)
            (folder / RECORD).write_text(draft)
            (folder / RECORD).chmod(self.mode & 0o666)
            make_folder(folder / ARTIFACT, self.mode)
        except BaseException:
            unmake(folder / ARTIFACT, folder / RECORD, folder)
            raise
        return folder

    def seal(self, staged: Path, record: Record) -> Record:
        """Write the record of a staged folder and bring all of it to the disk; return it with the allocated bytes.

        Raises:
            OSError: the disk is full, or broken.
        """
        path = staged / RECORD
        path.write_text(record._replace(digest=UNSEALED).to_json())
        figures.reserve(staged, self.mode)
        record = record._replace(digest=digest_of(staged / ARTIFACT))
        sync_tree(staged)
        record = record._replace(bytes=allocated(staged, self.blocks))
        with path.open("r+") as file:  # of the same length
            file.write(record.to_json())
        sync(path)
        return record

    def new_name(self, prefix: str) -> str:
        """Return the name of a folder that is about to be published."""
        return f"{prefix}{secrets.token_hex(4)}"

    def publish(self, staged: Path, name: str) -> None:
        """Make a sealed folder visible to all processes."""
        staged.rename(self._models / name)
        sync(self._models)

    def withdraw(self, name: str, staged: Path) -> None:
        """Take a folder back whose publication failed halfway; never raises."""
        with contextlib.suppress(OSError):
            (self._models / name).rename(staged)

    def listed(self) -> list[str] | None:
        """Return what there is among the published folders, with what others put beside them.

        None where the system can't say now (no descriptor left, an I/O error).
        """
        known, self._listed = self._listed, None
        if known is not None and not self.changed():
            return known
        try:
            before = os.stat(self._models).st_mtime_ns  # noqa: PTH116 - no Paths
            self._seen = before if time.time_ns() - before > _SETTLED else 0
            return os.listdir(self._models)  # noqa: PTH208 - no Paths
        except FileNotFoundError:
            return []
        except OSError:
            return None

    def changed(self) -> bool:
        """Whether something may have been published or removed since all was listed."""
        try:
            return os.stat(self._models).st_mtime_ns != self._seen  # noqa: PTH116 - no Paths
        except OSError:
            return False

    def folder(self, name: str) -> Path:
        """Return where the published folder of that name lies."""
        return self._models / name

    def read(self, name: str) -> Published | None:
        """Return the published folder of that name; None where it is gone, damaged or not ours to trust.

        Raises:
            OSError: this process has no descriptor or memory left to look.
        """
        return read_whole(str(self._models), name)

    def intact(self, record: Record, name: str) -> bool:
        """Whether a published artifact is to the byte what was unpacked; one without a digest is taken to be.

        Raises:
            OSError: this process has no descriptor or memory left to look.
        """
        try:
            return not record.digest or digest_of(self._models / name / ARTIFACT) == record.digest
        except OSError as error:
            raise_short(error)
            return False

    def _fill(self, book: Book) -> None:
        """Write what lies in the folders into a new ledger; that an artifact is missing is noticed at its first use."""
        listed = self.listed() or []
        names = sorted(published(listed))  # so the tables grow at their end
        self.made = book.fill(read_records(str(self._models), names))
        self._listed = listed
        for hold in self.workshop.under_way() if self.writable else ():
            book.hold(hold)
        now = self.listed() or [] if self.writable and self.changed() else []
        if late := {*published(now)}.difference(names):  # what was published between the two looks is in neither
            book.add(read_records(str(self._models), sorted(late)), State.PRESENT, None)
            self.made = None

    def taken(self, name: str) -> int:
        """Return the bytes that the published folder of that name takes."""
        return taken(self._models / name)

    def exists(self, name: str) -> bool:
        """Whether there is anything of that name among the published folders."""
        return os.path.lexists(self._models / name)

    def spoilt(self, name: str) -> bool:
        """Whether somebody has put something else in place of a published folder."""
        folder = self._models / name
        return folder.is_symlink() or (self.exists(name) and not folder.is_dir())

    def pin(self, name: str, staged: Path | None = None) -> Pin | None:
        """Lock a published folder, or one to be published, against removal by any process; None where it is gone.

        Raises:
            OSError: the system has no descriptor left, or can't read the folder.
        """
        folder = self._models / name
        pin = self._pins.take(folder, staged or folder)
        if pin is not None and self.writable:
            with contextlib.suppress(OSError):
                now = time.time_ns()  # by itself the kernel would take a clock that ticks every 4 ms
                os.utime(f"{staged or folder}/{RECORD}", ns=(now, now))  # its recency, where the ledger is made anew
        return pin

    def remove(self, name: str, aside: Path) -> Path | None:
        """Move a published folder aside, so that nobody ever sees half of it, and return where to ``discard`` it.

        None where some process has it pinned.

        Raises:
            FileNotFoundError: it is gone, or what it was to be moved to.
            OSError: the system refuses; the folder is still there.
        """
        folder = self._models / name
        with self._pins.claim(folder) as claimed:
            return move_aside(folder, aside, RECORD) if claimed else None

    def discard(self, folder: Path) -> bool:
        """Delete a staged or moved-aside folder; return whether it is gone, or must be tried again."""
        return delete(folder, RECORD)

    def sweep(self) -> dict[str, bool]:
        """Delete what dead processes, and only they, left under ``tmp/``; return their names, and whether all went."""
        return self.workshop.sweep() if self.writable else {}

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
            self._prepare()
            return os.statvfs(self.path)
