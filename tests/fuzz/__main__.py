"""Fuzzes the archives: ``python -m tests.fuzz [--count 100000] [--seed 1] [--start 0]``; 1 where something was found.

Inputs that broke a rule are kept in ``build/fuzz``. The same seed and number make the same input again.
"""

import argparse
import collections
import time
from pathlib import Path

from tests.support.fuzzing import Outcome, check_all, quick_folder


def fuzz(seed: int, numbers: range) -> int:
    """Check these inputs, print how they fared, and return how many broke a rule."""
    fared: collections.Counter[tuple[str, str]] = collections.Counter()
    begin = time.monotonic()
    kept = Path("build/fuzz")
    with quick_folder() as folder:
        for number, made, outcome in check_all(folder / "bench", seed, numbers):
            if isinstance(outcome, Outcome):
                fared[made.kind, outcome.error[0] if outcome.error else "unpacked"] += 1
                continue
            fared[made.kind, "BROKEN"] += 1
            kept.mkdir(parents=True, exist_ok=True)
            path = kept / f"{seed}-{number}.{made.kind}"
            path.write_bytes(made.data)
            print(f"{path}: {type(outcome).__name__}: {str(outcome)[:300]}", flush=True)
    for (kind, how), count in sorted(fared.items()):
        print(f"{kind:8} {how:16} {count:7}")
    broken = sum(count for (_, how), count in fared.items() if how == "BROKEN")
    print(f"{len(numbers)} inputs in {time.monotonic() - begin:.0f} s, seed {seed}: {broken} broke a rule")
    return broken


def main() -> int:
    """Run; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    options = parser.parse_args()
    return 1 if fuzz(options.seed, range(options.start, options.start + options.count)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
