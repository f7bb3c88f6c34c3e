"""Faults of loads, unloads and leases, by their number."""

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from modelcache import LoadFailed, NoRoom, Timeout
from tests.support.children import run
from tests.support.fakes import DictSource, FakeGauge
from tests.support.racing import Call, Counting, Gate, Model, load_model, small_cache, together
from tests.support.waiting import eventually


@pytest.mark.parametrize("collector", [True, False], ids=["gc", "no gc"])
def test_f012_cycle_is_freed_by_eviction(tmp_path: Path, collector: bool) -> None:
    """F012: an evicted model that refers to itself is gone before the next load, or soon where one follows another."""
    traces: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Circular(Model):
        """A model with a bound method of its own."""

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.call = self.predict

        def predict(self) -> None:
            """Do nothing."""

    def load(path: Path) -> Any:
        alive.append(sum(trace() is not None for trace in traces))
        model = Circular(load_model(path).name)
        traces.append(weakref.ref(model))
        return model

    if not collector:
        gc.disable()
    try:
        with small_cache(tmp_path, DictSource().add("a", "b", "c"), load, memory={"max_models": 1}) as cache:
            for name in "abc":
                cache.get(name)
            assert alive[:2] == [0, 0]  # collections of ours take a tenth of the time: the third load may be too soon
            eventually(lambda: sum(trace() is not None for trace in traces) == 1, timeout=15.0)
    finally:
        gc.enable()


def test_f017_too_large_for_a_real_cgroup(tmp_path: Path) -> None:
    """F017: in a memory cgroup of 256 MiB a model of 300 MB is refused before its load, and the others stay."""
    root = Path("/sys/fs/cgroup/memory")
    if not (root / "memory.limit_in_bytes").exists():
        pytest.skip("no cgroup v1 memory controller")
    group = root / f"modelcache-{tmp_path.parent.name}-f017"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"cgroup v1 is not writable: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(256 * 2**20))
        run(
            """
            group = Path(sys.argv[2])
            (group / "cgroup.procs").write_text(str(os.getpid()))
            sizes = {"small": 20 * 10**6, "other": 20 * 10**6, "big": 300 * 10**6}
            loaded = []
            def load(path, name):
                loaded.append(name)
                return bytearray(os.urandom(1)) * sizes[name]
            cache = ModelCache(DictSource().add(*sizes), load, size_of=lambda name, path: sizes[name],
                               disk=DiskTier(sys.argv[1], min_free=0), memory=MemoryTier(interval=0.05))
            assert cache.stats().memory_limit == 256 * 2**20, cache.stats()
            cache.get("small"), cache.get("other")
            try:
                cache.get("big")
            except TooLarge as error:
                assert error.model == "big" and error.need == sizes["big"] and error.limit < 256 * 2**20, error
                assert "big" in str(error)
            else:
                raise AssertionError("loaded")
            assert loaded == ["small", "other"]
            assert [model.model for model in cache.models() if model.tier == "memory"] == ["other", "small"]
            assert cache.close()
            """,
            tmp_path,
            group,
        )
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_f019_half_models_are_given_back(tmp_path: Path) -> None:
    """F019: a loader that allocates 100 MB and raises, 20 times, leaves no memory taken, and the model loadable."""
    run(
        """
        import psutil
        half = []
        class Half:
            def __init__(self): self.bytes = bytearray(100_000_000)
        def load(path):
            model = Half()
            half.append(__import__("weakref").ref(model))
            if len(half) <= 40:  # each load is tried twice
                raise MemoryError("half way")
            return Model("a")
        cache = small_cache(Path(sys.argv[1]), DictSource().add("a"), load, retry_after=0)
        before = psutil.Process().memory_info().rss
        errors = []
        for _ in range(20):
            try:
                cache.get("a")
            except LoadFailed as error:
                errors.append(error)
        assert len(errors) == 20
        assert not any(trace() for trace in half), "a half model lives"
        assert psutil.Process().memory_info().rss - before < 50_000_000
        assert cache.stats().memory_reserved == 0
        assert [model.state for model in cache.models()] == ["on disk"]
        assert cache.get("a").name == "a"
        assert cache.close()
        """,
        tmp_path,
    )


