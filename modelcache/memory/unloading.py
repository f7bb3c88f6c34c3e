"""Models on their way out: run ``unload=``, drop the last reference, collect cycles, give heap back, tell.

Which models leave, and why, is decided in ``memory.residents``; everything here runs outside the guard.
"""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from modelcache import heap
from modelcache.events import Event, Reason, Unloaded
from modelcache.guard import Guard
from modelcache.identity import me
from modelcache.memory.entries import Entry
from modelcache.memory.garbage import Garbage
from modelcache.memory.lingering import follow
from modelcache.memory.remains import Remains
from modelcache.memory.residents import Residents
from modelcache.telling import Teller, complain, text_of

T = TypeVar("T")

_OWED = 4 * 2**20  # bytes of unloaded models after which the heap is given back even where no reading asks for it


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
        evictions: how many evicted models it has unloaded.
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
        self._garbage = Garbage()
        self._owed = 0
        self._doubtful = False  # whether anything in a model that left since the last collection may live on
        self.errors = 0
        self.evictions = 0

    def carry_out(self, entries: list[Entry[T]], *, trim: bool = False) -> bool:
        """Unload entries that were retired; empties the list, so that no model is kept alive by it.

        They count as in memory until the heap is given back: before that their memory is not there for others. One that
        is asked for again before its turn stays. Never raises: a KeyboardInterrupt or SystemExit from ``unload=`` is
        kept by the teller for the end of the verb.

        Args:
            entries: what was retired.
            trim: give heap back however little it is.

        Returns:
            Whether cycles were collected.
        """
        left: list[Entry[T]] = []
        told: list[Event] = []
        collected = False
        try:
            while entries:
                entry = entries.pop(0)
                try:
                    self._depart(entry, left, told)
                except (KeyboardInterrupt, SystemExit) as stop:  # it may have come while this waited for its turn
                    self._teller.keep(stop)
                    if not entry.begun:
                        entries.append(entry)
                except Exception as error:  # noqa: BLE001 - the disk, say: the others leave all the same
                    complain("a model has left memory, but not all that it kept on disk was given back", error=error)
            collected = self.collect(urgent=False)
            self._owed += sum(entry.bytes for entry in left)
            if trim or self._owed >= _OWED:
                self._owed = 0
                heap.give_back()
            self._settle(left)
        except BaseException:  # an interrupt (Ctrl-C) may come at any line, this last one too
            self._settle(left)
            raise
        self._teller.tell(told)
        return collected

    def _settle(self, left: list[Entry[T]]) -> None:
        with self._guard:
            for entry in left:
                self._residents.gone(entry)
            self._guard.notify()

    def _depart(self, entry: Entry[T], left: list[Entry[T]], told: list[Event]) -> None:
        """Run ``unload=`` for one entry and drop the model; what is to be told of it goes into ``told``."""
        with self._guard:
            if not entry.retired or entry.begun or entry.retirer is not me():
                return  # taken back meanwhile, and perhaps retired anew, which whoever did that carries out
            entry.begun = True
            self.evictions += entry.farewell is not None
            if entry.farewell is not None:
                self._residents.lives.evicted(entry.farewell)
        left.append(entry)
        if entry.farewell is not None:
            self._teller.tell([entry.farewell])
        started = time.monotonic()
        problem: str | None = None
        try:
            if self._unload is not None:
                problem = self._run_unload(entry)
        finally:
            try:
                self._drop(entry)
            finally:
                try:
                    self._let_go(entry)
                finally:
                    told.append(self._unloaded(entry, time.monotonic() - started, problem))

    def _drop(self, entry: Entry[T]) -> None:
        """Drop the model, in its turn."""
        try:
            with heap.freeing():
                self._drop_now(entry)
        finally:
            if hasattr(entry, "value"):  # an interrupt while it waited
                self._drop_now(entry)

    def _drop_now(self, entry: Entry[T]) -> None:
        """Drop the model; take note of whether it lives on, or anything in it does."""
        straggler, left = None, True
        try:
            try:
                straggler = follow(entry.value, entry.model, entry.bytes)
                remains = Remains(entry.value)
            finally:
                del entry.value  # a get() that came too late finds no attribute, and takes the slow path
            left = remains.left()
        finally:
            if left:  # also if an interrupt came, or memory is out; never set to False here: others drop models too
                self._doubtful = True
            if straggler is not None and straggler.alive:
                with self._guard:
                    self._residents.lingering.add(straggler)

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

    def collect(self, *, urgent: bool) -> bool:
        """Collect cycles where a model that was unloaded lives on, or anything in it; return whether that was done.

        Args:
            urgent: a load waits for its memory; else one that would come too soon is left to the monitor.
        """
        with self._guard:
            hopeful = self._residents.lingering.hopeful()
        # Where parts live on, not models, nothing tells whether it helped: it is run no more often than one in vain.
        return (hopeful or (urgent and self._doubtful)) and self._collect(urgent=urgent and hopeful, judged=hopeful)

    def search(self, *, last: bool = False) -> bool:
        """Collect cycles and give heap back, as less came back than models promised; return whether that was done.

        Where nothing in these models lives on, what is missing lies in the heap, and none is in cycles of theirs.

        Args:
            last: a load is refused otherwise, or evictions rest.
        """
        if not (last or self._doubtful) or not self._collect(urgent=True, wait=True, last=last):
            return False
        heap.give_back()
        return True

    def judge_search(self, *, helped: bool) -> None:
        """Take note of whether it brought memory back."""
        self._garbage.judge(helped=helped)

    def _collect(self, *, urgent: bool, wait: bool = False, last: bool = False, judged: bool = False) -> bool:
        if not self._garbage.turn(urgent=urgent, wait=wait, last=last):
            return False
        with self._guard:
            before = len(self._residents.lingering.look())
        self._doubtful = False  # only now: others look for cycles too, and what is dropped from here on may be missed
        self._garbage.collect()
        with self._guard:
            helped = len(self._residents.lingering.look()) < before
            self._residents.lingering.collected()
        if judged:
            self._garbage.judge(helped=helped)
        return True
