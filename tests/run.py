"""Test what is shipped: unpack the sdist, take the package out of it, run its tests against the installed wheel.

So ``import modelcache`` can only be the wheel, and a test, page or helper that the sdist lacks is missed at once.
Called by the Makefile, in the environment into which the wheel was installed; finding other Pythons is here too.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
QUICK = "not slow and not servers and not fuzz"
QUICK_ARGUMENTS = [f"--ignore=tests/{folder}" for folder in ("interleave", "faults", "stress")]
"""What other Pythons run, at once, beside what QUICK marks: behaviour, contracts and properties."""


def main() -> int:
    """Run the tests here and, with ``--others``, their quick part elsewhere; stop at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the uv to use")
    parser.add_argument("--marks", required=True, help="pytest's -m on this Python")
    parser.add_argument("--others", action="store_true", help="also on the other Pythons that are there")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    uv = str(ROOT / options.uv) if "/" in options.uv else options.uv

    here = unpack()
    failed = run_pytest(Path(sys.executable), here, options.marks, options.pytest)
    here_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if options.others and not failed:
        others = {version: find(version) for version in VERSIONS if version != here_version}
        for version in [version for version, python in others.items() if python is None]:
            print(f"no Python {version} on this machine: not run", flush=True)
        pythons = [prepare(uv, python, version) for version, python in others.items() if python]
        failed = run_side_by_side(pythons, here, QUICK, [*QUICK_ARGUMENTS, *options.pytest])
    return failed


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


def run_pytest(python: Path, folder: Path, marks: str, more: list[str]) -> int:
    """Run the tests in ``folder`` and return pytest's exit status."""
    print(headline(python, marks), flush=True)
    return start_pytest(python, folder, marks, more).wait()


def run_side_by_side(pythons: list[Path], folder: Path, marks: str, more: list[str]) -> int:
    """Run the tests in ``folder`` on some Pythons at once, show one output after the other; return the worst status."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in pythons]
        running = [
            start_pytest(python, folder, marks, [*more, "-p", "no:cacheprovider"], output)
            for python, output in zip(pythons, outputs, strict=True)
        ]
        for python, process, output in zip(pythons, running, outputs, strict=True):
            process.wait()
            output.seek(0)
            print(headline(python, marks), output.read(), sep="\n", flush=True)
        return max((process.returncode for process in running), default=0)


def start_pytest(
    python: Path, folder: Path, marks: str, more: list[str], output: IO[str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start the tests in ``folder``."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pytest", "-m", marks, *more]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output and subprocess.STDOUT)


def headline(python: Path, marks: str) -> str:
    """Return what stands above an output."""
    return f"\n== {python.parents[1].name}: pytest -m {marks!r}"


if __name__ == "__main__":
    sys.exit(main())
