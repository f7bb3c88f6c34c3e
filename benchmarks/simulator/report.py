"""Prints what the replays came to."""

import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.grid import grid
from benchmarks.simulator.expected import SHARES, Check
from benchmarks.simulator.tiers import Outcome

Outcomes = Mapping[str, Sequence[Outcome]]
"""By policy, at each capacity."""


def print_trace(name: str, outcomes: Outcomes, missing: Sequence[str]) -> None:
    """Print three tables, a row a policy and a column a capacity: seconds, objects, bytes.

    Args:
        name: which trace.
        outcomes: what it came to; "lru" among them.
        missing: rows that could not be run, with the reason.
    """
    heads = ["", *(f"{share:.0%}" for share in SHARES)]
    base = outcomes["lru"]

    def seconds(place: int, one: Outcome) -> str:
        return f"{one.seconds:,.0f} ({one.seconds / base[place].seconds:.3f})"

    cells: dict[str, Callable[[int, Outcome], str]] = {
        "reload seconds (over those of lru)": seconds,
        "object miss ratio": lambda _, one: f"{one.misses:.4f}",
        "byte miss ratio": lambda _, one: f"{one.bytes:.4f}",
    }
    for title, cell in cells.items():
        lines = [[policy, *(cell(place, one) for place, one in enumerate(row))] for policy, row in outcomes.items()]
        grid(f"{name}: {title}", [heads, *lines])
    for line in missing:
        sys.stdout.write(f"{line}\n")


def print_checks(checks: Sequence[Check]) -> None:
    """Print each figure beside what is expected."""
    lines = [["figure", "expected", "got", "off", "good"]]
    for check in checks:
        digits = 0 if check.expected > 1 else 4
        at_most = "<= " if check.most else ""
        verdict = "yes" if check.passed else "NO"
        got, wanted = f"{check.got:.{digits}f}", f"{at_most}{check.expected:g}"
        lines.append([check.what, wanted, got, f"{check.deviation:+.2%}", verdict])
    grid("Ours beside what an independent program got", lines)
