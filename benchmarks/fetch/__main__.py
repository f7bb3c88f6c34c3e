"""From S3 to a usable folder: ``python -m benchmarks.fetch [--rounds 3] [--case file] [--small]``.

nginx on loopback serves a file of 1 GiB, a ``model.tar.gz`` of about 512 MiB and 5,000 files of 20 KB. Rows of one
case run in turns, each in a process of its own. Loopback has no latency, so this measures what a client costs,
not what a network does. Skips where nginx is not installed, and each peer that is not: ``uv pip install -r
pyproject.toml --group fetch`` into an environment of its own brings all of them.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fetch.data import MIB, make
from benchmarks.fetch.job import KEYS
from benchmarks.fetch.rows import ROWS
from benchmarks.fetch.server import BUCKET, available, serving
from benchmarks.fetch.targets import ratios, report
from benchmarks.grid import grid
from benchmarks.report import machine

_PEER = "boto3 download_file"
_TOUCH = 1536 * MIB
_TITLES = {
    "file": "one file of 1 GiB",
    "archive": "model.tar.gz of about 512 MiB, unpacked",
    "folder": "5,000 files of 20 KB",
}


def main() -> int:
    """Measure all cases and print a table for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=list(KEYS), action="append")
    parser.add_argument("--row", choices=list(ROWS), action="append")
    parser.add_argument("--small", action="store_true", help="a 16th of everything, to try the benchmark itself")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to write to")  # noqa: S108
    chosen = parser.parse_args()
    if available() is None:
        print("skipped: nginx is not installed (apt-get install nginx-light)")
        return 0
    print(machine())
    share = 16 if chosen.small else 1
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="bench-fetch-") as name:
        root = Path(name)
        root.chmod(0o755)
        sizes = {"file": 1024 * MIB // share, "archive": 640 * MIB // share, "folder": 5000 // share}
        wanted = {case: size if case in (chosen.case or KEYS) else 0 for case, size in sizes.items()}
        make(root, file=wanted["file"], archive=wanted["archive"], files=wanted["folder"])
        with serving(root) as endpoint:
            for case in chosen.case or list(KEYS):
                figures = _measure(root, endpoint, case, chosen.row or list(ROWS), chosen.rounds)
                _print(case, root / "data" / BUCKET / KEYS[case], figures)
                if share == 1:  # the targets are for these sizes
                    report(case, figures)
    return 0


def _measure(
    root: Path, endpoint: str, case: str, names: Sequence[str], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the figures of each row; of the first round only what is skipped."""
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    kept: list[Path] = []
    whole = 0
    for _ in range(rounds):
        for name in names:
            if figures[name] and "skipped" in figures[name][0]:
                continue
            if case != "folder":
                _touch(root)
            target = Path(tempfile.mkdtemp(dir=root)) / "target"
            target.mkdir()
            source = root / "data" / BUCKET / KEYS[case]
            command = [sys.executable, "-m", "benchmarks.fetch.child", name, case, endpoint, str(target), str(source)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                figures[name] = [{"skipped": f"failed: {' '.join(last)[:150]}"}]
            else:
                told = json.loads(done.stdout.splitlines()[-1])
                figures[name].append(told)
                if not name.startswith("limit") and "skipped" not in told:
                    whole = whole or told["bytes"]
                    assert told["bytes"] == whole, f"{name}: {told['bytes']} of {whole} bytes"
            if case == "folder":
                kept.append(target.parent)  # ext4 looks at lately deleted inodes at each create
            else:
                shutil.rmtree(target.parent)
    for folder in kept:
        shutil.rmtree(folder)
    return figures


def _touch(root: Path) -> None:
    """Have the host give this machine the memory for what a row writes; else the first row of a round pays for it."""
    path = root / "touched"
    block = bytes(MIB)
    with path.open("wb", buffering=0) as out:
        for _ in range(_TOUCH // MIB):
            out.write(block)
    path.unlink()


def _print(case: str, source: Path, figures: dict[str, list[dict[str, Any]]]) -> None:
    stored = sum(path.stat().st_size for path in ([source] if source.is_file() else source.iterdir()))
    lines = [["", "s", "(min..max)", "MB/s stored", "CPU s", "peak MiB", "sync s", f"times as fast as {_PEER}"]]
    skipped = []
    for name, values in figures.items():
        if "skipped" in values[0]:
            if values[0]["skipped"]:
                skipped.append(f"{name}: skipped, {values[0]['skipped']}")
            continue
        seconds = [value["seconds"] for value in values]
        middle = statistics.median(seconds)
        found = ratios(figures, name, _PEER)
        lines.append(
            [
                name,
                f"{middle:.2f}",
                f"{min(seconds):.2f}..{max(seconds):.2f}",
                f"{stored / middle / 1e6:.0f}",
                f"{statistics.median(value['cpu'] for value in values):.2f}",
                f"{statistics.median(value['peak'] for value in values) / MIB:.0f}",
                f"{statistics.median(value['sync'] for value in values):.2f}",
                f"{statistics.median(found):.2f}" if found else "-",
            ]
        )
    grid(f"{_TITLES[case]} ({stored / 1e6:.0f} MB stored); times without the final sync", lines)
    for line in skipped:
        print(line)


if __name__ == "__main__":
    raise SystemExit(main())
