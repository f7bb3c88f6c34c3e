"""Objects written to files as they arrive: many small ones at once, the parts of a large one side by side.

No byte passes through a queue: each thread reads a piece from its connection and writes it at its place. A part is
read, resumed and examined by ``s3_parts``. Whole objects are compared with their checksums on the way; of one that
comes in parts, whoever has written the next part in order reads it back, while it is still in the page cache.
"""

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from modelcache.sources.base import Output, RemoteFile
from modelcache.sources.s3_ahead import SMALL, Ahead, useful
from modelcache.sources.s3_connection import Grip
from modelcache.sources.s3_effort import Effort, Stopped
from modelcache.sources.s3_errors import Place
from modelcache.sources.s3_file import File, FileSink, prepared, read_back
from modelcache.sources.s3_get import Question, Span
from modelcache.sources.s3_means import TICK, start_threads
from modelcache.sources.s3_parts import CHUNK, Piece, corrupt

_AHEAD = 64  # files made room for before their turn has come
_Task = tuple[File, int]  # a file, and the number of one of its parts


def save(
    files: Sequence[tuple[Place, RemoteFile]],
    put: Callable[[RemoteFile], Callable[[], Output]],
    effort: Effort,
    most: int,
    *,
    count: Callable[[int], None],
    check: Callable[[], None],
) -> None:
    """Write files, as ``Saving.save`` promises.

    Args:
        files: what to write.
        put: makes room for a file and returns what opens it.
        effort: what all of them share.
        most: threads at most.
        count: hears of bytes that came.
        check: raises to stop.
    """
    work = _Work(effort, most)
    try:
        work.start(min(most, useful(effort, [file for _, file in files], most)))
        for place, file in files:
            work.add(prepared(place, file, put, effort))
            work.wait(_AHEAD, count, check)
        work.close()
        work.wait(0, count, check)
    finally:
        work.end()
    work.settle(count)


