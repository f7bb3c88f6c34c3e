"""``Prefetch``: the handle of models that are brought in before anybody asks for them."""

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import attrs

from modelcache.errors import CacheClosed, ConfigError, ModelCacheError
from modelcache.identity import me
from modelcache.ids import validate_id
from modelcache.units import parse_timeout


@attrs.frozen
class Progress:
    """How far a prefetch is.

    Attributes:
        total: models asked for.
        ready: models that are there.
        failed: models that could not be brought in.
    """

    total: int
    ready: int
    failed: int


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

    Made by ``ModelCache.prefetch``.

    Concurrency: all methods may be called from any thread.

    Attributes:
        errors: id to error of each model that failed; grows until ``wait`` returns True.
    """

    def __init__(
        self,
        models: Iterable[str],
        drop: Callable[["Prefetch", Iterable[str]], None],
        wait_for: Callable[["Prefetch", Iterable[str]], AbstractContextManager[None]],
        again: Callable[["Prefetch", str, ModelCacheError], bool],
    ) -> None:
        self._make_lock()
        self._open = set(models)
        self._total = len(self._open)
        self._drop = drop
        self._wait_for = wait_for
        self._again = again
        self._waiting: set[object] = set()
        self.errors: dict[str, ModelCacheError] = {}
        self.cancelled = False

    def _make_lock(self) -> None:
        # guards the open set and the errors; nothing is called under it.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # guards nothing of its own: it is the lock's

    def reset_after_fork(self) -> None:
        """In a child: what the parent's threads were bringing in does not arrive here."""
        self._make_lock()
        for model in self._open:
            self.errors[model] = CacheClosed(
                f"the prefetch of {model!a} was left to the parent process: prefetch it again", model=model
            )
        self._open = set()

    def finished(self, model: str, error: ModelCacheError | None) -> None:
        """Take note that one model has arrived, or failed; called by the cache."""
        if error is not None and self._again(self, model, error):
            return
        with self._lock:
            if model in self._open:
                self._open.discard(model)
                if error is not None:
                    self.errors[model] = error
                self._changed.notify_all()

    @property
    def progress(self) -> Progress:
        """How far it is; never waits."""
        with self._lock:
            failed = len(self.errors)
            return Progress(self._total, self._total - len(self._open) - failed, failed)

    @property
    def done(self) -> bool:
        """Whether every model has arrived or failed, or it was cancelled."""
        with self._lock:
            return not self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every model has arrived or failed; return False where ``timeout`` (seconds) ended first.

        Look at ``errors`` for what failed.
        """
        limit = parse_timeout(timeout)
        with self._lock:
            self._waiting = self._waiting | {me()}
            still = set(self._open)
        try:
            with self._wait_for(self, still), self._lock:
                return self._changed.wait_for(lambda: not self._open, limit)
        finally:
            with self._lock:
                self._waiting = self._waiting - {me()}

    def threads(self) -> set[object]:
        """Return the identities of the threads that wait for it now; never waits."""
        return self._waiting

    def cancel(self) -> None:
        """Stop what nobody else wants; what has arrived stays. ``wait`` returns at once from here on."""
        with self._lock:
            dropped, self._open = self._open, set()
            self.cancelled = True
            self._changed.notify_all()
        self._drop(self, dropped)
