"""``Guarded``: a user's policy, whatever it raises or answers, can't stop an eviction."""

import contextlib
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, MutableSet
from collections.abc import Set as AbstractSet

from modelcache.policies.base import Policy, Resident, Standing, searchable
from modelcache.policies.ranked import RANKED

STRAY_LIMIT = 1_000
"""Ids of no use that a policy may give in one answer, on top of ten for each model of the tier."""

_log = logging.getLogger("modelcache")


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
        self._order = RANKED["lru"]()
        self._clock = 0
        self._known: set[tuple[str, type[BaseException]]] = set()
        self._untold: deque[tuple[str, BaseException]] = deque()
        self._stop: BaseException | None = None

    def requested(self, model: str, clock: int) -> None:
        """Tell the policy."""
        self._clock = max(self._clock, clock)
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
        among = searchable(evictable)
        if isinstance(among, MutableSet):  # it is the tier's, and a stranger might change it
            among = frozenset(among)
        return self._complete(need, among)

    def standing(self, model: str) -> Standing | None:
        """Return None: what a user's policy knows is its own."""
        return self._order.standing(model)

    def recall(self, model: str, standing: Standing, clock: int = 0) -> None:
        """Tell the policy of one request, so that a new one finds who was used last."""
        self._clock = max(self._clock, clock)
        self._order.recall(model, standing)
        self._tell("requested", model, self._clock)

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

    def _complete(self, need: int, evictable: AbstractSet[str]) -> Iterator[str]:
        given: set[str] = set()
        strays, all_of_them = 0, None
        for model in self._answer(need, evictable):
            if isinstance(model, str) and model in evictable and model not in given:
                given.add(model)
                yield model
            else:
                strays += 1
                if all_of_them is None and isinstance(model, str) and model in given:  # does it begin again?
                    all_of_them = len(evictable)
            if len(given) == all_of_them:
                return
            if strays > STRAY_LIMIT + 10 * len(self._order):
                self._note("victims", ValueError("too many ids that are not evictable, or were given before"))
                break
        yield from (model for model in self._order.victims(need, evictable) if model not in given)
        # Last come those that even the order beside it does not know: a tier's slip must not stop it.
        yield from sorted(model for model in evictable if model not in given and model not in self._order)

    def _answer(self, need: int, evictable: AbstractSet[str]) -> Iterator[object]:
        try:
            yield from self.policy.victims(need, evictable)
        except GeneratorExit:
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            self._stop = self._stop or stop
        except BaseException as error:  # noqa: BLE001 - whatever a stranger's code raises ends here
            self._note("victims", error)
