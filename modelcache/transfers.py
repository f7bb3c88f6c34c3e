"""``Transfer``: the bytes of one artifact on their way from the source, and how fast they came lately.

Who moves them is ``fetch``; who is told of them ``prefetching``. The cache's guard is held for each call.
"""

import time
from collections import deque

_GRAIN = 0.25  # seconds that one figure of the recent past stands for
_GRAINS = 20  # of these are remembered


class Transfer:
    """One artifact on its way, in bytes as stored.

    Attributes:
        size: of the whole artifact, 0 where nothing needs to be transferred; None: not found yet.
        arrived: bytes that are here; from 0 again where the fetch is begun anew.
        since: monotonic seconds at which the first byte was asked for; None: none was.
    """

    def __init__(self) -> None:
        self.size: int | None = None
        self.arrived = 0
        self.since: float | None = None
        self._recent: deque[tuple[int, int]] = deque(maxlen=_GRAINS)  # bytes of each grain in which some came

    def found(self, size: int) -> None:
        """Take note of the artifact's size; one that turned out to be here already has none to transfer."""
        if size or self.size is None:
            self.size = size

    def spare(self) -> None:
        """Take note that nothing needs to be transferred after all: another process has done so."""
        self.size = self.arrived = 0

    def begin(self) -> None:
        """Take note that its bytes are asked for, from the first on."""
        self.arrived = 0
        if self.since is None:
            self.since = time.monotonic()

    def count(self, amount: int) -> None:
        """Take note of bytes that have arrived."""
        grain = int(time.monotonic() / _GRAIN)
        self.arrived += amount
        if self._recent and self._recent[-1][0] == grain:
            amount += self._recent.pop()[1]
        self._recent.append((grain, amount))

    def recent(self, first: int) -> int:
        """Return the bytes that arrived in the grain ``first`` and later."""
        return sum(amount for grain, amount in self._recent if grain >= first)


def rate(transfers: list[Transfer]) -> float:
    """Return the bytes a second that several transfers together brought over the last five seconds."""
    now = time.monotonic()
    begun = [transfer.since for transfer in transfers if transfer.since is not None]
    if not begun:
        return 0.0
    first = int(now / _GRAIN) - _GRAINS + 1
    span = max(min(now - first * _GRAIN, now - min(begun)), _GRAIN)
    return sum(transfer.recent(first) for transfer in transfers) / span
