"""Faults of models on their way out, by their number: swaps under requests, and what runs when a model leaves.

What a loader or ``unload=`` does wrong is ``faults/test_load_faults``.
"""

import threading
from collections import Counter
from pathlib import Path

import pytest

from modelcache import NoRoom
from tests.support.children import run
from tests.support.fakes import DictSource
from tests.support.racing import Call, Counting, Model, small_cache
from tests.support.waiting import eventually


def test_f088_request_in_flight_ends_on_its_model(tmp_path: Path) -> None:
    """F088: a swap waits for the requests in flight, which end on their model; newcomers wait, or get a typed error."""
    done, ending = Counting(), threading.Event()
    source = DictSource().add("a", "b")
    with small_cache(tmp_path, source, done.load, unload=done.unload, memory={"max_models": 1}) as cache:

        def request() -> int:
            with cache.lease("a") as model:
                assert ending.wait(10)
                return int(model.unloads)

        requests = [Call(request) for _ in range(3)]
        eventually(lambda: cache.stats().leases == 3)
        newcomers = [Call(cache.get, "b") for _ in range(3)]
        eventually(lambda: cache.stats().waiters == 3)
        with pytest.raises(NoRoom, match="leases hold 'a'"):
            cache.get("b", timeout=0.1)
        assert done.loaded == ["a"]
        assert not done.unloaded
        ending.set()
        assert [request.result() for request in requests] == [0, 0, 0]
        first = newcomers[0].result()
        assert isinstance(first, Model)
        assert all(newcomer.result() is first for newcomer in newcomers)
        assert [model.name for model in done.unloaded] == ["a"]


def test_f093_unload_runs_once_on_every_way_out(tmp_path: Path) -> None:
    """F093: each load has its one ``unload=``: evicted, replaced, unloaded, deleted, closed, and at exit."""
    said = run(
        """
        number, source = iter(range(100)), DictSource().add("a", "b", "c")
        def load(path, name):
            model = Model(f"{name}{next(number)}")
            print("load", model.name, flush=True)
            return model
        def cache_in(folder):
            return small_cache(Path(sys.argv[1], folder), source, load, memory={"max_models": 2},
                               unload=lambda model: print("unload", model.name, flush=True))
        cache, other = cache_in("one"), cache_in("two")
        for name in ("a", "b", "c"):
            with cache.lease(name): pass
        with cache.lease("c"):
            source.add("c", size=20)
            assert cache.refresh("c")
        assert cache.unload("b") and cache.unload("b")
        with cache.lease("b"):
            assert cache.delete("b") is False
        with cache.lease("a"): pass
        assert cache.close() and cache.close()
        with other.lease("a"): pass
        """,
        tmp_path,
    )
    words = [line.split() for line in said.splitlines()]
    loads = Counter(name for what, name in words if what == "load")
    unloads = Counter(name for what, name in words if what == "unload")
    assert loads == unloads
    assert len(loads) == 7
    assert set(loads.values()) == {1}
