"""How long users wait with memory over disk: recorded requests replayed through our policies, in pairs.

    python -m benchmarks.two_tiers [--traces FOLDER] [--only twin] [--memory 0.1] [--disk 0.3] [--jobs 2]

What decides is the seconds of all loads and fetches that somebody waited for, first ones included. ``A over B``: A is
the policy of the memory, B that of the disk, both as the library has them. ``GDSF`` is a plain reference;
``hears hits`` tells the disk of all requests, ``hears leaving`` counts a request for a model that leaves memory to make
room: the library does neither, and these show what that would bring.

Two tables a trace: in the first an artifact may leave the disk before its model leaves memory, as in the independent
program whose figures are to be reached; in the second models in memory keep their artifacts, as in the library. The
exit status is 1 where ``worth over worth`` waits longer than it should.

About five minutes of processor time for the three traces that are here, most of it for ``web12``.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.grid import grid
from benchmarks.report import machine
from benchmarks.simulator import expected, peers, traces
from benchmarks.simulator.report import print_checks
from benchmarks.simulator.tiers import Tier
from benchmarks.simulator.two import Waits, replay_two
from modelcache.policies import Policy, make_policy

OTHERS: dict[str, Callable[[], Policy]] = {"GDSF": peers.Gdsf}
HEARS_HITS, HEARS_LEAVING = "worth, hears hits", "worth, hears leaving"
BASE, BEST = ("lru", "lru"), ("worth", "worth")
ROWS = (
    BASE,
    ("lru", "worth"),
    *(("worth", disk) for disk in ("lru", "lfu", "fifo", "GDSF", "worth", HEARS_HITS, HEARS_LEAVING)),
)
Pair = tuple[str, str]


def tier(row: str, trace: traces.Trace, share: float) -> Tier:
    """Return a new tier for one half of a row."""
    name = "worth" if row in {HEARS_HITS, HEARS_LEAVING} else row
    return Tier(OTHERS[name]() if name in OTHERS else make_policy(name, "policy"), trace.share(share))


def run(folder: Path, name: str, pair: Pair, memory: float, disk: float, *, pins: bool) -> Waits:
    """Replay one trace through one pair of policies."""
    trace = traces.read(folder, name)
    upper, lower = tier(pair[0], trace, memory), tier(pair[1], trace, disk)
    hits, leaving = pair[1] == HEARS_HITS, pair[1] == HEARS_LEAVING
    return replay_two(trace, upper, lower, pins=pins, tells_hits=hits, tells_leaving=leaving)


def print_waits(title: str, waits: Mapping[Pair, Waits]) -> None:
    """Print a row a pair."""
    base = waits[BASE].seconds
    lines = [["", "seconds waited", "of loads", "of fetches", "memory misses", "disk misses"]]
    lines += [
        [
            " over ".join(pair),
            f"{one.seconds:,.0f} ({one.seconds / base:.3f})",
            f"{one.loads:,.0f}",
            f"{one.fetches:,.0f}",
            f"{one.misses:.4f}",
            f"{one.fetched:.4f}",
        ]
        for pair, one in waits.items()
    ]
    grid(title, lines)


def examine(pool: ProcessPoolExecutor, folder: Path, name: str, memory: float, disk: float) -> list[expected.Check]:
    """Replay one trace through all pairs, print what it came to, and return the figures to check."""
    jobs = {
        pins: {pair: pool.submit(run, folder, name, pair, memory, disk, pins=pins) for pair in ROWS}
        for pins in (False, True)
    }
    waits = {pins: {pair: job.result() for pair, job in row.items()} for pins, row in jobs.items()}
    sizes = f"{name}: memory {memory:.0%} over disk {disk:.0%}"
    print_waits(f"{sizes}, artifacts may leave before their models", waits[False])
    print_waits(f"{sizes}, models in memory keep their artifacts", waits[True])
    if (memory, disk) != expected.TWO_TIERS_SHARES or name not in expected.TWO_TIERS:
        return []
    ratio = waits[False][BEST].seconds / waits[False][BASE].seconds
    return [expected.Check(f"{name} worth over worth", expected.TWO_TIERS[name], ratio, 0, most=True)]


def main() -> int:
    """Replay, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=0.1, help="memory, as a share of the bytes of all models")
    parser.add_argument("--disk", type=float, default=0.3, help="disk, likewise")
    options, names = traces.chosen(parser)
    sys.stdout.write(f"{machine()}\n")
    with ProcessPoolExecutor(options.jobs) as pool:
        found = [check for name in names for check in examine(pool, options.traces, name, options.memory, options.disk)]
    if found:
        print_checks(found)
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