class _Work:
    """What the threads of one call do, and the caller waits for.

    Attributes:
        effort: what all files share.
    """

    def __init__(self, effort: Effort, most: int) -> None:
        self.effort = effort
        self._most = most  # threads
        self._running = 0
        # Guards the queue, the numbers, the error, and what of a file is written and checked. Under it nothing is
        # done but waiting. Reentrant, as a signal handler's own code may interrupt the caller here.
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[_Task] = deque()
        self._open: set[File] = set()
        self._closed = False
        self._came = 0
        self._counted = 0
        self._wanted = 0  # the caller waits until no more files than these are unfinished
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        """Start threads."""
        if not sum(self._start(self._run) for _ in range(number)) and number:
            raise RuntimeError("not even one thread could be started")

    def add(self, file: File) -> None:
        """Have a file written."""
        if len(file.spans) > 1:
            file.output = file.open()
        with self._changed:
            self._open.add(file)
            self._queue.extend((file, number) for number in range(len(file.spans)))
            self._changed.notify(len(file.spans))

    def close(self) -> None:
        """Say that no more files come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, most: int, count: Callable[[int], None], check: Callable[[], None]) -> None:
        """Wait until no more than so many files are unfinished."""
        while True:
            check()
            with self._changed:
                if self._error is not None:
                    raise self._error
                if len(self._open) <= most:
                    return
                self._wanted = most // 2
                self._changed.wait(TICK)
            self.settle(count)

    def settle(self, count: Callable[[int], None]) -> None:
        """Tell of the bytes that came since the last time."""
        with self._changed:
            new, self._counted = self._came - self._counted, self._came
        if new:
            count(new)

    def end(self) -> None:
        """Stop what still runs, and close all files."""
        if not self._closed or self._open:
            self.effort.quit()
        self.close()
        while self._threads:
            self._threads.pop().join()
        for file in self._open:
            if file.output is not None:
                file.output.close()

    def came(self, size: int) -> None:
        """Note bytes that were written."""
        with self._changed:
            self._came += size

    def _start(self, work: Callable[[Grip, memoryview], None]) -> bool:
        """Start one more thread; whether there may be, and was, one more."""
        with self._changed:
            if self._running >= self._most:
                return False
            self._running += 1
        started: list[threading.Thread] = []
        try:
            start_threads(started, 1, functools.partial(self._guarded, work))
        except RuntimeError:
            with self._changed:
                self._running -= 1
            return False
        with self._changed:
            self._threads = [*filter(threading.Thread.is_alive, self._threads), *started]
        return True

    def _guarded(self, work: Callable[[Grip, memoryview], None]) -> None:
        try:
            with self.effort.gripped() as grip:
                work(grip, memoryview(bytearray(CHUNK)))
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            self.effort.quit()
        finally:
            with self._changed:
                self._running -= 1

    def _run(self, grip: Grip, buffer: memoryview) -> None:
        with contextlib.closing(Ahead[_Task](self.effort)) as ahead:
            for task, question in self._tasks(ahead):
                if question is not None and not ahead.silent:
                    if not self._ready(task, question, grip, buffer):
                        ahead.doubt()
                elif question is None or not self._start(functools.partial(self._one, task, question)):
                    self._one(task, question, grip, buffer)

    def _one(self, task: _Task, question: Question | None, grip: Grip, buffer: memoryview) -> None:
        """Bring one part, however long that takes."""
        with contextlib.closing(question) if question else contextlib.nullcontext():
            if question is not None:
                question.be_patient()
            sink, piece = self._opened(task, question, grip, buffer)
            piece.read()
        self._written(*task, sink.buffer)

    def _ready(self, task: _Task, question: Question, grip: Grip, buffer: memoryview) -> bool:
        """Take an answer that has begun to come; whether it did not stop in the middle.

        What failed is another thread's to mend: pauses of one that has other answers in hand would add up.
        """
        with contextlib.closing(question):
            sink, piece = self._opened(task, question, grip, buffer)
            whole = piece.begin()
            stalled = piece.stalled

        def mend(grip: Grip, buffer: memoryview) -> None:
            sink.buffer = buffer
            piece.pass_on(grip)
            piece.read()
            self._written(*task, buffer)

        if whole:
            self._written(*task, buffer)
        elif not self._start(mend):
            mend(grip, buffer)
        return not stalled

    def _opened(self, task: _Task, question: Question | None, grip: Grip, buffer: memoryview) -> tuple[FileSink, Piece]:
        file, number = task
        if len(file.spans) == 1:
            file.output = file.open()
        sink = FileSink(file, self.effort.requests, self.came, buffer)
        return sink, Piece(self.effort, grip, file.place, file.file, file.spans[number], sink, question)

    def _tasks(self, ahead: Ahead[_Task]) -> Iterator[tuple[_Task, Question | None]]:
        """Yield one task after another, and what was asked for it.

        A connection is waited for (``None``) only while none is held: else threads that hold some could wait for
        each other's.
        """
        task = None
        while True:
            if task is None and not ahead.full:
                task = self._next(alone=not ahead)
            if task is not None and self._is_asked(ahead, task):
                task = None
            elif ahead:
                first = ahead.first()
                if first is not None:
                    yield first
            elif task is not None:
                yield task, None
                task = None
            else:
                return

    def _is_asked(self, ahead: Ahead[_Task], task: _Task) -> bool:
        """Ask ahead, or have another thread do all of it where a connection must be made; whether either could be."""
        file, number = task
        if ahead.ask(task, file.file, file.spans[number]):
            return True
        return ahead.should_connect(file.file) and self._start(functools.partial(self._one, task, None))

    def _next(self, *, alone: bool) -> _Task | None:
        """Return the next task; ``alone``: wait for one, and take any; else leave what takes long to other threads."""
        with self._changed:
            while alone and not self._queue and not self._closed and not self.effort.stop.is_set():
                self._changed.wait(TICK)
            if self.effort.stop.is_set() or not self._queue or not (alone or self._queue[0][0].file.size <= SMALL):
                return None
            return self._queue.popleft()

    def _written(self, file: File, number: int, buffer: memoryview) -> None:
        """Note that a part is written; check what can be checked now; after the last one close the file."""
        if len(file.spans) > 1 and not self._is_last(file, number, buffer):
            return
        problem = file.digests.problem() if file.digests is not None else None
        if problem:
            raise corrupt(file.place, file.file, problem)
        output, file.output = file.output, None
        if output is not None:
            output.finish()
        with self._changed:
            self._open.discard(file)
            if len(self._open) <= self._wanted:
                self._changed.notify_all()

    def _is_last(self, file: File, number: int, buffer: memoryview) -> bool:
        """Note that a part of several is written; check what can be checked now; whether that was all: once."""
        with self._changed:
            file.done.add(number)
        for span in self._in_order(file):
            if file.digests is not None and file.digests.any:
                read_back(file, span, file.digests, buffer)
        with self._changed:
            if file.ended or file.checked < len(file.spans):
                return False
            file.ended = True
            return True

    def _in_order(self, file: File) -> Iterator[Span]:
        """Yield the parts that follow those checked, as far as they are written and nobody else is at it."""
        while True:
            with self._changed:
                if file.checking or file.checked not in file.done:
                    return
                file.checking = True
            yield file.spans[file.checked]
            with self._changed:
                file.checking = False
                file.checked += 1
