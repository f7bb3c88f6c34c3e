"""``Ledger``: the SQLite file in which the processes that share a disk folder agree (WAL mode, sqlite.org/wal.html).

It is a memory, not the truth: each published folder carries what is needed to make the ledger anew, which happens where
it is damaged, missing or of another version. What it holds is ``disk.book``.

A SQLite handle must not come over a fork (sqlite.org/howtocorrupt.html, 2.6), not even unused: so it is closed before
each fork, and opened again by whoever needs it.
"""

import contextlib
import errno
import fcntl
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from modelcache.disk.book import Book
from modelcache.disk.files import identity
from modelcache.disk.tables import VERSION, create
from modelcache.openfiles import OpenFile

R = TypeVar("R")

OPENING = 60.0
"""Seconds that a start waits for a process that stands still while it opens or replaces the ledger."""

_TRY = 0.02  # seconds that one try waits for another process inside SQLite
_PAUSE = 0.01  # longest pause between two tries
_DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR_CORRUPTFS,
}
_PLAIN = sqlite3.SQLITE_ERROR
_WAITS = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL}
_NO_SPACE = {sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMOPEN}  # what a start meets on a full disk
_SPARE = 64 * 2**10  # bytes that are given up where the disk is full
_AT_FORK = 0.1  # seconds that a fork in a signal handler waits for a transaction of another thread
_BREAKS = 10  # times that it is broken off then
_FRAMES = 500  # pages of the log after which it is written back


class _OfAnotherVersion(sqlite3.DatabaseError):
    """The tables are of another version."""


class _Occupied(sqlite3.OperationalError):
    """Somebody else opens or replaces the file, or has closed it under us: to be tried again."""

    sqlite_errorcode = sqlite3.SQLITE_BUSY


