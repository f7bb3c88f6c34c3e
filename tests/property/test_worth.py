"""``worth`` against its formula, in exact fractions over the plain list of all that happened."""

import itertools
import math
import random
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from modelcache.policies import Resident, Standing, Worth

MODELS = "abcdefgh"
models = st.sampled_from(MODELS)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("request"), models, st.integers(0, 40)),
        st.tuples(st.just("admit"), models, st.integers(1, 10**9), st.floats(0.001, 1000)),
        st.tuples(st.just("remove"), models),
    ),
    max_size=120,
)


class Reference:
    """The formula, with no thought for speed."""

    def __init__(self) -> None:
        self.clock = 0
        self.past: dict[str, list[Fraction]] = {}  # n, first, last
        self.residents: dict[str, tuple[int, float]] = {}

    def request(self, model: str, later: int) -> None:
        """Count a request, some requests for others later."""
        self.clock += later
        past = self.past.setdefault(model, [Fraction(0), Fraction(self.clock), Fraction(0)])
        past[0] += 1
        past[2] = Fraction(self.clock)
        if past[0] > 32:
            past[0], past[1] = past[0] / 2, self.clock - (self.clock - past[1]) / 2

    def admit(self, model: str, size: int, cost: float) -> None:
        """Take in a model, whether somebody has asked for it or not."""
        self.past.setdefault(model, [Fraction(0), Fraction(self.clock), Fraction(self.clock)])
        self.residents[model] = (size, cost)

    def remove(self, model: str) -> None:
        """Let a model go."""
        self.residents.pop(model, None)

    def worth(self, model: str) -> Fraction:
        """Return the square of ``rate * cost / bytes``."""
        (n, first, last), (size, cost) = self.past[model], self.residents[model]
        rate = max(n, 1) ** 2 / ((self.clock - first + 1) * (self.clock - last + 1))
        return rate * (Fraction(cost) / size) ** 2


def live(life: list[Any]) -> tuple[Worth, Reference]:
    """Tell both the same."""
    policy, reference = Worth(), Reference()
    for verb, *rest in life:
        getattr(reference, verb)(*rest)
        if verb == "request":
            policy.requested(rest[0], reference.clock)
        elif verb == "admit":
            policy.admitted(Resident(*rest))
        else:
            policy.removed(*rest)
    return policy, reference


@settings(max_examples=300, deadline=None)
@given(life=steps, evictable=st.sets(models))
def test_order_is_the_formula(life: list[Any], evictable: set[str]) -> None:
    """Each evictable resident is given once, none else, and none before one that is worth less."""
    policy, reference = live(life)
    answer = list(policy.victims(1, evictable))
    assert sorted(answer) == sorted(evictable & reference.residents.keys())
    worths = [reference.worth(model) for model in answer]
    for lower, higher in itertools.pairwise(worths):
        assert lower <= higher * (1 + Fraction(1, 10**9))  # floats round


@settings(max_examples=100, deadline=None)
@given(life=steps)
def test_answers_are_the_same_every_time(life: list[Any]) -> None:
    """Two that were told the same give the same order, however the evictable models are handed over."""
    one, _ = live(life)
    other, _ = live(life)
    expected = list(one.victims(1, MODELS))
    assert list(one.victims(1, MODELS)) == expected
    assert list(other.victims(1, set(MODELS))) == expected
    assert list(other.victims(1, list(reversed(MODELS)))) == expected


@settings(max_examples=100, deadline=None)
@given(life=steps, later=st.integers(0, 1000))
def test_standings_keep_the_order_over_a_restart(life: list[Any], later: int) -> None:
    """A new policy that recalls what the old one knew ranks as the old one, whatever its clock shows."""
    old, reference = live(life)
    new = Worth()
    new.requested("somebody", later)
    for model, (size, cost) in reference.residents.items():
        new.admitted(Resident(model, size, cost))
        standing = old.standing(model)
        if standing is not None:
            new.recall(model, standing)
    asked = [model for model in MODELS if new.standing(model) is not None]
    assert len(asked) == sum(reference.past[model][0] > 0 for model in reference.residents)
    worths = [reference.worth(model) for model in new.victims(1, asked)]
    assert len(worths) == len(asked)
    for lower, higher in itertools.pairwise(worths):
        assert lower <= higher * (1 + Fraction(1, 10**9))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9), popular=st.sampled_from([1, 3]), count=st.integers(200, 700))
def test_victims_of_many_are_the_formula(seed: int, popular: int, count: int) -> None:
    """However many models come and go, are asked for or held, each victim is worth the least of all that may go."""
    policy, reference, held = Worth(), Reference(), set[str]()
    source = random.Random(seed)  # noqa: S311 - a load, not a secret
    for _ in range(600):
        model = f"m{int(count * source.random() ** popular)}"
        reference.request(model, source.choice([1, 1, 1, 40]))
        policy.requested(model, reference.clock)
        if model in reference.residents:
            continue
        while len(reference.residents) >= count // 2:
            may = reference.residents.keys() - held
            victim = next(iter(policy.victims(1, may)))
            if source.random() < 0.1:
                least = min(map(reference.worth, may))
                assert reference.worth(victim) <= least * (1 + Fraction(1, 10**9))  # floats round
            policy.removed(victim)
            reference.remove(victim)
        size, cost = source.randrange(1, 10**6), source.uniform(0.01, 60)
        policy.admitted(Resident(model, size, cost))
        reference.admit(model, size, cost)
        if source.random() < 0.1:
            held.add(model)
            policy.hold(model, held=source.random() < 0.5)  # which changes no answer
    assert sorted(policy.victims(1, reference.residents.keys())) == sorted(reference.residents)


@settings(max_examples=100, deadline=None)
@given(n=st.floats(), age=st.floats(), idle=st.floats())
def test_a_standing_is_refused_or_of_use(n: float, age: float, idle: float) -> None:
    """Whatever numbers a file held, they are refused, or they can be recalled and the model can go."""
    try:
        standing = Standing(n, age, idle)
    except ValueError:
        return
    policy = Worth()
    policy.recall("a", standing)
    policy.admitted(Resident("a", 1, 1.0))
    policy.requested("a", 1)
    assert list(policy.victims(1, "a")) == ["a"]
    again = policy.standing("a")
    assert again is not None
    assert math.isfinite(again.age)
