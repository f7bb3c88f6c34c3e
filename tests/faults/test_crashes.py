"""Processes that are killed at the worst moment, several processes in one folder, and the end of the interpreter."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from modelcache import DiskTier, ModelCache
from tests.support.children import KILLED, finish, run, start
from tests.support.fakes import DictSource
from tests.support.racing import allocated, small_cache
from tests.support.warm import Warm

# A process that kills itself at the n-th read of the stream, charge of bytes, or system call that publishes or removes.
CRASH = """
import shutil, tempfile
folder, point, number, text = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
left = [number]
def step(*_, **__):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
def before(owner, name):
    real = getattr(owner, name)
    def stepping(*arguments, **settings):
        step()
        return real(*arguments, **settings)
    setattr(owner, name, stepping)
source = DictSource()
from tests.support.fakes import tar
source.artifacts["a"] = tar({f"part{n}/file": (text * 3000).encode() for n in range(4)})
if point == "read":
    source.gate = step
elif point == "grow":
    from modelcache.disk.publishing import Publisher
    before(Publisher, "grow")
elif point == "mkdir":
    before(os, "mkdir")
elif point == "rename":
    before(os, "rename")
elif point == "fsync":
    before(os, "fsync")
elif point == "unlink":
    before(os, "unlink")
    before(os, "rmdir")
def load(path):
    files = sorted(path.rglob("file"))
    assert len(files) == 4, files
    texts = {file.read_text() for file in files}
    assert len(texts) == 1, "a mixture"
    return texts.pop()
cache = small_cache(folder, source, load, retry_after=0)
content = cache.get("a")
assert content == text * 3000 or content == "old" * 3000
if point == "unlink":
    cache.delete("a")
assert cache.close()
print("whole")
"""


@pytest.mark.parametrize("point", ["read", "grow", "rename", "fsync", "mkdir"])
def test_f025_killed_at_every_step_of_a_fetch(tmp_path: Path, forks: Warm, point: str) -> None:
    """F025: killed at the n-th step of a fetch, for each n until it gets through, no start sees a partial model."""
    number = 0
    whole = False
    while not whole:
        number += 1
        code, out = forks.run(CRASH, tmp_path, point, number, "new" if number % 2 else "other")
        assert code in {0, KILLED}, out
        whole = code == 0
        disk = DiskTier(tmp_path / "disk", min_free=0)
        with ModelCache(DictSource(), lambda path: sorted(path.rglob("file")), disk=disk) as cache:
            assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1, "leftovers of the dead"
            for model in cache.models():
                files = cache.get(model.model)
                assert len(files) == 4
                assert len({file.read_text() for file in files}) == 1
                assert cache.delete(model.model) is True
        assert allocated(tmp_path / "disk") == 0
        if number > 12:
            break
    assert number > 1


@pytest.mark.parametrize("number", range(1, 10, 2))
def test_f034_killed_in_the_middle_of_a_removal(tmp_path: Path, forks: Warm, number: int) -> None:
    """F034: killed at the n-th file of a removal, the model is there whole or not at all, and the rest is swept."""
    code, out = forks.run(CRASH, tmp_path, "unlink", number, "new")
    assert code in {0, KILLED}, out
    assert code == KILLED or number > 5
    with small_cache(tmp_path, DictSource(), lambda path: sorted(path.rglob("file"))) as cache:
        assert all(len(cache.get(model.model)) == 4 for model in cache.models())
        for model in cache.models():
            assert cache.delete(model.model)
        assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1
    assert allocated(tmp_path / "disk") == 0


SHARED = """
import hashlib, random
folder, seconds, shared, wanted_first = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
seed, pids = 0, []
names = [f"m{number}" for number in range(8)]
source = DictSource()
import random as r
from tests.support.fakes import tar
for name in names:
    source.artifacts[name] = tar({"weights": r.Random(name).randbytes(40000)})
wanted = {name: hashlib.sha256(r.Random(name).randbytes(40000)).hexdigest() for name in names}
def load(path, name):
    return hashlib.sha256((path / "weights").read_bytes()).hexdigest(), path
with small_cache(folder / "first", source, load) as cache:
    cache.get(names[0])  # all imports
for child in range(8):
    seed += 1
    if not (pid := os.fork()): break
    pids.append(pid)
else:
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
cache = small_cache(folder, source, load, memory={"max_models": 2}, disk={"budget": 3 * 60000})
chance = random.Random(seed)
(shared / f"ready{seed}").touch()
eventually(lambda: len(list(shared.iterdir())) == 8, 15)
deadline, count = time.monotonic() + seconds, 0
while time.monotonic() < deadline:
    name = chance.choice(names[:1] if wanted_first == "one" and not count else names)
    with cache.lease(name, timeout=15) as (digest, path):
        assert digest == wanted[name], name
        assert hashlib.sha256((path / "weights").read_bytes()).hexdigest() == wanted[name], "removed under a lease"
    count += 1
    if wanted_first == "one":
        break