def _helper(keep: Any) -> None:
    half = Model("half")
    keep(half)
    raise ValueError("deep down")


def _plain(keep: Any) -> None:
    _helper(keep)


def _from_another(keep: Any) -> None:
    try:
        _helper(keep)
    except ValueError:
        raise RuntimeError("outside") from OSError("unrelated")


def _from_nothing(keep: Any) -> None:
    try:
        _helper(keep)
    except ValueError:
        raise RuntimeError("outside") from None


def _while_handling(keep: Any) -> None:
    try:
        _helper(keep)
    except ValueError:
        int("not a number")


def _group(keep: Any) -> None:
    try:
        _helper(keep)
    except ValueError as error:
        raise ExceptionGroup("several", [OSError("one"), error]) from None


def _stuck_generator(keep: Any) -> None:
    def generate() -> Any:
        half = Model("half")
        keep(half)
        yield 1
        raise ValueError("in a generator")

    list(generate())


@pytest.mark.parametrize("fail", [_plain, _from_another, _from_nothing, _while_handling, _group, _stuck_generator])
def test_f019_no_error_keeps_a_half_model(tmp_path: Path, fail: Any) -> None:
    """F019: however errors are chained, the half-loaded model dies, though the error is remembered and held."""
    traces: list[weakref.ref[Any]] = []

    def load(path: Path) -> Any:
        fail(lambda half: traces.append(weakref.ref(half)))

    with small_cache(tmp_path, DictSource().add("a"), load, retry_after=60) as cache:
        errors = together(*[lambda: cache.get("a")] * 3)
        assert all(type(error) is LoadFailed for error in errors)
        gc.collect()
        assert [trace() for trace in traces] == [None]


def test_f087_loading_models_count_and_are_no_victims(tmp_path: Path) -> None:
    """F087: two cold models at once where one fits: both lookups get theirs, and never were two in memory."""
    done = Counting()
    most = []

    def load(path: Path, name: str) -> Any:
        model = done.load(path, name)
        most.append(len(done.loaded) - len(done.unloaded))
        return model

    with small_cache(tmp_path, DictSource().add("a", "b"), load, unload=done.unload, memory={"max_models": 1}) as cache:
        for _ in range(20):
            models = together(lambda: cache.get("a").name, lambda: cache.get("b").name)
            assert models == ["a", "b"]
    assert max(most) == 1


def test_f089_lease_that_never_ends(tmp_path: Path) -> None:
    """F089: a lease that never ends is named, with its age, to those whose time ends; others are served on."""
    stop = threading.Event()
    done = Counting()
    with small_cache(
        tmp_path, DictSource().add("kept", "hot", "cold"), done.load, memory={"max_models": 2, "interval": 0.05}
    ) as cache:

        def keep() -> None:
            with cache.lease("kept"), cache.lease("hot"):
                stop.wait(15)

        keeper = Call(keep)
        eventually(lambda: cache.stats().leases == 2)
        cold = Call(cache.get, "cold", timeout=0.5)
        for _ in range(100):
            assert cache.get("hot").name == "hot"
        refusal = cold.error()
        assert isinstance(refusal, NoRoom)
        assert {name for name, _, _ in refusal.holders} == {"kept", "hot"}
        assert "'kept' (1 leases, " in str(refusal)
        assert max(age for _, _, age in refusal.holders) > 0
        stop.set()
        keeper.result()
        assert cache.get("cold").name == "cold"


def test_f089_lease_lost_by_an_exception(tmp_path: Path) -> None:
    """F089: a lease whose holder dies of an exception is released, and a lost one too, with a warning."""
    with small_cache(tmp_path, DictSource().add("a", "b"), memory={"max_models": 1, "interval": 0.02}) as cache:

        def die() -> None:
            with cache.lease("a"):
                raise RuntimeError

        assert isinstance(Call(die).error(), RuntimeError)
        assert cache.get("b").name == "b"
        with pytest.warns(ResourceWarning):
            cache.lease("b").acquire()
        assert Call(cache.get, "a", timeout=5).result().name == "a"


