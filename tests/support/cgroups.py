"""Real memory cgroups (v1) with a limit, and Python scripts that run in them from their first byte on.

They are made below the cgroup that the tests run in, so root of a container is enough; where the controller is
missing or not writable the test is skipped. Copied trees of files are made by ``behaviour/test_gauges``.
"""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.support.children import ROOT, finish, source
from tests.support.waiting import eventually

MIB = 1 << 20
_MOUNT = Path("/sys/fs/cgroup/memory")
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


@attrs.frozen
class Group:
    """A memory cgroup of the test.

    Attributes:
        path: its folder.
    """

    path: Path

    def start(
        self, script: str, *arguments: Any, prefix: tuple[str, ...] = (), watchdog: int = 15, **env: str
    ) -> "subprocess.Popen[str]":
        """Start a script in the group; see ``children.start``. It is a member before Python starts.

        Args:
            script: Python, after ``children.PRELUDE``.
            arguments: its ``sys.argv[1:]``.
            prefix: a program, with its arguments, that runs Python.
            watchdog: seconds.
            env: added to our environment.
        """
        path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
        python = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source(script)]
        return subprocess.Popen(
            ["sh", "-c", _JOIN, str(self.path), *prefix, *python, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "WATCHDOG": str(watchdog), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_in(self, script: str, *arguments: Any, code: int | None = 0, timeout: float = 18.0, **settings: Any) -> str:
        """Run a script in the group to its end and return what it printed; see ``start`` and ``children.finish``."""
        return finish(self.start(script, *arguments, **settings), code=code, timeout=timeout)

    @property
    def max_usage(self) -> int:
        """The most bytes that were ever charged, page cache included."""
        return int((self.path / "memory.max_usage_in_bytes").read_text())

    @property
    def failcnt(self) -> int:
        """How often the limit was hit; harmless as long as there was page cache to drop."""
        return int((self.path / "memory.failcnt").read_text())

    @property
    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for want of memory."""
        return self._table("memory.oom_control").get("oom_kill", 0)

    def stat(self) -> dict[str, int]:
        """Return ``memory.stat``: ``total_rss``, ``total_cache`` and so on, in bytes."""
        return self._table("memory.stat")

    def _table(self, name: str) -> dict[str, int]:
        lines = (self.path / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}

    @contextlib.contextmanager
    def child(self, limit: int | None = None) -> "Iterator[Group]":
        """Make a group below this one until the block ends; with no limit of its own, unless one is given."""
        with _made(self.path / "child", limit) as group:
            yield group


def child_cgroup(limit: int | None) -> contextlib.AbstractContextManager[Group]:
    """Make a memory cgroup of ``limit`` bytes (None: no limit) below our own until the block ends.

    Processes that are left in it are killed then. Skips the test where it can't be made.
    """
    return _made(_own() / f"modelcache-test-{uuid.uuid4().hex}", limit)


def _own() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            own = _MOUNT / path.lstrip("/")
            return own if own.exists() else _MOUNT  # a private view of the hierarchy: its top is ours
    pytest.skip("no cgroup v1 memory controller here")


@contextlib.contextmanager
def _made(path: Path, limit: int | None) -> Iterator[Group]:
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"the cgroup v1 memory controller is not writable: {error}")
    try:
        if limit is not None:
            (path / "memory.limit_in_bytes").write_text(str(limit))
        yield Group(path)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    for pid in (path / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)

    def gone() -> bool:
        with contextlib.suppress(OSError):  # its last process is not quite dead
            path.rmdir()
        return not path.exists()

    eventually(gone)
