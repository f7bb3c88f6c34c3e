"""File systems of one's own for a test: small, read-only, layered; a test is skipped where this user may not mount."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str | Path) -> None:
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, *arguments], check=False, capture_output=True).returncode:
        pytest.skip(f"can't mount here: {' '.join(map(str, arguments))}")


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs with such options as ``size=4m,nr_inodes=40``; the folder is made."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", options, "none", folder)
    try:
        yield folder
    finally:
        _unmount(folder)


@contextlib.contextmanager
def formatted(folder: Path, size: int, *command: str) -> Iterator[Path]:
    """Mount a file system of ``size`` bytes that a command like ``mkfs.xfs`` makes; the folder is made."""
    make, image = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin"), folder.with_suffix(".image")
    if make is None:
        pytest.skip(f"there is no {command[0]} here")
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([make, "-q", *command[1:], image], check=True)
    folder.mkdir()
    _mount("-o", "loop", image, folder)
    try:
        yield folder
    finally:
        _unmount(folder)


def leave_single_blocks(folder: Path, most: int) -> None:
    """Fill a file system, and free every other block of ``most``: what is written then comes in pieces."""
    for number in range(most):
        (folder / f"one{number}").write_bytes(bytes(4096))
    os.sync()
    with contextlib.suppress(OSError), (folder / "rest").open("wb", buffering=0) as file:
        while file.write(bytes(2**20)):
            pass
    for number in range(0, most, 2):
        (folder / f"one{number}").unlink()
    os.sync()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Make a folder read-only, for root too."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield folder
    finally:
        _unmount(folder)


@contextlib.contextmanager
def layered(lower: Path, folder: Path) -> Iterator[Path]:
    """Mount a folder over another one that it never changes, as a container's over its image."""
    with small_disk(folder.with_name("upper"), "size=64m") as upper:  # a layer may not be on such a mount itself
        for made in (folder, upper / "files", upper / "work"):
            made.mkdir()
        _mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper}/files,workdir={upper}/work", "none", folder)
        try:
            yield folder
        finally:
            _unmount(folder)


def open_path(tmp_path: Path) -> Path:
    """Return a new folder that other users reach too."""
    folder = tmp_path / "open"
    folder.mkdir()
    for parent in (folder, *folder.parents):
        if "pytest-" in str(parent):
            parent.chmod(0o755)
    return folder
