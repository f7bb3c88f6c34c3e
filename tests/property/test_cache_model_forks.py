"""Forks among the calls of the plain model: what a child finds and does, and that its parent does not feel it.

The calls, and what must hold after each, are those of ``test_cache_model``. Forks at chosen moments of other threads'
work are in ``interleave/test_fork``. All of it happens in a process of its own, whose threads are idle at each fork.
"""

import gc
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from modelcache import NoRoom
from modelcache.disk.opening import make_pins
from tests.property.test_cache_model import Twins, Versioned, models
from tests.support.children import run
from tests.support.waiting import eventually

SPACE = {None, 2**20}  # disk budgets with which nothing is ever removed to fetch something else
PATIENCE = 10  # seconds that a child may take
FORKS = 3  # of one process, at most

Calls = list[tuple[str, Any]]

step = st.one_of(
    st.tuples(st.sampled_from(["get", "hold", "unload", "delete"]), models),
    st.tuples(st.just("release"), st.integers(0, 50)),
)
steps = st.lists(step, max_size=6)


def is_locked(folder: Path) -> bool:
    """Return whether some process reads a published folder, so that none may remove it."""
    with make_pins(folder.parents[1], 0o700, writable=True).claim(folder) as free:
        return not free


def is_whole(value: Versioned) -> bool:
    """Return whether the files that a model was loaded from are there, and no process may remove them."""
    text = (value.path / "model.txt").read_bytes().rstrip(b"\0").decode()
    return text == f"{value.model} {value.version}" and is_locked(value.path.parent)


