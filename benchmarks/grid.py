"""Prints a plain table of texts; a table of medians and ratios is ``report``."""

import sys
from collections.abc import Sequence


def grid(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells under a title: the first has the heads, the first cell of each is its name."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sys.stdout.write(f"\n{title}\n")
    for number, line in enumerate(lines):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
        if not number:
            sys.stdout.write("  ".join("-" * width for width in widths) + "\n")
    sys.stdout.flush()
