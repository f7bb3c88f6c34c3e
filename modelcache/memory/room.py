"""Making room in memory: evict, unload, give heap back, measure, and wait where all is leased.

It acts on what ``memory.residents`` decides. Everything that runs a user's code or waits happens outside the guard.
"""

import gc
import logging
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, Protocol, TypeVar

from modelcache import heap
from modelcache.errors import NoRoom, TooLarge
from modelcache.events import Event, Evicted, Reason, Reclaimed, Unloaded
from modelcache.guard import Guard
from modelcache.memory.entries import GONE, Entry
from modelcache.memory.residents import Residents, Shortage
from modelcache.memory.tier import Limits, MemoryTier
from modelcache.units import format_bytes

T = TypeVar("T")

_log = logging.getLogger("modelcache")
_FUTILE = 3  # batches in a row that free less than a tenth of what they promised, after which more won't help
_BACK_OFF = 30  # looks of the monitor that are left out after such a row
_OWED = 4 * 2**20  # bytes of unloaded models after which the heap is given back even where no reading asks for it
_GC_SHARE = 10  # at most a tenth of the time is spent in collections of ours


class Applicant(Protocol):
    """Who needs room in memory."""

    state: str

    @property
    def model(self) -> str:
        """The id of the model that is to be loaded."""
        ...

    def wanted(self) -> bool:
        """Whether somebody still waits for it; the guard is held."""
        ...

    def hopeless(self) -> bool:
        """Whether everybody who could give room waits for room too; the guard is held."""
        ...

    def refused(self, refusal: NoRoom) -> None:
        """Note what stands in the way, for a waiter whose time ends meanwhile; the guard is held."""
        ...


