"""Small objects asked for before their turn, so that one thread keeps many answers coming.

A thread for each would spend more time on waiting for the interpreter than on the objects. What is done with the
answers is ``s3_saving``'s business.
"""

import math
import select
from collections.abc import Sequence
from typing import Generic, TypeVar

from modelcache.sources.base import RemoteFile
from modelcache.sources.s3_effort import Effort
from modelcache.sources.s3_get import BRIEF, Question, Span
from modelcache.sources.s3_means import TICK
from modelcache.sources.s3_parts import spans_of
from modelcache.sources.s3_stream import CONNECTIONS

_Task = TypeVar("_Task")

SMALL = 64 * 1024
"""Bytes of an object that is asked for ahead: its answer fits into the kernel's buffers, so it keeps nobody waiting."""
DEPTH = 16
"""Answers that one thread waits for."""
_LOOKS = round(BRIEF / TICK)  # for the next answer; after that all are silent


class Ahead(Generic[_Task]):
    """The questions of one thread.

    Concurrency: one thread.

    Args:
        effort: what all files share.
    """

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._means = effort.requests.getter.means
        self._means.join()
        self._poll = select.poll()
        self._asked: dict[int, tuple[_Task, Question]] = {}
        self._ready: list[int] = []
        self._looks = 0  # in vain, since the last answer
        self._doubted: set[int] = set()
        self._silent = False

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def full(self) -> bool:
        """Whether no more is to be asked for as yet."""
        return len(self) >= DEPTH

    def ask(self, task: _Task, file: RemoteFile, span: Span) -> bool:
        """Ask for what a task is about; whether that could be done."""
        if file.size > SMALL:
            return False
        try:
            question = self._effort.requests.getter.ask_ahead(file, span, len(self))
        except Exception:  # noqa: BLE001 - asked again in its turn, where errors are told
            return False
        if question is None:
            return False
        descriptor = question.fileno()
        self._asked[descriptor] = task, question
        self._poll.register(descriptor, select.POLLIN)
        return True

    def should_connect(self, file: RemoteFile) -> bool:
        """Whether a file that can't be asked for ahead could be, over one more connection."""
        return file.size <= SMALL and self._effort.requests.getter.should_connect(file, len(self))

    @property
    def silent(self) -> bool:
        """Whether what ``first`` returned just now is perhaps not to come, or not soon."""
        return self._silent

    def doubt(self) -> None:
        """Take all that is waited for to be silent, as one answer has stopped in the middle."""
        self._doubted.update(self._asked)

    def first(self) -> tuple[_Task, Question] | None:
        """Return a task whose answer has begun to come, or, if all are silent, that which was asked first.

        None where nothing came for a moment, in which there may be more to ask for. The caller closes the question.
        """
        if not self._ready:
            given_up = self._looks >= _LOOKS or self._effort.stop.is_set()
            self._ready = [descriptor for descriptor, _ in self._poll.poll(0 if given_up else TICK * 1000)]
            if not self._ready and not given_up:
                self._looks += 1
                return None
            self._looks = 0 if self._ready else self._looks
        descriptor = self._ready.pop(0) if self._ready else next(iter(self._asked))
        self._silent = self._looks >= _LOOKS or descriptor in self._doubted
        self._doubted.discard(descriptor)
        self._poll.unregister(descriptor)
        return self._asked.pop(descriptor)

    def close(self) -> None:
        """Give up all answers."""
        while self._asked:
            _, (_, question) = self._asked.popitem()
            question.close()
        self._means.leave()


def useful(effort: Effort, files: Sequence[RemoteFile], most: int) -> int:
    """Return the threads that files can use, with so many connections."""
    small = [file for file in files if file.size <= SMALL]
    large = sum(min(CONNECTIONS, len(spans_of(file.size))) for file in files if file.size > SMALL)
    each = DEPTH if small and effort.requests.getter.can_ask_ahead(small[0]) else 1
    return large + math.ceil(min(len(small), most) / each)
