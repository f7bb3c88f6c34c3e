"""Test what is shipped: unpack the sdist, take the package out of it, run its tests against the installed wheel.

So ``import modelcache`` can only be the wheel, and a test, page or helper that the sdist lacks is missed at once.
Called by the Makefile, in the environment into which the wheel was installed; finding other Pythons is here too.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
LANES = 2  # runs of pytest at a time: much of the tests' time is waiting
QUICK = "not slow and not servers and not fuzz"
"""What other Pythons run: behaviour, contracts and properties."""
SLOWER = [f"tests/{folder}" for folder in ("interleave", "faults", "stress")]
QUICKER = [f"--ignore={folder}" for folder in SLOWER]
FEW = 5  # tests that may fail beside another run, and are then run alone


def main() -> int:
    """Run the tests here and, with ``--others``, their quick part elsewhere; return the worst status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the uv to use")
    parser.add_argument("--marks", required=True, help="pytest's -m on this Python")
    parser.add_argument("--others", action="store_true", help="also on the other Pythons that are there")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --; then all is one run here")
    options = parser.parse_args()
    uv = str(ROOT / options.uv) if "/" in options.uv else options.uv

    here, python = unpack(), Path(sys.executable)
    if options.pytest or not options.others:
        return run_pytest(python, here, options.marks, options.pytest)
    runs = [(python, options.marks, SLOWER), (python, options.marks, QUICKER)]
    for version in VERSIONS:
        if version == f"{sys.version_info.major}.{sys.version_info.minor}":
            continue
        if found := find(version):
            runs.append((prepare(uv, found, version), QUICK, QUICKER))
        else:
            print(f"no Python {version} on this machine: not run", flush=True)
    with ThreadPoolExecutor(LANES) as lanes, tempfile.TemporaryDirectory() as logs:
        files = [Path(logs, str(number)) for number in range(len(runs))]
        running = [
            lanes.submit(run_pytest, run[0], here, *run[1:], file) for run, file in zip(runs, files, strict=True)
        ]
        for one, file in zip(running, files, strict=True):
            one.result()
            print(file.read_text(), flush=True)
        ends = zip(runs, files, [one.result() for one in running], strict=True)
        return max(run_again(run, here, file, end) for run, file, end in ends)


def run_again(run: tuple[Path, str, list[str]], here: Path, log: Path, status: int) -> int:
    """Run alone the few tests that failed beside another run, which may have starved them; return the new status."""
    python, marks, more = run
    failed = Path(f"{log}-cache", "v", "cache", "lastfailed")
    if status != 1 or not failed.is_file() or len(json.loads(failed.read_text())) > FEW:
        return status
    return run_pytest(python, here, marks, [*more, "-o", f"cache_dir={log}-cache", "--last-failed"])


def unpack() -> Path:
    """Unpack the sdist without the package and return the folder."""
    folder = ROOT / "build" / "check"
    shutil.rmtree(folder, ignore_errors=True)
    (sdist,) = (ROOT / "dist").glob("modelcache-*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    shutil.rmtree(unpacked / "modelcache")
    return unpacked


def find(version: str) -> Path | None:
    """Return a Python of this version that really runs: on PATH, or kept by pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which(f"python{version}")
    candidates = [on_path] if on_path else []
    candidates += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python{version}")), reverse=True)
    ask = "import sys; print(sys.executable, '%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        # A pyenv shim exists for versions that are not switched on, and then fails.
        answer = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
        path, _, is_version = answer.stdout.strip().rpartition(" ")
        if answer.returncode == 0 and is_version == version:
            return Path(path)
    return None


def prepare(uv: str, python: Path, version: str) -> Path:
    """Make an environment with the wheel and what its tests need; return its Python."""
    folder = ROOT / "build" / f"py{version}"
    (wheel,) = (ROOT / "dist").glob("modelcache-*.whl")
    made = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", python, folder], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", made, wheel, "--group", "test"]
    subprocess.run(install, check=True, cwd=ROOT)
    return made


def run_pytest(python: Path, folder: Path, marks: str, more: list[str], log: Path | None = None) -> int:
    """Run the tests in ``folder``, print or log what they say, and return pytest's exit status."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "pytest", "-m", marks, *more]
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("w"))
        command += [] if log is None else ["-o", f"cache_dir={log}-cache"]  # for ``run_again``
        for place in {output, None}:
            print(f"== {python.parents[1].name}: pytest -m {marks!r} {' '.join(more)}", file=place, flush=True)
        return subprocess.run(command, check=False, cwd=folder, env=env, stdout=output, stderr=output).returncode


if __name__ == "__main__":
    sys.exit(main())
