"""What every part of one unpacking needs: whose it is, the limits, and how its errors are worded.

Covers the limits and the count of unpacked bytes. Which limit applies where is in ``tree``, ``decode``, ``tar``
and ``zip``; how much disk there is, is known to the caller's ``grow``.
"""

import attrs

from modelcache.errors import ArtifactCorrupt, UnsafeArtifact
from modelcache.units import format_bytes

CHUNK = 256 * 1024
"""Bytes read and written at a time."""
_SHOWN = 200


@attrs.frozen
class Limits:
    """How far an archive may go before it is refused as ``UnsafeArtifact``.

    Attributes:
        members: members, and folders made for them. Each costs an inode and a few system calls; real models
            have a few thousand, a million would take hours to check and delete.
        path: bytes of a member's path, and of a link's goal: what Linux can open at all.
        part: bytes of one part of a path: what Linux file systems can store.
        depth: folders inside one another. Deleting a tree recurses and holds a descriptor a level.
        file: bytes of one file, and what a header may claim of one. Two orders above today's biggest.
        total: bytes of all files. How much disk there is stops an archive long before.
        header: bytes of one PAX or GNU long-name header of a tar, which has to be held in memory.
        headers: bytes of all of these; each costs time, and nothing else would bound them.
        frames: gzip members or zstd frames, unless they have 1 KiB or more on average: each takes time to begin.
        directory: bytes of a zip's directory, which has to be held in memory.
        floor: bytes that any archive may unpack to, however small it is as stored.
        ratio: how many times its stored size an archive may unpack to, above ``floor``. Sparse weights reach
            20, text 10; bombs 1000.
    """

    members: int = 100_000
    path: int = 4096
    part: int = 255
    depth: int = 128
    file: int = 2**39
    total: int = 2**40
    header: int = 2**20
    headers: int = 128 * 2**20
    frames: int = 10_000
    directory: int = 64 * 2**20
    floor: int = 2**30
    ratio: int = 200


def shown(name: str) -> str:
    """Return an untrusted name for a message: quoted, control characters escaped, cut if long."""
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...'"


@attrs.define
class Job:
    """One unpacking.

    Attributes:
        model: id of the model.
        size: bytes of the file as stored.
        limits: how far it may go.
        unpacked: bytes decoded so far.
    """

    model: str
    size: int
    limits: Limits = Limits()
    unpacked: int = 0

    def count(self, size: int, member: str | None = None) -> None:
        """Add ``size`` decoded bytes.

        Raises:
            UnsafeArtifact: the archive unpacks to far more than its stored size explains.
        """
        self.unpacked += size
        if self.unpacked > self.limits.total:
            raise self.unsafe(f"unpacks to more than {format_bytes(self.limits.total)}", member)
        if self.unpacked > self.limits.floor and self.unpacked > self.limits.ratio * self.size:
            raise self.unsafe(
                f"unpacks to more than {format_bytes(self.limits.floor)} and {self.limits.ratio} times "
                f"its stored {format_bytes(self.size)}: a decompression bomb",
                member,
            )

    def corrupt(self, what: str, member: str | None = None, offset: int | None = None) -> ArtifactCorrupt:
        """Return the error for bytes that are no whole archive."""
        place = "" if offset is None else f" (at byte {offset} of the stored file)"
        text = f"{self._who(member)}: {what}{place}; pack it and upload it again"
        return ArtifactCorrupt(text, model=self.model, member=member, offset=offset)

    def unsafe(self, what: str, member: str | None = None) -> UnsafeArtifact:
        """Return the error for an archive that must not be unpacked; nothing of it is used."""
        text = f"{self._who(member)}: {what}; refused as a whole: look at where it comes from, and pack it again"
        return UnsafeArtifact(text, model=self.model, member=member)

    def _who(self, member: str | None) -> str:
        whose = f"model {shown(self.model)}"
        return whose if member is None else f"{whose}, member {shown(member)}"
