"""Every error that modelcache raises, in one tree.

::

    ModelCacheError
    ├── ConfigError(ValueError)               a setting that can't work, told at construction where it shows there
    ├── InvalidModelId(ValueError)            an id that could not name a model safely
    ├── ModelNotFound(LookupError)            the source has no such model
    ├── SourceUnavailable(ConnectionError)    the source did not answer, or answered that it can't
    ├── AccessDenied(PermissionError)         the source, or a local folder, refuses these credentials
    ├── ArtifactChanged                       the artifact was replaced while it was fetched
    ├── ArtifactCorrupt                       the bytes are not what the source promised, or no artifact
    ├── UnsafeArtifact                        an archive that reaches outside its folder or past a limit
    ├── TooLarge(MemoryError)                 the model can never fit within a limit
    ├── NoRoom(MemoryError)                   the model does not fit now
    ├── LoadFailed                            the user's ``load`` (or ``size_of``, or the disk) failed
    ├── CacheClosed                           the cache was closed
    └── Timeout(TimeoutError)                 the caller's wait ended first

Those with a builtin in brackets are also that, so ``except LookupError`` works. What an error knows is in
its attributes as well as in its text; all of them survive pickling and :func:`copy.copy`.
Events and how failures are remembered are not here: see ``events`` and ``flights``.
"""

import copy
from typing import Any, Self


class ModelCacheError(Exception):
    """Base of every error of this library.

    Args:
        message: what happened, to which model, against which limit, and what to do.
        **data: the facts behind the message; each becomes an attribute.

    Attributes:
        model: id of the model that the error is about; None where it is about none.
    """

    model: str | None = None

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.__dict__.update(data)

    def fresh(self) -> Self:
        """Return an equal error without traceback, for one more caller to raise.

        Two threads that raise one exception object would grow one another's traceback.
        """
        twin = copy.copy(self)
        twin.__cause__ = self.__cause__
        twin.__suppress_context__ = True
        return twin


class ConfigError(ModelCacheError, ValueError):
    """A setting that can't work.

    Attributes:
        setting: name of the setting.
        value: what was given.
    """

    setting: str | None = None
    value: Any = None


class InvalidModelId(ModelCacheError, ValueError):
    """An id that could not name a model safely; never remembered, never sent to the source."""


class ModelNotFound(ModelCacheError, LookupError):
    """The source has no artifact for this id.

    Attributes:
        source: URL of the source.
        tried: the places that were looked at, in order.
    """

    source: str | None = None
    tried: tuple[str, ...] = ()


class SourceUnavailable(ModelCacheError, ConnectionError):
    """The source did not answer, broke off too often, or answered that it can't serve now.

    Attributes:
        source: URL of the source.
        code: the source's own error code, e.g. ``SlowDown``; None where there was no answer.
    """

    source: str | None = None
    code: str | None = None


class AccessDenied(ModelCacheError, PermissionError):
    """The source, or a folder on this machine, refuses these credentials.

    Attributes:
        source: URL or path that refused.
        code: the source's own error code, e.g. ``ExpiredToken``.
    """

    source: str | None = None
    code: str | None = None


class ArtifactChanged(ModelCacheError):
    """The artifact was replaced at the source while it was being fetched, several times running.

    Attributes:
        source: URL of the source.
        version: the version (ETag or version id) that was asked for.
    """

    source: str | None = None
    version: str | None = None


class ArtifactCorrupt(ModelCacheError):
    """The bytes are not what the source promised, or they are no artifact of a kind we know.

    Attributes:
        source: URL of the source; None where only the bytes are known.
        version: the version (ETag or version id) that was fetched.
        member: name of the archive member or file at which it was seen.
        offset: byte offset at which it was seen, in the artifact as stored.
    """

    source: str | None = None
    version: str | None = None
    member: str | None = None
    offset: int | None = None


class UnsafeArtifact(ModelCacheError):
    """An archive or folder that would write outside its folder, make a device, or go past a limit of archives.

    Attributes:
        member: name of the offending member.
    """

    member: str | None = None


class TooLarge(ModelCacheError, MemoryError):
    """The model can never fit within a limit, however much is evicted.

    Attributes:
        tier: ``"memory"`` or ``"disk"``.
        need: bytes the model needs.
        limit: bytes there can be at most.
    """

    tier: str | None = None
    need: int | None = None
    limit: int | None = None


class NoRoom(ModelCacheError, MemoryError):
    """The model does not fit now: what is in the way is leased, or does not belong to the cache.

    Servers turn it into 507 or 503.

    Attributes:
        tier: ``"memory"`` or ``"disk"``.
        need: bytes the model needs; models, where ``max_models`` is in the way.
        used: how many of these were in use when it was refused.
        limit: how many there may be.
        holders: ``(model, leases, age of the oldest lease in seconds)`` for each leased model in the way; empty where
            what is in the way is not the cache's.
    """

    tier: str | None = None
    need: int | None = None
    used: int | None = None
    limit: int | None = None
    holders: tuple[tuple[str, int, float], ...] = ()


class LoadFailed(ModelCacheError):
    """The user's ``load`` raised (see ``__cause__``), returned None, or asked for itself in a circle.

    Also where ``size_of`` or a ``Source`` raised what is none of these errors, or the disk is broken.
    """


class CacheClosed(ModelCacheError):
    """The cache was closed, or is being closed; never remembered."""


class Timeout(ModelCacheError, TimeoutError):
    """The caller's wait ended before the model was there; a fetch or load under way goes on.

    Attributes:
        timeout: seconds waited.
        state: what the model was doing: ``"fetching"``, ``"loading"``, ...
    """

    timeout: float | None = None
    state: str | None = None
