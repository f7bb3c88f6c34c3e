"""What a model is worth between processes, and what the answers of other processes come to.

The processes themselves are in ``faults/test_shared_limit``.
"""

from typing import Any

import pytest

from modelcache.disk.accounts import Account
from modelcache.memory.asking import Verdict, weigh
from modelcache.memory.entries import Entry
from modelcache.memory.residents import Residents
from modelcache.memory.worthiness import Worthiness, kind_of_policy
from modelcache.policies import Policy, make_policy


def made(policy: Policy, model: str, *, times: int, others: int, idle: float = 0.0) -> float:
    """Return the worth of a model that was asked for so often in the last 100 s, beside requests for others."""
    residents: Residents[Any] = Residents(policy, lambda _: None, lambda _: None)
    worthiness = Worthiness(policy, residents)
    worthiness._began -= 100
    entry = Entry(residents, model, object(), 1000, 0.5)
    residents.missed(model)
    residents.insert(entry)
    for number in range(others + times - 1):
        if number * times // (others + times) < (number + 1) * times // (others + times):
            residents.note(entry)
            residents.drain()
        else:
            residents.missed("another")
    entry.tick -= idle
    entry.born -= idle
    return worthiness.rate(entry)


def test_worth_is_by_the_clock_of_all() -> None:
    """Half of the few requests to a quiet process are fewer than a tenth of the many to a busy one."""
    quiet = made(make_policy("worth", "policy"), "a", times=5, others=5)
    busy = made(make_policy("worth", "policy"), "b", times=60, others=540)
    assert quiet < busy


@pytest.mark.parametrize("policy", ["worth", "lru", "fifo"])
def test_who_is_idle_longer_is_worth_less(policy: str) -> None:
    """Of two models that are alike otherwise, the one that has been idle, or there, for longer goes first."""
    long, short = (made(make_policy(policy, "policy"), "a", times=5, others=20, idle=idle) for idle in (60, 5))
    assert long < short


def test_lfu_is_by_uses() -> None:
    """By frequency, fewer uses are worth less, however recent they are."""
    few = made(make_policy("lfu", "policy"), "a", times=3, others=5)
    many = made(make_policy("lfu", "policy"), "a", times=9, others=5, idle=50)
    assert few < many


def test_a_user_s_policy_is_rated_by_last_use() -> None:
    """What a user's policy thinks can't be compared: last use stands in for it."""

    class Own:
        def requested(self, model: str, clock: int) -> None: ...
        def admitted(self, resident: object) -> None: ...
        def removed(self, model: str) -> None: ...
        def victims(self, need: int, evictable: Any) -> Any:
            return list(evictable)

    assert kind_of_policy(make_policy(Own(), "policy")) == "lru"


ASKED = 10.0
MINE = Account(wants=100, asked=ASKED, answered=ASKED, rank=5.0, idle=500)


@pytest.mark.parametrize(
    ("mine", "others", "verdict"),
    [
        (None, {}, Verdict.LATE),
        (MINE, {}, Verdict.OWN),
        (MINE, {"b": Account(answered=9.0, rank=1.0)}, None),
        (MINE, {"b": Account(answered=11.0, rank=1.0)}, None),
        (MINE, {"b": Account(answered=11.0, rank=7.0)}, Verdict.OWN),
        (MINE, {"b": Account(answered=11.0)}, Verdict.OWN),
        (Account(wants=0, asked=ASKED), {"b": Account(answered=9.0)}, Verdict.LOOK),
        (Account(wants=0, asked=ASKED), {"b": Account(answered=11.0, giving=50)}, None),
        (Account(wants=100, asked=ASKED), {"b": Account(answered=11.0)}, Verdict.WAIT),
        (Account(wants=900, asked=ASKED, rank=5.0, idle=500), {"b": Account(answered=11.0, idle=300)}, Verdict.WAIT),
        (Account(wants=900, asked=ASKED, rank=5.0, idle=500), {"b": Account(answered=11.0, idle=400)}, Verdict.OWN),
        (Account(wants=900, asked=ASKED, rank=5.0), {"b": Account(answered=11.0, guessed=True)}, Verdict.OWN),
    ],
)
def test_what_answers_come_to(mine: Account | None, others: dict[str, Account], verdict: Verdict | None) -> None:
    """Nothing is evicted before all have answered, while somebody gives way, or where all together do not suffice."""
    assert weigh(mine, others, ASKED, "me") is verdict
