"""Every Python block in README.md and docs/ runs: a page is one program, run in an empty folder.

A block below ``<!-- not run: reason -->`` is left out, and its reason must say something.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelcache

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(
    r"(?:^[ ]*<!-- not run:(?P<reason>[^\n]*?)-->\n(?:[ ]*\n)?)?"
    r"^(?P<indent>[ ]*)```python\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> Iterator[str]:
    """Yield the code of each block that is to run, moved down to its line in the page, so that errors point there."""
    text = (ROOT / page).read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        if match["reason"] is None:
            yield "\n" * line + textwrap.dedent(match["code"])
        else:
            assert match["reason"].strip(), f"{page}:{line}: say why this block is not run"


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, each seeing what those above it made."""
    monkeypatch.chdir(tmp_path)
    # Whoever takes an example's default folders gets them under the temporary one.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    namespace = {"__name__": "__main__"}
    for code in blocks(page):
        exec(compile(code, ROOT / page, "exec"), namespace)  # noqa: S102 - our own pages


def test_no_block_is_missed() -> None:
    """The pattern sees every fence that says python."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert len(re.findall(r"^\s*`{3,}\s*\{?py", text, re.MULTILINE)) == len(BLOCK.findall(text)), page


@pytest.mark.parametrize("name", modelcache.__all__)
def test_every_name_is_in_the_reference(name: str) -> None:
    """Every public name has a place in the reference pages."""
    pages = "".join(page.read_text() for page in ROOT.glob("docs/reference/*.md"))
    assert re.search(rf"\b{name}\b", pages), f"docs/reference/ does not mention {name}"
