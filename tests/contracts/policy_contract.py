"""What every Policy must do, ours or a user's: inherit, give ``make``, and pytest runs it.

::

    class TestMine(PolicyContract):
        def make(self):
            return Mine()

Which order a policy keeps is its own business, and tested beside it.
"""

import math
from collections.abc import Collection
from itertools import islice

import pytest

from modelcache.policies import Allowed, Policy, Resident

MODELS = ("a", "b", "c", "d", "e")


def admit(policy: Policy, model: str, clock: int = 0, size: int = 100, cost: float = 1.0) -> None:
    """Request a model and bring it in, as a miss does."""
    policy.requested(model, clock)
    policy.admitted(Resident(model, size, cost))


def order(policy: Policy, evictable: Collection[str]) -> list[str]:
    """Return all victims, the first to go first."""
    return list(policy.victims(1, evictable))


class PolicyContract:
    """The contract."""

    def make(self) -> Policy:
        """Return a new policy."""
        raise NotImplementedError

    def filled(self) -> Policy:
        """Return a policy that has seen some life."""
        policy = self.make()
        for clock, model in enumerate(MODELS):
            admit(policy, model, clock)
        for clock, model in enumerate("ababacd"):
            policy.requested(model, len(MODELS) + clock)
        return policy

    def test_is_a_policy(self) -> None:
        """It has the four methods."""
        assert isinstance(self.make(), Policy)

    def test_empty(self) -> None:
        """With nothing in the tier there is nothing to give."""
        assert order(self.make(), ()) == []

    def test_gives_every_evictable_model_once(self) -> None:
        """Asked to the end, it gives each evictable model exactly once."""
        assert sorted(order(self.filled(), MODELS)) == sorted(MODELS)

    def test_takes_any_collection(self) -> None:
        """Evictable models may come as a set, a list, the keys of a dict, or a view that is asked one by one."""
        policy = self.filled()
        expected = order(policy, list(MODELS))
        assert order(policy, set(MODELS)) == expected
        assert order(policy, dict.fromkeys(MODELS).keys()) == expected
        assert order(policy, Allowed(dict.fromkeys(MODELS, 1), bool)) == expected

    def test_view_follows_the_tier(self) -> None:
        """A view is asked anew at each call: who may go now goes now."""
        policy = self.filled()
        whole = order(policy, MODELS)
        held = dict.fromkeys(MODELS, False)
        view = Allowed(held, lambda held: not held)
        for model in whole:
            held[model] = True
            assert order(policy, view) == [model for model in whole if not held[model]]

    def test_passes_over_what_is_leased(self) -> None:
        """Models that may not go are passed over; the others keep their order among themselves."""
        policy = self.filled()
        whole = order(policy, MODELS)
        for leased in MODELS:
            rest = [model for model in MODELS if model != leased]
            assert order(policy, rest) == [model for model in whole if model != leased]

    def test_asking_changes_no_standing(self) -> None:
        """Asking for victims, to the end, in part or not at all, changes no standing."""
        policy = self.filled()
        whole = order(policy, MODELS)
        for taken in range(len(MODELS) + 1):
            list(islice(policy.victims(1, MODELS), taken))
            policy.victims(1, MODELS[:2])
            assert order(policy, MODELS) == whole

    def test_removed_is_not_given(self) -> None:
        """A model that left is not given, and the order of the others stays."""
        policy = self.filled()
        whole = order(policy, MODELS)
        policy.removed("c")
        rest = [model for model in MODELS if model != "c"]
        assert order(policy, rest) == [model for model in whole if model != "c"]

    def test_unknown_ids_are_ignored(self) -> None:
        """Requests and removals of models that are not in the tier are no errors and are not given."""
        policy = self.filled()
        policy.requested("elsewhere", 50)
        policy.removed("never seen")
        policy.removed("elsewhere")
        assert sorted(order(policy, MODELS)) == sorted(MODELS)

    def test_measuring_again_loses_nobody(self) -> None:
        """A model measured anew is still there, once."""
        policy = self.filled()
        policy.admitted(Resident("a", 200, 2.0))
        assert sorted(order(policy, MODELS)) == sorted(MODELS)

    @pytest.mark.parametrize("cost", [0.0, -1.0, 1e-300, 1e308, math.inf, math.nan])
    @pytest.mark.parametrize("size", [0, 1, 2**63])
    def test_odd_figures_lose_nobody(self, size: int, cost: float) -> None:
        """Sizes and costs that make no sense, or are not known, keep nobody from going."""
        policy = self.filled()
        odd = [f"odd {number}" for number in range(2 * len(MODELS))]
        for model in [*MODELS[:2], *odd]:
            admit(policy, model, 70, size, cost)
        assert sorted(order(policy, [*MODELS, *odd])) == sorted([*MODELS, *odd])

    def test_clock_that_stands_still_or_goes_back(self) -> None:
        """A clock that is no clock keeps nobody from going."""
        policy = self.filled()
        for clock in (1_000_000, 1_000_000, 3, 0):
            policy.requested("a", clock)
            admit(policy, f"at {clock}", clock)
        evictable = [*MODELS, "at 1000000", "at 3", "at 0"]
        assert sorted(order(policy, evictable)) == sorted(evictable)

    def test_same_life_same_order(self) -> None:
        """Two that were told the same give the same order."""
        assert order(self.filled(), MODELS) == order(self.filled(), MODELS)

    def test_comes_back(self) -> None:
        """A model that left can come back, and is there once."""
        policy = self.filled()
        policy.removed("b")
        admit(policy, "b", 60)
        assert sorted(order(policy, MODELS)) == sorted(MODELS)
