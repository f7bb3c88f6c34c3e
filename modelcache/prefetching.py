"""``Prefetch``: the handle of models that are brought in before anybody asks for them, and how far they are.

What it orders is carried out by ``orders``. Bytes are counted by ``transfers``.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import attrs

from modelcache.errors import CacheClosed, ConfigError, ModelCacheError
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.ids import validate_id
from modelcache.transfers import Transfer, rate
from modelcache.units import parse_timeout


@attrs.frozen
class Progress:
    """How far a prefetch is; bytes are those of artifacts as they are stored at the source.

    What is on disk already needs no bytes. A model that failed, or was cancelled, counts with the bytes that had
    arrived, in both sums.

    Attributes:
        total: models asked for.
        ready: models that are there.
        failed: models that could not be brought in.
        cancelled: models that were dropped by ``cancel``.
        bytes: bytes that have arrived; of a fetch that has to begin anew (``ArtifactChanged``, say) from 0 again.
        bytes_total: bytes to transfer for all models whose artifact was found by now.
        unsized: models that count for nothing in ``bytes_total``, as their artifact was not found yet.
        rate: bytes a second that arrived over the last five seconds.
        left: seconds in which the missing bytes arrive at that rate; a model that is not found yet is taken to be like
            those that are. To load what has arrived takes time beyond it. None: unknown, as nothing arrives now, or no
            artifact was found yet. 0 once all bytes are there.
    """

    total: int
    ready: int
    failed: int
    cancelled: int
    bytes: int
    bytes_total: int
    unsized: int
    rate: float
    left: float | None


class Flown(Protocol):
    """A model on its way, as the handle sees it."""

    to_memory: bool

    @property
    def state(self) -> str:
        """What is done for it now."""
        ...

    @property
    def transfer(self) -> Transfer:
        """Its bytes."""
        ...


@attrs.define(eq=False)
class _Part:
    """One model of a prefetch.

    Attributes:
        state: how it ended; while it is open, what counts where it is not on its way.
        flight: what brings it in; None: nothing does.
        transfer: its bytes; None: none were needed.
        arrived: bytes that count where it failed.
    """

    state: str = "queued"
    flight: Flown | None = None
    transfer: Transfer | None = None
    arrived: int = 0

    def end(self, state: str) -> None:
        """Take note of how it ended; a flight that others still want is not its own any more."""
        self.state, self.flight = state, None
        if state != "ready" and self.transfer is not None:
            self.arrived, self.transfer = self.transfer.arrived, None

    def now(self) -> str:
        """Return its state at this moment."""
        if self.flight is None:
            return self.state
        state = self.flight.state
        if state != "done":
            return state
        return "loading" if self.flight.to_memory else "fetching"  # callbacks hear of it first


def check_request(models: object, tier: object) -> list[str]:
    """Return the ids to prefetch, each once.

    Raises:
        InvalidModelId: an id that could not name a model.
        ConfigError: ``models`` is no list of ids, or ``tier`` no tier.
    """
    if isinstance(models, str | bytes) or not isinstance(models, Iterable):
        raise ConfigError(f"prefetch takes a list of ids, not {models!r}", setting="models", value=models)
    if not isinstance(tier, str) or tier not in {"memory", "disk"}:
        raise ConfigError(f"tier={tier!r} must be 'memory' or 'disk'", setting="tier", value=tier)
    return list(dict.fromkeys(validate_id(model) for model in models))


class Prefetch:
    """Models on their way, none of which anybody waits for.

    Made by ``ModelCache.prefetch``. A lookup always goes before it: in the queue for a thread, of which prefetches
    leave one alone (where ``loaders`` is 1 they use it, and a lookup waits for the fetch or the load that is under
    way, no longer), and in the line for room in memory and on disk. A lookup that wants one of its models makes that
    one go first. So a prefetch may wait for as long as there are lookups that wait.

    Concurrency: all methods may be called from any thread; ``wait`` and ``cancel`` are refused, with
    ``ModelCacheError``, in a signal handler or ``__del__`` that interrupted a decision of the cache. After a fork, what
    was open is failed in the child, and goes on in the parent.

    Attributes:
        errors: id to error of each model that failed; grows until ``wait`` returns True.
        cancelled: whether ``cancel`` was called.
    """

    urgent = False  # what it waits for comes after what a lookup waits for

    def __init__(
        self,
        models: Iterable[str],
        *,
        to_memory: bool,
        guard: Guard,
        drop: Callable[["Prefetch"], None],
        wait_for: Callable[["Prefetch"], AbstractContextManager[None]],
        again: Callable[["Prefetch", str, ModelCacheError], bool],
    ) -> None:
        self.to_memory = to_memory
        self._guard = guard  # the cache's own lock, so that a fork meets no half of a decision here either
        self._changed = threading.Condition(guard)  # guards nothing of its own: it is the cache's lock
        self._parts = {model: _Part() for model in models}
        self._open = dict.fromkeys(self._parts)
        self._drop = drop
        self._wait_for = wait_for
        self._again = again
        self._waiting: set[object] = set()
        self.errors: dict[str, ModelCacheError] = {}
        self.cancelled = False

    def reset_after_fork(self) -> None:
        """In a child: what the parent's threads were bringing in does not arrive here; the guard is held."""
        for model in self._open:
            self.errors[model] = CacheClosed(
                f"the prefetch of {model!a} was left to the parent process: prefetch it again", model=model
            )
            self._parts[model].end("failed")
        self._open = {}
        self._waiting = set()

    def wanted(self) -> list[str]:
        """Return the models that are still to be brought in; the guard is held."""
        return list(self._open)

    def wants(self, model: str) -> bool:
        """Whether a model is still to be brought in; the guard is held."""
        return model in self._open

    def boarded(self, model: str, flight: Flown) -> None:
        """Take note of what brings a model in; the guard is held."""
        part = self._parts[model]
        part.flight, part.transfer = flight, flight.transfer

    def finished(self, model: str, error: ModelCacheError | None) -> None:
        """Take note that one model has arrived, or failed; called by the cache."""
        if error is not None and self._again(self, model, error):
            return
        with self._guard:
            if model in self._open:
                del self._open[model]
                self._parts[model].end("ready" if error is None else "failed")
                if error is not None:
                    self.errors[model] = error
                self._changed.notify_all()

    @property
    def progress(self) -> Progress:
        """How far it is; never waits, and looking changes nothing."""
        with self._guard:
            parts = self._parts.values()
            states = [part.state for part in parts]
            transfers = [part.transfer for part in parts if part.transfer is not None]
            sized = [(transfer.size, transfer.arrived) for transfer in transfers if transfer.size is not None]
            unsized = sum(part.transfer is None or part.transfer.size is None for part in self._rest())
            ended = sum(part.arrived for part in parts)
            speed = rate(transfers)
        arrived = sum(arrived for _, arrived in sized)
        missing = sum(max(size - arrived, 0) for size, arrived in sized)
        return Progress(
            total=len(states),
            ready=states.count("ready"),
            failed=states.count("failed"),
            cancelled=states.count("cancelled"),
            bytes=arrived + ended,
            bytes_total=arrived + missing + ended,
            unsized=unsized,
            rate=speed,
            left=_left(missing, [size for size, _ in sized if size], unsized, speed),
        )

    def _rest(self) -> list[_Part]:
        return [self._parts[model] for model in self._open]

    @property
    def states(self) -> dict[str, str]:
        """The state of each model, in the order in which they were asked for; never waits.

        ``"queued"``; ``"fetching"``, ``"waiting for room"``, ``"waiting for a measurement"`` and ``"loading"``, as
        in ``models()``; the ends are ``"ready"``, ``"failed"`` (see ``errors``) and ``"cancelled"``.
        """
        with self._guard:
            return {model: part.now() for model, part in self._parts.items()}

    @property
    def done(self) -> bool:
        """Whether every model has arrived or failed, or it was cancelled."""
        return not self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every model has arrived or failed; return False where ``timeout`` (seconds) ended first.

        It is no lookup: it does not make its models go first. Look at ``errors`` for what failed.
        """
        limit = parse_timeout(timeout)
        thread = me()
        with self._guard:
            self._waiting = self._waiting | {thread}
        try:
            with self._wait_for(self), self._guard:
                return self._changed.wait_for(lambda: not self._open, limit)
        finally:
            with self._guard:
                self._waiting = self._waiting - {thread}

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it now; never waits."""
        return self._waiting

    def cancel(self) -> None:
        """Stop what nobody else wants; what has arrived stays. ``wait`` returns at once from here on."""
        self._drop(self)

    def give_up(self) -> list[str]:
        """Want nothing any more, and return what was open; the guard is held."""
        dropped, self._open = list(self._open), {}
        for model in dropped:
            self._parts[model].end("cancelled")
        self.cancelled = True
        self._changed.notify_all()
        return dropped


def _left(missing: int, sizes: list[int], unsized: int, speed: float) -> float | None:
    """Return the seconds until all bytes are there; None where that can't be told."""
    if unsized and not sizes:
        return None
    missing += unsized * sum(sizes) // max(len(sizes), 1)
    if not missing:
        return 0.0
    return missing / speed if speed else None
