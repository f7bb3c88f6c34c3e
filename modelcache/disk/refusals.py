"""Why a fetch gets no room on disk, or is none of this process's: the errors of ``disk.reserving`` and ``agreeing``."""

from pathlib import Path

from modelcache.disk.items import DiskShortage
from modelcache.errors import AccessDenied, NoRoom, TooLarge
from modelcache.events import Reason
from modelcache.units import format_bytes, format_holders


class FetchedElsewhere(Exception):
    """Another process is fetching the model already."""


class Contention(Exception):
    """Two fetches wait for one another's room: this one gives up its share, and starts again later.

    Attributes:
        need: bytes to reserve at the next start, so that the two do not meet again.
    """

    def __init__(self, need: int) -> None:
        super().__init__(need)
        self.need = need


def no_room(
    model: str, amount: int, shortage: DiskShortage, path: Path, holders: tuple[tuple[str, int, float], ...]
) -> NoRoom:
    """Return the error that says what is in the way of ``amount`` more bytes."""
    figures = shortage.figures
    by_budget = shortage.reason is Reason.DISK_BUDGET
    where = "in" if by_budget else "on the file system of"
    advice = "raise disk.budget" if by_budget else "free the disk, or lower disk.min_free"
    return NoRoom(
        f"no room on disk for {model!a}: it needs {format_bytes(amount)} more, {shortage.reason} allows "
        f"{format_bytes(figures['high'])} and {format_bytes(figures['used'])} are taken {where} {path}"
        + (f", held by leases on {format_holders(holders)}" if holders else "")
        + f": {advice}",
        model=model,
        tier="disk",
        need=amount,
        used=figures["used"],
        limit=figures["high"],
        holders=holders,
    )


def too_large(model: str, need: int, beside: int, budget: int) -> TooLarge:
    """Return the error for a model that can never fit within the budget."""
    old = f", beside the {format_bytes(beside)} of its old version" if beside else ""
    return TooLarge(
        f"model {model!a} needs {format_bytes(need)} on disk{old}, more than the whole disk budget "
        f"of {format_bytes(budget)}: raise disk.budget",
        model=model,
        tier="disk",
        need=need,
        limit=budget,
    )


def not_deleted(model: str, path: Path) -> AccessDenied:
    """Return the error for a model that is to be removed from a folder that can only be read."""
    return AccessDenied(
        f"model {model!a} can't be deleted from disk folder {path}, which can only be read: "
        "delete it as a user who may write to it",
        model=model,
        source=str(path),
    )


def read_only(model: str, path: Path) -> AccessDenied:
    """Return the error for a model that would have to be fetched into a folder that can only be read."""
    return AccessDenied(
        f"model {model!a} is not in disk folder {path}, or not as it should be, and that folder can only be read: "
        "give DiskTier a folder that this user may write to",
        model=model,
        source=str(path),
    )
