"""LRU, LFU and FIFO against a reference that sorts a plain list. ``worth`` is test_worth.py."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from modelcache.policies import Policy, Resident, make_policy

models = st.sampled_from("abcdefgh")


class Row:
    """What the reference knows of one model; times are ticks."""

    def __init__(self, model: str, now: int) -> None:
        self.model = model
        self.since = now
        self.last = now
        self.uses = 1


KEYS: dict[str, Callable[[Row], Any]] = {
    "fifo": lambda row: row.since,
    "lru": lambda row: row.last,
    "lfu": lambda row: (row.uses, row.last),
}


class Twins(RuleBasedStateMachine):
    """A policy and its reference, told the same."""

    @initialize(name=st.sampled_from(sorted(KEYS)))
    def start(self, name: str) -> None:
        """Choose which."""
        self.name = name
        self.policy: Policy = make_policy(name, "policy")
        self.rows: dict[str, Row] = {}
        self.clock = 0

    @rule(model=models)
    def request(self, model: str) -> None:
        """A lookup, hit or not."""
        self.clock += 1
        self.policy.requested(model, self.clock)
        if model in self.rows:
            self.rows[model].last = self.clock
            self.rows[model].uses += 1

    @rule(model=models)
    def load(self, model: str) -> None:
        """A miss and its load, or a hit that was measured anew."""
        self.request(model)
        self.measure(model)

    @rule(model=models, size=st.integers(1, 1000), cost=st.floats(0, 10))
    def measure(self, model: str, size: int = 1, cost: float = 1.0) -> None:
        """A model enters without a request (a restart, a prefetch), or is measured anew."""
        self.clock += 1
        self.policy.admitted(Resident(model, size, cost))
        if model not in self.rows:
            self.rows[model] = Row(model, self.clock)

    @rule(model=models)
    def leave(self, model: str) -> None:
        """A model leaves, or one that is not there."""
        self.policy.removed(model)
        self.rows.pop(model, None)

    @rule(evictable=st.sets(models), taken=st.integers(0, 8))
    def evict(self, evictable: set[str], taken: int) -> None:
        """The first few victims leave."""
        chosen = [model for _, model in zip(range(taken), self.policy.victims(1, evictable), strict=False)]
        assert chosen == self.expected(evictable)[:taken]
        for model in chosen:
            self.leave(model)

    @invariant()
    def same_order(self) -> None:
        """Both give the same order, whole and in part, and asking twice changes nothing."""
        for evictable in ("abcdefgh", "aceg", "aceg", "abcdefgh"):
            assert list(self.policy.victims(1, evictable)) == self.expected(set(evictable))

    def expected(self, evictable: set[str]) -> list[str]:
        """Sort what may go."""
        rows = [row for row in self.rows.values() if row.model in evictable]
        return [row.model for row in sorted(rows, key=KEYS[self.name])]


@pytest.mark.parametrize("seed", [0])
def test_orders_equal_the_reference(seed: int) -> None:
    """Whatever happens in whatever order, the three policies rank as the reference does."""
    run_state_machine_as_test(Twins, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))
