"""What the serving process writes down as it goes, in a mapped file: it outlives a process that the kernel kills.

Who reads it is ``watch``.
"""

import mmap
from pathlib import Path

FIGURES = (
    "begun",  # requests
    "hits",
    "misses",
    "loads",
    "evictions",
    "reload_seconds",  # in loads of what had been in memory before
    "held",  # models in memory, summed over looks
    "models",  # bytes of their footprints, likewise
    "reserved",  # bytes reserved for loads under way, likewise
    "looks",
    "room",  # (used + reserved) / high, summed over looks during which a load waited for room
    "waits",  # how many such looks
    "underrated",  # bytes: the most that a load took beyond what was reserved for it
    "seconds",  # of serving
)
TODO, BEGUN, DONE, FAILED = range(4)
"""What becomes of a request; one that is BEGUN when its process dies is lost."""


class Book:
    """Figures and the fate of each request.

    Concurrency: one process writes at a time; within it each figure, and each request, is one thread's.

    Args:
        path: a file of the right size; see ``create``.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 0)
        self._figures = memoryview(self._bytes)[: 8 * len(FIGURES)].cast("d")
        self.requests = memoryview(self._bytes)[8 * len(FIGURES) :]

    @classmethod
    def create(cls, path: Path, requests: int) -> "Book":
        """Write an empty one."""
        path.write_bytes(bytes(8 * len(FIGURES) + requests))
        return cls(path)

    def __getitem__(self, name: str) -> float:
        """Return a figure."""
        return self._figures[FIGURES.index(name)]

    def __setitem__(self, name: str, value: float) -> None:
        """Write a figure."""
        self._figures[FIGURES.index(name)] = value

    def figures(self) -> dict[str, float]:
        """Return all figures."""
        return dict(zip(FIGURES, self._figures, strict=True))

    def count(self, fate: int) -> int:
        """Return how many requests came to that."""
        return bytes(self.requests).count(fate)

    def close_lost(self) -> int:
        """Count requests that were under way when a process died as failed; return how many are still to do."""
        for number, fate in enumerate(self.requests):
            if fate == BEGUN:
                self.requests[number] = FAILED
        return self.count(TODO)
