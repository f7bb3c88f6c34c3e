"""Who is let into memory, what is reserved for it, and who gives way: by a gauge and sizes that the test decides.

How footprints come about is in ``test_footprints``, what follows an eviction in ``test_eviction``; threads that meet at
one point in ``interleave/test_admission``.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest

from modelcache import Evicted, LoadFailed, NoRoom, Pressure, Reason, TooLarge
from modelcache.disk import figures
from modelcache.disk.figures import Figures
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Gate, Spawn, eventually

NEVER = 1000.0  # seconds between two looks of a monitor that is to stay out of a test


class Sized:
    """A cache whose models have these sizes, on a gauge that reads what is loaded.

    Args:
        sizes: id to the bytes that ``size_of`` says, and that the gauge reads for it.
        limit: bytes there are.
        settings: of the cache; ``memory`` those of the memory tier.

    Attributes:
        extra: bytes that the gauge reads on top.
        grown: id to the bytes by which a model is larger than was said.
        told: evictions.
    """

    def __init__(self, make_cache: MakeCache, sizes: dict[str, int], *, limit: int = 1000, **settings: Any) -> None:
        self.extra = 0
        self.grown: dict[str, int] = {}
        self.sizes = sizes
        self.during: Any = lambda model: None
        self.book = Book(load=self._load)
        memory = {"gauge": FakeGauge(self._used, limit), "high": 800, "low": 400, "interval": NEVER}
        memory.update(settings.pop("memory", {}))
        self.cache = make_cache(
            DictSource().add(*sizes),
            self.book,
            size_of=lambda model, path: sizes[model],
            memory=memory,
            **settings,
        )
        self.told: list[Any] = []
        self.cache.on(Evicted, self.told.append)

    def _load(self, path: Path, model: str) -> Any:
        self.during(model)
        return type("Model", (), {"model": model})()

    def _used(self) -> int:
        return self.extra + sum(self.sizes[model] + self.grown.get(model, 0) for model in self.book.alive)

    def get(self, *models: str) -> None:
        """Load models, in order."""
        for model in models:
            assert self.cache.get(model).model == model

    @property
    def alive(self) -> str:
        """Ids of what is loaded, sorted, in one word."""
        return "".join(sorted(self.book.alive))

    def waits(self, state: str = "waiting for room") -> bool:
        """Whether some load waits."""
        return any(row.state == state for row in self.cache.models())

    def remember(self, model: str, resident: int, peak: int) -> None:
        """Have a model known with its peak, as by an earlier process."""
        assert self.cache.prefetch([model], tier="disk").wait(10)
        for folder in self.cache.disk.path.glob("models/*"):
            if f'"{model}"' in next(folder.glob("*record*.json")).read_text():
                figures.write(folder, Figures(resident=resident, peak=peak, seconds=1.0))


# Who gives way


def test_what_is_tracked_counts_where_the_gauge_reads_low(make_cache: MakeCache) -> None:
    """Used is at least what the footprints add up to: models that the gauge does not see yet may still grow."""
    sized = Sized(make_cache, dict.fromkeys("abcd", 250), memory={"gauge": FakeGauge(0)})
    sized.get(*"abc")
    assert sized.alive == "abc"
    sized.get("d")
    assert sized.alive == "bcd"


def test_what_is_measured_counts_where_the_footprints_read_low(make_cache: MakeCache) -> None:
    """Used is at least what the gauge reads, whatever is known of the models."""
    sized = Sized(make_cache, dict.fromkeys("abcd", 100))
    sized.get(*"ab")
    sized.extra = 550
    sized.get("c")
    assert sized.alive == "bc"


def test_one_that_suffices_is_preferred(make_cache: MakeCache) -> None:
    """Of victims that go first by the policy, those are spared that one further victim makes needless."""
    sized = Sized(make_cache, {"a": 100, "b": 100, "c": 500, "d": 400})
    sized.get(*"abcd")
    assert sized.alive == "abd"
    assert [event.model for event in sized.told] == ["c"]


def test_nothing_goes_where_it_would_not_suffice(make_cache: MakeCache, spawn: Spawn) -> None:
    """Where leases are in the way of a newcomer whatever else goes, all stays, and the newcomer waits."""
    sized = Sized(make_cache, {"a": 500, "b": 100, "c": 100, "d": 400}, memory={"interval": 0.05})
    with sized.cache.lease("a"):
        sized.get(*"bc")
        waiting = spawn(sized.cache.get, "d")
        eventually(sized.waits)
        assert sized.alive == "abc"
        with pytest.raises(NoRoom, match="'a'"):
            spawn(sized.cache.get, "d", timeout=0.2).result()
        assert sized.told == []
    assert waiting.result().model == "d"
    assert sized.alive == "bcd"


def test_nothing_goes_for_a_budget_that_a_lease_fills(make_cache: MakeCache) -> None:
    """Where leases leave too little of the budget, all stays, also those whose footprints were only guessed."""
    book, source = Book(), DictSource().add("a", size=40).add("b", size=100).add("c", size=60)
    cache = make_cache(source, book, memory={"gauge": FakeGauge(), "budget": 160, "interval": 0.05})
    cache.get("a")
    with cache.lease("b"):
        assert [row.in_use for row in cache.models()] == ["estimate", "estimate"]
        cache.memory.budget = 150
        with pytest.raises(NoRoom, match="'b'"):
            cache.get("c")
        assert book.alive == ["a", "b"]
    assert cache.get("c").model == "c"


def test_too_large_leaves_the_others(make_cache: MakeCache) -> None:
    """F017: a model larger than the limit is refused before it is loaded, with its figures; the others stay."""
    sized = Sized(make_cache, {"a": 100, "b": 900})
    sized.get("a")
    with pytest.raises(TooLarge) as refused:
        sized.cache.get("b")
    assert (refused.value.model, refused.value.need, refused.value.limit) == ("b", 900, 800)
    assert sized.book.loads == ["a"]
    assert sized.alive == "a"


# Peaks


def test_peak_is_reserved(make_cache: MakeCache, spawn: Spawn) -> None:
    """While a model loads, the bytes of its peak are taken: the next one waits until it is measured."""
    sized = Sized(make_cache, {"a": 200, "b": 200}, memory={"interval": 0.05})
    for model in "ab":
        sized.remember(model, 200, 500)
    with Gate("a") as gate:
        sized.during = gate
        first = spawn(sized.cache.get, "a")
        gate.wait()
        assert sized.cache.stats().memory_reserved == 500
        second = spawn(sized.cache.get, "b")
        eventually(sized.waits)
        assert sized.book.loads == []
    for load in (first, second):
        load.result()
    assert sized.alive == "ab"
    assert sized.told == []
    assert sized.cache.stats().memory_reserved == 0


def test_room_is_made_for_the_peak(make_cache: MakeCache) -> None:
    """What is evicted for a load is what its peak needs, not only what it keeps."""
    sized = Sized(make_cache, {"a": 300, "b": 300, "c": 100})
    sized.remember("c", 100, 450)
    sized.get(*"abc")
    assert sized.alive == "bc"


def test_measured_peak_above_high_goes_alone(make_cache: MakeCache) -> None:
    """A peak that exceeds ``high``, but not the limit, is let in once all that may go is gone."""
    sized = Sized(make_cache, {"a": 300, "b": 300, "c": 100}, memory={"interval": 0.05})
    sized.remember("c", 100, 950)
    sized.get(*"abc")
    assert sized.alive == "c"


def test_measured_peak_above_the_limit_is_refused(make_cache: MakeCache) -> None:
    """A peak that was measured, and would pass the limit itself, is refused: the process would be killed."""
    sized = Sized(make_cache, {"c": 100}, memory={"interval": 0.05})
    sized.extra = 200
    sized.remember("c", 100, 950)
    with pytest.raises(NoRoom):
        sized.cache.get("c", timeout=0.5)
    assert sized.book.loads == []


def learned(make_cache: MakeCache, **more: int) -> Sized:
    """Return a cache of models of these sizes, in MiB, that has learned that peaks are twice what stays."""
    mib = 2**20
    sizes = {model: size * mib for model, size in more.items()}
    memory = {"high": 800 * mib, "low": 400 * mib, "interval": 0.05}
    sized = Sized(make_cache, sizes, limit=1000 * mib, memory=memory)
    for _ in range(8):  # only a real process has peaks to learn from
        sized.cache._parts.residents.footprints._peaks.add("txt", 2.0)
    return sized


def test_estimated_peak_waits_for_a_lease_but_not_for_ever(make_cache: MakeCache, spawn: Spawn) -> None:
    """Where only the estimate of a peak is in the way, a lease that is never released refuses nobody."""
    sized = learned(make_cache, held=450, new=300)
    lease = sized.cache.lease("held")
    lease.acquire()
    assert spawn(sized.cache.get, "new").result().model == "new"
    lease.release()
    assert sized.told == []


def test_estimated_peak_beside_ones_own_lease(make_cache: MakeCache) -> None:
    """Who holds a lease, and asks for one more, is not refused for an estimate."""
    sized = learned(make_cache, held=450, new=300)
    with sized.cache.lease("held"):
        sized.get("new")
    assert sized.told == []


def test_estimated_peak_of_a_part(make_cache: MakeCache) -> None:
    """An ensemble's part is not refused for the estimate of its peak beside what the whole reserved."""
    sized = learned(make_cache, whole=300, part=300)
    sized.during = lambda model: sized.cache.get("part") if model == "whole" else None
    sized.get("whole")
    assert sorted(sized.book.alive) == ["part", "whole"]


