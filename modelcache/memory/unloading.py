"""Models on their way out: run ``unload=``, drop the last reference, collect cycles, give heap back, tell.

Which models leave, and why, is decided in ``memory.residents``; everything here runs outside the guard.
"""

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from modelcache import heap
from modelcache.events import Event, Reason, Unloaded
from modelcache.guard import Guard
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.telling import Teller, complain, text_of

T = TypeVar("T")

_OWED = 4 * 2**20  # bytes of unloaded models after which the heap is given back even where no reading asks for it
_GC_SHARE = 10  # collections of ours take at most a tenth of the time, but for a load that waits for memory


class Unloader(Generic[T]):
    """Carries out what the memory tier decided.

    Args:
        residents: keeps the book.
        guard: the cache's lock.
        unload: the user's ``unload=``; None where there is none.
        let_go: releases what an entry kept open (its pin on disk), and deletes what was to be deleted.
        teller: takes events, outside the guard.

    Attributes:
        errors: how many calls of ``unload=`` raised.
    """

    def __init__(
        self,
        residents: Residents[T],
        guard: Guard,
        unload: Callable[[T], object] | None,
        let_go: Callable[[Entry[T]], None],
        teller: Teller,
    ) -> None:
        self._residents = residents
        self._guard = guard
        self._unload = unload
        self._let_go = let_go
        self._teller = teller
        self._owed = 0
        self._suspects: list[weakref.ref[Any]] = []
        self._collected = 0.0
        self._collection_took = 0.0
        self.errors = 0

    def carry_out(self, entries: list[Entry[T]], *, trim: bool = False) -> None:
        """Unload entries that were retired; empties the list, so that no model is kept alive by it.

        Never raises: a KeyboardInterrupt or SystemExit from ``unload=`` is kept by the teller for the end of the verb.
        """
        size = sum(entry.bytes for entry in entries)
        traces = [_trace(entry.value) for entry in entries]
        while entries:
            try:
                self._depart(entries.pop(0))
            except Exception as error:  # noqa: BLE001 - the disk, say: the others leave all the same
                complain("a model has left memory, but not all that it kept on disk was given back", error=error)
        self._suspects = [*self._suspects, *(trace for trace in traces if trace is not None)]
        self.collect(now=False)
        self._owed += size
        if trim or self._owed >= _OWED:
            self._owed = 0
            heap.give_back()
        with self._guard:
            self._guard.notify()

    def _depart(self, entry: Entry[T]) -> None:
        """Run ``unload=`` for one entry, drop the model, and tell."""
        started = time.monotonic()
        problem: str | None = None
        try:
            if self._unload is not None:
                problem = self._run_unload(entry)
        finally:
            del entry.value  # a get() that came too late finds no attribute, and takes the slow path
            try:
                self._let_go(entry)
            finally:
                with self._guard:
                    self._residents.gone(entry)
                    self._guard.notify()
                self._teller.tell([self._unloaded(entry, time.monotonic() - started, problem)])

    def _run_unload(self, entry: Entry[T]) -> str | None:
        """Return what ``unload=`` raised, as text: the error itself would keep the model alive."""
        assert self._unload is not None  # noqa: S101 - for the type checker
        try:
            self._unload(entry.value)
        except (KeyboardInterrupt, SystemExit) as stop:
            self.errors += 1
            self._teller.keep(stop)
            return type(stop).__name__
        except BaseException as error:  # noqa: BLE001 - the model leaves whatever its unload= does
            self.errors += 1
            complain("unload= of model %a raised; the model has left memory all the same", entry.model, error=error)
            return f"{type(error).__name__}: {text_of(error)}"
        return None

    def _unloaded(self, entry: Entry[T], duration: float, problem: str | None) -> Event:
        reason = entry.reason or Reason.UNLOAD
        return Unloaded(
            seq=self._teller.number(),
            time=time.time(),
            model=entry.model,
            tier="memory",
            reason=Reason.EVICTED if reason.was_eviction else reason,
            bytes=entry.bytes,
            duration=duration,
            error=problem,
        )

    def collect(self, *, now: bool) -> None:
        """Collect cycles where a model that was unloaded lives on.

        Args:
            now: also where the last collection was just before; else it is left to the monitor's next look.
        """
        self._suspects = [trace for trace in self._suspects if trace() is not None]
        started = time.monotonic()
        if not self._suspects or (not now and started - self._collected < _GC_SHARE * self._collection_took):
            return
        gc.collect()
        self._suspects = []  # what still lives is held by somebody, and no collection helps
        self._collected = time.monotonic()
        self._collection_took = self._collected - started


def _trace(value: object) -> "weakref.ref[Any] | None":
    try:
        return weakref.ref(value)
    except TypeError:
        return None
