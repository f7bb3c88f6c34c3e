"""Runs every benchmark, one after the other: ``python -m benchmarks``."""

import subprocess
import sys

ALL = ("hit", "policies", "two_tiers", "victims", "quiet", "growth")


def main() -> int:
    """Run each in a process of its own; stop at the first that fails."""
    for name in ALL:
        sys.stdout.write(f"\n== benchmarks.{name}\n")
        sys.stdout.flush()
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
