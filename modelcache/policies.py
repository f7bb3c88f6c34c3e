"""Which model to evict: the :class:`Policy` protocol and three well-known orders on cachetools' classes.

Whether anything has to go, how much, and what may go (nothing leased) is decided by the tiers, which then ask
here. How much memory is in use is told by ``gauges``.
"""

import contextlib
import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol, TypeGuard, runtime_checkable

import attrs
from cachetools import Cache, FIFOCache, LFUCache, LRUCache

from modelcache.errors import ConfigError

STRAY_LIMIT = 1_000
"""Ids of no use that a policy may give in one answer, on top of ten for each evictable model."""

_METHODS = ("requested", "admitted", "removed", "victims")
_log = logging.getLogger("modelcache")


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


class Ranked:
    """LRU, LFU and FIFO: an order kept by one of cachetools' classes.

    LFU counts from the request that brought the model in, and forgets the count when it leaves; among equals
    the least recently used goes first. All methods are O(1), :meth:`victims` O(models in the tier).

    Concurrency: as :class:`Policy` says.

    Args:
        order: an empty, unbounded cachetools cache; its values are not used.
    """

    def __init__(self, order: Cache[str, None]) -> None:
        self._order = order

    def requested(self, model: str, clock: int) -> None:  # noqa: ARG002 - the protocol's
        """Touch a model of the tier; others have no standing."""
        self._order.get(model)

    def admitted(self, resident: Resident) -> None:
        """Enter a model; one that is there stays where it stands, since measuring is not using."""
        if resident.model not in self._order:
            self._order[resident.model] = None

    def removed(self, model: str) -> None:
        """Forget a model."""
        if model in self._order:
            del self._order[model]

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:  # noqa: ARG002 - the protocol's
        """Return the evictable models of the tier, the least worthy first, as things stand at the call."""
        return _drain(copy.copy(self._order), frozenset(evictable))


def _drain(order: Cache[str, None], evictable: frozenset[str]) -> Iterator[str]:
    left = len(evictable)
    while order and left:
        model, _ = order.popitem()
        if model in evictable:
            left -= 1
            yield model


_BUILT_IN: dict[str, Callable[[], Ranked]] = {
    "lru": lambda: Ranked(LRUCache(math.inf)),
    "lfu": lambda: Ranked(LFUCache(math.inf)),
    "fifo": lambda: Ranked(FIFOCache(math.inf)),
}


class Guarded:
    """A user's policy, kept from doing harm: whatever it does, eviction can go on.

    What it raises is counted, and told by :meth:`report`, which raises interrupts again. Ids from its
    ``victims`` that are unknown, not evictable or there twice are passed over. Evictable ids that it does not
    give, for whatever reason, follow in LRU order.

    Concurrency: as :class:`Policy` says, but :meth:`report` is called with no lock held, from any thread.

    Args:
        policy: the user's.

    Attributes:
        policy: as given.
        errors: calls that raised, and answers that were broken off since they had no end.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.errors = 0
        self._order = _BUILT_IN["lru"]()
        self._known: set[tuple[str, type[BaseException]]] = set()
        self._untold: deque[tuple[str, BaseException]] = deque()
        self._stop: BaseException | None = None

    def requested(self, model: str, clock: int) -> None:
        """Tell the policy."""
        self._order.requested(model, clock)
        self._tell("requested", model, clock)

    def admitted(self, resident: Resident) -> None:
        """Tell the policy."""
        self._order.admitted(resident)
        self._tell("admitted", resident)

    def removed(self, model: str) -> None:
        """Tell the policy."""
        self._order.removed(model)
        self._tell("removed", model)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Return each evictable id once: those that the policy gives, then the rest in LRU order."""
        return self._complete(need, frozenset(evictable), self._order.victims(need, evictable))

    def report(self) -> None:
        """Log each new kind of error (method and type), once; call it with no lock held.

        Not logged at once: a log handler is a stranger's code and may wait, or ask the cache.
        """
        with contextlib.suppress(Exception):  # another thread was faster, or a log handler raised
            while self._untold:
                method, error = self._untold.popleft()
                name = f"{type(self.policy).__qualname__}.{method}"
                _log.error("policy %s raised; LRU order fills the gap", name, exc_info=error)
        stop, self._stop = self._stop, None
        if stop is not None:
            raise stop

    def _tell(self, method: str, *args: object) -> None:
        try:
            getattr(self.policy, method)(*args)
        except (KeyboardInterrupt, SystemExit) as stop:  # not here, in the middle of a decision: see report
            self._stop = self._stop or stop
        except BaseException as error:  # noqa: BLE001 - whatever a stranger's code raises ends here
            self._note(method, error)

    def _note(self, method: str, error: BaseException) -> None:
        self.errors += 1
        kind = (method, type(error))
        if kind not in self._known:
            self._known.add(kind)
            self._untold.append((method, error))

    def _complete(self, need: int, evictable: frozenset[str], rest: Iterable[str]) -> Iterator[str]:
        given: set[str] = set()
        strays = 0
        for model in self._answer(need, evictable):
            if isinstance(model, str) and model in evictable and model not in given:
                given.add(model)
                yield model
            else:
                strays += 1
            if len(given) == len(evictable):
                return
            if strays > STRAY_LIMIT + 10 * len(evictable):
                self._note("victims", ValueError("too many ids that are not evictable, or were given before"))
                break
        # Last come those that even the order beside it does not know: a tier's slip must not stop it.
        yield from (model for model in dict.fromkeys([*rest, *sorted(evictable)]) if model not in given)

    def _answer(self, need: int, evictable: frozenset[str]) -> Iterator[object]:
        try:
            yield from self.policy.victims(need, evictable)
        except GeneratorExit:
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            self._stop = self._stop or stop
        except BaseException as error:  # noqa: BLE001 - whatever a stranger's code raises ends here
            self._note("victims", error)


def make_policy(policy: str | Policy, setting: str) -> Policy:
    """Return a policy for one tier.

    Args:
        policy: ``"lru"``, ``"lfu"``, ``"fifo"``, or an object with the methods of :class:`Policy`, which is
            wrapped in :class:`Guarded`. One object serves one tier.
        setting: name of the setting, for the message.

    Raises:
        ConfigError: anything else, a class instead of an instance of it among them.
    """
    if isinstance(policy, str) and policy in _BUILT_IN:
        return _BUILT_IN[policy]()
    if isinstance(policy, Ranked | Guarded):
        return policy
    if _is_policy(policy):
        return Guarded(policy)
    names = ", ".join(f'"{name}"' for name in _BUILT_IN)
    raise ConfigError(
        f"{setting}={policy!r:.100} must be {names}, or an object with the methods {', '.join(_METHODS)}",
        setting=setting,
        value=policy,
    )


def _is_policy(policy: object) -> TypeGuard[Policy]:
    return not isinstance(policy, type) and all(callable(getattr(policy, method, None)) for method in _METHODS)
