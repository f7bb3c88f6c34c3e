"""``Upstairs``: what the disk tier must know of the memory tier, which keeps the files of its models."""

from collections.abc import Collection
from typing import Protocol

from modelcache.events import Reason


class Upstairs(Protocol):
    """What the disk tier must know of the memory tier, which keeps the files of its models."""

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models`` from memory; return whether there was one."""
        ...

    def idle(self, models: Collection[str]) -> bool:
        """Whether one of ``models`` could be evicted from memory now; the guard is held."""
        ...

    def unmet(self, *, over: bool) -> None:
        """Note whether a limit of the disk tier waits for a lease to end; the guard is held."""
        ...

    def holders(self, models: Collection[str]) -> tuple[tuple[str, int, float], ...]:
        """Return ``(model, leases, age of the oldest in seconds)`` for each leased one; the guard is held."""
        ...