class Forks(Twins):
    """The machine with children: each goes on from its parent's state by a few calls of its own, and closes.

    In a child ``theirs`` are the models that its ancestors have in memory, whose files it can't have removed.
    """

    def __init__(self) -> None:
        """Begin as the first process."""
        super().__init__()
        self.forks = 0
        self.is_child = False
        self.theirs: list[Versioned] = []
        self.published: list[str] = []  # what the children of this process fetched, and theirs
        self.spoilt: set[str] = set()  # what this child deleted: it is on disk as its ancestors read it, to go some day

    @precondition(lambda self: self.forks < FORKS and self.is_plain())
    @rule(calls=steps)
    def fork(self, calls: Calls) -> None:
        """Fork a child that makes these calls."""
        self.beget(lambda: self.use(calls))

    @precondition(lambda self: self.forks < FORKS and self.is_plain())
    @rule(calls=steps, then=steps)
    def fork_twice(self, calls: Calls, then: Calls) -> None:
        """Fork a child that makes ``calls`` and then forks one of its own, which makes those of ``then``."""

        def use() -> None:
            self.use(calls)
            self.fork(then)
            self.check()

        self.beget(use)

    @precondition(lambda self: self.forks < FORKS and self.is_plain())
    @rule(calls=steps, then=steps)
    def fork_twice_at_once(self, calls: Calls, then: Calls) -> None:
        """Fork a child that forks one of its own before it has used the cache; that one makes ``calls``."""

        def use() -> None:
            fetched = self.await_child(*self.split(lambda: self.use(calls)))
            self.find(fetched)
            self.use(then)

        self.beget(use)

    def beget(self, use: Callable[[], None]) -> None:
        """Fork a child that runs ``use``, wait for its end, and check that nothing is felt of it here."""
        self.forks += 1
        before = self.rows()
        fetched = self.await_child(*self.split(use))
        assert self.rows() == before
        self.find(fetched)

    def split(self, use: Callable[[], None]) -> tuple[int, int]:
        """Fork, and return the child's process id and where its report comes; the child never returns."""
        reader, writer = os.pipe()
        with self.book.closed(), self.source.closed():
            child = os.fork()
        if not child:
            self.live(use, writer)
        os.close(writer)
        return child, reader

    def live(self, use: Callable[[], None], writer: int) -> NoReturn:
        """Be a child, from the fork to the end; its report is what it fetched, or what went wrong."""
        signal.alarm(PATIENCE)
        code, self.published, self.source.opens = 1, [], []
        self.is_child = True
        try:
            self.theirs += self.book.values
            self.spoilt |= self.deleted & self.ordered
            use()
            self.leave()
            report, code = json.dumps([self.source.opens + self.published, sorted(self.spoilt)]), 0
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
            report = traceback.format_exc()
        os.write(writer, report.encode()[:60_000])
        os._exit(code)

    def await_child(self, child: int, reader: int) -> list[str]:
        """Wait for the end of a child, which must be a good one; return what it and its own fetched and left."""
        with open(reader) as pipe:
            report = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, report or "a child hung"
        fetched, deleted = json.loads(report)
        published = [model for model in fetched if model not in deleted]
        self.published += published
        if self.is_child:
            self.spoilt |= set(deleted)
        return published

    def find(self, published: list[str]) -> None:
        """Check that what others have fetched is found on disk."""
        opens = list(self.source.opens)
        for model in published:
            assert self.cache.prefetch([model], tier="disk").wait(PATIENCE)
        assert self.source.opens == opens

    def use(self, calls: Calls) -> None:
        """Make calls in a child, and check after each what must hold."""
        self.check()
        for name, argument in calls:
            self.call(name, argument)
            self.check()

    def is_plain(self) -> bool:
        """Whether no lease that a child may end deletes a newer version, which nobody has in memory, from disk."""
        pending = [value for model, _, value in self.leases if model in self.deleted & self.ordered]
        return all(value.version == self.current[value.model] for value in pending)

    def call(self, name: str, argument: Any) -> None:
        """Make one call in a child, unless that would take files from its ancestors, which then know no better."""
        if name == "release":
            if self.leases:
                self.release(argument)
        elif name == "delete":
            if any(value.model == argument and value.version == self.current[argument] for value in self.theirs):
                self.delete_theirs(argument)
        elif name == "unload":
            self.unload(argument)
        elif self.is_here(argument) or (self.cache.disk.budget in SPACE and argument not in self.spoilt):
            getattr(self, name)(argument)

    def delete_theirs(self, model: str) -> None:
        """Delete a model that an ancestor has in memory: its files stay."""
        leased = model in self.leased()
        assert self.cache.delete(model) is False
        self.spoilt.add(model)
        if leased:
            self.ordered.add(model)

    def may_refuse(self, refusal: NoRoom) -> bool:
        """Whether there may be no room: in a child also since what came before the fork is expected to free nothing."""
        return super().may_refuse(refusal) or (bool(self.theirs) and refusal.limit == self.cache.memory.high)

    def is_here(self, model: str) -> bool:
        """Whether a lookup needs no fetch."""
        known = {row.model for row in self.cache.models()} - self.spoilt
        return model in known or self.must_be_found(model)

    def check(self) -> None:
        """Check in a child what must hold after each call."""
        self.each_load_is_in_memory_or_was_unloaded()
        self.leased_models_are_in_memory()
        self.limits_hold()
        self.disk_budget_holds()
        self.evictions_were_of_idle_models()
        self.files_are_whole()

    def leave(self) -> None:
        """Close the cache in a child: each model has its one unload, inherited ones too, and no folder is left."""
        for _, lease, _ in self.leases:
            lease.release()
        assert self.cache.close(timeout=PATIENCE)
        self.book.check()
        assert all(is_whole(value) for value in self.theirs)

    def rows(self) -> list[Any]:
        """Return what the cache says of models in memory, and the temporary folders of all processes."""
        rows = [row for row in self.cache.models() if row.tier == "memory"]
        said = [(row.model, row.tier, row.state, row.bytes, row.leases, row.hits, row.last_used) for row in rows]
        return [*said, *sorted((self.cache.disk.path / "tmp").iterdir())]

    @invariant()
    def disk_budget_holds(self) -> None:
        """The disk budget is exceeded by what is leased only, and by what an ancestor has in memory."""
        eventually(self.counts_what_is_there)
        disk, stats = self.cache.disk, self.cache.stats()
        if disk.budget is not None and stats.disk_used > disk.budget:
            kept = self.leased() | {value.model for value in self.theirs}
            assert {row.model for row in self.cache.models()} <= kept

    @invariant()
    def files_are_whole(self) -> None:
        """What is in memory, here or in an ancestor, has its files, and nobody may remove them."""
        assert all(is_whole(value) for value in [*self.book.values, *self.theirs])


def search() -> None:
    """Look for an order of calls and forks that breaks something."""
    gc.freeze()  # or each child would search all of hypothesis for garbage, on pages that it must copy for that
    run_state_machine_as_test(
        Forks,
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.timeout(120)
def test_cache_and_its_children_against_a_plain_model() -> None:
    """After any order of calls a forked child finds what its parent had, may do what it likes, and disturbs nobody."""
    run(
        "from tests.property.test_cache_model_forks import search\nsearch()",
        watchdog=60,
        timeout=70,
    )
