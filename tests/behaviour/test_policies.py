"""Policies: the four orders, and what a user's policy can't break. Properties are tests/property/."""

import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any
from unittest import mock

import pytest

from modelcache.errors import ConfigError
from modelcache.policies import (
    Allowed,
    Guarded,
    Policy,
    Ranked,
    Remembering,
    Resident,
    Standing,
    Worth,
    cooling,
    make_policy,
    recall_order,
)
from modelcache.policies.worth import STRANGERS
from tests.contracts.policy_contract import MODELS, PolicyContract, admit, order


class Newest:
    """A user's policy: the latest in goes first."""

    def __init__(self) -> None:
        self.models: dict[str, Resident] = {}
        self.clocks: list[int] = []

    def requested(self, model: str, clock: int) -> None:
        """Note the clock."""
        self.clocks.append(clock)

    def admitted(self, resident: Resident) -> None:
        """Note the model."""
        self.models[resident.model] = resident

    def removed(self, model: str) -> None:
        """Forget the model."""
        self.models.pop(model, None)

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Give the latest first."""
        return (model for model in reversed(self.models) if model in evictable)


class Answers(Newest):
    """A user's policy that gives what it is told to."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Give the answer."""
        return self.answer  # type: ignore[no-any-return]


class Broken:
    """A user's policy whose every method raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error or ZeroDivisionError("oops")

    def requested(self, model: str, clock: int) -> None:
        """Raise."""
        raise self.error

    def admitted(self, resident: Resident) -> None:
        """Raise."""
        raise self.error

    def removed(self, model: str) -> None:
        """Raise."""
        raise self.error

    def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
        """Raise."""
        raise self.error


class TestLru(PolicyContract):
    """LRU keeps the contract."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy("lru", "policy")


class TestLfu(PolicyContract):
    """LFU keeps the contract."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy("lfu", "policy")


class TestFifo(PolicyContract):
    """FIFO keeps the contract."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy("fifo", "policy")


class TestWorth(PolicyContract):
    """``worth`` keeps the contract."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy("worth", "policy")


class TestUsers(PolicyContract):
    """A user's policy keeps the contract as it is."""

    def make(self) -> Policy:
        """Make one."""
        return Newest()


