"""What a policy is: the :class:`Policy` protocol, and :class:`Resident`, what it is told of a model.

The orders themselves are beside it: ``ranked`` (LRU, LFU, FIFO), ``worth``, and ``guarded`` for a user's own.
"""

from collections.abc import Collection, Iterable
from typing import Protocol, runtime_checkable

import attrs


@attrs.frozen
class Resident:
    """What a policy is told about a model that entered its tier.

    Attributes:
        model: its id.
        bytes: its size in that tier.
        cost: seconds to bring it back once it is gone.
    """

    model: str
    bytes: int
    cost: float


@runtime_checkable
class Policy(Protocol):
    """Ranks the models of one tier; a seam that a user may fill.

    Concurrency: the tier calls all four under its lock, so never two at a time. They must not block, do I/O, log
    or call the cache. Of what they raise see :class:`Guarded`. A forked child goes on with its copy.
    """

    def requested(self, model: str, clock: int) -> None:
        """Note one request for ``model``.

        Called for each request, hit or miss, in order, before :meth:`admitted` where that brings the model in;
        so also for models that are not in the tier. Hits may be told late, in batches.

        Args:
            model: its id.
            clock: how many requests the cache has had so far, this one included.
        """

    def admitted(self, resident: Resident) -> None:
        """Note that a model entered the tier, or that its bytes or cost were measured anew (no request)."""

    def removed(self, model: str) -> None:
        """Note that a model left the tier, for whatever reason; unknown ids are ignored."""

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Return who goes, the least worthy first; being asked changes no standing.

        Args:
            need: bytes to free; a hint.
            evictable: ids of the models that may go; no others count.

        Returns:
            Ids. The caller takes as many as it needs, before it calls another method, and drops the rest.
        """