assert cache.close()
os.write(1, f"{count}\\n".encode())
os._exit(0)
"""


def counts_of(folder: Path, seconds: int, wanted: str) -> list[int]:
    """Run eight processes that use one folder; return how many models each has used."""
    shared = folder / "ready"
    shared.mkdir()
    return [int(count) for count in run(SHARED, folder, seconds, shared, wanted, watchdog=40, timeout=45).split()]


def test_f026_eight_processes_ask_for_one_model(tmp_path: Path) -> None:
    """F026: eight processes that ask for one model at one moment all read the whole of it."""
    assert counts_of(tmp_path, 1, "one") == [1] * 8


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(60)])], ids=["3 s", "10 s"]
)
def test_f033_eight_processes_evict_and_read(tmp_path: Path, seconds: int) -> None:
    """F026, F033: eight processes with disk room for three models read the right bytes, and evict without error."""
    counts = counts_of(tmp_path, seconds, "all")
    assert len(counts) == 8
    assert all(counts)
    with small_cache(tmp_path, DictSource()):
        assert len(list((tmp_path / "disk" / "tmp").iterdir())) == 1


def test_f056_interpreter_ends_during_a_prefetch(tmp_path: Path) -> None:
    """F056: a script that ends with a prefetch under way ends within seconds, and leaves nothing under tmp/."""
    script = """
    source = DictSource().add(*[f"m{number}" for number in range(20)], size=100_000)
    gate = Gate()
    def slowly():
        gate.reached.set()
        threading.Event().wait(0.05)
    source.gate = slowly
    cache = small_cache(Path(sys.argv[1]), source)
    handle = cache.prefetch([f"m{number}" for number in range(20)])
    gate.wait()
    print("end", flush=True)
    """
    started = time.monotonic()
    assert "end" in run(script, tmp_path)
    assert time.monotonic() - started < 10
    assert not list((tmp_path / "disk" / "tmp").iterdir())


def test_f056_interpreter_ends_while_the_source_is_silent(tmp_path: Path) -> None:
    """F056: a source that never answers delays the end by seconds only, and nothing is left under tmp/."""
    script = """
    source = DictSource().add("a")
    gate = Gate()
    def hang():
        gate.reached.set()
        threading.Event().wait()
    source.gate = hang
    cache = small_cache(Path(sys.argv[1]), source)
    cache.prefetch(["a"])
    gate.wait()
    """
    started = time.monotonic()
    run(script, tmp_path)
    assert time.monotonic() - started < 12
    assert not list((tmp_path / "disk" / "tmp").iterdir())


def test_f056_unload_runs_at_exit(tmp_path: Path) -> None:
    """F056: a cache that nobody closed unloads its models at exit, leased ones too are not in the way of the end."""
    script = """
    cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"),
                        unload=lambda model: print("bye", model.name, flush=True))
    cache.get("a")
    lease = cache.lease("b")
    lease.acquire()
    """
    started = time.monotonic()
    assert "bye a" in run(script, tmp_path)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("blocks_in", ["load", "read"])
def test_f056_ctrl_c_during_get(tmp_path: Path, blocks_in: str) -> None:
    """F056: Ctrl-C during a get whose load or fetch hangs ends the process within seconds, with no temp folder left."""
    script = """
    gate = Gate()
    def hang():
        print("there", flush=True)
        gate.reached.set()
        threading.Event().wait(60 if sys.argv[2] == "load" else 0.05)
    source, done = DictSource().add("a", size=3_000_000), Counting()
    from tests.support.fakes import tar
    source.artifacts["a"] = tar({"model.txt": os.urandom(20_000_000)})
    if sys.argv[2] == "load":
        done.gates["a"] = hang
    else:
        source.gate = hang
    cache = small_cache(Path(sys.argv[1]), source, done.load)
    cache.get("a")
    """
    child = start(script, tmp_path, blocks_in)
    assert child.stdout
    assert "there" in child.stdout.readline()
    started = time.monotonic()
    child.send_signal(signal.SIGINT)
    finish(child, code=-signal.SIGINT)
    assert time.monotonic() - started < 10
    assert not list((tmp_path / "disk" / "tmp").iterdir())


def test_f056_get_in_an_atexit_handler(tmp_path: Path) -> None:
    """F056: a lookup at exit, after the cache was closed, ends in CacheClosed."""
    script = """
    import atexit
    def late():
        try:
            cache.get("b", timeout=5)
        except CacheClosed:
            print("closed", flush=True)
    sys.modules.pop("modelcache_unused", None)
    cache = small_cache(Path(sys.argv[1]), DictSource().add("a", "b"))
    cache.get("a")
    cache.close()
    atexit.register(late)
    """
    assert "closed" in run(script, tmp_path)


@pytest.mark.parametrize("number", range(3))
def test_f047_clock_from_the_future(tmp_path: Path, number: int) -> None:
    """F047: folders and records with times in 2030 are neither immortal nor evicted first for ever: new use counts."""
    future = 1_900_000_000
    source = DictSource().add("a", "b", "c", size=20_000)
    with small_cache(tmp_path, source) as cache:
        cache.prefetch(["a", "b", "c"], tier="disk").wait(10)
    folders = sorted((tmp_path / "disk" / "models").iterdir())
    os.utime(folders[number] / "record.json", (future, future))
    record = folders[number] / "record.json"
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "fetched": float(future)}))
    os.utime(folders[number] / "record.json", (future, future))
    future_model = fields["model"]
    with small_cache(tmp_path, source, disk={"policy": "lru"}) as cache:  # "worth" weighs fetch seconds, too
        assert {model.model for model in cache.models()} == {"a", "b", "c"}
        assert all(model.last_used <= time.time() for model in cache.models())
        others = sorted({"a", "b", "c"} - {future_model})
        for name in others:
            assert cache.get(name).name == name
            cache.unload(name)
        total = sum(model.bytes for model in cache.models())
        cache.disk.budget = total - 4096
        assert {model.model for model in cache.models()} == set(others), "the one not used since 2030 goes first"
        assert cache.get(future_model).name == future_model
