"""What a model takes in memory, resident and at its peak: estimated before it was measured, learned over its loads.

How one load is measured is ``memory.measuring``. Here: which figure is in use, how later measurements are blended
in, which of them are distrusted, and what the artifacts of this cache usually become in memory. Every method runs
under the cache's guard.
"""

import math
from collections import deque

import attrs

from modelcache.memory.ratios import LEARNED, Ratios, share_of

NOISE = 2**20
"""Bytes by which a process grows and shrinks on its own, so that less measures nothing."""

_SMALL = 8 * NOISE  # an estimate above this is no small model's
_WEIGHTY = 4 * NOISE  # resident bytes from which on a model's peak says something of others
_STEEPEST = 4.0  # times the resident bytes: peaks above that are a matter of one model, not of the cache
_DISTRUSTED = 3  # doubtful measurements in a row after which the next load of that model runs alone
_ENOUGH = 8  # clean measurements from which on the ratios of this cache are known well
_MOST = 100_000  # models that figures are kept of; beyond it those that were not loaded for longest are forgotten
_OTHER = 1.1  # times as large or small as what was measured: an artifact like that is another version
_BLEND = 0.3  # weight of a new figure that is below the known one; a higher one counts at once
_CAUTIOUS = 0.9  # share of the learned peaks that the estimate of a peak is to cover


@attrs.frozen
class Measurement:
    """What one load took, in bytes.

    Attributes:
        resident: what used memory grew by, its parts (models that its loader asked for) taken off.
        peak: what it grew by at its highest, likewise; at least ``resident``.
        clean: whether nothing else was loaded, unloaded or imported meanwhile.
        latent: of ``resident``, mapped pages that were not used yet.
    """

    resident: int
    peak: int
    clean: bool
    latent: int = 0


@attrs.frozen
class Plan:
    """What a load is expected to take, in bytes.

    Attributes:
        resident: once it is loaded.
        peak: while it loads; at least ``resident``.
        sure: whether that was measured, or given by the user, rather than guessed from the artifact.
        peak_sure: whether the peak was measured.
        artifact: bytes of the artifact's files.
        alone: whether it should run alone, so that it can be measured.
        first: whether it was never measured.
        maps: whether it left mapped pages untouched at its last load.
        thread: identity of the thread that loads it; None before it is admitted.
    """

    resident: int
    peak: int
    sure: bool = False
    peak_sure: bool = False
    artifact: int = 0
    alone: bool = False
    first: bool = True
    maps: bool = False
    thread: object = None


@attrs.frozen
class Known:
    """What is known of one model, in bytes and seconds; replaced as a whole.

    Attributes:
        estimate: what was expected before any measurement.
        given: whether ``estimate`` is the user's word.
        resident: measured, blended; None: never measured cleanly.
        peak: measured, blended; None: never.
        artifact: bytes of the artifact that was measured; 0: none was.
        doubtful: the last measurement that is not believed, as others loaded meanwhile or as it was above all that is
            allowed; None: none since the last clean one.
        distrusted: such measurements in a row.
        seconds: of its loads, blended; 0: none yet.
        weighed: whether this process has measured it cleanly, be it too small to tell.
        maps: whether it left mapped pages untouched at its last load.
        kind: what its artifact is of.
    """

    estimate: int = 0
    given: bool = False
    resident: int | None = None
    peak: int | None = None
    artifact: int = 0
    doubtful: int | None = None
    distrusted: int = 0
    seconds: float = 0.0
    weighed: bool = False
    maps: bool = False
    kind: str = ""

    @property
    def in_use(self) -> int:
        """The footprint that decisions are made with."""
        return self.estimate if self.resident is None else self.resident

    def growth(self, artifact: int) -> float:
        """Return how many times as large an artifact is as the one that was measured; 1 where that tells nothing."""
        return artifact / self.artifact if self.artifact and max(artifact, self.artifact) >= NOISE else 1.0

    def covers(self, artifact: int) -> bool:
        """Whether the figures are of an artifact of this size, or of a larger one, rather than of a smaller version."""
        return self.growth(artifact) < _OTHER

    def expect(self, artifact: int) -> int:
        """Return the footprint to count with for an artifact of this size."""
        if self.resident is None or self.covers(artifact):
            return self.in_use
        return self.estimate if self.given else math.ceil(self.resident * self.growth(artifact))

    def sure(self, artifact: int) -> bool:
        """Whether that was measured, or given by the user, rather than guessed."""
        return self.given or (self.resident is not None and self.covers(artifact))


