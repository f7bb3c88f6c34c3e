"""Request traces: who was asked for, in order, and what each model weighs and takes to bring back.

A trace is two files, ``NAME.requests.csv.gz`` (``t_s,model``) and ``NAME.models.csv``, which may be gzipped too
(``model,size_mb,load_s,fetch_s``). Where ours come from is told in traces/README.md.
"""

import argparse
import csv
import functools
import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import attrs

FOLDER = Path(__file__).with_name("traces")
"""The traces that come with the simulator."""


@attrs.frozen(eq=False)
class Trace:
    """One trace.

    Attributes:
        name: its name.
        requests: ids, in order.
        bytes: size of each model.
        load: seconds from disk to memory of each model.
        fetch: seconds from the source to disk of each model.
    """

    name: str
    requests: list[str]
    bytes: dict[str, int]
    load: dict[str, float]
    fetch: dict[str, float]

    def share(self, share: float) -> int:
        """Return ``share`` of the bytes of all models."""
        return int(share * sum(self.bytes.values()))


def names(folder: Path) -> list[str]:
    """Return the names of the traces in a folder."""
    return sorted(path.name.removesuffix(".requests.csv.gz") for path in folder.glob("*.requests.csv.gz"))


@functools.cache
def read(folder: Path, name: str) -> Trace:
    """Return a trace; whole bytes, since sums of fractions depend on their order.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    rows = list(csv.DictReader(_lines(folder, f"{name}.models.csv")))
    return Trace(
        name=name,
        requests=[row["model"] for row in csv.DictReader(_lines(folder, f"{name}.requests.csv"))],
        bytes={row["model"]: round(float(row["size_mb"]) * 1e6) for row in rows},
        load={row["model"]: float(row["load_s"]) for row in rows},
        fetch={row["model"]: float(row["fetch_s"]) for row in rows},
    )


def chosen(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a command that replays traces; return them, and the names of the traces."""
    parser.add_argument("--traces", type=Path, default=FOLDER, help="a folder of traces (see its README)")
    parser.add_argument("--only", action="append", help="one trace by name; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--rounds", help="not used: a replay comes out the same every time")
    options = parser.parse_args()
    found = options.only or names(options.traces)
    if not found:
        parser.error(f"no *.requests.csv.gz in {options.traces}")
    return options, found


def _lines(folder: Path, name: str) -> Iterator[str]:
    plain = folder / name
    if plain.exists():
        with plain.open(newline="") as file:
            yield from file
    else:
        with gzip.open(f"{plain}.gz", "rt", newline="") as file:
            yield from file
