"""The public types, as a user's strict type checker sees them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed here")
HERE = Path(__file__).parent


def mypy(name: str, cache: Path) -> str:
    """Return what ``mypy --strict`` says of a snippet."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", str(HERE / name)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.timeout(120)
def test_types_are_found(tmp_path: Path) -> None:
    """A user's strict type checker finds the model's type in everything that gives the model."""
    assert "Success" in mypy("accepted.py", tmp_path)


@pytest.mark.timeout(120)
def test_mistakes_are_refused(tmp_path: Path) -> None:
    """A user's strict type checker refuses what would be refused at run time."""
    lines = (HERE / "refused.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# refused")}
    assert {int(number) for number in re.findall(r"refused\.py:(\d+): error", mypy("refused.py", tmp_path))} == marked