# What was taken beyond what was expected


@pytest.mark.parametrize("verb", ["get", "prefetch"])
def test_part_goes_first_and_others_wait(make_cache: MakeCache, spawn: Spawn, verb: str) -> None:
    """What a loader waits for does not stand in line, and who waits for that loader's room is not refused meanwhile."""
    cache: list[Any] = []
    with Gate("whole") as gate:

        def ask(model: str) -> None:
            gate(model)
            if model == "whole" and verb == "get":
                cache[0].get("part")
            elif model == "whole":
                assert cache[0].prefetch(["part"]).wait(2.0)

        book = Book()
        book.gate = ask
        source = DictSource().add("whole", "part", size=300).add("other", size=600)
        memory = {"gauge": FakeGauge(limit=10_000), "budget": 800, "interval": 0.05}
        cache.append(make_cache(source, book, memory=memory))
        whole = spawn(cache[0].get, "whole")
        gate.wait()
        other = spawn(cache[0].get, "other")
        eventually(lambda: any(row.state == "waiting for room" for row in cache[0].models()))
    assert [whole.result().model, other.result().model] == ["whole", "other"]
    assert book.loads == ["part", "whole", "other"]


def test_deficit_is_worked_off_by_just_enough(make_cache: MakeCache) -> None:
    """Where a load took more than was expected the monitor evicts what is missing, not down to ``low``."""
    sized = Sized(make_cache, dict.fromkeys("abcdefgh", 100), memory={"interval": 0.05})
    sized.get(*"abcdefg")
    sized.grown["h"] = 150
    sized.get("h")
    eventually(lambda: len(sized.told) >= 2)
    looks = itertools.count()
    eventually(lambda: next(looks) > 10)
    assert sized.alive == "cdefgh"
    assert [event.reason for event in sized.told] == [Reason.WATERMARK] * 2


