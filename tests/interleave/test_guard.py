"""Under the guard nothing is read or written, no other lock is taken, and no user's code runs: watched from outside.

What the locks are for is in docs/explanation/concurrency.md.
"""

from pathlib import Path

import pytest

from tests.support.children import run

WATCHED = """
guards, broken = [], set()

def held():
    return any(guard.busy for guard in guards)

def look(what):
    if held():
        frame = sys._getframe(1)
        while "modelcache/" not in frame.f_code.co_filename and frame.f_back:
            frame = frame.f_back
        broken.add(f"{what} in {frame.f_code.co_name}, {frame.f_code.co_filename}")

class Lock(type(threading.RLock())):
    def acquire(self, *args, **settings):
        if not self._is_owned():
            look("another lock")
        return super().acquire(*args, **settings)
    def __enter__(self):
        return self.acquire()

real = threading.RLock

def make():
    ours = sys._getframe(1).f_globals.get("__name__", "").startswith("modelcache")
    return Lock() if ours else real()

threading.RLock = threading.Lock = make
for name in [name for name in sys.modules if name.partition(".")[0] in {"modelcache", "tests"}]:
    del sys.modules[name]
from modelcache import *
from modelcache.guard import Guard
from tests.support.fakes import DictSource, FakeGauge

begin = Guard.__init__
def enrol(guard):
    begin(guard)
    guards.append(guard)
Guard.__init__ = enrol

def watched(name, call):
    def watch(*args, **settings):
        look(name)
        return call(*args, **settings)
    return watch

for name in ("stat", "lstat", "fstat", "statvfs", "read", "pread", "preadv", "write", "pwrite", "close", "fsync"):
    setattr(os, name, watched(name, getattr(os, name)))
quiet = ("os.register_at_fork", "os.putenv", "os.getxattr")
sys.addaudithook(lambda event, _: look(event) if event.startswith(IO) and event not in quiet else None)
IO = ("open", "os.", "import", "fcntl", "sqlite3", "socket", "shutil", "subprocess", "ctypes.dlopen", "time.sleep")
"""
"""Notes each call of the system, and each other lock of ours, under a guard that the calling thread holds."""

STORY = """
folder = Path(sys.argv[1])
source = DictSource().add(*[f"{who}{number}" for who in "abcx" for number in range(12)])
source.add_file("broken", "broken.tar.gz", b"no archive")
use = {}

class Gauge(FakeGauge):
    limit_source = property(lambda gauge: look("limit_source") or "the test")

gauge = Gauge(lambda: look("gauge") or sum(list(use.values())))

class Model:
    def __init__(self, model):
        self.model = model

def load(path, model):
    look("load")
    use[model] = 100
    return Model(model)

def unload(model):
    look("unload")
    use.pop(model.model, None)

def size_of(model, path):
    look("size_of")
    return 100

def make():
    disk = DiskTier(folder, budget="200 KiB", min_free="1 KiB")
    memory = MemoryTier(gauge=gauge, high=550, idle_after=1.0, interval=0.05)
    cache = ModelCache(source, load, unload=unload, size_of=size_of, disk=disk, memory=memory, retry_after=0.0)
    cache.on(Event, lambda event: look("callback"))
    return cache

def ask(cache, *models):
    for model in models:
        try:
            with cache.lease(model, timeout=5.0):
                cache.models(), cache.stats(), cache.explain(model), cache.history(model)
        except ModelCacheError:
            pass

with make() as one, make() as two:
    threads = [
        threading.Thread(target=ask, args=(cache, *(f"{who}{number}" for number in range(12) for who in "abcx"[at:])))
        for cache in (one, two)
        for at in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ask(one, "broken", "nobody")
    handle = one.prefetch([f"c{number}" for number in range(12)], tier="disk")
    assert handle.wait(5.0)
    one.prefetch(["a0", "a1"]).cancel()
    lease = one.lease("a2")
    lease.acquire()
    source.add("a2", size=20)
    one.refresh("a2")
    one.delete("a2")
    lease.release()
    one.get("a3")
    one.unload("a3")
    one.memory.high = 150
    one.memory.max_models = 1
    one.memory.budget = 100
    one.disk.budget = "60 KiB"
    one.disk.min_free = "2 KiB"
    ask(one, "x1", "x2")
    eventually(lambda: one.stats().models == 0)  # idle for long enough
    assert not handle.errors
print(sorted(broken))
"""

SLIPS = {
    "a call of the system": "os.stat(folder)",
    "another lock": "cache._parts.disk.store.owner",
    "a user's code": "gauge.read()",
    "an import": "import colorsys",
}
"""What is done under the guard on purpose."""


def test_guard_is_for_decisions_only(tmp_path: Path) -> None:
    """Two caches on one folder, in all that they do: fetch, load, evict, refresh, delete, look, retune and close."""
    assert run(WATCHED + STORY, tmp_path, timeout=60.0, watchdog=55).strip() == "[]"


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS.keys())
def test_a_slip_would_be_seen(tmp_path: Path, slip: str) -> None:
    """What watches sees what it is there for."""
    story = STORY.partition("with make()")[0]
    under = f"\nwith make() as cache:\n    with cache._parts.guard:\n        {slip}\nprint(len(broken))"
    assert int(run(f"{WATCHED}{story}{under}", tmp_path)) > 0
