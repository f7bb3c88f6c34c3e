import gc, threading, time, json
from typing import Any
import pytest
from modelcache import *
from modelcache.gauges import Reading
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Gate, Spawn, eventually
MIB = 2**20
class Thing: pass
def row(cache, model): return next(i for i in cache.models() if i.model == model)
class Growing:
    def __init__(self, limit=2**40): self.used = 0; self.limit=limit
    def read(self): return Reading(self.used, self.limit)

def test_two_at_once_are_doubtful(make_cache, spawn):
    gauge = Growing(); gate = Gate("a")
    def load(path, model):
        if model == "a":
            gate(model)
        gauge.used += 20*MIB
        return Thing()
    cache = make_cache(DictSource().add("a","b"), Book(load=load), memory={"gauge": gauge, "high": 2**39})
    with gate:
        fa = spawn(cache.get, "a"); gate.wait()
        cache.get("b")
        r = row(cache, "b")
        assert r.in_use == "estimate" and r.doubtful == 20*MIB, r
    fa.result()
    r = row(cache, "a")
    assert r.in_use == "estimate" and r.doubtful == 40*MIB, r

def test_too_large_part_is_not_retried(make_cache):
    tries = []
    made = []
    def load(path, model):
        tries.append(model)
        if model == "whole": made[0].get("part")
        return Thing()
    cache = make_cache(DictSource().add("a","whole","part"), Book(load=load), size_of=lambda m,p: 5000 if m=="part" else 100, memory={"budget": 1000, "gauge": FakeGauge()})
    made.append(cache)
    cache.get("a")
    with pytest.raises(LoadFailed): cache.get("whole")
    assert tries == ["a", "whole"]
    assert cache.stats().evictions == 0

def test_deep_figures(make_cache):
    cache = make_cache(DictSource().add("a"), memory={"gauge": Growing()})
    cache.get("a"); cache.unload("a")
    (fig,) = cache.disk.path.glob("models/*/figures.json")
    cache.close()
    fig.write_text("["*100000)
    cache = make_cache(DictSource().add("a"), memory={"gauge": Growing()})
    cache.get("a")
    fig.write_text("x"*600)
    cache.unload("a"); 
    json.loads(fig.read_bytes()[:512])

def test_rescue_then_refresh_is_no_reload(make_cache, spawn):
    gate = Gate()
    book = Book(unload=lambda model: gate() if model.model == "a" else None)
    source = DictSource().add("a","b","c")
    cache = make_cache(source, book, size_of=lambda m,p: 100, memory={"gauge": FakeGauge()})
    for m in "abc": cache.get(m)
    with gate:
        low = spawn(setattr, cache.memory, "max_models", 1); gate.wait()
        lease = cache.lease("b"); lease.acquire()
    low.result()
    cache.memory.max_models = 5
    source.add("b", size=20)
    assert cache.refresh("b")
    lease.release()
    assert cache.stats().reloads == 0

def test_part_measured_low_counts_what_it_took(make_cache):
    gauge = Growing(); made=[]
    takes = {"whole": 50*MIB, "part": 40*MIB}
    def load(path, model):
        if model == "whole": made[0].get("part")
        gauge.used += takes[model]
        return Thing()
    def unload(v): pass
    cache = make_cache(DictSource().add("whole","part"), Book(load=load), memory={"gauge": gauge, "high": 2**39})
    made.append(cache)
    cache.get("part"); cache.unload("part"); gauge.used = 0
    takes["part"] = 20*MIB
    cache.get("whole")
    assert row(cache,"whole").measured == 50*MIB, row(cache,"whole")

def test_idle_counts_from_release(make_cache):
    cache = make_cache(DictSource().add("a"), memory={"gauge": FakeGauge(), "idle_after": 0.5, "interval": 0.02})
    with cache.lease("a"):
        t = time.monotonic(); eventually(lambda: time.monotonic() - t > 0.7)
    t = time.monotonic()
    eventually(lambda: cache.stats().models == 0)
    assert time.monotonic() - t > 0.3

def test_old_lease_of_old_version_only(make_cache):
    source = DictSource().add("a")
    cache = make_cache(source, memory={"gauge": FakeGauge(), "lease_warning": 0.3, "interval": 0.02})
    told = []; cache.on(Pressure, told.append)
    lease = cache.lease("a"); lease.acquire()
    eventually(lambda: told)
    source.add("a", size=20)
    assert cache.refresh("a")
    with cache.lease("a"):
        t=time.monotonic(); eventually(lambda: time.monotonic()-t > 0.15)
        assert len(told) == 1
    lease.release()

class Inner:
    def __init__(self):
        self.f = self.method
        self.alive = alive; alive.append(1)
    def method(self): pass
alive = []
class Wrapper:
    def __init__(self, inner): self.inner = inner

@pytest.mark.parametrize("kind", ["wrapper", "dict"])
def test_inner_cycles(make_cache, kind):
    import weakref
    refs = []
    def load(path, model):
        inner = Inner(); refs.append(weakref.ref(inner))
        return Wrapper(inner) if kind == "wrapper" else {"a": inner}
    def used(): return sum(r() is not None for r in refs)*100
    cache = make_cache(DictSource().add(*"abcdefgh"), Book(load=lambda *a: None), load=load, unload=None, size_of=lambda m,p: 100, memory={"gauge": FakeGauge(used, 1000), "high": 300, "interval": 0.05})
    gc.disable()
    try:
        for m in "abcdefgh": cache.get(m)
        assert used() <= 300
    finally: gc.enable()

def test_rescued_are_not_promised(make_cache, spawn):
    gate = Gate()
    book = Book(unload=lambda model: gate() if model.model == "a" else None)
    cache = make_cache(DictSource().add("a","b","c"), book, size_of=lambda m,p: 100, memory={"gauge": FakeGauge()})
    told=[]; cache.on(Reclaimed, told.append)
    for m in "abc": cache.get(m)
    with gate:
        low = spawn(setattr, cache.memory, "max_models", 1); gate.wait()
        lease = cache.lease("b"); lease.acquire()
    low.result()
    assert told[0].models == 1 and told[0].promised == 100, told
    lease.release()

def test_lingering_list_is_bounded(make_cache):
    cache = make_cache(DictSource().add("a"), load=lambda p: Thing(), unload=None, memory={"gauge": FakeGauge()})
    for _ in range(50):
        held = cache.get("a"); cache.unload("a"); del held
    assert len(cache._parts.residents.lingering._all) < 5

def test_mapped_part(make_cache):
    pass

def test_bare_beside_a_permanent_lease(make_cache, spawn):
    gauge = Growing(1000*MIB)
    class G: pass
    peaks = {}
    cache = make_cache(DictSource().add("held","new"), Book(load=lambda p,m: Thing()), size_of=lambda m,p: {"held":450,"new":300}[m]*MIB, memory={"gauge": gauge, "high": 800*MIB, "interval": 0.02}, timeout=1.0)
    lease = cache.lease("held"); lease.acquire(); gauge.used = 450*MIB
    with cache._parts.guard:
        cache._parts.residents.footprints._peaks.append(2.0)
    cache.get("new")
    lease.release()
