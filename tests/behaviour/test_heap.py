"""Giving heap back: only under glibc's own allocator, and to an effect."""

import ctypes
import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelcache import heap

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="allocators are preloaded by LD_PRELOAD on Linux")
SAY = "from modelcache import heap; print(heap.allocator(), heap.give_back(), heap.give_back())"


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_found", None)


def _say(preload: str = "") -> str:
    package = Path(heap.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(package), "LD_PRELOAD": preload}
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=False, env=env, timeout=15)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _allocator(name: str) -> Path:
    found = sorted(glob.glob(f"/usr/lib/*/lib{name}*.so*"))  # noqa: PTH207 - two wild parts
    if not found:
        pytest.skip(f"lib{name} is not installed here")
    return Path(found[0])


def _glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("the C library here is not glibc")


@linux
def test_glibc_is_asked() -> None:
    """Under glibc's own allocator the heap is trimmed."""
    _glibc()
    assert heap.allocator() == "glibc"
    assert heap.give_back()


@linux
def test_fragmented_heap_comes_back() -> None:
    """Freed blocks between blocks that are still held leave the resident set."""
    _glibc()
    process = psutil.Process()
    blocks = [bytearray(os.urandom(64 * 1024)) for _ in range(1600)]
    held = blocks[::40]
    del blocks
    before = process.memory_info().rss
    assert heap.give_back()
    assert before - process.memory_info().rss > 50 * MIB
    assert len(held) == 40


@linux
@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc", "mimalloc"])
def test_preloaded_allocator_is_left_alone(name: str) -> None:
    """Under a preloaded allocator nothing is done, and it is named."""
    assert _say(str(_allocator(name))) == f"{name} False False"


@linux
def test_allocator_under_another_name_is_left_alone(tmp_path: Path) -> None:
    """An allocator whose file name tells nothing is found out by where malloc lies."""
    plain = shutil.copy(_allocator("tcmalloc_minimal").resolve(), tmp_path / "plain.so")
    assert _say(str(plain)) == "unknown False False"


@linux
def test_no_preload() -> None:
    """A plain child process is trimmed, as this one."""
    _glibc()
    assert _say() == "glibc True True"


class _Library:
    """A C library that lacks what is given, as musl and macOS do."""

    def __init__(self, real: ctypes.CDLL, lacking: str) -> None:
        self._real, self._lacking = real, lacking

    def __getattr__(self, name: str) -> Any:
        if name == self._lacking:
            raise AttributeError(name)
        return getattr(self._real, name)


@linux
@pytest.mark.parametrize("lacking", ["malloc_trim", "gnu_get_libc_version", "dladdr", "malloc"])
def test_library_without_a_symbol(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Where the C library lacks a function that is needed, nothing is done."""
    library = _Library(ctypes.CDLL(None), lacking)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert heap.allocator() == "unknown"
    assert not heap.give_back()


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_no_library_to_ask(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Where the process can't be asked for its functions, as on Windows, nothing is done."""

    def refuse(name: None) -> ctypes.CDLL:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not heap.give_back()


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_systems(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """On other systems nothing is done."""
    monkeypatch.setattr(sys, "platform", platform)
    assert heap.allocator() == "unknown"
    assert not heap.give_back()


@linux
def test_unreadable_maps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the list of mapped files can't be read, where malloc lies decides."""
    _glibc()
    monkeypatch.setattr(heap, "_MAPS", tmp_path / "nowhere")
    assert heap.allocator() == "glibc"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2", "jemalloc"),
        ("/opt/libtcmalloc_minimal.so.4.5.10", "tcmalloc"),
        ("/opt/my libs/libmimalloc.so.2.1 (deleted)", "mimalloc"),
        ("/srv/jemalloc/libother.so", "unknown"),
        ("/srv/models/tcmalloc-notes.txt", "unknown"),
    ],
)
def test_mapped_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, name: str) -> None:
    """An allocator is known by the name of its library, not by a folder or another file."""
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r-xp 00000000 08:01 1  /usr/bin/python3\n7f02-7f03 r-xp 0 08:01 2  {path}\n7f04-7f05 rw-p\n"
    )
    monkeypatch.setattr(heap, "_MAPS", maps)
    monkeypatch.setattr(sys, "platform", "other")
    assert heap.allocator() == name


def test_looks_once_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The allocator is looked at once, and again in a process with another pid."""
    looks: list[None] = []
    monkeypatch.setattr(heap, "_foreign", lambda: looks.append(None))
    heap.give_back()
    heap.give_back()
    assert len(looks) == 1
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    heap.give_back()
    assert len(looks) == 2
