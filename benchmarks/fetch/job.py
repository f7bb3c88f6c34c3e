"""What a row is given: one thing to fetch, and where to."""

from pathlib import Path

import attrs

from benchmarks.fetch.data import ARCHIVE, FILE, FOLDER


class NotThisCase(Exception):
    """The row has no meaning for this case."""


KEYS = {"file": FILE, "archive": ARCHIVE, "folder": f"{FOLDER}/"}


@attrs.frozen
class Job:
    """One thing to fetch.

    Attributes:
        case: ``"file"``, ``"archive"`` or ``"folder"``.
        endpoint: where the server is.
        target: an empty folder.
        source: the served object or folder on this machine's disk, for the limits.
    """

    case: str
    endpoint: str
    target: Path
    source: Path

    @property
    def key(self) -> str:
        """Key or prefix."""
        return KEYS[self.case]
