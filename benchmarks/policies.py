"""Which policy waits least in memory: recorded requests replayed through ours and published ones, at four capacities.

    python -m benchmarks.policies [--traces FOLDER] [--only twin] [--jobs 2]

What decides is reload seconds: the load times that somebody waited for, over the whole trace, first loads included.
The rows: ours (``worth pruned`` keeps victims that the others make unnecessary, as the memory tier does), plain
references of GDSF and GreedyDual, and, out of reach as they know the future, Belady and Belady by cost. libCacheSim's
where it is installed (group ``bench``).
The exit status is 1 where a figure is more than 1 % off what an independent program got. Memory over disk is
``benchmarks.two_tiers``.

About five minutes of processor time for the three traces that are here, most of it for ``web12``.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.report import machine
from benchmarks.simulator import expected, foreign, peers, report, traces
from benchmarks.simulator.tiers import Outcome, replay
from benchmarks.simulator.traces import Trace
from modelcache.policies import Policy, Worth, make_policy

PRUNED = "worth pruned"
OTHERS: dict[str, Callable[[], Policy]] = {
    PRUNED: Worth,
    "GDSF": peers.Gdsf,
    "GreedyDual": peers.GreedyDual,
}
OFFLINE: dict[str, Callable[[Trace], Policy]] = {"Belady": peers.Belady, "Belady by cost": peers.BeladyCost}
FOREIGN = {f"libCacheSim {name}": name for name in foreign.NAMES}
ROWS = ("lru", "lfu", "fifo", "worth", *OTHERS, *OFFLINE)


def policy_of(row: str, trace: Trace) -> Policy:
    """Return a new policy for a row."""
    if row in OFFLINE:
        return OFFLINE[row](trace)
    return OTHERS[row]() if row in OTHERS else make_policy(row, "policy")


def run(folder: Path, name: str, row: str, share: float) -> Outcome:
    """Replay one trace through one row at one capacity."""
    trace = traces.read(folder, name)
    if row in FOREIGN:
        return foreign.replay(trace, FOREIGN[row], trace.share(share))
    return replay(trace, policy_of(row, trace), trace.share(share), spare=row == PRUNED)


def examine(pool: ProcessPoolExecutor, folder: Path, name: str) -> list[expected.Check]:
    """Replay one trace, print what it came to, and return the figures to check."""
    rows = [*ROWS, *(FOREIGN if foreign.INSTALLED else ())]
    missing = [] if foreign.INSTALLED else [f"{row}: not run, libcachesim is not installed" for row in FOREIGN]
    jobs = {(row, share): pool.submit(run, folder, name, row, share) for share in expected.SHARES for row in rows}
    outcomes = {row: [jobs[row, share].result() for share in expected.SHARES] for row in rows}
    trace = traces.read(folder, name)
    sys.stdout.write(f"\n{name}: {len(trace.requests):,} requests for {len(trace.bytes):,} models\n")
    report.print_trace(name, outcomes, missing)
    return [
        check
        for place, (lru, worth) in enumerate(zip(outcomes["lru"], outcomes["worth"], strict=True))
        for check in expected.checks(name, place, lru.misses, lru.seconds, worth.seconds)
    ]


def main() -> int:
    """Replay, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options, names = traces.chosen(parser)
    sys.stdout.write(f"{machine()}\n")
    with ProcessPoolExecutor(options.jobs) as pool:
        found = [check for name in names for check in examine(pool, options.traces, name)]
    if found:
        report.print_checks(found)
    return 0 if all(check.passed for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
