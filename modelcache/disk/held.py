"""``Held``: a published artifact that is read, and that no process removes meanwhile."""

from pathlib import Path

import attrs

from modelcache.disk.items import Item
from modelcache.disk.pins import Pin


@attrs.define(eq=False)
class Held:
    """A published artifact that no process removes while this is open.

    Attributes:
        item: what it is.
        folder: where it lies.
        pin: what keeps it there; None once it was released.
    """

    item: Item
    folder: Path
    pin: Pin | None

    @property
    def path(self) -> Path:
        """What the loader gets."""
        return self.item.record.path(self.folder)

    @property
    def size(self) -> int:
        """Bytes of the artifact's files."""
        return self.item.size

    @property
    def version(self) -> str:
        """The source's version of it."""
        return self.item.version
