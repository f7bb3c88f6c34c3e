"""What one load takes: the gauge before and after it, the peak between.

What the figures become is ``memory.footprints``. A measurement is of the whole process, so it is clean only where
nothing else was loaded, unloaded or imported meanwhile; parts that the loader itself asked for are taken off.
"""

import sys
from pathlib import Path
from typing import Any, Generic, TypeVar

from modelcache import heap
from modelcache.gauges import Reading
from modelcache.memory.footprints import NOISE, Measurement, Plan
from modelcache.memory.garbage import Garbage
from modelcache.memory.mappings import untouched
from modelcache.memory.residents import Residents
from modelcache.memory.tier import MemoryTier
from modelcache.peaks import PeakMeter
from modelcache.telling import complain

T = TypeVar("T")

_GARBAGE = 4 * NOISE  # bytes above what was expected from which on a load's own garbage is given back first
_MUCH = 1.2  # times what was expected, likewise


class Scale:
    """One load on the scale.

    Attributes:
        parts: bytes of the models that its loader asked for and that were loaded meanwhile.
        moves: how often these moved what is in memory, as ``residents.churn`` counts.
    """

    def __init__(self, plan: Plan, churn: int, before: Reading | None) -> None:
        self.plan = plan
        self.churn = churn
        self.before = before
        self.modules = len(sys.modules)  # what a loader imports is the process's, not the model's
        self.window: Any = None
        self.parts = 0
        self.moves = 0


class Measuring(Generic[T]):
    """Weighs loads.

    Args:
        tier: its gauge.
        residents: what else moves.
        meter: reads peaks.
    """

    def __init__(self, tier: MemoryTier, residents: Residents[T], meter: PeakMeter) -> None:
        self._tier = tier
        self._residents = residents
        self._garbage = Garbage()
        self._meter = meter

    def begin(self, plan: Plan, churn: int, admitted: Reading | None) -> Scale:
        """Put a load on the scale.

        Args:
            plan: what it is expected to take.
            churn: ``residents.churn`` at its admission.
            admitted: the reading that let it in.
        """
        heap.include_thread()
        if plan.first and self._tier.measures_process:  # freed heap that the load would fill hides what it takes
            heap.give_back()
            admitted = self._tier.read() or admitted
        scale = Scale(plan, churn, admitted)
        if self._tier.measures_process:
            scale.window = self._meter.begin()
        return scale

    def end(self, scale: Scale, path: Path) -> tuple[Measurement | None, Reading | None]:
        """Take a load off the scale; return what it took, and the last reading. Never raises.

        None as the measurement: the gauge could not be read.
        """
        peak = 0 if scale.window is None else scale.window.end()
        try:
            after = self._read(scale)
        except BaseException as error:  # noqa: BLE001 - a gauge must not cost the model that was just loaded
            complain("the gauge raised after a load", error=error)
            return None, scale.before
        if scale.before is None or after is None:
            return None, after
        grown = after.mine - scale.before.mine - scale.parts
        latent = 0
        if self._tier.measures_process and _may_map(scale.plan, grown):
            latent = untouched(path)
        resident = max(grown, 0) + latent
        peak = max(peak - scale.parts, resident)
        return Measurement(resident, peak, clean=self._undisturbed(scale), latent=latent), after

    def _undisturbed(self, scale: Scale) -> bool:
        return self._residents.churn == scale.churn + scale.moves and scale.modules == len(sys.modules)

    def _read(self, scale: Scale) -> Reading | None:
        """Read the gauge after a load, without the load's own garbage where it left more than was expected."""
        reading = self._tier.read()
        if not self._excessive(scale, reading):
            return reading
        heap.give_back()
        reading = self._tier.read()
        if reading is None or not self._excessive(scale, reading):
            return reading
        if not self._undisturbed(scale) or not self._garbage.turn(urgent=True):  # others may have taken it
            return reading
        self._garbage.collect()
        heap.give_back()
        after = self._tier.read()
        if after is not None:
            self._garbage.judge(helped=reading.mine - after.mine >= _GARBAGE)
        return after

    def _excessive(self, scale: Scale, reading: Reading | None) -> bool:
        if reading is None or scale.before is None:
            return False
        expected = scale.plan.resident * _MUCH + _GARBAGE
        return reading.mine - scale.before.mine - scale.parts > expected


def _may_map(plan: Plan, grown: int) -> bool:
    """Whether a look at the mapped files, of some system calls, is worth its time."""
    return plan.artifact >= NOISE and (plan.first or plan.maps or grown < plan.resident // 2)
