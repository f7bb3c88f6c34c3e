"""Prints what the replays came to."""

import sys
from collections.abc import Callable, Mapping, Sequence

from benchmarks.simulator.expected import SHARES, Check
from benchmarks.simulator.tiers import Outcome

Outcomes = Mapping[str, Sequence[Outcome]]
"""By policy, at each capacity."""


def print_trace(heading: str, outcomes: Outcomes, missing: Sequence[str]) -> None:
    """Print three tables, a row a policy and a column a capacity: seconds, objects, bytes.

    Args:
        heading: which trace.
        outcomes: what it came to; "lru" among them.
        missing: rows that could not be run, with the reason.
    """
    heads = ["", *(f"{share:.0%}" for share in SHARES)]
    base = outcomes["lru"]

    def seconds(place: int, one: Outcome) -> str:
        return f"{one.seconds:,.0f} ({one.seconds / base[place].seconds:.3f})"

    cells: dict[str, Callable[[int, Outcome], str]] = {
        "reload seconds (over lru)": seconds,
        "object miss ratio": lambda _, one: f"{one.misses:.4f}",
        "byte miss ratio": lambda _, one: f"{one.bytes:.4f}",
    }
    sys.stdout.write(f"\n{heading}\n")
    for title, cell in cells.items():
        lines = [[name, *(cell(place, one) for place, one in enumerate(row))] for name, row in outcomes.items()]
        print_lines([[title, *heads[1:]], *lines])
    for line in missing:
        sys.stdout.write(f"{line}\n")


def print_checks(checks: Sequence[Check]) -> None:
    """Print each figure beside what is expected."""
    lines = [["figure", "expected", "got", "off", ""]]
    for check in checks:
        digits = 0 if check.expected > 1 else 4
        at_most = "<= " if check.most else ""
        verdict = "" if check.passed else "TOO FAR OFF"
        got, wanted = f"{check.got:.{digits}f}", f"{at_most}{check.expected:g}"
        lines.append([check.what, wanted, got, f"{check.deviation:+.2%}", verdict])
    sys.stdout.write("\nOurs beside what an independent program got\n")
    print_lines(lines)


def print_lines(lines: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first row as heads."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sys.stdout.write("\n")
    for number, line in enumerate(lines):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
        if not number:
            sys.stdout.write("  ".join("-" * width for width in widths).rstrip() + "\n")
