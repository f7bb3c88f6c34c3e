"""A cache against a plain model of it: what may be in memory after any order of calls."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from modelcache import (
    DiskTier,
    Evicted,
    Lease,
    LoadFailed,
    MemoryTier,
    ModelCache,
    NoRoom,
    SourceUnavailable,
    TooLarge,
    Unloaded,
)
from tests.support.fakes import Book, DictSource, Model, allocated, tar
from tests.support.waiting import eventually

MODELS = "abcdef"
SIZES = {model: 100 * (number + 1) for number, model in enumerate(MODELS)}

models = st.sampled_from(MODELS)
some_disk = st.sampled_from([None, 30_000, 40_000, 70_000, 2**20])
QUICK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a folder whose syncs cost nothing


def fail(model: str) -> None:
    """Be a loader's step that fails."""
    raise ValueError(f"{model} does not load")


class Versioned(Model):
    """A model that knows its version."""

    version = 0


def load(path: Path, model: str) -> Versioned:
    """Load what ``Twins.upload`` made."""
    data = (path / "model.txt").read_bytes()
    value = Versioned(model, len(data), path)
    value.version = int(data.rstrip(b"\0").split()[1])
    return value


class Twins(RuleBasedStateMachine):
    """One cache, used from one thread, and what must hold of it.

    The plain model: which leases are held, and on which versions, which models were ordered to leave with their last
    lease, which version must be seen at least, and the limits. What is evicted is the policy's choice; that it was
    needed, and allowed, is checked.
    """

    def __init__(self) -> None:
        """Make a cache in a folder of its own."""
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=QUICK)
        self.source = source = DictSource()
        self.current = dict.fromkeys(MODELS, 0)  # the version of each model that the source has
        self.least = dict.fromkeys(MODELS, 0)  # the newest version of each model that was seen, or that must be seen
        for model in MODELS:
            self.upload(model)
        self.book = Book(load)
        self.cache: ModelCache[Any] = ModelCache(
            source,
            self.book.load,
            unload=self.book.unload,
            size_of=lambda model, path: SIZES[model],
            disk=DiskTier(Path(self.folder.name) / "disk", min_free=0),
            memory=MemoryTier(high=10_000, low=10_000, policy="lru", gauge=self.book.gauge(20_000), interval=1000.0),
            timeout=5.0,
            retry_after=0,
        )
        self.leases: list[tuple[str, Lease[Any], Versioned]] = []
        self.ordered: set[str] = set()
        self.deleted: set[str] = set()
        self.events: list[Any] = []
        self.cache.on(Evicted, self.events.append)
        self.cache.on(Unloaded, self.events.append)

    def upload(self, model: str) -> None:
        """Give a model its current version at the source; all its versions are of one size."""
        text = f"{model} {self.current[model]}"
        self.source.artifacts[model] = tar({"model.txt": text.encode().ljust(SIZES[model], b"\0")})

    # What is done

    def asked(self, model: str, lease: Lease[Any]) -> bool:
        """Acquire a lease; return whether there was room."""
        there = self.must_be_found(model)
        value, refusal = None, None
        try:
            value = lease.acquire()
        except NoRoom as error:
            refusal = error
        if refusal is not None:
            assert not there, f"NoRoom for {model}, which is in memory"
            assert self.may_refuse(refusal), f"{refusal!r}, and nobody holds a lease"
            assert {holder[0] for holder in refusal.holders} <= self.leased()
            return False
        assert value.model == model
        assert value.version >= self.least[model], f"{model} went back to an older version"
        self.least[model] = value.version
        self.ordered.discard(model)
        self.deleted.discard(model)
        return True

    @rule(model=models)
    def get(self, model: str) -> None:
        """Look a model up."""
        lease = self.cache.lease(model)
        if self.asked(model, lease):
            lease.release()

    @rule(model=models)
    def hold(self, model: str) -> None:
        """Lease a model, and keep it."""
        lease = self.cache.lease(model)
        if self.asked(model, lease):
            entry = lease.held
            assert entry is not None
            self.leases.append((model, lease, entry.value))

    @precondition(lambda self: self.leases)
    @rule(number=st.integers(0, 50))
    def release(self, number: int) -> None:
        """Release one of the leases; what was ordered to leave with it has left when it returns."""
        model, lease, _ = self.leases.pop(number % len(self.leases))
        lease.release()
        if model not in self.leased():
            if model in self.ordered:
                assert model not in self.book.alive
            self.ordered.discard(model)

    @rule(model=models)
    def unload(self, model: str) -> None:
        """Drop a model from memory."""
        gone = self.cache.unload(model)
        assert gone is (model not in self.leased())
        if not gone:
            self.ordered.add(model)

    @rule(model=models)
    def delete(self, model: str) -> None:
        """Drop a model from both tiers."""
        gone = self.cache.delete(model)
        assert gone is (model not in self.leased())
        if gone:
            assert model not in {row.model for row in self.cache.models()}
        else:
            self.ordered.add(model)
            self.deleted.add(model)

    @rule(model=models, new=st.booleans(), broken=st.booleans())
    def refresh(self, model: str, new: bool, broken: bool) -> None:
        """Refresh a model, with a new version or without; one that does not load, or has no room, changes nothing."""
        there, known = model in self.in_memory(), {row.model for row in self.cache.models()}
        loads, leased = len(self.book.loads), model in self.leased()
        if new:
            self.current[model] += 1
            self.upload(model)
        self.book.gate = fail if broken else None
        renewed, refusal = None, None
        try:
            renewed = self.cache.refresh(model)
        except (NoRoom, TooLarge, LoadFailed) as error:
            refusal = error
        self.book.gate = None
        if refusal is not None:
            assert model in known
            assert isinstance(refusal, NoRoom | TooLarge) or (broken and there)
            assert len(self.book.loads) == loads
            assert not leased or model in self.in_memory()
        elif model not in known:
            assert not renewed
        else:
            self.least[model] = self.current[model]

    @rule(model=models, down=st.booleans())
    def ask_in_trouble(self, model: str, down: bool) -> None:
        """Look a model up while it does not load, or while the source is down: what is there already is served."""
        there, found = model in self.book.alive, self.must_be_found(model)
        known = found or (model, "disk") in {(row.model, row.tier) for row in self.cache.models()}
        self.source.down = SourceUnavailable("down", source="dict") if down else None
        self.book.gate = None if down else fail
        lease, error = self.cache.lease(model), None
        try:
            assert self.asked(model, lease) is (lease.held is not None)
        except (LoadFailed, SourceUnavailable) as raised:
            error = raised
        self.book.gate = self.source.down = None
        if error is not None:
            assert isinstance(error, SourceUnavailable if down else LoadFailed)
            assert not (down and known)
        elif lease.held is not None:
            assert there or (down and known)
            lease.release()

    @rule(most=st.sampled_from([None, 1, 2, 3, 6]))
    def tune_max_models(self, most: int | None) -> None:
        """Move ``max_models``."""
        self.cache.memory.max_models = most

    @rule(budget=st.sampled_from([None, 600, 700, 1000, 2100]))
    def tune_budget(self, budget: int | None) -> None:
        """Move ``memory.budget``; it always allows each model by itself."""
        self.cache.memory.budget = budget

    @rule(high=st.sampled_from([10_000, 700, 1500, "5%", "50%"]))
    def tune_high(self, high: int | str) -> None:
        """Move the watermark; it always allows each model by itself."""
        self.cache.memory.low = None
        self.cache.memory.high = high

    @rule(budget=some_disk)
    def tune_disk(self, budget: int | None) -> None:
        """Move ``disk.budget``; it always allows each model by itself."""
        self.cache.disk.budget = budget

    # What must hold

    def leased(self) -> set[str]:
        """Return the models that somebody leases."""
        return {model for model, _, _ in self.leases}

    def may_refuse(self, refusal: NoRoom) -> bool:
        """Whether there may be no room; a machine that extends this one looks at the refusal."""
        return bool(self.leased())

    def must_be_found(self, model: str) -> bool:
        """Whether a lookup must find a model in memory: not where all that is there are leased, outdated versions."""
        loads = [value for held, _, value in self.leases if held == model]
        idle = self.book.alive.count(model) > self.versions_leased(model)
        return idle or any(value.version >= self.least[model] for value in loads)

    def versions_leased(self, model: str) -> int:
        """Return how many loads of a model somebody leases."""
        return len({id(value) for held, _, value in self.leases if held == model})

    def in_memory(self) -> set[str]:
        """Return the models that the cache says are in memory, once what a thread of it is unloading has gone."""
        eventually(lambda: all(row.state != "unloading" for row in self.cache.models()))
        return {row.model for row in self.cache.models() if row.tier == "memory"}

    @invariant()
    def each_load_is_in_memory_or_was_unloaded(self) -> None:
        """Loads less unloads are the models in memory, each once, and its older versions as long as they are leased."""
        here, alive = self.in_memory(), self.book.alive
        for model in MODELS:
            assert alive.count(model) - self.versions_leased(model) in {0, 1}
        assert set(alive) == here
        assert len(self.book.loads) - len(self.book.unloads) == len(alive) == self.cache.stats().models

    @invariant()
    def leased_models_are_in_memory(self) -> None:
        """A leased model never leaves, and counts its leases."""
        counts = {row.model: row.leases for row in self.cache.models()}
        for model in MODELS:
            assert counts.get(model, 0) == sum(held == model for held, _, _ in self.leases)
        assert self.leased() <= set(self.book.alive)

    @invariant()
    def limits_hold(self) -> None:
        """No limit is exceeded, except by what is leased; then nothing else is in memory."""
        memory, alive = self.cache.memory, self.book.alive
        idle = [model for model in set(alive) if alive.count(model) > self.versions_leased(model)]
        used = sum(SIZES[model] for model in alive)
        over_count = memory.max_models is not None and len(alive) > memory.max_models
        over_budget = memory.budget is not None and used > memory.budget
        over_high = used > memory.high
        if over_count or over_budget or over_high:
            assert not idle, f"{idle} are idle in memory over a limit"

    def counts_what_is_there(self) -> bool:
        """Whether the bytes that the cache counts are those on disk at this moment."""
        with contextlib.suppress(FileNotFoundError):  # removed as we look
            return self.cache.stats().disk_used == allocated(self.cache.disk.path)
        return False

    @invariant()
    def disk_budget_holds(self) -> None:
        """The disk budget is exceeded by the artifacts of leased models only; what is counted is what is there."""
        eventually(self.counts_what_is_there)  # an older version may go on another thread
        stats = self.cache.stats()
        if self.cache.disk.budget is not None and stats.disk_used > self.cache.disk.budget:
            assert {row.model for row in self.cache.models()} <= self.leased()

    @invariant()
    def evictions_were_of_idle_models(self) -> None:
        """Each Evicted from memory has its Unloaded, and no leased model was among them."""
        evicted = [event.model for event in self.events if isinstance(event, Evicted) and event.tier == "memory"]
        unloaded = [event.model for event in self.events if isinstance(event, Unloaded) and event.reason == "evicted"]
        assert sorted(evicted) == sorted(unloaded)
        assert self.cache.stats().evictions == len(evicted)

    def teardown(self) -> None:
        """Close, and check that nothing is left."""
        for _, lease, _ in self.leases:
            lease.release()
        assert self.cache.close(timeout=10)
        self.book.check()
        assert list((self.cache.disk.path / "tmp").iterdir()) == []
        self.folder.cleanup()


@pytest.mark.timeout(120)
def test_cache_against_a_plain_model() -> None:
    """After any order of lookups, leases, drops and tuning, the cache holds what it may, and all that it must."""
    run_state_machine_as_test(
        Twins,
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to make a failure smaller takes minutes
            report_multiple_bugs=False,
        ),
    )
