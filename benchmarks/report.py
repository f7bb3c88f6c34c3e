"""How a benchmark measures and prints: the machine, then a table of medians, spreads and ratios.

Rows of one table are measured in turns (A B C, A B C, ...), so that a machine that grows slower in between slows all
of them; ratios are taken round by round, against the named peer of the same round.
"""

import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def machine() -> str:
    """Return one line about this machine and Python."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def rounds(rows: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Return ``count`` figures of each row, measured in turns after one round that is thrown away."""
    figures: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(count + 1):
        for name, measure in rows.items():
            figure = measure()
            if turn:
                figures[name].append(figure)
    return figures


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` (0 to 1) of ``values`` lie, by the nearest rank."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def table(title: str, figures: Mapping[str, Sequence[float]], unit: str, peers: Sequence[str]) -> None:
    """Print a row a name: median, p95, and the median ratio, with its spread, to each peer of the same round."""
    heads = ["", f"median {unit}", f"p95 {unit}", *(f"x {peer} (min..max)" for peer in peers)]
    lines = [heads]
    for name, values in figures.items():
        cells = [name, f"{statistics.median(values):.0f}", f"{percentile(values, 0.95):.0f}"]
        for peer in peers:
            ratios = [mine / theirs for mine, theirs in zip(values, figures[peer], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    sys.stdout.write(f"\n{title}\n")
    for number, line in enumerate(lines):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
        if not number:
            sys.stdout.write("  ".join("-" * width for width in widths) + "\n")
