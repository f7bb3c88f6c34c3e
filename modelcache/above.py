"""``Above``: the memory tier, as the disk tier sees it."""

from collections.abc import Collection
from typing import Any

from modelcache.events import Reason
from modelcache.memory.residents import Residents
from modelcache.memory.room import Room


class Above:
    """Answers ``disk.upstairs``.

    Args:
        residents: who is in memory.
        room: evicts from there.
    """

    def __init__(self, residents: Residents[Any], room: Room[Any]) -> None:
        self._residents = residents
        self._room = room

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models`` from memory; return whether there was one."""
        return self._room.give_up(frozenset(models), reason, figures, for_model)

    def idle(self, models: Collection[str]) -> bool:
        """Whether one of ``models`` could be evicted from memory now; the guard is held."""
        resident = self._residents.resident
        return any(model in resident and not resident[model].held() for model in models)

    def unmet(self, *, over: bool) -> None:
        """Note whether a limit of the disk tier waits for a lease to end; the guard is held."""
        self._residents.disk_over = over
        self._residents.update_short()

    def holders(self, models: Collection[str]) -> tuple[tuple[str, int, float], ...]:
        """Return ``(model, leases, age of the oldest in seconds)`` for each leased one; the guard is held."""
        return self._residents.holders(frozenset(models))
