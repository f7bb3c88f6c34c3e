"""``Applicant``: who needs room in memory, as ``memory.admission`` sees it."""

from collections.abc import Iterable
from typing import Protocol

from modelcache.errors import NoRoom


class Applicant(Protocol):
    """Who needs room in memory."""

    state: str

    @property
    def model(self) -> str:
        """The id of the model that is to be loaded."""
        ...

    @property
    def nested(self) -> bool:
        """Whether a loader under way waits for it: then it does not wait behind others."""
        ...

    def first(self, line: Iterable[object]) -> bool:
        """Whether nobody in the line goes before it; the guard is held."""
        ...

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, or for room as it does; the guard is held."""
        ...

    def own_threads(self) -> set[object]:
        """Return the identities of the threads that wait for it, and that run it; the guard is held."""
        ...

    def check(self) -> None:
        """Raise Cancelled where it was told to stop, or nobody waits for it any more; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...

    def refused(self, refusal: NoRoom | None) -> None:
        """Note what stands in the way (None: nothing), for a waiter whose time ends meanwhile; the guard is held."""
        ...
