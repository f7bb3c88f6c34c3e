"""Memory that is only dead cycles or freed heap is no reason to refuse a load: real memory, in a process of its own."""

import textwrap
from pathlib import Path

import pytest

from tests.support.real import run_real

CYCLES = """
class Model:
    def __init__(self):
        self.weights = bytearray(b"1") * (4 * MIB)
        self.parts = [bytes(1000) for _ in range(1000)]
        self.predict = self.run  # a cycle, as many models have one

    def run(self):
        pass

pins = []

def load(path):
    model = Model()
    pins.append(bytes(100_000))  # what requests keep lies between what models free: only a trim gives that back
    return model
"""


def test_unloaded_cycles_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """F012: unloads and loads of a model in a cycle, faster than collections are allowed to be, all end well."""
    run_real(
        CYCLES
        + textwrap.dedent("""
        (name,) = models(1, 5 * MIB)
        with cache_of(load, rss() + 60 * MIB) as cache:
            for _ in range(100):
                cache.get(name)
                cache.unload(name)
        """),
        tmp_path,
    )


def test_who_waits_gets_what_others_collect(tmp_path: Path) -> None:
    """F012: who waits for room gets that of unloaded models in cycles, whoever collects them, and whenever."""
    run_real(
        CYCLES
        + textwrap.dedent("""
        names = models(2, 5 * MIB)
        ready, stop = threading.Event(), threading.Event()
        with cache_of(load, rss() + 60 * MIB) as cache:
            def hold():
                with cache.lease(names[0]):
                    ready.set()
                    stop.wait(10)
            holder = Call(hold)  # so that it waits, rather than to be refused at once
            ready.wait(5)
            gc.disable()
            for _ in range(300):  # until one that comes too soon after a collection must wait
                waiting = cache.prefetch([names[1]])
                if not waiting.wait(0.1):
                    break
                cache.unload(names[1])
            else:
                raise AssertionError("nobody had to wait")
            gc.collect()
            assert waiting.wait(8), cache.explain(names[1])
            assert not waiting.errors
            stop.set()
            holder.result()
        """),
        tmp_path,
    )


@pytest.mark.slow
def test_f012_cycle_after_the_last_model(tmp_path: Path) -> None:
    """F012: a model in a cycle goes within some seconds though no model is left and Python's collector is off."""
    run_real(
        """
        import gc, weakref
        seen = []
        def load(path):
            value = Weights(bytearray(MIB))
            value.itself = value
            seen.append(weakref.ref(value))
            return value
        names = models(2, MIB)
        gc.disable()
        with cache_of(load, rss() + 1000 * MIB) as cache:
            for name in names:
                cache.get(name)
                cache.unload(name)  # the second time it is too soon for another collection
            eventually(lambda: seen[1]() is None, timeout=30)
            assert not cache.stats().lingering
        """,
        tmp_path,
        timeout=60,
    )
