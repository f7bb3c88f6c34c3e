"""What a strict type checker must accept, with the types that it must find."""

from pathlib import Path
from typing import assert_type

from modelcache import Event, Evicted, Lease, ModelCache


class Model:
    """A model of a user's."""

    def close(self) -> None:
        """Close it."""


def load(path: Path) -> Model:
    """Load from a path alone."""
    return Model()


def load_by_name(path: Path, model: str) -> Model:
    """Load from a path and an id."""
    return Model()


plain = ModelCache("s3://models/prod", load, unload=Model.close)
assert_type(plain.get("a"), Model)
named = ModelCache("s3://models/prod", load=load_by_name, size_of=lambda model, path: len(model))
assert_type(named, ModelCache[Model])
numbers = ModelCache(Path("models"), load=lambda path: int(path.read_text()))
assert_type(numbers.get("a"), int)
assert_type(named.lease("a"), Lease[Model])
with named.lease("a", timeout=None) as model:
    assert_type(model, Model)


@plain.on(Evicted)
def told(event: Evicted) -> None:
    """Take an event of the type that was asked for."""
    assert event.reason is not None


plain.on(Event, lambda event: event.seq, background=True)
plain.off(told)
plain.memory.high = "80%"
plain.memory.low = None
plain.disk.budget = 20 * 2**30
