"""What was aimed at, and whether it was reached in this run; and where a peer was faster.

All are ratios of rows of the same round, so that a busy machine changes them less than seconds; those of processor
time, beside them, it changes least, though they tell nothing of what runs at once.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from benchmarks.fetch.data import MIB
from benchmarks.grid import grid

OURS = "modelcache"
STANDARD = "modelcache, standard zlib"
_PEAK = 64  # MiB beyond what the process had before: of one file
_LEVEL = 1.1  # times the seconds of a peer that still count as level with it

Figures = Mapping[str, Sequence[Mapping[str, Any]]]


@attrs.frozen
class _Target:
    """One row in the seconds of another.

    Attributes:
        case: what is fetched.
        mine, peer: names of the rows.
        least: how many times faster than the peer, at least.
    """

    case: str
    mine: str
    peer: str
    least: float


_TARGETS = (
    _Target("file", OURS, "boto3 download_file", 1.5),
    _Target("file", OURS, "s5cmd", 1 / _LEVEL),
    _Target("archive", OURS, "limit: isal alone", 1 / 1.25),
    _Target("archive", STANDARD, "limit: zlib alone", 1 / 1.25),
    _Target("archive", OURS, "boto3 download_file", 2),
    _Target("archive", OURS, "boto3 get_object", 1.6),
    _Target("folder", OURS, "boto3 get_object", 4),
    _Target("folder", OURS, "boto3 download_file", 10),
    _Target("folder", OURS, "s5cmd", 1 / _LEVEL),
)


def ratios(figures: Figures, mine: str, peer: str, what: str = "seconds") -> list[float] | None:
    """Return how many times faster (or ``cpu``) ``mine`` was, round by round; None where one of the two was skipped."""
    if any("skipped" in (figures.get(name) or [{"skipped": ""}])[0] for name in (mine, peer)):
        return None
    pairs = zip(figures[mine], figures[peer], strict=True)
    return [theirs[what] / ours[what] for ours, theirs in pairs]


def report(case: str, figures: Figures) -> None:
    """Print the targets of a case, then the peers that were faster."""
    lines = [["target", "at least", "median", "(min..max)", "by CPU s", ""]]
    for target in _TARGETS:
        found = ratios(figures, target.mine, target.peer) if target.case == case else None
        if found is not None:
            median = statistics.median(found)
            name = f"{target.mine}: times as fast as {target.peer}"
            spread = f"{min(found):.2f}..{max(found):.2f}"
            cpu = statistics.median(ratios(figures, target.mine, target.peer, "cpu") or [])
            reached = "reached" if median >= target.least else "MISSED"
            lines.append([name, f"{target.least:.2f}", f"{median:.2f}", spread, f"{cpu:.2f}", reached])
    if case == "file" and "skipped" not in (figures.get(OURS) or [{"skipped": ""}])[0]:
        peak = max(value["peak"] for value in figures[OURS]) / MIB
        reached = "reached" if peak <= _PEAK else "MISSED"
        lines.append([f"{OURS}: peak MiB, at most", f"{_PEAK}", f"{peak:.0f}", "", "", reached])
    if len(lines) > 1:
        grid("targets", lines)
    for name in figures:
        found = None if name.startswith((OURS, "limit")) else ratios(figures, OURS, name)
        if found is not None and statistics.median(found) < 1:
            print(f"slower than {name}: {1 / statistics.median(found):.2f} times its seconds")