class Ledger:
    """Runs transactions.

    Concurrency: any thread, never with the guard held, which a decision may take; one transaction at a time.

    Args:
        path: the file; None: in memory, for a folder that can only be read.
        mode: permissions of folders; the file gets the same without the execute bits.
        fill: writes what is known from the folders into a new ledger.

    Attributes:
        undo: is called where a transaction that writes has begun and failed, or may have, before another one begins.
    """

    def __init__(self, path: Path | None, mode: int, fill: Callable[[Book], None]) -> None:
        self._path = path
        self._mode = mode & 0o666
        self._fill = fill
        self.undo: Callable[[Book, BaseException], object] = lambda *_: None
        self._begin()

    def _begin(self) -> None:
        # guards the connection: SQLite's own I/O happens under it, and the guard of the cache may be taken, as may the
        # locks of workshop and openfiles; no other lock, no fetch, load or deletion, no code of a user's but Policy.
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] = (0, 0)

    @property
    def busy(self) -> bool:
        """Whether this very thread is in the middle of a transaction (then it must not start another)."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001 - as Condition does

    def change(self, decide: Callable[[Book], R], check: Callable[[], None] | None = None) -> R:
        """Run a transaction that reads and writes.

        Args:
            decide: is called once or more often; what it does to anything but the book, ``undo`` takes back.
            check: is called between two tries, without any lock; raises to stop.

        Raises:
            OSError: the disk is full, or broken.
        """
        return self._run("BEGIN IMMEDIATE", decide, check)

    def look(self, decide: Callable[[Book], R], check: Callable[[], None] | None = None) -> R:
        """Run a transaction that only reads; it waits for no process that writes, but for one that opens the file."""
        return self._run("BEGIN", decide, check)

    def _run(self, begin: str, decide: Callable[[Book], R], check: Callable[[], None] | None) -> R:
        replaced, reopened, seen = False, False, [(0, 0)]
        while True:
            try:
                with self._lock:
                    return self._transact(begin, decide, seen)
            except sqlite3.Error as error:
                exact = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
                code = exact & 0xFF
                if (code == sqlite3.SQLITE_FULL or exact in _NO_SPACE) and not self._give_way():
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({self._path})") from error
                if code not in _WAITS and exact not in _NO_SPACE:
                    if replaced:
                        raise OSError(errno.EIO, f"{error} ({self._path})") from error
                    # other codes (no descriptor or memory left, a file system that refuses) say nothing of the file,
                    # and a plain error perhaps of this connection only
                    if self._path is not None and _DAMAGED & {code, exact} and (reopened or exact != _PLAIN):
                        replaced = self._replace(self._path, seen[0])
                    else:
                        reopened, replaced = True, reopened or exact != _PLAIN
                        self.close()
            if check is not None:
                check()
            time.sleep(random.uniform(0, _PAUSE))  # noqa: S311 - so that two that met do not meet again

    def _give_way(self) -> bool:
        """Free the bytes that are kept for a full disk, on which room can only be made by a note of who goes."""
        if self._path is None:
            return False
        try:
            os.unlink(f"{self._path}.spare")  # noqa: PTH108 - a str
        except OSError:
            return False
        return True

    def _keep_spare(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{path}.spare", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, self._mode)
            try:
                if os.fstat(descriptor).st_size < _SPARE:
                    os.pwrite(descriptor, bytes(_SPARE), 0)
            finally:
                os.close(descriptor)

    def _transact(self, begin: str, decide: Callable[[Book], R], seen: list[tuple[int, int]]) -> R:
        """Run a transaction once, and note in which file."""
        try:
            connection = self._connect()
        finally:
            seen[0] = self._file
        book: Book | None = None
        try:
            connection.execute(begin)  # an interrupt may come right after it
            book = Book(connection)
            result = decide(book)
            connection.execute("COMMIT")
            if self._path is not None and self._connection is connection and self._file != identity(self._path):
                raise _Occupied("removed meanwhile")  # noqa: TRY301 - nobody will ever see this
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            if book is not None and begin != "BEGIN":
                self.undo(book, error)
            if self._connection is not connection:  # a signal handler has forked: nothing of this is in the file
                raise _Occupied("closed by a fork") from None
            raise
        return result

    def _connect(self) -> sqlite3.Connection:
        """Return the connection to the file that others see: somebody may have removed it under us."""
        if self._connection is not None and (self._path is None or self._file == identity(self._path)):
            return self._connection
        self._disconnect()
        self._connection = self._open_file(self._path) if self._path is not None else self._open_memory()
        return self._connection

    def _open_memory(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._prepare(connection)
        return connection

    def _open_file(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True, mode=self._mode | 0o700)
        with self._entrance(path):
            self._create(path)
            if path.stat().st_uid == os.geteuid():
                path.chmod(self._mode)  # whatever the umask; SQLite gives its other files the same
            self._file = identity(path)
            connection = sqlite3.connect(path, timeout=_TRY, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._keep_spare(path)
        return connection

    def _create(self, path: Path) -> None:
        """Make the file where it is missing, without the log of the one before, which others may still have open.

        One that is there is never opened but by SQLite: to close it would drop all locks on it of this process, those
        of another cache too (sqlite.org/howtocorrupt.html, 2.2).
        """
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if not path.exists() or path.stat().st_size == 0:
            _unlink(f"{path}-wal", f"{path}-shm", f"{path}-journal")
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, self._mode))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in {0, VERSION}:
            raise _OfAnotherVersion(f"version {version}, not {VERSION}")
        if version == 0:  # before there is a log, into which all would be written as well
            connection.execute("BEGIN IMMEDIATE")
            create(connection)
            self._fill(Book(connection))
            connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # after a power cut the folders tell what is missing
        connection.execute(f"PRAGMA wal_autocheckpoint = {_FRAMES}")
        connection.execute(f"PRAGMA journal_size_limit = {_FRAMES * 4096}")
        if version == 0:  # last, so that it counts only once its log can be written
            connection.execute(f"PRAGMA user_version = {VERSION}")

    @contextlib.contextmanager
    def _entrance(self, path: Path) -> Iterator[None]:
        """Open and replace one at a time: or one would find half of what another has replaced.

        Who is stopped in here keeps newcomers out, but nobody waits for it with a lock held.
        """
        held = OpenFile(f"{path}.lock", os.O_RDWR | os.O_CREAT, self._mode)
        try:
            if os.fstat(held.descriptor).st_uid == os.geteuid():
                os.fchmod(held.descriptor, self._mode)
            try:
                fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _Occupied("being opened") from error
            yield
        finally:
            held.close()

    def _replace(self, path: Path, seen: tuple[int, int]) -> bool:
        """Remove a ledger that is damaged, unless somebody has done that already; False: somebody is at it."""
        with self._lock:
            self._disconnect()
            try:
                with self._entrance(path):
                    if identity(path) == seen:
                        _unlink(
                            str(path), f"{path}-wal", f"{path}-shm", f"{path}-journal"
                        )  # the file first: see _create
            except _Occupied:
                return False
        return True

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._file = (0, 0)
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def before_fork(self, *, guarded: bool = False) -> None:
        """Close the file, and let nobody open it until the fork is over.

        Args:
            guarded: this thread holds the guard, since a signal handler forks in the middle of its decision. Who has
                the lock then may wait for the guard, for as long as we wait for the lock: so its transaction is broken
                off, and tried again after the fork.
        """
        if not self._lock.acquire(timeout=_AT_FORK if guarded else -1):
            for _ in range(_BREAKS):
                self._disconnect()  # its next statement fails; it lets go unless it waits for the guard then
                if self._lock.acquire(timeout=_PAUSE):
                    break
        self._disconnect()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self.busy:
            self._lock.release()

    def reset_after_fork(self) -> None:
        """In a child: nothing was inherited but the lock, which is made anew."""
        self._begin()

    def close(self) -> None:
        """Close the file; it is opened again by whoever needs it."""
        with self._lock:
            self._disconnect()


def patience(seconds: float = 1.0) -> Callable[[], None]:
    """Return a check for ``change`` that raises TimeoutError after some seconds."""
    until = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, f"another process is in the middle of a change for over {seconds} s")

    return check


def _unlink(*names: str) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)  # noqa: PTH108 - a str
