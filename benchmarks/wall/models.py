"""Five kinds of real models: how one of a given size is made, loaded, and used a little.

Where they are kept, and how much memory each really takes, is ``store``.
"""

import copy
import functools
import itertools
import json
import pickle
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import joblib
import numpy as np
from sklearn.ensemble import RandomForestRegressor

COLUMNS = 8
_SMALL, _LARGE = 10_000, 30_000  # rows that a tree learns from: about 1.3 and 4 MB a tree
_NODE = 64 + 8  # bytes of a node of a regression tree, and its value
_ENTRY = 1_330  # bytes that an entry of ``objects`` takes in memory


@attrs.frozen
class Kind:
    """A kind of model.

    Attributes:
        make: writes one of about so many bytes in memory into a folder, from a seed.
        load: returns it from its folder.
        use: does what a small request does, and returns a number.
    """

    make: Callable[[Path, int, int], None]
    load: Callable[[Path], Any]
    use: Callable[[Any, random.Random], float]


def _make_array(folder: Path, size: int, seed: int) -> None:
    np.save(folder / "weights.npy", np.random.default_rng(seed).random(size // 4, dtype=np.float32))


def _load_array(folder: Path) -> Any:
    return np.load(folder / "weights.npy")


def _use_array(model: Any, chance: random.Random) -> float:
    start = chance.randrange(len(model) - 65_536)
    return float(model[start : start + 65_536].sum())


def _load_mapped(folder: Path) -> Any:
    return np.load(folder / "weights.npy", mmap_mode="r")


def _use_mapped(model: Any, chance: random.Random) -> float:
    part = len(model) // 16  # touched, and so resident; in time all of it
    start = chance.randrange(len(model) - part)
    return float(model[start : start + part].sum())


def _make_coded(folder: Path, size: int, seed: int) -> None:
    levels = np.linspace(-1, 1, 16, dtype=np.float32)
    codes = np.random.default_rng(seed).integers(0, 16, size // 4, dtype=np.uint8)
    plain = levels[codes].tobytes()
    (folder / "weights.z").write_bytes(len(plain).to_bytes(8) + zlib.compress(plain, 1))


def _load_coded(folder: Path) -> Any:
    """Read, decode, copy: for a moment twice what stays."""
    with (folder / "weights.z").open("rb") as file:
        size = int.from_bytes(file.read(8))
        plain = zlib.decompress(file.read(), bufsize=size)
    return np.frombuffer(plain, dtype=np.float32).copy()


@functools.cache
def _trees(rows: int) -> list[Any]:
    """Train a few real trees on noisy data, so that they grow deep."""
    generator = np.random.default_rng(rows)
    inputs = generator.normal(size=(rows, COLUMNS)).astype(np.float32)
    target = inputs[:, 0] * inputs[:, 1] + generator.normal(scale=2.0, size=rows)
    forest = RandomForestRegressor(6, max_features=2, random_state=rows).fit(inputs, target)
    return [forest, *forest.estimators_]


def _make_forest(folder: Path, size: int, seed: int) -> None:
    """Grow a forest to the size from copies of trained trees whose answers differ a little."""
    generator = np.random.default_rng(seed)
    model, *trees = _trees(_SMALL if size < 30_000_000 else _LARGE)
    forest = copy.copy(model)
    forest.estimators_ = []
    left = size
    for tree in itertools.cycle(trees):
        left -= tree.tree_.node_count * _NODE
        if left < 0 and forest.estimators_:
            break
        grown = copy.deepcopy(tree)
        grown.tree_.value[:] += generator.normal(scale=0.1, size=grown.tree_.value.shape)
        forest.estimators_.append(grown)
    forest.n_estimators = len(forest.estimators_)
    joblib.dump(forest, folder / "model.joblib")


def _load_forest(folder: Path) -> Any:
    return joblib.load(folder / "model.joblib")


def _use_forest(model: Any, chance: random.Random) -> float:
    return float(model.predict([[chance.gauss() for _ in range(COLUMNS)]])[0])


def _make_objects(folder: Path, size: int, seed: int) -> None:
    """Write a dict of dicts with texts and lists of numbers: what a rule engine or a vocabulary looks like."""
    chance = random.Random(seed)  # noqa: S311 - load, not secrets
    entries = {}
    for number in range(size // _ENTRY):
        text = f"{chance.getrandbits(64):016x} " * chance.randint(4, 24)
        codes = [chance.getrandbits(30) for _ in range(16)]
        entries[f"item-{number}"] = {"text": text, "codes": codes, "weight": chance.random()}
    (folder / "model.pickle").write_bytes(pickle.dumps(entries, protocol=pickle.HIGHEST_PROTOCOL))


def _load_objects(folder: Path) -> Any:
    return pickle.loads((folder / "model.pickle").read_bytes())  # noqa: S301 - our own bytes


def _use_objects(model: Any, chance: random.Random) -> float:
    found = [model[f"item-{chance.randrange(len(model))}"] for _ in range(20)]
    return float(sum(entry["weight"] + entry["codes"][3] for entry in found))


KINDS = {
    "array": Kind(_make_array, _load_array, _use_array),
    "mapped": Kind(_make_array, _load_mapped, _use_mapped),
    "coded": Kind(_make_coded, _load_coded, _use_array),
    "forest": Kind(_make_forest, _load_forest, _use_forest),
    "objects": Kind(_make_objects, _load_objects, _use_objects),
}


def make(folder: Path, kind: str, size: int, seed: int) -> None:
    """Write one model of about ``size`` bytes in memory."""
    KINDS[kind].make(folder, size, seed)
    (folder / "kind.json").write_text(json.dumps(kind))


def load(folder: Path, model: str) -> Any:
    """Load a model from its folder; its id begins with its kind."""
    return KINDS[model.partition("-")[0]].load(folder)


def use(model: str, value: Any, chance: random.Random) -> float:
    """Do what a small request does with a model."""
    return KINDS[model.partition("-")[0]].use(value, chance)
