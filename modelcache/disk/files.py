"""Small file operations of the disk tier: measure, sync, make, compare, sweep.

Nothing here knows of models; what is done with these is ``disk.store``.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from modelcache.blocks import USUAL, Blocks
from modelcache.openfiles import OpenFile

_LOOKS = 100  # at a folder from which files are being removed
_AT_ONCE = 16 * 1024  # bytes of a file that are read by one call


def allocated(folder: Path, blocks: Blocks = USUAL) -> int:
    """Return the bytes that the file system allocated for a folder and all that is in it; see ``Blocks.prompt``."""
    total = folder.lstat().st_blocks * 512
    seen: set[int] = set()
    for entry in walk(folder):
        status = entry.stat(follow_symlinks=False)
        if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
            if status.st_ino in seen:
                continue
            seen.add(status.st_ino)
        taken = status.st_blocks * 512
        total += taken if blocks.prompt else max(taken, blocks.charged(status.st_size))
    return total


def taken(folder: Path) -> int:
    """Return what a folder takes in which things come and go: it is looked at again where one has just gone."""
    for _ in range(_LOOKS):
        try:
            return allocated(folder)
        except FileNotFoundError:
            continue
        except OSError:  # of somebody else, or on a bad disk
            break
    return 0


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a folder, links not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from walk(Path(entry.path))


def sync_tree(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for entry in walk(folder):
        if not entry.is_symlink():
            sync(Path(entry.path))
    sync(folder)


def sync(path: Path) -> None:
    """Bring one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: str) -> str:
    """Return the text of a small file; see ``read_dated``."""
    return read_dated(path)[0]


def read_dated(path: str, at: int | None = None) -> tuple[str, float]:
    """Return the text of a small file, and seconds since the epoch of its last change: with few calls of the system.

    Args:
        path: of the file.
        at: descriptor of the folder that ``path`` begins in; None: as ``open`` has it.

    Raises:
        OSError: it can't be read.
        UnicodeDecodeError: it is no text.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=at)
    try:
        changed = os.fstat(descriptor).st_mtime
        text = piece = os.read(descriptor, _AT_ONCE)
        while len(piece) == _AT_ONCE:
            piece = os.read(descriptor, _AT_ONCE)
            text += piece
    finally:
        os.close(descriptor)
    return text.decode(), changed


def make_folder(folder: Path, mode: int) -> None:
    """Make a folder with these permissions, whatever the umask; nothing where it is there."""
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        return
    set_mode(folder, mode)


def delete(folder: Path, key: str) -> bool:
    """Delete a folder, or what lies in its place; return whether it is gone.

    The file ``key`` goes first, which takes no descriptor: what can't be deleted now says no more what it is.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        unmake(folder / key)
        shutil.rmtree(folder, ignore_errors=True)
    return not os.path.lexists(folder)


def unmake(*paths: Path) -> None:
    """Remove files and empty folders in this order, as far as they are there; never raises, and takes no descriptor."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def set_mode(folder: Path, mode: int) -> None:
    """Give a new folder its permissions: the umask of the moment is not the tier's policy, a group for all is."""
    folder.chmod(mode | (folder.stat().st_mode & stat.S_ISGID))


def move_aside(folder: Path, aside: Path, key: str) -> Path:
    """Take a folder away from all readers by one step, and return where it is now.

    A folder of a container's image (the lower layer of an overlayfs) can't be renamed: it stays where it is, without
    the file ``key``, so that nobody takes it for whole.

    Raises:
        FileNotFoundError: it is gone, or what it was to be moved to.
        OSError: the system refuses; the folder is whole.
    """
    try:
        folder.rename(aside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        (folder / key).unlink(missing_ok=True)
        return folder
    return aside


def same(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the folder behind ``descriptor``."""
    try:
        now = path.lstat()
    except FileNotFoundError:
        return False
    then = os.fstat(descriptor)
    return (now.st_dev, now.st_ino) == (then.st_dev, then.st_ino)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from one that is put in its place; zeros where there is none."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino


def sweep_one(leftover: Path) -> None:
    """Delete what a dead process left; raise OSError where a live one has it locked."""
    held = OpenFile(leftover, os.O_RDONLY)
    try:
        fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()
    finally:
        held.close()