class TestGuarded(PolicyContract):
    """A user's policy keeps the contract when guarded."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy(Newest(), "policy")


class TestGuardedBroken(PolicyContract):
    """Even a policy that always raises keeps the contract when guarded."""

    def make(self) -> Policy:
        """Make one."""
        return make_policy(Broken(), "policy")


# Orders


def ranked(name: str, requests: str = "") -> Policy:
    """Bring in a to e, then request."""
    policy = make_policy(name, "policy")
    for model in MODELS:
        admit(policy, model)
    for clock, model in enumerate(requests):
        policy.requested(model, clock)
    return policy


@pytest.mark.parametrize(
    ("name", "requests", "expected"),
    [
        ("fifo", "aacbd", "abcde"),
        ("lru", "", "abcde"),
        ("lru", "aacb", "deacb"),
        ("lfu", "", "abcde"),
        ("lfu", "aabbbcdd", "ecadb"),
    ],
)
def test_order(name: str, requests: str, expected: str) -> None:
    """FIFO: as they came; LRU: least recently requested first; LFU: least often, then least recently."""
    assert "".join(order(ranked(name, requests), MODELS)) == expected


@pytest.mark.parametrize("name", ["lru", "lfu", "fifo"])
def test_measuring_is_not_using(name: str) -> None:
    """A model measured anew stays exactly where it stood."""
    policy = ranked(name, "bbcc")
    before = order(policy, MODELS)
    for model in MODELS:
        policy.admitted(Resident(model, 999, 9.0))
    assert order(policy, MODELS) == before


def test_lfu_counts_the_request_that_loaded() -> None:
    """A newcomer has one use, the one that brought it in, however often it was asked for before that."""
    policy = make_policy("lfu", "policy")
    policy.requested("new", 1)
    policy.requested("new", 2)
    admit(policy, "new", 3)
    admit(policy, "old", 4)
    policy.requested("old", 5)
    policy.requested("new", 6)
    assert order(policy, ["new", "old"]) == ["old", "new"]  # two uses each: the least recent goes


def test_lfu_forgets_what_left() -> None:
    """A model that comes back starts counting anew."""
    policy = ranked("lfu", "aaaabbccddee")
    policy.removed("a")
    admit(policy, "a")
    assert order(policy, MODELS)[0] == "a"


@pytest.mark.parametrize("policy", [*map(ranked, ["fifo", "lru", "lfu", "worth"])], ids=str)
def test_first_victim_looks_at_few(policy: Policy) -> None:
    """The first victim of a large tier costs a few looks at what may go, not a walk through all of it."""
    models = {f"m{number}": number for number in range(1_000)}
    for model in models:
        admit(policy, model, 9)
    looks = []
    view = Allowed(models, lambda number: looks.append(number) or number != 0)
    assert next(iter(policy.victims(1, view))) != "m0"
    assert len(looks) <= 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("lru", "deacb"), ("fifo", "abcde"), ("lfu", "deacb"), (Newest(), "edcba")],
    ids=["lru", "fifo", "lfu", "users"],
)
def test_recall_finds_the_order_again(name: str | Policy, expected: str) -> None:
    """Told who was used last, longest ago first, an order is what it was, and recalling twice changes nothing."""
    policy = make_policy(name, "policy")
    assert isinstance(policy, Remembering)
    for model in MODELS:
        policy.admitted(Resident(model, 1, 1.0))
    for _ in range(2):
        for idle, (model, n) in enumerate([("a", 2), ("c", 3), ("b", 7), ("elsewhere", 9)]):
            policy.recall(model, Standing(n, 9, 9 - idle))
    assert "".join(order(policy, MODELS)) == expected
    assert policy.standing("a") is None  # nothing beside the order


@pytest.mark.parametrize("name", ["lru", "worth"])
def test_order_of_last_use(name: str) -> None:
    """Models that a tier has found go in the order of their last use, before who was asked for since."""
    policy = make_policy(name, "policy")
    for model in MODELS:
        policy.admitted(Resident(model, 1, 1.0))
    recall_order(policy, "ecabd")
    assert order(policy, MODELS) == list("ecabd")
    policy.requested("e", 1)
    assert order(policy, MODELS) == list("cabde")


def test_recall_is_a_request_to_a_users_policy() -> None:
    """A user's policy, which has no such method, hears of one request at the present clock."""
    mine = Newest()
    policy = make_policy(mine, "policy")
    policy.requested("a", 41)
    assert isinstance(policy, Remembering)
    policy.recall("a", Standing(3, 2, 1))
    assert mine.clocks == [41, 41]


# Which may go


def test_allowed_is_a_set() -> None:
    """A view has the size and the members of the set that it stands for, and combines into plain sets."""
    models = {"a": 1, "b": 0, "c": 2}
    view = Allowed(models, bool)
    assert (len(view), sorted(view), view) == (2, ["a", "c"], {"a", "c"})
    assert "a" in view
    assert "b" not in view
    assert "x" not in view
    assert view & {"a", "b"} == {"a"}
    models["b"] = 3
    assert view == {"a", "b", "c"}


# Worth


def at_work(*lives: tuple[str, int, float], requests: str = "") -> Worth:
    """Bring in models of some bytes and cost at the clocks 1, 2, ..., then request."""
    policy = Worth()
    for clock, (model, size, cost) in enumerate(lives, 1):
        admit(policy, model, clock, size, cost)
    for clock, model in enumerate(requests, len(lives) + 1):
        policy.requested(model, clock)
    return policy


