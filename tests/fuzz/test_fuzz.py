"""Some hundred of the inputs that ``make fuzz`` tries, and those that once broke a rule, shrunk."""

import struct
import tarfile
from pathlib import Path

import pytest

from modelcache.archives import unpacking
from tests.fuzz.__main__ import fuzz
from tests.support.archives import header, link, member, tar, zip_of
from tests.support.fuzzing import LIMITS, Outcome, check, check_all, quick_folder
from tests.support.mutating import Input

_LONG = b"././@LongLink"


def _long(text: bytes, size: int, kind: bytes = b"L") -> bytes:
    """Return a GNU long-name header that says it has ``size`` bytes."""
    return header(_LONG, b"%011o" % size, kind) + text.ljust(512, b"\0")


def _record(text: bytes, kind: bytes = b"x") -> bytes:
    """Return a PAX header of one record."""
    return header(b"pax", b"%011o" % len(text), kind) + text.ljust(512, b"\0")


_END = bytes(1024)
FOUND = {
    "long name cut short by its size": _long(b"n" * 40 + b"/m", 7) + header(b"m") + _END,
    "empty long name": header(_LONG, kind=b"L") + header(b"m") + _END,
    "two long names": _long(b"a", 1) + _long(b"b", 1) + header(b"m") + _END,
    "long name and PAX path": _long(b"a", 1) + _record(b"9 path=b\n") + header(b"m") + _END,
    "one size for all members": _record(b"9 size=5\n", b"g") + header(b"m") + header(b"n") + _END,
    "NUL inside a long name": _long(b"a\0b", 4) + header(b"m") + _END,
    "NUL inside a PAX header": _record(b"9 path=b\n\0\n9 path=c\n") + header(b"m") + _END,
}
"""What two readers of a tar would read differently: each must be refused."""


def test_slice() -> None:
    """Damaged archives stay inside, end in one of two errors, or give all that the standard library reads in them."""
    fared = {True: 0, False: 0}
    with quick_folder() as folder:
        for number, made, outcome in check_all(folder / "bench", 0, range(500)):
            assert isinstance(outcome, Outcome), f"{number}, {made.kind}: {outcome!r}"
            fared[outcome.error is None] += 1
    assert min(fared.values()) > 50  # else the mutator has grown too wild, or too tame


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_all() -> None:
    """A hundred thousand of them; ``python -m tests.fuzz`` takes a seed and a count."""
    assert fuzz(seed=1, numbers=range(100_000)) == 0


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar that two readers would read differently is refused."""
    monkeypatch.setattr(unpacking, "LIMITS", LIMITS)
    outcome = check(tmp_path / "bench", Input("tar", FOUND[name]), monkeypatch)
    assert outcome.error is not None
    assert outcome.error[0] == "ArtifactCorrupt"


def test_found_in_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A zip whose directory puts two entries behind the end of the file is refused."""
    monkeypatch.setattr(unpacking, "LIMITS", LIMITS)
    data = bytearray(zip_of({"a": b"1", "b": b"2", "c": b"3"}))
    at = data.index(b"PK\x01\x02")
    for offset in (2**31, 2**31 + 1000):
        at = data.index(b"PK\x01\x02", at + 4)
        struct.pack_into("<L", data, at + 42, offset)
    outcome = check(tmp_path / "bench", Input("zip", bytes(data)), monkeypatch)
    assert outcome.error is not None


def test_sees_a_broken_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check notices a decoder that raises something else, and content that is missing."""
    monkeypatch.setattr(unpacking, "LIMITS", LIMITS)
    honest = Input("tar", tar([member("a", b"1"), link("b", "a", tarfile.LNKTYPE)]))
    check(tmp_path / "bench", honest, monkeypatch)
    monkeypatch.setattr("tests.support.fuzzing.reference", lambda _: {"a": b"2"})
    with pytest.raises(AssertionError, match="a"):
        check(tmp_path / "bench", honest, monkeypatch)

    def broken(*_: object) -> None:
        raise KeyError("untyped")

    monkeypatch.setattr(unpacking, "unpack_tar", broken)
    with pytest.raises(KeyError):
        check(tmp_path / "bench", honest, monkeypatch)