def test_growth_from_outside_goes_down_to_low(make_cache: MakeCache) -> None:
    """Growth that is no load's is answered down to ``low``."""
    sized = Sized(make_cache, dict.fromkeys("abcdefgh", 100), memory={"interval": 0.05, "low": 500})
    sized.get(*"abcdef")
    sized.extra = 250
    eventually(lambda: sized.alive == "ef")


def test_f014_no_cascade_while_an_unload_takes_long(make_cache: MakeCache, spawn: Spawn) -> None:
    """F014: at ``high`` one load evicts one of 20 equal models, however long its ``unload=`` takes."""
    names = [f"m{number:02}" for number in range(20)]
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(
            DictSource().add(*names, "new"),
            book,
            size_of=lambda model, path: 40,
            memory={"high": 800, "low": 400, "gauge": FakeGauge(lambda: 40 * len(book.alive)), "interval": 0.02},
        )
        told: list[Any] = []
        cache.on(Evicted, told.append)
        for name in names:
            cache.get(name)
        newcomer = spawn(cache.get, "new")
        gate.wait()
        looks = itertools.count()
        eventually(lambda: next(looks) > 10)
        assert [event.model for event in told] == ["m00"]
    assert newcomer.result().model == "new"
    assert len(told) == 1


# Memory that runs out


