"""One row of one case in a process of its own; prints its figures as JSON.

A process of its own, as memory and CPU are read from the kernel for the whole of it, children included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fetch.job import Job, NotThisCase
from benchmarks.fetch.rows import ROWS


def _cpu() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def _peak() -> int:
    """Return the peak of resident memory since it was last reset, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _sync(folder: Path) -> float:
    """Sync the file system of a folder, and return the seconds that it took."""
    started = time.perf_counter()
    subprocess.run(["/bin/sync", "-f", str(folder)], check=True)
    return time.perf_counter() - started


def main() -> int:
    """Run the row that the arguments name."""
    name, case, endpoint, target, source = sys.argv[1:]
    job = Job(case, endpoint, Path(target), Path(source))
    try:
        run = ROWS[name](job)
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}))
        return 0
    except NotThisCase:
        print(json.dumps({"skipped": ""}))
        return 0
    before_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    Path("/proc/self/clear_refs").write_text("5")
    memory, cpu, started = _peak(), _cpu(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    cpu = _cpu() - cpu
    extra = _peak() - memory
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(path.stat().st_size for path in job.target.rglob("*") if path.is_file())
    files = sum(path.is_file() for path in job.target.rglob("*"))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": cpu,
                "peak": max(extra, children if children > before_children * 1024 else 0),
                "bytes": size,
                "files": files,
                "sync": _sync(job.target),
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