def test_f090_loader_that_hangs(tmp_path: Path) -> None:
    """F090, F111: a hanging load times its waiters out and is seen in models() and stats(); its late end is used."""
    gate = Gate()
    done = Counting(a=gate)
    gauge = FakeGauge(limit=1000)
    with small_cache(
        tmp_path, DictSource().add("a", "b"), done.load, size_of=lambda *_: 100, memory={"gauge": gauge, "high": 250}
    ) as cache:
        calls = [Call(cache.get, "a", timeout=0.2) for _ in range(3)]
        gate.wait()
        eventually(lambda: cache.stats().waiters == 3)
        for call in calls:
            error = call.error()
            assert isinstance(error, Timeout)
            assert error.state == "loading"
        assert [(model.model, model.state) for model in cache.models()] == [("a", "loading")]
        assert cache.stats().memory_reserved == 100
        assert cache.get("b").name == "b"
        gate.open()
        assert cache.get("a").name == "a"
        assert cache.stats().memory_reserved == 0
    assert done.loaded == ["a", "b"]


def test_f091_unloads_need_no_slot_of_loads(tmp_path: Path) -> None:
    """F091: ten loads through one slot, each of which needs a slow unload= first, all end."""
    done = Counting()
    turns = threading.Semaphore(0)

    def unload(model: Model) -> None:
        turns.acquire(timeout=10)
        done.unload(model)

    names = [f"m{number}" for number in range(10)]
    with small_cache(
        tmp_path, DictSource().add(*names), done.load, unload=unload, memory={"max_models": 1}, loaders=1
    ) as cache:
        calls = [Call(cache.get, name) for name in names]
        for _ in range(30):
            turns.release()
        assert [call.result().name for call in calls] == names
    assert len(done.unloaded) == 10


def test_f091_slow_unload_on_another_thread(tmp_path: Path) -> None:
    """F091: while an unload= hangs, others are loaded while there is room; who wants its model waits."""
    gate = Gate()
    done = Counting()

    def unload(model: Model) -> None:
        if model.name == "slow":
            gate()
        done.unload(model)

    memory = {"max_models": 3, "interval": 0.05}
    with small_cache(
        tmp_path, DictSource().add("slow", "a", "b"), done.load, unload=unload, memory=memory, loaders=1
    ) as cache:
        cache.get("slow")
        leaving = Call(cache.unload, "slow")
        gate.wait()
        assert cache.get("a", timeout=5).name == "a"
        assert cache.get("b", timeout=5).name == "b"
        assert isinstance(Call(cache.get, "slow", timeout=0.2).error(), NoRoom | Timeout)
        gate.open()
        assert leaving.result() is True


@pytest.mark.parametrize(
    "error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, MemoryError]
)
def test_f092_whatever_the_leader_raises(tmp_path: Path, error: type[BaseException]) -> None:
    """F092: whatever a loader raises, all waiters get one typed error each; after the back-off it is tried again."""
    gate = Gate()
    fail = [True]

    def load(path: Path) -> Any:
        gate()
        if fail[0]:
            raise error("no")
        return load_model(path)

    with small_cache(tmp_path, DictSource().add("a"), load, retry_after=0.05) as cache:
        calls = [Call(cache.get, "a") for _ in range(10)]
        gate.wait()
        eventually(lambda: cache.stats().waiters == 10)
        gate.open()
        for call in calls:
            failure = call.error()
            assert type(failure) is LoadFailed
            assert error.__name__ in str(failure)
            assert failure.model == "a"
        fail[0] = False
        assert eventually(lambda: Call(cache.get, "a").error() is None)


def test_f097_twice_is_no_fault(tmp_path: Path) -> None:
    """F097: load twice is one load and a hit, unload twice is no error, and no innocent model leaves."""
    done = Counting()
    with small_cache(tmp_path, DictSource().add("a", "b"), done.load, unload=done.unload) as cache:
        bystander = cache.get("b")
        assert cache.get("a") is cache.get("a")
        assert cache.unload("a") is True
        assert cache.unload("a") is True
        assert cache.unload("never there") is True
        assert cache.get("a").name == "a"
        assert cache.get("b") is bystander
        assert cache.stats().evictions == 0
    assert done.loaded == ["b", "a", "a"]
