"""Runs one row from outside the cgroup: starts the serving process, samples its memory, starts it again if killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attrs

from benchmarks.cgroup import Group
from benchmarks.wall.book import DONE, TODO, Book
from benchmarks.wall.child import Task
from benchmarks.wall.store import resident

SAMPLE = 0.005  # seconds between two looks at the memory
WARM = 0.1  # share of the requests after which means are taken
MOST_KILLS = 20  # then the row is given up
_PAGE = os.sysconf("SC_PAGE_SIZE")


@attrs.define
class Result:
    """What came of one row; bytes and seconds.

    Attributes:
        row: its name.
        high: bytes that the process may use.
        kills: processes that the kernel killed for want of memory.
        failed: requests that got an error, were lost with a killed process, or never served.
        peak: most that was resident.
        above: most that was used above ``high``, by the samples.
        mean_used: mean of used / ``high`` once warm.
        figures: the book's.
        errors: class, how often, and the text of the last one.
    """

    row: str
    high: int
    kills: int = 0
    failed: int = 0
    peak: int = 0
    above: int = 0
    mean_used: float = 0.0
    figures: dict[str, float] = attrs.Factory(dict)
    errors: list[tuple[str, int, str]] = attrs.Factory(list)


class Watch:
    """One row.

    Args:
        task: what the child is told; group and book are filled in.
        limit: bytes of the cgroup.
        timeout: seconds after which the row is given up.
    """

    def __init__(self, task: Task, limit: int, timeout: float) -> None:
        self._task = task
        self._limit = limit
        self._end = time.monotonic() + timeout
        self._used = 0.0
        self._samples = 0

    def run(self) -> Result:
        """Serve all requests, as far as that can be done.

        Raises:
            Unavailable: no cgroup.
            RuntimeError: the child ended for a reason other than memory.
        """
        result = Result(self._task.row, self._task.high)
        with tempfile.TemporaryDirectory() as folder, Group("wall", self._limit) as group:
            path = Path(folder, "book")
            book = Book.create(path, self._task.requests)
            while book.close_lost() and result.kills < MOST_KILLS and time.monotonic() < self._end:
                task = attrs.evolve(self._task, group=str(group.path), book=str(path))
                self._serve(task, book, result, group)
            result.kills = max(result.kills, group.kills())
            result.failed = self._task.requests - book.count(DONE)
            result.figures = book.figures()
        result.mean_used = self._used / max(self._samples, 1)
        return result

    def _serve(self, task: Task, book: Book, result: Result, group: Group) -> None:
        """Run one process to its end, natural or not."""
        command = [sys.executable, "-m", "benchmarks.wall.child", json.dumps(attrs.asdict(task))]
        todo = book.count(TODO)
        with (
            tempfile.TemporaryFile("w+") as said,  # a pipe that nobody reads would fill
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as child,
        ):
            try:
                self._sample(child, task, book, result, group)
                out, _ = child.communicate()
            except BaseException:
                child.kill()
                raise
            said.seek(0)
            err = said.read()
        if child.returncode == -signal.SIGKILL:
            result.kills += 1
        elif child.returncode == 0:
            result.errors += [(name, count, text) for name, count, text in json.loads(out)]
        elif child.returncode != -signal.SIGTERM:
            raise RuntimeError(f"row {task.row} ended with {child.returncode} after {todo} were to do:\n{err[-3000:]}")

    def _sample(self, child: "subprocess.Popen[str]", task: Task, book: Book, result: Result, group: Group) -> None:
        """Look at the memory of a process until it ends, or its time is over."""
        statm = Path(f"/proc/{child.pid}/statm")
        warm = task.requests * WARM
        while child.poll() is None:
            try:
                used = group.used() if task.gauge == "container" else int(statm.read_text().split()[1]) * _PAGE
                result.peak = max(result.peak, used, resident("VmHWM", child.pid))  # modelcache sets the mark back
            except (OSError, IndexError):  # it ended meanwhile
                return
            result.above = max(result.above, used - task.high)
            if book["begun"] >= warm and used:
                self._used += used / task.high
                self._samples += 1
            if time.monotonic() > self._end:
                child.terminate()
                return
            time.sleep(SAMPLE)