@pytest.mark.parametrize(
    ("lives", "requests", "expected"),
    [
        ([("a", 1, 90.0), ("b", 1, 1.0), ("c", 1, 5.0)], "", "bca"),
        ([("a", 9, 1.0), ("b", 1, 1.0), ("c", 5, 1.0)], "", "acb"),
        ([("a", 2, 8.0), ("b", 8, 2.0), ("c", 1, 1.0)], "", "bca"),
        ([("a", 1, 1.0), ("b", 1, 1.0), ("c", 1, 1.0)], "", "abc"),
        ([("b", 1, 1e200), ("c", 1, 1e200), ("a", 1, 1e200)], "", "bca"),
        ([("a", 1, 1.0), ("b", 1, 1.0), ("c", 1, 1.0)], "abacba", "cba"),
        ([("a", 1, 1.0), ("b", 1, 1.0)], "aaa" + "b" * 20, "ab"),
        ([("a", 1, 1.0), ("b", 1, 1.0), ("c", 9, 9.0)], "bbc" + "a" * 4, "cba"),
    ],
    ids=[
        "cost",
        "bytes",
        "cost a byte",
        "recency",
        "equals",
        "frequency",
        "what was once asked for often",
        "all of it",
    ],
)
def test_worth_order(lives: list[tuple[str, int, float]], requests: str, expected: str) -> None:
    """Who saves the fewest seconds a byte and a request goes first."""
    assert "".join(order(at_work(*lives, requests=requests), "abc"[: len(lives)])) == expected


def test_worth_remembers_who_left() -> None:
    """A model that comes back has the history from before, and so stays where a new one goes."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0), requests="aaaaaa")
    policy.removed("a")
    policy.removed("b")
    admit(policy, "b", 9, 1)
    admit(policy, "a", 10, 1)
    admit(policy, "new", 11, 1, 0.5)
    assert order(policy, ["a", "b", "new"]) == ["b", "new", "a"]


def test_worth_follows_a_new_measurement() -> None:
    """Bytes and cost measured anew count from then on; the history stays."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0))
    assert order(policy, "ab") == ["a", "b"]
    policy.admitted(Resident("b", 10, 1.0))
    assert order(policy, "ab") == ["b", "a"]
    policy.admitted(Resident("b", 10, 100.0))
    assert order(policy, "ab") == ["a", "b"]


@pytest.mark.parametrize("unknown", [0.0, -2.0, math.nan, math.inf])
def test_worth_takes_the_median_for_an_unknown_cost(unknown: float) -> None:
    """A model of unknown cost costs what a byte usually does."""
    policy = Worth()
    for model, cost in (("a", 1.0), ("b", 30.0), ("c", 1000.0), ("d", unknown)):
        policy.requested(model, 1)
        policy.admitted(Resident(model, 10, cost))
    assert order(policy, "abcd") == ["a", "b", "d", "c"]  # d as b, and of equals by name
    policy.admitted(Resident("d", 10, 2.0))
    assert order(policy, "abcd") == ["a", "d", "b", "c"]


def test_worth_of_a_prefetched_model() -> None:
    """A model that comes in before anybody asks is worth as much as one that was asked for once, just now."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0))
    policy.admitted(Resident("c", 1, 1.0))
    assert order(policy, "abc") == ["a", "b", "c"]
    assert policy.standing("c") is None
    policy.requested("c", 4)
    assert policy.standing("c") == Standing(1, 2, 0)


def test_worth_halves() -> None:
    """After 32 requests the count and the age are halved."""
    policy = at_work(("a", 1, 1.0), requests="b" * 9 + "a" * 31)
    assert policy.standing("a") == Standing(32, 40, 0)
    policy.requested("a", 42)
    assert policy.standing("a") == Standing(16.5, 20.5, 0)


def test_made_up_ids_push_nobody_out() -> None:
    """However many ids that do not exist are asked for, models that were here keep their history."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0), requests="aab")
    policy.removed("a")
    for clock in range(6, STRANGERS + 106):
        policy.requested(f"made up {clock}", clock)
    assert policy.standing("made up 105") is None
    assert policy.standing(f"made up {STRANGERS + 105}") == Standing(1, 0, 0)
    assert policy.standing("a") == Standing(3, STRANGERS + 104, STRANGERS + 101)
    assert policy.standing("b") == Standing(2, STRANGERS + 103, STRANGERS + 100)


