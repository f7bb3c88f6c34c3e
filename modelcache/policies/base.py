"""What a policy is: the :class:`Policy` protocol, :class:`Remembering`, and what they are told of a model.

The orders themselves are beside it: ``ranked`` (LRU, LFU, FIFO), ``worth``, and ``guarded`` for a user's own.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
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


@attrs.frozen
class Standing:
    """What is known of the requests for one model, relative to a policy's clock, so that it can outlive a restart.

    Whoever keeps it for longer than a moment keeps ``clock - age`` and ``clock - idle``, the requests at which the
    model was first and last asked for, and a clock that goes on over restarts; :meth:`at` makes a standing of them.

    Attributes:
        n: requests, halved now and then together with the age.
        age: requests to the cache since the first that counts.
        idle: requests to the cache since the last for this model.

    Raises:
        ValueError: no requests, a number below 0, or one that is not finite.
    """

    n: float
    age: float
    idle: float

    def __attrs_post_init__(self) -> None:
        if not (0 < self.n < math.inf and 0 <= self.age < math.inf and 0 <= self.idle < math.inf):
            raise ValueError(f"{self} is impossible")

    @classmethod
    def at(cls, clock: float, n: float, first: float, last: float) -> "Standing":
        """Return the standing at ``clock`` of a model first and last asked for then; what lies ahead is taken as now.

        Raises:
            ValueError: as the class.
        """
        return cls(n, max(clock - first, 0), max(clock - last, 0))


@runtime_checkable
class Policy(Protocol):
    """Ranks the models of one tier; a seam that a user may fill.

    Where caches of several sources share a disk folder, each policy is told of all models there: those of its own
    source by their ids, the others by the URL of their source, a line break, and their id.

    Concurrency: the tier calls all four under its lock, so never two at a time. They must not block, do I/O, log
    or call the cache. Of what they raise see :class:`Guarded`. A forked child goes on with its copy.
    """

    def requested(self, model: str, clock: int) -> None:
        """Note one request for ``model``.

        Called before :meth:`admitted` where that brings the model in; so also for models that are not in the tier. The
        memory tier tells of hits late, in batches, of each batch the last 10,000, so perhaps after a later miss. The
        disk tier tells of lookups that memory missed.

        Args:
            model: its id.
            clock: how many requests the tier has had so far, this one included; it may skip some.
        """

    def admitted(self, resident: Resident) -> None:
        """Note that a model entered the tier, or that its bytes or cost were measured anew (no request)."""

    def removed(self, model: str) -> None:
        """Note that a model left the tier, for whatever reason; unknown ids are ignored."""

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Return who goes, the least worthy first; being asked changes no standing.

        Args:
            need: bytes to free; a hint.
            evictable: ids of the models that may go; no others count. Any collection: a list, a set, or a view that
                looks at the tier each time it is asked. In a view ``in`` costs next to nothing, while ``len`` and a
                walk cost a look at every model; it is good until another method is called.

        Returns:
            Ids; best as a generator that finds the next one when asked. The caller takes as many as it needs, before
            it calls another method, and drops the rest.
        """


@runtime_checkable
class Remembering(Protocol):
    """What our policies have beside the four methods, for a tier that keeps standings over restarts.

    A tier that shares what it keeps with other processes recalls a model before it books a request for it, and keeps
    its standing after that: so the requests of all of them add up.

    Concurrency: as :class:`Policy` says.
    """

    def standing(self, model: str) -> Standing | None:
        """Return what is known of a model, here or gone; None where that is nothing, or nothing worth keeping."""

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:
        """Take in what is known of a model from before a restart, or from another process; no request.

        Of several models the one that was asked for longest ago comes first. Recalling twice is recalling once.

        Args:
            model: its id.
            standing: what is known.
            clock: when that is so; 0: at the latest clock that it was told.
        """


def recall_order(policy: Policy, models: Sequence[str]) -> None:
    """Tell a policy in which order models that a tier has found were used last, the longest ago first; no requests.

    Each stands as if asked for once, and idle for as many requests as there were others after it: at least.
    """
    if isinstance(policy, Remembering):
        for idle, model in zip(range(len(models) - 1, -1, -1), models, strict=True):
            policy.recall(model, Standing(1, idle, idle))


def searchable(evictable: Collection[str]) -> AbstractSet[str]:
    """Return ``evictable`` itself where it can be looked into at once, else (a list) a set of it."""
    return evictable if isinstance(evictable, AbstractSet) else frozenset(evictable)