def test_memory_error_is_tried_once_more(make_cache: MakeCache) -> None:
    """A load that runs out of memory is made room for, and tried once more; what it needs goes, the rest stays."""
    sized = Sized(make_cache, {"a": 100, "b": 100, "c": 100, "new": 150})
    sized.get(*"abc")
    tries: list[str] = []

    def during(model: str) -> None:
        tries.append(model)
        if len(tries) == 1:
            raise MemoryError("tight")

    sized.during = during
    sized.get("new")
    assert tries == ["new", "new"]
    assert [(event.model, event.reason, event.for_model) for event in sized.told] == [
        ("a", Reason.MEMORY_ERROR, "new"),
        ("b", Reason.MEMORY_ERROR, "new"),
    ]


def test_memory_error_twice_is_told(make_cache: MakeCache) -> None:
    """What still runs out of memory is a LoadFailed that names it; nothing stays reserved, the next call tries anew."""
    sized = Sized(make_cache, {"a": 100, "new": 150}, retry_after=0)
    sized.get("a")

    def during(model: str) -> None:
        raise MemoryError("tight")

    sized.during = during
    with pytest.raises(LoadFailed, match="MemoryError: tight") as failed:
        sized.cache.get("new")
    assert isinstance(failed.value.__cause__, MemoryError)
    assert "artifact is broken" not in str(failed.value)
    assert sized.cache.stats().memory_reserved == 0
    sized.during = lambda model: None
    sized.get("new")


@pytest.mark.parametrize("part", [500, 900], ids=["no room", "too large"])
def test_part_that_is_refused_is_not_tried_again(make_cache: MakeCache, part: int) -> None:
    """A part without room is no memory that ran out: the whole is not loaded again, and nothing is evicted for it."""
    sized = Sized(make_cache, {"a": 50, "held": 400, "whole": 50, "part": part}, memory={"interval": 0.05})
    sized.get("a")
    tries: list[str] = []

    def during(model: str) -> None:
        tries.append(model)
        if model == "whole":
            sized.cache.get("part", timeout=0.3)

    sized.during = during
    with sized.cache.lease("held"), pytest.raises((NoRoom, LoadFailed)):
        sized.cache.get("whole")
    assert tries == ["held", "whole"]
    assert "a" in sized.book.alive


def test_what_the_gauge_does_not_see_is_no_pressure(make_cache: MakeCache) -> None:
    """Evictions for what is tracked need not move the gauge: they are not taken to be in vain."""
    sized = Sized(make_cache, dict.fromkeys("abcdefgh", 250), memory={"gauge": FakeGauge(0), "low": 1})
    told: list[Any] = []
    sized.cache.on(Pressure, told.append)
    sized.get(*"abcdefgh", *"abcdefgh")
    assert told == []
    assert not sized.cache.stats().pressed
