"""What must hold of an archive, whatever is in it: tried on one input, with every decoder.

Inputs are made in ``mutating``; ``fuzz/test_fuzz`` runs some hundred of them, ``make fuzz`` a hundred thousand.
"""

import contextlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from modelcache.archives import Limits, codecs, decode, unpacking
from modelcache.errors import ArtifactCorrupt, UnsafeArtifact
from tests.support.archives import Bench, Bytes, content
from tests.support.mutating import Input, Mutator, reference

LIMITS = Limits(
    members=200, part=200, depth=60, file=2**18, total=2**20, header=2**14, headers=2**16, frames=50, floor=2**19
)
_NAMES = {"tar": "m.tar", "tar.gz": "m.tar.gz", "tar.zst": "m.tar.zst", "zip": "m.zip"}
_ROOM = 2**20 + 2**18 + 4096 * 400  # what may be charged: total, one file, a block each for members and folders


@attrs.frozen
class Outcome:
    """What came of one input: files, or the type, words and member of an error."""

    content: dict[str, bytes | None] | None = None
    error: tuple[str, str, str | None] | None = None


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """Give a temporary folder in memory, where there is such: a disk takes ten times as long."""
    memory = Path("/dev/shm")  # noqa: S108 - no fixed name in it
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def decoders() -> dict[str, Any]:
    """Return the zlib modules that are there, by name."""
    found: dict[str, Any] = {"zlib": zlib}
    try:
        from isal import isal_zlib  # noqa: PLC0415 - an extra
    except ImportError:
        return found
    return {**found, "isal": isal_zlib}


def attempt(folder: Path, data: bytes, name: str) -> Outcome:
    """Unpack ``data`` below ``folder``, and check all that must hold whatever comes of it.

    Raises:
        AssertionError: something was touched outside, a limit was passed, or less was charged than is there.
        Exception: any error that is not one of the two an archive may have.
    """
    bench = Bench(folder)
    refused: ArtifactCorrupt | UnsafeArtifact | None = None
    outcome = Outcome()
    try:
        bench.unpack(data, name, stream=Bytes(data))
    except (ArtifactCorrupt, UnsafeArtifact) as error:
        refused = error
    else:
        outcome = Outcome(content(bench.target))
    if refused is not None:
        assert refused.model == "fraud"
        assert str(refused).isprintable()
        assert str(refused).isascii()
        outcome = Outcome(error=(type(refused).__name__, str(refused), refused.member))
    assert bench.stream.ended
    there = list(bench.target.rglob("*"))
    assert len(there) <= LIMITS.members
    top = bench.target.resolve()
    for path in there:
        assert path.is_symlink() or path.is_file() or path.is_dir()
        assert path.is_symlink() is False or path.resolve(strict=True).is_relative_to(top)
    assert bench.peak <= _ROOM + len(data)
    if outcome.error is None:
        assert bench.charged >= sum({at.st_ino: at.st_blocks * 512 for at in map(Path.lstat, there)}.values())
        assert all(path.lstat().st_size <= LIMITS.file for path in there if path.is_file())
    return outcome


def check(folder: Path, made: Input, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """Unpack one input with each decoder; all must agree, and give no less than the standard library reads."""
    outcomes = {}
    for name, module in decoders().items() if made.kind in ("tar.gz", "zip") else [("any", zlib)]:
        monkeypatch.setattr(codecs, "zlib_module", lambda module=module: module)
        folder.mkdir()
        try:
            outcomes[name] = attempt(folder, made.data, _NAMES[made.kind])
        finally:
            shutil.rmtree(folder)
    first, *others = outcomes.values()
    assert all(_agree(other, first) for other in others), outcomes
    if first.content is not None and (expected := reference(made)) is not None:
        for name, data in expected.items():
            assert first.content.get(name) == data, name
    return first


def _agree(one: Outcome, other: Outcome) -> bool:
    """Whether two decoders came to the same, but for how soon they find that what they were given makes no sense.

    What is both damaged and unsafe is refused for what is found first.
    """
    if one.error is None or other.error is None:
        return one == other
    return one.error[0] == other.error[0] or any("damaged gzip data" in error[1] for error in (one.error, other.error))


def check_all(folder: Path, seed: int, numbers: range) -> Iterator[tuple[int, Input, Outcome | Exception]]:
    """Check inputs one after the other; give the number, the input and its outcome, or the error that it brought."""
    mutator = Mutator(seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(unpacking, "LIMITS", LIMITS)
        for number in numbers:
            made = mutator.make(number)
            monkeypatch.setattr(decode, "ALONE", 0 if number % 50 == 0 else 2**20)  # some with a thread
            try:
                yield number, made, check(folder, made, monkeypatch)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                yield number, made, error
