"""Thirty real scikit-learn models of very different sizes, trained from fixed seeds and packed as ``model.tar.gz``.

They stand for what a company has: forests, boosted trees, nearest neighbours that carry their data, and linear
models over random features. All take rows of 12 numbers. Where they are served is not here: see ``servers``.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

COLUMNS = 12
COUNTRIES = ("de", "fr", "es", "it", "nl", "pl")
THREADS = 2  # growing trees and compressing release the interpreter
_MEMBER = "model.joblib"

Recipe = Callable[[int], Any]


def _data(seed: int, rows: int) -> tuple[Any, Any]:
    """Return rows that only partly tell their label, so that trees grow as deep as on real customers."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(rows, COLUMNS)).astype(np.float32)
    signal = inputs[:, :4].sum(axis=1) + random.normal(scale=3.0, size=rows)
    return inputs, (signal > 0).astype(int)


def _forest(rows: int, trees: int) -> Recipe:
    return lambda seed: RandomForestClassifier(trees, max_features=3, random_state=seed).fit(*_data(seed, rows))


def _extra_trees(rows: int, trees: int) -> Recipe:
    return lambda seed: ExtraTreesClassifier(trees, max_features=1, random_state=seed).fit(*_data(seed, rows))


def _boosting(trees: int) -> Recipe:
    return lambda seed: GradientBoostingClassifier(
        n_estimators=trees, max_depth=8, max_features=2, subsample=0.5, random_state=seed
    ).fit(*_data(seed, 1_500))


def _neighbours(rows: int) -> Recipe:
    return lambda seed: KNeighborsClassifier(15, algorithm="kd_tree").fit(*_data(seed, rows))


def _linear(features: int) -> Recipe:
    return lambda seed: make_pipeline(
        RBFSampler(gamma=0.05, n_components=features, random_state=seed), LogisticRegression(max_iter=50)
    ).fit(*_data(seed, 300))


def recipes() -> dict[str, Recipe]:
    """Return how to train each model, by id."""
    kinds: dict[str, Callable[[int], Recipe]] = {
        "fraud": lambda step: _forest(4_000 + 500 * step, 60 + 15 * step),
        "churn": lambda step: _extra_trees(5_000 + 500 * step, 30 + 8 * step),
        "credit": lambda step: _boosting(100 + 20 * step),
        "similar": lambda step: _neighbours(60_000 + 40_000 * step),
        "uplift": lambda step: _linear(30_000 + 15_000 * step),
    }
    return {f"{kind}/{country}": make(step) for kind, make in kinds.items() for step, country in enumerate(COUNTRIES)}


def train_all(folder: Path) -> Iterator[tuple[str, int]]:
    """Train and pack every model as ``<id>.tar.gz`` below ``folder``, unless it is there already.

    Yields:
        As each is done, its id and its bytes before compression, which are about what it takes in memory.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [
            pool.submit(_train, folder, model, recipe, seed) for seed, (model, recipe) in enumerate(recipes().items())
        ]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _train(folder: Path, model: str, recipe: Recipe, seed: int) -> tuple[str, int]:
    path = folder / f"{model}.tar.gz"
    if path.exists():
        with tarfile.open(path) as archive:
            return model, archive.getmember(_MEMBER).size
    buffer = io.BytesIO()
    joblib.dump(recipe(seed), buffer)
    member = tarfile.TarInfo(_MEMBER)
    member.size = buffer.tell()
    buffer.seek(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz", compresslevel=1) as archive:
        archive.addfile(member, buffer)
    unfinished.replace(path)
    return model, member.size
