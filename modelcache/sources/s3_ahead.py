"""Small objects asked for before their turn, so that one thread keeps many answers coming.

A thread for each would spend more time on waiting for the interpreter than on the objects. What is done with the
answers is ``s3_saving``'s business.
"""

import select
from typing import Generic, TypeVar

from modelcache.sources.base import RemoteFile
from modelcache.sources.s3_effort import Effort
from modelcache.sources.s3_get import Question, Span
from modelcache.sources.s3_means import TICK

_Task = TypeVar("_Task")

SMALL = 64 * 1024
"""Bytes of an object that is asked for ahead: its answer fits into the kernel's buffers, so it keeps nobody waiting."""
DEPTH = 16
"""Answers that one thread waits for."""
_LOOKS = 20  # of TICK seconds each, for the first answer of several; after that one is waited for by its own timeout


class Ahead(Generic[_Task]):
    """The questions of one thread.

    Concurrency: one thread.

    Args:
        effort: what all files share.
    """

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._poll = select.poll()
        self._asked: dict[int, tuple[_Task, Question]] = {}
        self._ready: list[int] = []

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, task: _Task, file: RemoteFile, span: Span) -> bool:
        """Ask for what a task is about; whether that could be done."""
        if file.size > SMALL:
            return False
        try:
            question = self._effort.requests.getter.ask_ahead(file, span)
        except Exception:  # noqa: BLE001 - asked again in its turn, where errors are told
            return False
        if question is None:
            return False
        descriptor = question.fileno()
        self._asked[descriptor] = task, question
        self._poll.register(descriptor, select.POLLIN)
        return True

    def first(self) -> tuple[_Task, Question]:
        """Return a task whose answer has begun to come, or that which was asked first; the caller closes the latter."""
        looks = 0
        while not self._ready and looks < _LOOKS and not self._effort.stop.is_set():
            self._ready = [descriptor for descriptor, _ in self._poll.poll(TICK * 1000)]
            looks += 1
        descriptor = self._ready.pop(0) if self._ready else next(iter(self._asked))
        self._poll.unregister(descriptor)
        return self._asked.pop(descriptor)

    def close(self) -> None:
        """Give up all answers."""
        while self._asked:
            _, (_, question) = self._asked.popitem()
            question.close()