def test_history_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the models that left, those that left or were asked for last are remembered."""
    monkeypatch.setattr("modelcache.policies.worth.REMEMBERED", 2)
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0), ("c", 1, 1.0))
    policy.removed("a")
    policy.removed("b")
    policy.requested("a", 4)
    policy.removed("c")
    assert [policy.standing(model) is not None for model in "abc"] == [True, False, True]


def test_standing_outlives_a_restart() -> None:
    """Recalled into a new policy, whose clock starts at 0, the standings give the same order."""
    lives = [(model, 1, 1.0) for model in MODELS]
    old, new = at_work(*lives, requests="abacabadcc" * 5), Worth()
    standings = {model: old.standing(model) for model in MODELS}
    for number, (model, standing) in enumerate(standings.items()):
        assert standing is not None
        if number % 2:
            new.recall(model, standing)
        new.admitted(Resident(model, 1, 1.0))
        new.recall(model, standing)
    assert order(new, MODELS) == order(old, MODELS)
    assert {model: new.standing(model) for model in MODELS} == standings


def test_recall_adds_to_what_is_known() -> None:
    """The larger count, the earlier beginning and the later request hold, for models here, gone and never in."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0), requests="xaa")
    policy.removed("b")
    for model in "abx":
        policy.recall(model, Standing(2, 100, 3))
        policy.recall(model, Standing(2, 100, 3))
    assert policy.standing("a") == Standing(3, 100, 0)
    assert policy.standing("b") == Standing(2, 100, 3)
    assert policy.standing("x") == Standing(2, 100, 2)
    assert policy.standing("never") is None
    policy.recall("odd", Standing(99, 1, 5))  # idle for longer than known, more requests than are counted
    assert policy.standing("odd") == Standing(32, 5, 5)


def test_standing_on_a_clock() -> None:
    """Kept as the requests at which a model was first and last asked for, a standing ages with the clock."""
    policy = at_work(("a", 1, 1.0), ("b", 1, 1.0), requests="abb")
    kept = policy.standing("a")
    assert kept is not None
    first, last = 5 - kept.age, 5 - kept.idle
    assert Standing.at(5, kept.n, first, last) == kept == Standing(2, 4, 2)
    assert Standing.at(8, kept.n, first, last) == Standing(2, 7, 5)
    assert Standing.at(0, kept.n, first, last) == Standing(2, 0, 0)  # a clock that went back
    with pytest.raises(ValueError, match="impossible"):
        Standing.at(5, kept.n, math.nan, last)


def test_processes_that_share_a_ledger_add_up() -> None:
    """Where each recalls what is kept before it books a request, and keeps what it knows then, counts add up."""
    policies, kept, clock = [Worth(), Worth()], (0.0, 0.0, 0.0), 0
    for turn in [0, 0, 1, 0, 1, 1, 1]:
        policy, clock = policies[turn], clock + 1
        if kept[0]:
            policy.recall("a", Standing.at(clock, *kept), clock)
        policy.requested("a", clock)
        standing = policy.standing("a")
        assert standing is not None
        kept = (standing.n, clock - standing.age, clock - standing.idle)
    assert kept == (7, 1, 7)


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, -1, 1), (1, 1, -1), (1, math.inf, 1), (math.nan, 1, 1)], ids=str)
def test_impossible_standings(numbers: tuple[float, float, float]) -> None:
    """Numbers that no history can have are refused."""
    with pytest.raises(ValueError, match="impossible"):
        Standing(*numbers)