class Footprints:
    """The figures of every model that was in memory; the cache's guard is held for each call."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self._sizes = Ratios()  # resident over artifact bytes
        self._small: deque[float] = deque(maxlen=LEARNED)  # resident bytes of artifacts too small to tell anything
        self._peaks = Ratios()  # peak over resident bytes
        self._clean = 0
        self._doubtful = 0  # doubtful loads in a row, of whatever model

    def known(self, model: str) -> Known | None:
        """Return what is known of a model; None if it never was in memory."""
        return self._known.get(model)

    def plan(self, model: str, artifact: int, given: int | None, kind: str = "") -> Plan:
        """Return what a load is expected to take.

        Args:
            model: its id.
            artifact: bytes of the artifact's files.
            given: bytes that the user's ``size_of`` says; None where there is none.
            kind: what the artifact is of: models of one kind become alike.
        """
        known = self._known.get(model, Known())
        estimate = self._estimate(artifact, kind) if given is None else given
        self._known.pop(model, None)  # to be forgotten last
        self._known[model] = known = attrs.evolve(known, estimate=estimate, given=given is not None, kind=kind)
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]
        resident, peak = known.expect(artifact), math.ceil((known.peak or 0) * max(known.growth(artifact), 1.0))
        if known.peak is None:
            peak = math.ceil(resident * self._peaks.usual(kind, _CAUTIOUS))
        first = known.resident is None and not known.weighed
        unknown = self._clean < _ENOUGH and self._doubtful >= _DISTRUSTED
        return Plan(
            resident=resident,
            peak=max(peak, resident),
            sure=known.sure(artifact),
            peak_sure=known.peak is not None and known.covers(artifact),
            artifact=artifact,
            alone=first and (known.distrusted >= _DISTRUSTED or unknown),
            first=first,
            maps=known.maps,
        )

    def _estimate(self, artifact: int, kind: str) -> int:
        if artifact < NOISE and self._small:
            return math.ceil(max(share_of(self._small, 0.5), artifact))
        return math.ceil(artifact * self._sizes.usual(kind, 0.5))

    def learn(self, model: str, artifact: int, measured: Measurement | None, seconds: float, most: float) -> Known:
        """Take in what a load took, and return what is known now.

        Growth below ``NOISE`` says only that the model is small: the estimate stays in use where it is small too, or
        the user's.

        Args:
            model: its id.
            artifact: bytes of the artifact's files.
            measured: None: it could not be measured.
            seconds: that the load took.
            most: bytes above which a model is refused. A measurement above it, which would be the last one, is believed
                only once the next one says so too: a thread of the host may have taken that memory.
        """
        known = self._known.get(model, Known())
        blended = seconds if not known.seconds else known.seconds + _BLEND * (seconds - known.seconds)
        known = attrs.evolve(known, seconds=blended, maps=measured is not None and measured.latent > 0)
        if measured is not None and measured.clean and (known.doubtful or 0) <= most < measured.resident:
            known = attrs.evolve(known, doubtful=measured.resident)
        elif measured is not None and measured.clean:
            known = self._learn_clean(known, artifact, measured)
        elif measured is not None and known.resident is None:
            self._doubtful += 1
            known = attrs.evolve(known, doubtful=measured.resident, distrusted=known.distrusted + 1)
        self._known[model] = known
        return known

    def _learn_clean(self, known: Known, artifact: int, measured: Measurement) -> Known:
        self._clean += 1
        self._doubtful = 0
        if not 1 / _OTHER < known.growth(artifact) < _OTHER:
            known = attrs.evolve(known, resident=None, peak=None)
        known = attrs.evolve(known, artifact=artifact, doubtful=None, distrusted=0, weighed=True)
        peak = _blend(known.peak, measured.peak) if measured.peak >= NOISE else known.peak
        if measured.resident < NOISE and (known.given or known.in_use < _SMALL):
            return attrs.evolve(known, peak=None if peak is None else max(peak, known.in_use))
        if artifact >= NOISE:
            self._sizes.add(known.kind, measured.resident / artifact)
        elif measured.resident >= NOISE:
            self._small.append(measured.resident)
        if measured.resident >= _WEIGHTY:
            self._peaks.add(known.kind, min(measured.peak / measured.resident, _STEEPEST))
        resident = _blend(known.resident, max(measured.resident, NOISE))
        return attrs.evolve(known, resident=resident, peak=max(peak or 0, resident))

    def recall(self, model: str, artifact: int, resident: int | None, peak: int | None, seconds: float) -> None:
        """Take over what an earlier process measured of an artifact of this size, unless this one knows better."""
        known = self._known.get(model, Known())
        if known.resident is None and not known.seconds:
            self._known[model] = attrs.evolve(known, artifact=artifact, resident=resident, peak=peak, seconds=seconds)

    def forget(self, model: str) -> None:
        """Drop what is known of a model that is in neither tier."""
        self._known.pop(model, None)


def _blend(known: int | None, new: int) -> int:
    """Return a figure that rises at once and falls slowly: heap that was free already makes a load read low."""
    return new if known is None or new >= known else round(known + _BLEND * (new - known))
