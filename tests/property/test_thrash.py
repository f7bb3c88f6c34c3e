"""When the memory tier thrashes, against a reference that keeps every sample."""

import time
from bisect import bisect_left
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from modelcache.memory.thrash import Change, Thrash

HOUR = 3600.0

# Eighths add up without a rounding error, so that sums may be compared for equality.
seconds = st.integers(0, 400).map(lambda eighths: eighths / 8)
models = st.sampled_from("abcdefgh")
reload = st.tuples(st.just("loaded"), models, seconds, st.just(True))
load = st.tuples(st.just("loaded"), models, seconds, st.booleans())
serving = st.tuples(st.just("served"), seconds)
look = st.just(("look",))


def phases(pauses: st.SearchStrategy[float], most: int) -> st.SearchStrategy[list[tuple[float, tuple[Any, ...]]]]:
    """Return histories of a few phases, ``most`` steps in all: mostly reloads, serving, or anything, each at a pace."""
    step = st.one_of(reload, reload, reload, look), st.one_of(serving, look), st.one_of(load, serving, look)
    long = most // 4
    phase = st.one_of([st.lists(st.tuples(pauses, steps), min_size=long // 2, max_size=long) for steps in step])
    return st.lists(phase, max_size=4).map(lambda some: [step for phase in some for step in phase])


class Kept:
    """The reference: all samples of all time, and the definition written down as it stands."""

    def __init__(self) -> None:
        self.active = False
        self.samples: list[tuple[float, str | None, float]] = []  # when, whose reload (None: serving), seconds
        self.loads: list[float] = []  # since thrashing was last over

    def loaded(self, now: float, model: str, seconds: float, *, reload: bool) -> None:
        """Keep it."""
        self.loads.append(now)
        if reload:
            self.samples.append((now, model, seconds))

    def served(self, now: float, seconds: float) -> None:
        """Keep it."""
        self.samples.append((now, None, seconds))

    @property
    def window(self) -> float:
        """How far back it reaches, in seconds."""
        last = self.loads[-20:]
        return max(60.0, last[-1] - last[0]) if last else 60.0

    def figures(self, start: float) -> tuple[float, int, tuple[tuple[str, float], ...]]:
        """Return the share, the number of reloads, and the worst models of what was since ``start``."""
        recent = self.samples[bisect_left(self.samples, start, key=lambda sample: sample[0]) :]
        reloads = [(model, took) for _, model, took in recent if model is not None]
        swapping = sum(took for _, took in reloads)
        both = sum(took for _, _, took in recent)
        totals = {name: sum(took for model, took in reloads if model == name) for name, _ in reloads}
        worst = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:5]
        return (swapping / both if both else 0.0), len(reloads), tuple(worst)

    def starts(self, now: float) -> list[float]:
        """Return where the window may start: where it does, or a second or a 16th of its length earlier."""
        start = now - self.window
        earliest = start - max(1.0, self.window / 16)
        return [start, *(at for at, _, _ in self.samples if earliest <= at < start)]

    def look(self, now: float, start: float) -> Change | None:
        """Return what a look that takes the window from ``start`` must tell; nothing is changed."""
        share, reloads, worst = self.figures(start)
        turns = share < 0.25 if self.active else share >= 0.5 and reloads >= 10
        return Change(not self.active, share, reloads * 60 / self.window, worst, self.window) if turns else None

    def changed(self) -> None:
        """Go over to the other state."""
        self.active = not self.active
        if not self.active:
            self.loads.clear()


def run(history: list[tuple[float, tuple[Any, ...]]], *, exact: bool) -> list[Change]:
    """Tell both the same, ask both at each look, and return the changes."""
    thrash, kept = Thrash(), Kept()
    changes = []
    now = 1000.0
    for pause, (step, *arguments) in history:
        now += pause
        for twin in (thrash, kept):
            if step == "loaded":
                twin.loaded(now, arguments[0], arguments[1], reload=arguments[2])
            elif step == "served":
                twin.served(now, arguments[0])
        if step == "look":
            starts = kept.starts(now)[:1] if exact else kept.starts(now)
            assert thrash.share(now) in {kept.figures(start)[0] for start in starts}
            change = thrash.look(now)
            assert change in [kept.look(now, start) for start in starts]
            if change is not None:
                kept.changed()
                changes.append(change)
            assert thrash.active is kept.active
    return changes


@given(phases(st.sampled_from([0.0, 1.0, 1.0, 7.0, 60.0, HOUR]), 120))
@settings(max_examples=150, deadline=None)
def test_equals_the_reference(history: list[tuple[float, tuple[Any, ...]]]) -> None:
    """With at most one moment a second, and few of them, every answer is exact."""
    run(history, exact=True)


@given(phases(st.floats(0, 2) | st.floats(0, 100), 120))
@settings(max_examples=120, deadline=None)
def test_start_of_the_window_is_as_exact_as_said(history: list[tuple[float, tuple[Any, ...]]]) -> None:
    """Whatever the times, an answer is that of a window which starts at most a second or a 16th too early."""
    run(history, exact=False)


@given(st.integers(0, 10**9), st.sampled_from([0.3, 5.0, 120.0]), st.sampled_from([1.0, 0.125]))
@settings(max_examples=15, deadline=None)
def test_long_histories(seed: int, pause: float, weight: float) -> None:
    """The same holds once old samples are kept in larger and larger pieces."""
    random = Random(seed)  # noqa: S311 - no secret
    history: list[tuple[float, tuple[Any, ...]]] = []
    busy = 0.1
    for _ in range(random.randrange(300, 700)):
        lull = HOUR if random.random() < 0.002 else 0.0
        busy = random.choice([0.0, 0.1, 0.9]) if random.random() < 0.03 else busy
        history.append((random.uniform(0, 2 * pause) + lull, ("served", random.randrange(40) / 8 * weight)))
        if random.random() < busy:
            history.append((0.0, ("loaded", random.choice("abcdefgh"), random.randrange(200) / 8, True)))
        if random.random() < 0.2:
            history.append((0.0, ("look",)))
    run(history, exact=False)


def thrashing(thrash: Thrash, now: float, *, pause: float = 1.0) -> tuple[float, Change]:
    """Swap two models until it is told, with a look after each load; return when, and the change."""
    for count in range(40):
        now += pause
        thrash.loaded(now, "ab"[count % 2], 2.0, reload=True)
        change = thrash.look(now)
        if change is not None:
            return now, change
    pytest.fail("never told")


def test_ten_reloads_and_half_of_the_time() -> None:
    """It is told once, with the tenth reload and not before, with the models that cost most."""
    now, change = thrashing(Thrash(), 0.0)
    assert now == 10.0
    assert change == Change(True, 1.0, 10.0, (("a", 10.0), ("b", 10.0)), 60.0)


def test_first_loads_do_not_count() -> None:
    """A server that starts, and loads all day, does not thrash."""
    thrash = Thrash()
    for count in range(100):
        thrash.loaded(float(count), f"m{count}", 5.0, reload=False)
        assert thrash.look(float(count)) is None
    assert thrash.share(99.0) == 0.0


def test_enters_at_half_leaves_below_a_quarter() -> None:
    """Between a quarter and a half nothing changes, whichever side it came from."""
    thrash = Thrash()
    for count in range(10):
        thrash.loaded(float(count), "a", 2.0, reload=True)
    thrash.served(10.0, 20.5)
    assert thrash.look(10.0) is None
    thrash.loaded(11.0, "a", 0.5, reload=True)
    change = thrash.look(11.0)
    assert change is not None
    assert change.share == 0.5
    assert thrash.look(12.0) is None
    thrash.served(13.0, 41.0)
    assert thrash.share(13.0) == 0.25
    assert thrash.look(13.0) is None
    thrash.served(14.0, 0.25)
    change = thrash.look(14.0)
    assert change is not None
    assert not change.entering
    assert thrash.look(15.0) is None


def test_over_when_traffic_stops() -> None:
    """With nothing served and nothing loaded it is over once the window has passed; and not before."""
    thrash = Thrash()
    now, _ = thrashing(thrash, 0.0)
    assert thrash.look(now + 60.0) is None
    assert thrash.look(now + 61.0) == Change(False, 0.0, 0.0, (), 60.0)
    assert thrash.look(now + 62.0) is None


@pytest.mark.parametrize("pause", [60.0, 600.0, 86_400.0])
def test_slow_loads_stretch_the_window(pause: float) -> None:
    """Reloads that are minutes or a day apart, with next to nothing served between, are thrashing too."""
    thrash = Thrash()
    now, change = thrashing(thrash, 0.0, pause=pause)
    assert change.window == 9 * pause
    assert thrash.look(now + 9 * pause) is None
    assert thrash.look(now + 9 * pause + 1) is not None


def test_a_lull_is_not_bridged() -> None:
    """Once it was over, one more reload does not bring back the reloads of before."""
    thrash = Thrash()
    now, _ = thrashing(thrash, 0.0)
    assert thrash.look(now + 61.0) is not None
    thrash.loaded(now + HOUR, "a", 2.0, reload=True)
    assert thrash.look(now + HOUR) is None
    again, change = thrashing(thrash, now + HOUR)
    assert again == now + HOUR + 9
    assert change.entering


def test_at_most_five_models_are_named() -> None:
    """The worst come first, and more than five are not named."""
    thrash = Thrash()
    for count in range(12):
        thrash.loaded(1.0, f"m{count}", float(count), reload=True)
    change = thrash.look(1.0)
    assert change is not None
    assert change.worst == (("m11", 11.0), ("m10", 10.0), ("m9", 9.0), ("m8", 8.0), ("m7", 7.0))


def test_a_clock_that_was_read_before_the_guard_was_had() -> None:
    """A time before that of an earlier call is taken for that one's."""
    thrash = Thrash()
    for count in range(10):
        thrash.loaded(1000.0 - 100 * count, "a", 1.0, reload=True)
    assert thrash.look(1000.0) is not None


def kept_by(thrash: Thrash) -> int:
    """Count what a tier remembers: slices and names in them."""
    return sum(1 + len(part.models) for part in thrash._slices)


def test_memory_is_bounded_at_any_rate() -> None:
    """Thousands of models reloaded in one second are not all remembered; the sums are right nevertheless."""
    thrash = Thrash()
    for count in range(20_000):
        thrash.loaded(count / 20_000, f"m{count}", 0.125, reload=True)
    thrash.loaded(1.0, "worst", 3.0, reload=True)
    assert kept_by(thrash) <= 300
    change = thrash.look(1.0)
    assert change is not None
    assert change.reloads_per_minute == 20_001
    assert change.worst[0] == ("worst", 3.0)


def test_memory_is_bounded_for_any_time() -> None:
    """A sample a second for two days, and few loads, need a few hundred slices, and a look stays quick."""
    thrash = Thrash()
    thrash.loaded(0.0, "a", 1.0, reload=True)
    for second in range(0, 2 * 86_400, 4):
        thrash.served(float(second), 0.125)
    assert kept_by(thrash) <= 700
    start = time.perf_counter()
    assert thrash.look(2 * 86_400.0) is None
    assert time.perf_counter() - start < 0.1
