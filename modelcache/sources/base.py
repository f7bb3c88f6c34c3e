"""What a source is: it finds an artifact for a model id, and streams one version of its bytes.

Where those bytes go, and what is made of them, is ``fetch``; which models are asked for, and how often, ``cache``.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import attrs

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".tar.zst", ".tzst", ".zip")
"""An id that ends in one of these (case ignored) is a key as it stands; a file so named must hold an archive."""


@attrs.frozen
class RemoteFile:
    """One object or file at the source.

    Attributes:
        name: its path inside the artifact, ``/`` between parts, as the source calls it: not to be trusted.
        size: bytes, as the source stores it.
        version: what pins these very bytes (ETag, version id, or size and time of a local file).
        address: where the source finds it again (a key, a path); only the source reads this.
        checksums: algorithm (``"crc32"``, ``"sha256"``, ``"md5"``, ...) to expected hex digest of the whole
            file, where the source knows any; ``"md5/5242880"`` is the digest of the digests of parts of so many
            bytes, followed by their number.
    """

    name: str
    size: int
    version: str
    address: str
    checksums: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Artifact:
    """One version of what a model is made from, found but not fetched.

    Attributes:
        model: the id it was found for.
        version: one string for the whole; changes whenever a byte may have changed.
        files: what is to be fetched; exactly one where ``folder`` is false.
        folder: True: a prefix or folder, fetched file by file. False: one file, perhaps an archive.
        path: where it lies on this machine, ready to load without a copy; None where it must be fetched.
    """

    model: str
    version: str
    files: tuple[RemoteFile, ...]
    folder: bool = False
    path: Path | None = None

    @property
    def size(self) -> int:
        """Bytes to fetch, all files together."""
        return sum(file.size for file in self.files)


class Stream(Protocol):
    """The bytes of one file, in order, as stored (no content encoding undone)."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; ``b""`` at the end, and only once length and checksum were found right.

        Broken connections are resumed inside at the exact offset.

        Raises:
            ArtifactChanged: the file is no longer the version that was asked for.
            ArtifactCorrupt: length or checksum differ from what the source promised.
            SourceUnavailable: the source broke off, or stayed silent, too often.
            AccessDenied: the credentials were refused or have expired.
        """
        ...

    def close(self) -> None:
        """Give the connection back; may be called at any time, more than once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


@runtime_checkable
class Source(Protocol):
    """A place with artifacts.

    Concurrency: both methods are called from several threads at once, after a fork also from a child
    process, and never under a lock of the cache. Neither does anything at construction that needs the network.
    """

    @property
    def url(self) -> str:
        """For people: where this is, without secrets."""
        ...

    def find(self, model: str) -> Artifact:
        """Return the present version of a model's artifact; ``model`` is already validated.

        Raises:
            ModelNotFound: there is none.
            SourceUnavailable: the source can't be asked.
            AccessDenied: the credentials were refused.
        """
        ...

    def open(self, artifact: Artifact, file: RemoteFile) -> Stream:
        """Return the bytes of one of ``artifact.files``, pinned to its version."""
        ...


@runtime_checkable
class Watchable(Protocol):
    """A stream that looks up while it waits for bytes."""

    def watch(self, check: Callable[[], None], /) -> None:
        """Have ``check`` called on the reader's thread, now and then while it waits; what it raises ends the read."""
        ...


class Output(Protocol):
    """A new file that a :class:`Saving` source writes to; never use its descriptor after ``finish`` or ``close``."""

    @property
    def descriptor(self) -> int:
        """For ``os.pwrite`` and the like."""
        ...

    def finish(self) -> None:
        """Close it after all is written; raises OSError where the disk is full, or broken."""
        ...

    def close(self) -> None:
        """Close it where it was given up; never raises, and does nothing once it is closed."""
        ...


@runtime_checkable
class Saving(Protocol):
    """A source that writes files itself, several at once, or one from several connections."""

    def save(
        self,
        artifact: Artifact,
        put: Callable[[RemoteFile], Callable[[], Output]],
        *,
        count: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        """Write all files of an artifact, pinned to their versions and checked; returns once all are written.

        Args:
            artifact: what ``find`` returned.
            put: called on the caller's thread, once a file: makes room for it, and returns what opens a new file to
                write to, which may have its length already, all zeros. That is called once, on any thread, and the
                file closed by the source.
            count: called on the caller's thread with the bytes that have come since the last time.
            check: called on the caller's thread, several times a second; raises to stop.

        Raises:
            ModelCacheError: as ``Source.open`` and ``Stream.read``.
            OSError: of the files written.
        """
        ...