def test_few_of_many_are_looked_at_again() -> None:
    """Once all were ordered, a victim of 10,000 models costs a look at some of them, and is the least of all."""
    models = [f"m{number}" for number in range(10_000)]
    policy = at_work(*((model, 1, float(number + 1)) for number, model in enumerate(models)))
    gone, scored = [], []
    for turn in range(300):
        with mock.patch.object(cooling, "scores", side_effect=counting(scored)):
            victim = next(iter(policy.victims(1, Allowed(dict.fromkeys(models[turn:], 1), bool))))
        policy.removed(victim)
        gone.append(victim)
    assert gone == models[:300]
    assert sum(scored[1:]) < 300 * 300


def counting(scored: list[int]) -> Callable[..., list[cooling.Scored]]:
    """Return what scores models, and notes how many."""

    def score(lives: dict[str, cooling.Life], now: float) -> list[cooling.Scored]:
        scored.append(len(lives))
        return scores(lives, now)

    scores = cooling.scores
    return score


# Choice


@pytest.mark.parametrize(("name", "kind"), [("lru", Ranked), ("lfu", Ranked), ("fifo", Ranked), ("worth", Worth)])
def test_names(name: str, kind: type) -> None:
    """The four names are known, and each call makes a new policy."""
    assert isinstance(make_policy(name, "policy"), kind)
    assert make_policy(name, "policy") is not make_policy(name, "policy")


def test_only_user_objects_are_guarded() -> None:
    """A user's object is wrapped; ours, and one that is wrapped already, are not."""
    mine = Newest()
    guarded = make_policy(mine, "policy")
    assert isinstance(guarded, Guarded)
    assert guarded.policy is mine
    assert make_policy(guarded, "policy") is guarded
    for name in ("lru", "worth"):
        ours = make_policy(name, "policy")
        assert make_policy(ours, "policy") is ours


@pytest.mark.parametrize("bad", ["LRU", "worst", "", None, 3, object(), Newest, mock.Mock(spec=["victims"])], ids=repr)
def test_anything_else_is_refused(bad: Any) -> None:
    """Other names, and objects or classes that are no policy, are refused with all that is allowed."""
    with pytest.raises(
        ConfigError, match=r'disk\.policy=.*"lru", "lfu", "fifo", "worth", .*requested, admitted, removed, victims'
    ):
        make_policy(bad, "disk.policy")


# Guarded


def guarded(policy: Policy) -> Guarded:
    """Guard a policy and bring in a to e."""
    made = Guarded(policy)
    for model in MODELS:
        admit(made, model)
    return made


def test_guarded_tells_the_policy() -> None:
    """The user's policy is told of everything, and its order holds."""
    mine = Newest()
    policy = guarded(mine)
    policy.requested("zzz", 42)
    policy.removed("d")
    assert mine.clocks[-1] == 42
    assert list(mine.models) == ["a", "b", "c", "e"]
    assert order(policy, ["a", "b", "c", "e"]) == ["e", "c", "b", "a"]
    assert policy.errors == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["d", "a"], "dabce"),
        (["d", "d", "x", "a", "d", None, 7, [], "x"], "dabce"),
        ([], "abcde"),
        ("edcba", "edcba"),
        (itertools.repeat("d"), "dabce"),
        (itertools.count(), "abcde"),
    ],
    ids=["part", "strays", "nothing", "a str", "endless repeats", "endless strays"],
)
def test_whatever_is_answered_everything_can_go(answer: Any, expected: str) -> None:
    """Strays and repeats are passed over, and who was not given follows in LRU order."""
    assert "".join(order(guarded(Answers(answer)), MODELS)) == expected


def test_strays_do_not_bring_in_what_is_leased() -> None:
    """A leased model that the policy gives all the same does not go."""
    assert order(guarded(Answers("abcde")), ["e", "b"]) == ["b", "e"]