class Room(Generic[T]):
    """The acting half of the memory tier.

    Args:
        tier: settings and gauge.
        residents: the decisions.
        guard: the cache's lock.
        unload: the user's ``unload=``; None where there is none.
        let_go: releases what an entry kept open (its pin on disk), and deletes what was to be deleted.
        tell: takes events, outside the guard.
        number: gives each event its ``seq``.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        tier: MemoryTier,
        residents: Residents[T],
        guard: Guard,
        unload: Callable[[T], object] | None,
        let_go: Callable[[Entry[T]], None],
        tell: Callable[[Iterable[Event]], None],
        number: Callable[[], int],
    ) -> None:
        self._tier = tier
        self._residents = residents
        self._guard = guard
        self._unload = unload
        self._let_go = let_go
        self._tell = tell
        self._number = number
        self._owed = 0
        self._collected = 0.0
        self._collection_took = 0.0
        self._pause = 0
        self.evictions = 0
        self.unload_errors = 0

    def admit(self, applicant: Applicant, token: object, need: int) -> Limits:
        """Reserve ``need`` bytes under ``token``, evicting just enough; return the reading that allowed it.

        Raises:
            TooLarge: the model can never fit.
            NoRoom: what is in the way is leased, or is not the cache's.
        """
        residents, futile, most, rows = self._residents, 0, 1, 0
        while True:
            limits = self._tier.limits()
            _refuse_too_large(applicant.model, need, limits)
            with self._guard:
                residents.drain()
                shortage = residents.shortage(limits, need, 1)
                waits_for_itself = any(entry.model == applicant.model for entry in residents.leaving)
                if shortage.fits and not waits_for_itself:
                    residents.reserved[token] = need
                    residents.churn += 1
                    return limits
                victims = [] if futile >= _FUTILE else residents.choose(shortage, most)
                told = [self._evicted(entry, shortage, applicant.model) for entry in victims]
                if not victims:
                    rows, futile = rows + (futile >= _FUTILE), 0
                    self._wait(applicant, need, shortage, last=rows > 1)
            if victims:
                most *= 2
                futile = 0 if self._evict(victims, told, limits) else futile + 1

    def _wait(self, applicant: Applicant, need: int, shortage: Shortage, *, last: bool) -> None:
        """Wait for something to change; the guard is held.

        Raises:
            NoRoom: nothing will, nobody waits any more, or (``last``) evicting did not help twice over.
        """
        residents = self._residents
        idle = any(not entry.holds for entry in residents.resident.values())
        applicant.state = "waiting for room"
        if last or not applicant.wanted() or (not residents.leaving and not idle and applicant.hopeless()):
            raise self._no_room(applicant.model, need, shortage)
        applicant.refused(self._no_room(applicant.model, need, shortage))
        residents.waiting += 1
        residents.update_short()
        try:
            self._guard.wait(self._tier.interval)
        finally:
            residents.waiting -= 1
            residents.update_short()

    def _no_room(self, model: str, need: int, shortage: Shortage) -> NoRoom:
        """Return the error that says what is in the way; the guard is held."""
        holders = self._residents.holders()
        held = ", ".join(f"{ascii(model)} ({leases} leases, {age:.1f} s)" for model, leases, age in holders)
        figures = shortage.figures
        show = str if shortage.reason is Reason.MAX_MODELS else format_bytes
        ours = self._residents.tracked()
        where = f"leases hold {held}" if held else f"nothing can be evicted ({format_bytes(ours)} are models)"
        return NoRoom(
            f"no room in memory for {ascii(model)}: it needs {format_bytes(need)}, {shortage.reason} allows "
            f"{show(figures['high'])} and {show(figures['used'])} are used; {where}: release leases, "
            f"or raise memory.{_SETTING[shortage.reason]}",
            model=model,
            tier="memory",
            need=need,
            used=figures["used"],
            limit=figures["high"],
            holders=holders,
        )

    def enforce(self) -> None:
        """Evict what the limits demand now; returns once all that must go, and may, is gone."""
        self._lower(floor=False)

    def look(self) -> None:
        """Answer growth from outside: from above ``high`` down to ``low``; the monitor's tick."""
        self._settle_orphans()
        if self._pause:
            self._pause -= 1
            with self._guard:
                self._residents.drain()
        elif not self._lower(floor=True):
            self._pause = _BACK_OFF

    def _lower(self, *, floor: bool) -> bool:
        """Evict until the limits are met; return False where evicting did not help."""
        residents, futile, most = self._residents, 0, 1
        while True:
            limits = self._tier.limits()
            with self._guard:
                residents.drain()
                shortage = residents.shortage(limits, 0, 0, floor=limits.low if floor else None)
                victims = [] if shortage.met else residents.choose(shortage, most)
                told = [self._evicted(entry, shortage, None) for entry in victims]
                if not victims:
                    residents.over = not shortage.met and any(entry.holds for entry in residents.entries())
                    residents.update_short()
                    return True
            most *= 2
            futile = 0 if self._evict(victims, told, limits) else futile + 1
            if futile >= _FUTILE:
                return False

    def _settle_orphans(self) -> None:
        while self._residents.orphans:
            self.release(self._residents.orphans.popleft())

    def release(self, entry: Entry[T]) -> None:
        """Look at what a release makes possible: a pending unload, a limit not met, a load that waits."""
        with self._guard:
            due = entry.doomed
            retired = due is not None and self._residents.retire(entry, due)
            over = self._residents.over
            self._guard.notify()
        if retired:
            self.carry_out([entry])
        if over:
            self.enforce()

    def give_up(self, models: Collection[str], reason: Reason, figures: dict[str, int], for_model: str) -> bool:
        """Evict the coldest idle one of ``models``, whose files the disk tier needs; False where none is idle."""
        shortage = Shortage(fits=False, over_high=0, over_budget=0, over_count=1, reason=reason, figures=figures)
        with self._guard:
            self._residents.drain()
            victims = self._residents.choose(shortage, 1, models)
            told = [self._evicted(entry, shortage, for_model or None) for entry in victims]
        if victims:
            self._tell(told)
            self.carry_out(victims)
        return bool(victims)

    def _evicted(self, entry: Entry[T], shortage: Shortage, for_model: str | None) -> Event:
        self.evictions += 1
        return Evicted(
            seq=self._number(),
            time=time.time(),
            model=entry.model,
            tier="memory",
            reason=shortage.reason,
            bytes=entry.bytes,
            for_model=for_model,
            **shortage.figures,
        )

    def _evict(self, victims: list[Entry[T]], told: list[Event], before: Limits) -> bool:
        """Unload a batch, give heap back, measure; return whether it freed a fair share of what it promised."""
        started = time.monotonic()
        promised = sum(0 if entry.inherited else entry.bytes for entry in victims)
        count, reason = len(victims), told[0].reason
        self._tell(told)
        self.carry_out(victims, trim=reason is Reason.WATERMARK)
        after = self._tier.limits()
        if before.reading is None or after.reading is None:
            return True
        freed = before.reading.used - after.reading.used
        event = Reclaimed(
            seq=self._number(),
            time=time.time(),
            tier="memory",
            duration=time.monotonic() - started,
            used=after.reading.used,
            limit=after.reading.limit,
            high=after.high,
            low=after.low,
            promised=promised,
            freed=freed,
            models=count,
        )
        self._tell([event])
        return freed * 10 >= promised or reason is not Reason.WATERMARK

    def carry_out(self, entries: list[Entry[T]], *, trim: bool = False) -> None:
        """Unload entries that were retired; empties the list, so that no model is kept alive by it.

        Raises:
            KeyboardInterrupt, SystemExit: from ``unload=``, once everything is consistent.
        """
        size = sum(entry.bytes for entry in entries)
        traces = [_trace(entry.value) for entry in entries]
        stopped: BaseException | None = None
        while entries:
            try:
                self._depart(entries.pop(0))
            except (KeyboardInterrupt, SystemExit) as error:
                stopped = stopped or error
        self._collect(traces)
        self._owed += size
        if trim or self._owed >= _OWED:
            self._owed = 0
            heap.give_back()
        with self._guard:
            self._guard.notify()
        if stopped is not None:
            raise stopped

    def _depart(self, entry: Entry[T]) -> None:
        """Run ``unload=`` for one entry, drop the model, and tell."""
        started = time.monotonic()
        problem: str | None = None
        try:
            if self._unload is not None:
                problem = self._run_unload(entry)
        finally:
            entry.value = GONE
            try:
                self._let_go(entry)
            finally:
                with self._guard:
                    self._residents.gone(entry)
                    self._guard.notify()
                self._tell([self._unloaded(entry, time.monotonic() - started, problem)])

    def _run_unload(self, entry: Entry[T]) -> str | None:
        """Return what ``unload=`` raised, as text: the error itself would keep the model alive."""
        assert self._unload is not None  # noqa: S101 - for the type checker
        try:
            self._unload(entry.value)
        except (KeyboardInterrupt, SystemExit):
            self.unload_errors += 1
            raise
        except BaseException as error:  # the model leaves whatever its unload= does
            self.unload_errors += 1
            _log.exception("unload= of model %a raised; the model has left memory all the same", entry.model)
            return f"{type(error).__name__}: {error}"
        return None

    def _unloaded(self, entry: Entry[T], duration: float, problem: str | None) -> Event:
        reason = entry.reason or Reason.UNLOAD
        return Unloaded(
            seq=self._number(),
            time=time.time(),
            model=entry.model,
            tier="memory",
            reason=Reason.EVICTED if reason.was_eviction else reason,
            bytes=entry.bytes,
            duration=duration,
            error=problem,
        )

    def _collect(self, traces: list["weakref.ref[Any] | None"]) -> None:
        """Collect cycles where a model lives on, unless collections already take a tenth of the time."""
        alive = any(trace is not None and trace() is not None for trace in traces)
        now = time.monotonic()
        if not alive or now - self._collected < _GC_SHARE * self._collection_took:
            return
        gc.collect()
        self._collected = time.monotonic()
        self._collection_took = self._collected - now


_SETTING = {
    Reason.WATERMARK: "high",
    Reason.MEMORY_BUDGET: "budget",
    Reason.MAX_MODELS: "max_models",
}


def _refuse_too_large(model: str, need: int, limits: Limits) -> None:
    bounds = [("budget", limits.budget)] if limits.budget is not None else []
    if limits.reading is not None:
        bounds.append(("high", limits.high))
    for setting, bound in bounds:
        if need > bound:
            raise TooLarge(
                f"model {ascii(model)} needs {format_bytes(need)} of memory, more than memory.{setting} = "
                f"{format_bytes(bound)} allows with nothing else loaded: raise it, or serve the model elsewhere",
                model=model,
                tier="memory",
                need=need,
                limit=bound,
            )


def _trace(value: object) -> "weakref.ref[Any] | None":
    try:
        return weakref.ref(value)
    except TypeError:
        return None