def test_a_set_of_the_tiers_is_not_handed_out() -> None:
    """A user's policy that empties what it was given harms nobody."""

    class Thief(Newest):
        def victims(self, need: int, evictable: Collection[str]) -> Iterable[str]:
            evictable.clear()  # type: ignore[attr-defined]
            return []

    evictable = set(MODELS)
    assert order(guarded(Thief()), evictable) == list(MODELS)
    assert evictable == set(MODELS)


def test_answer_that_begins_again() -> None:
    """Once all were given, a policy that gives them again without end is broken off, and that is no error."""
    policy = guarded(Answers(itertools.cycle(MODELS)))
    assert order(policy, ["e", "b"]) == ["b", "e"]
    assert policy.errors == 0


@pytest.mark.parametrize("answer", [None, 3, itertools.repeat("x")], ids=["None", "int", "endless"])
def test_answer_of_no_use_is_an_error(answer: Any) -> None:
    """An answer that can't be walked through, or has no end, counts as an error."""
    policy = guarded(Answers(answer))
    assert order(policy, MODELS) == list(MODELS)
    assert policy.errors == 1


def test_answer_that_breaks_off() -> None:
    """Where the policy raises halfway, what it gave stands and the rest follows in LRU order."""

    def answer() -> Iterable[str]:
        yield "c"
        raise LookupError

    policy = guarded(Answers(answer()))
    assert order(policy, MODELS) == ["c", "a", "b", "d", "e"]
    assert policy.errors == 1


def test_models_that_nobody_admitted_can_go_too() -> None:
    """Evictable models that even the fallback does not know come last."""
    assert order(Guarded(Answers([])), ["y", "x"]) == ["x", "y"]


def test_errors_are_told_once_a_kind_and_not_under_the_lock(caplog: pytest.LogCaptureFixture) -> None:
    """What a policy raises is counted at once, and logged by report(), once for each method and type."""
    broken = Broken()
    policy = guarded(broken)
    order(policy, MODELS)
    policy.removed("a")
    broken.error = KeyError("other")
    policy.removed("b")
    assert policy.errors == 13
    assert caplog.text == ""  # the cache's lock is held in all of these
    policy.report()
    policy.report()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 5
    assert sum("Broken.removed" in line for line in told) == 2
    policy.removed("b")
    policy.report()
    assert len(caplog.records) == 5


def test_report_survives_a_broken_log() -> None:
    """A log filter that raises does not get out of report()."""
    policy = guarded(Broken())
    logger = logging.getLogger("modelcache")
    broken = mock.Mock(spec=[], side_effect=RuntimeError)
    logger.addFilter(broken)
    try:
        policy.report()
    finally:
        logger.removeFilter(broken)
    assert broken.called


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_wait_for_the_report(kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit do not break a decision off: the report after it raises them, once."""
    policy = Guarded(Broken(kind()))
    policy.admitted(Resident("a", 1, 1.0))
    assert order(policy, ["a"]) == ["a"]
    policy.removed("a")
    with pytest.raises(kind):
        policy.report()
    policy.report()
    assert policy.errors == 0


def test_odd_base_exceptions_do_not_pass() -> None:
    """Other errors that are no Exception are treated like any error."""
    policy = guarded(Broken(type("Odd", (BaseException,), {})()))
    assert order(policy, MODELS) == list(MODELS)


def test_answer_may_be_dropped_halfway() -> None:
    """The caller may stop taking victims; a generator of the user's is closed, and nothing is an error."""
    closed = []

    def answer() -> Iterable[str]:
        try:
            yield "c"
            yield "d"
        finally:
            closed.append(True)

    policy = guarded(Answers(answer()))
    taken = policy.victims(1, MODELS)
    assert next(iter(taken)) == "c"
    taken.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert policy.errors == 0
