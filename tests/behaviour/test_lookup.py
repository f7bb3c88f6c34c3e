"""A lookup from end to end: what ``get`` and ``lease`` give, wait for, and remember."""

import contextvars
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from modelcache import (
    CacheClosed,
    Failed,
    Fetched,
    InvalidModelId,
    LoadFailed,
    ModelCache,
    ModelNotFound,
    NoRoom,
    SourceUnavailable,
    Timeout,
)
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache, Model
from tests.support.waiting import WAIT, Gate, Spawn, eventually, is_unlocked


def test_get_fetches_and_loads_once(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """The first get fetches and loads; the second returns the same object and asks nobody."""
    cache = make_cache(source, book)
    model = cache.get("a")
    assert model.model == "a"
    assert cache.get("a") is model
    assert (source.finds, source.opens, book.loads) == (["a"], ["a"], ["a"])


def test_lease_gives_the_model(make_cache: MakeCache, book: Book) -> None:
    """A lease gives the model on entering, and the same one to the next lease."""
    cache = make_cache(book=book)
    with cache.lease("a") as first, cache.lease("a") as second:
        assert first is second
        assert first.model == "a"
    assert book.loads == ["a"]


def test_an_id_may_have_slashes(make_cache: MakeCache) -> None:
    """An id is a relative name with slashes between its parts."""
    cache = make_cache(DictSource().add("fraud/eu/v3"))
    assert cache.get("fraud/eu/v3").model == "fraud/eu/v3"


def test_ids_that_differ_in_form_are_different_models(make_cache: MakeCache) -> None:
    """Ids that differ only in case, Unicode form or punctuation are different models with different files."""
    ids = ["caf\u00e9", "cafe\u0301", "CAF\u00c9", "a/b", "a_b", "A/b"]
    cache = make_cache(DictSource().add(*ids))
    paths = {cache.get(model).path for model in ids}
    assert len(paths) == len(ids)
    assert [row.model for row in cache.models()] == sorted(ids)


def test_load_gets_the_unpacked_folder(make_cache: MakeCache) -> None:
    """``load(path)`` gets a pathlib.Path of the unpacked folder."""
    seen: list[Path] = []

    def load(path: Path) -> str:
        seen.append(path)
        return (path / "model.txt").read_text().rstrip("\0")

    cache = make_cache(load=load, unload=None)
    assert cache.get("a") == "a"
    assert isinstance(seen[0], Path)
    assert seen[0].is_dir()


def test_load_gets_the_id_where_it_requires_it(make_cache: MakeCache) -> None:
    """A loader that requires a second positional argument gets the id there."""

    def load(path: Path, model: str) -> tuple[str, bool]:
        return model, path.is_dir()

    assert make_cache(load=load, unload=None).get("a") == ("a", True)


def test_load_with_an_optional_second_argument_gets_only_the_path(make_cache: MakeCache) -> None:
    """A second argument that has a default is left at it."""

    def load(path: Path, mode: str = "default", *, device: str = "cpu") -> str:
        return f"{mode} {device}"

    assert make_cache(load=load, unload=None).get("a") == "default cpu"


def test_load_may_be_a_method_or_a_class(make_cache: MakeCache, tmp_path: Path) -> None:
    """Bound methods and classes are loaders as well as functions."""

    class Loader:
        def __init__(self, path: Path) -> None:
            self.path = path

        def load(self, path: Path, model: str) -> str:
            return model

    assert make_cache(load=Loader(tmp_path).load, unload=None, folder=tmp_path / "1").get("a") == "a"
    assert make_cache(load=Loader, unload=None, folder=tmp_path / "2").get("a").path.is_dir()


def test_single_file_is_given_as_a_file(make_cache: MakeCache) -> None:
    """The path of a single-file artifact is the file itself, under its own name."""
    source = DictSource().add_file("m", "m.joblib", b"weights")
    book = Book(lambda path, _: (path.name, path.read_bytes()))
    cache = make_cache(source, book)
    assert cache.get("m") == ("m.joblib", b"weights")


def test_single_file_is_a_file_after_a_restart(make_cache: MakeCache) -> None:
    """A single-file artifact found again on disk is still given as the file."""
    source = DictSource().add_file("m", "m.joblib", b"weights")
    make_cache(source, Book(lambda path, _: path.read_bytes())).prefetch(["m"], tier="disk").wait(WAIT)
    cache = make_cache(source, Book(lambda path, _: path.read_bytes()))
    assert cache.get("m") == b"weights"
    assert source.opens == ["m"]


def test_falsy_models_are_models(make_cache: MakeCache) -> None:
    """Only None is no model; 0, empty lists and False are kept like any other."""
    values: dict[str, Any] = {"a": 0, "b": [], "c": False, "d": ""}
    book = Book(lambda _, model: values[model])
    cache = make_cache(book=book)
    assert [cache.get(model) for model in "abcdabcd"] == [0, [], False, ""] * 2
    assert book.loads == ["a", "b", "c", "d"]


# Waiting


def test_many_lookups_share_one_load(make_cache: MakeCache, source: DictSource, book: Book, spawn: Spawn) -> None:
    """Lookups of a model on its way wait for the one fetch and load under way."""
    with Gate() as gate:
        source.gate = gate
        cache = make_cache(source, book)
        futures = [spawn(cache.get, "a") for _ in range(8)]
        gate.wait()
        eventually(lambda: cache.stats().waiters == 8)
    models = {future.result(WAIT) for future in futures}
    assert len(models) == 1
    assert (source.finds, book.loads) == (["a"], ["a"])


def test_timeout_bounds_the_wait_only(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """A lookup that gives up raises Timeout with its figures; the fetch goes on and serves the next one."""
    with Gate() as gate:
        source.gate = gate
        cache = make_cache(source, book)
        with pytest.raises(Timeout, match=r"'a'.*0\.01") as caught:
            cache.get("a", timeout=0.01)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert (error.model, error.timeout, error.state) == ("a", 0.01, "fetching")
    assert cache.get("a").model == "a"
    assert source.opens == ["a"]


def test_timeout_of_nothing_starts_the_load(make_cache: MakeCache, book: Book) -> None:
    """``timeout=0`` never waits, but sets the load going."""
    cache = make_cache(book=book)
    with Gate() as gate:
        book.gate = gate
        with pytest.raises(Timeout):
            cache.get("a", timeout=0)
        gate.wait()
    eventually(lambda: [row.tier for row in cache.models()] == ["memory"])
    assert cache.get("a", timeout=0).model == "a"


def test_timeout_of_the_cache_holds_where_none_is_given(make_cache: MakeCache, book: Book) -> None:
    """The cache's own timeout bounds lookups that give none, and a lookup's own goes before it."""
    cache = make_cache(book=book, timeout=0.01)
    with Gate() as gate:
        book.gate = gate
        with pytest.raises(Timeout) as caught:
            cache.lease("a").acquire()
        assert caught.value.timeout == 0.01
        with pytest.raises(Timeout) as caught:
            cache.get("a", timeout=0.02)
        assert caught.value.timeout == 0.02


def test_timeout_none_waits_for_ever(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """``timeout=None`` waits however long it takes, whatever the cache's own timeout."""
    cache = make_cache(book=book, timeout=0.01)
    with Gate() as gate:
        book.gate = gate
        future = spawn(cache.get, "a", timeout=None)
        gate.wait()
        with pytest.raises(Timeout):
            cache.get("a")
        assert not future.done()
    assert future.result(WAIT).model == "a"


def test_very_long_timeout_is_a_timeout(make_cache: MakeCache) -> None:
    """A timeout of more seconds than the system's clocks hold waits like any other."""
    cache = make_cache(timeout=1e12)
    assert cache.get("a").model == "a"
    assert cache.get("b", timeout=1e300).model == "b"
    assert cache.prefetch(["c"]).wait(1e12)
    assert cache.close(timeout=1e12)


def test_one_that_gives_up_does_not_stop_the_others(
    make_cache: MakeCache, source: DictSource, book: Book, spawn: Spawn
) -> None:
    """Each waiter has its own timeout."""
    with Gate() as gate:
        source.gate = gate
        cache = make_cache(source, book)
        future = spawn(cache.get, "a", timeout=WAIT)
        gate.wait()
        with pytest.raises(Timeout):
            cache.get("a", timeout=0.01)
    assert future.result(WAIT).model == "a"
    assert book.loads == ["a"]


def test_no_more_loads_at_once_than_loaders(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """``loaders`` bounds the loads under way at once."""
    running: list[str] = []
    most = []
    lock = threading.Lock()

    def load(path: Path, model: str) -> str:
        with lock:
            running.append(model)
            most.append(len(running))
        gate(model)
        with lock:
            running.remove(model)
        return model

    with Gate() as gate:
        cache = make_cache(book=Book(load), loaders=2)
        futures = [spawn(cache.get, model) for model in "abcdef"]
        eventually(lambda: len(running) == 2)
        eventually(lambda: cache.stats().waiters == 6)
    assert sorted(future.result(WAIT) for future in futures) == list("abcdef")
    assert max(most) == 2


def test_loads_run_on_threads_of_the_cache(make_cache: MakeCache) -> None:
    """Fetches and loads run on the cache's own threads, started when there is work."""
    names: list[str] = []
    cache = make_cache(book=Book(lambda _, model: names.append(threading.current_thread().name) or model))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("modelcache-")]
    cache.get("a")
    assert names[0].startswith("modelcache-")


def test_loader_sees_the_first_callers_context(make_cache: MakeCache) -> None:
    """A loader runs in a copy of the first caller's contextvars; what it sets stays in the copy."""
    tenant = contextvars.ContextVar("tenant", default="nobody")
    seen: list[str] = []

    def load(path: Path) -> str:
        seen.append(tenant.get())
        tenant.set("the loader")
        return "model"

    cache = make_cache(load=load, unload=None)
    token = tenant.set("acme")
    cache.get("a")
    assert tenant.get() == "acme"
    tenant.reset(token)
    cache.get("b")
    assert seen == ["acme", "nobody"]


def test_no_lock_is_held_while_user_code_runs(make_cache: MakeCache, source: DictSource) -> None:
    """Loader, size_of, unload and source are called with no lock held."""
    free: dict[str, bool] = {}
    source.gate = lambda: free.update(source=is_unlocked(cache))
    cache = make_cache(
        source,
        load=lambda path: bool(free.update(load=is_unlocked(cache))) or Model("a", 1, path),
        unload=lambda model: free.update(unload=is_unlocked(cache)),
        size_of=lambda model, path: free.update(size_of=is_unlocked(cache)) or 1,
    )
    cache.get("a")
    cache.unload("a")
    assert free == {"source": True, "load": True, "size_of": True, "unload": True}


# Failures


def test_missing_model(make_cache: MakeCache, source: DictSource) -> None:
    """A model that the source lacks is ModelNotFound, with its id and where it was looked for."""
    cache = make_cache(source)
    with pytest.raises(ModelNotFound, match="'nope'") as caught:
        cache.get("nope")
    assert isinstance(caught.value, LookupError)
    assert (caught.value.model, caught.value.source, caught.value.tried) == ("nope", "dict://tests", ("nope",))
    assert cache.models() == []


def test_failure_is_remembered(make_cache: MakeCache, source: DictSource) -> None:
    """A failure answers for ``retry_after`` seconds: a fresh error each time, and nobody is asked."""
    cache = make_cache(source, retry_after=60)
    errors = []
    for _ in range(3):
        with pytest.raises(ModelNotFound) as caught:
            cache.get("nope")
        errors.append(caught.value)
    assert source.finds == ["nope"]
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1
    assert {error.tried for error in errors} == {("nope",)}


def test_failure_is_forgotten_after_a_while(make_cache: MakeCache, source: DictSource) -> None:
    """After ``retry_after`` seconds a lookup tries again."""
    cache = make_cache(source, retry_after=0.05)
    with pytest.raises(ModelNotFound):
        cache.get("late")
    source.add("late")

    def found() -> Any:
        try:
            return cache.get("late")
        except ModelNotFound:
            return None

    assert eventually(found).model == "late"


def test_retry_after_nothing_remembers_nothing(make_cache: MakeCache, source: DictSource) -> None:
    """``retry_after=0`` asks again each time."""
    cache = make_cache(source, retry_after=0)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            cache.get("nope")
    assert source.finds == ["nope", "nope"]


def test_delete_forgives_a_failure(make_cache: MakeCache, source: DictSource) -> None:
    """After ``delete()`` a failed model is tried again at once."""
    cache = make_cache(source, retry_after=60)
    with pytest.raises(ModelNotFound):
        cache.get("late")
    source.add("late")
    assert cache.delete("late")
    assert cache.get("late").model == "late"


def test_each_waiter_gets_a_fresh_error(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """A failure reaches every waiter as an error object of its own, of the same type and data."""

    def load(path: Path, model: str) -> None:
        raise ValueError("broken weights")

    with Gate() as gate:
        book = Book(load)
        book.gate = gate
        cache = make_cache(book=book)
        futures = [spawn(cache.get, "a") for _ in range(4)]
        eventually(lambda: cache.stats().waiters == 4)
    errors = [future.exception(WAIT) for future in futures]
    assert len({id(error) for error in errors}) == 4
    for error in errors:
        assert isinstance(error, LoadFailed)
        assert error.model == "a"
        assert "broken weights" in str(error)
        assert isinstance(error.__cause__, ValueError)
    assert cache.stats().failures == 1


def test_failure_keeps_no_half_loaded_model(make_cache: MakeCache) -> None:
    """A remembered failure keeps nothing alive that its loader had begun to load."""
    traces: list[weakref.ref[Any]] = []

    def load(path: Path) -> object:
        half = Model("half", 1, path)
        traces.append(weakref.ref(half))
        raise ValueError("broken")

    cache = make_cache(load=load, unload=None, retry_after=60)
    with pytest.raises(LoadFailed):
        cache.get("a")
    gc.collect()
    assert traces[0]() is None


def test_no_room_is_not_remembered(make_cache: MakeCache, book: Book) -> None:
    """NoRoom is a matter of the moment: the next lookup tries anew."""
    cache = make_cache(book=book, memory={"max_models": 1}, retry_after=60)
    with cache.lease("a"), pytest.raises(NoRoom):
        cache.get("b")
    assert cache.get("b").model == "b"


def test_source_that_is_down(make_cache: MakeCache, source: DictSource) -> None:
    """An error of the source reaches the caller as it is, and counts as a failure."""
    source.down = SourceUnavailable("no answer", source=source.url, code="SlowDown")
    cache = make_cache(source, retry_after=0)
    with pytest.raises(SourceUnavailable, match="no answer") as caught:
        cache.get("a")
    assert caught.value.code == "SlowDown"
    assert isinstance(caught.value, ConnectionError)
    source.down = None
    assert cache.get("a").model == "a"


def test_failed_fetch_leaves_nothing(make_cache: MakeCache, source: DictSource) -> None:
    """A fetch that breaks off leaves no file and no reservation, and the next one starts over."""

    def broken() -> None:
        raise SourceUnavailable("broke off")

    source.gate = broken
    cache = make_cache(source, retry_after=0)
    with pytest.raises(SourceUnavailable):
        cache.get("a")
    assert cache.stats().disk_used == 0
    assert [path for path in (cache.disk.path / "tmp").rglob("*") if path.is_file()] == []
    source.gate = None
    assert cache.get("a").model == "a"


def test_failure_event(make_cache: MakeCache) -> None:
    """A failure is told once, with the error's class and text, however many wait."""
    cache = make_cache()
    heard: list[Failed] = []
    cache.on(Failed, heard.append)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            cache.get("nope")
    assert [(event.model, event.error) for event in heard] == [("nope", "ModelNotFound")]


def test_errors_show_no_workings(make_cache: MakeCache) -> None:
    """A traceback of ours begins with what went wrong, not with a KeyError of the cache's own table."""
    cache = make_cache(memory={"max_models": 1})
    calls: dict[type[Exception], Any] = {
        ModelNotFound: lambda: cache.get("nope"),
        InvalidModelId: lambda: cache.get("../x"),
        Timeout: lambda: cache.get("b", timeout=0),
        NoRoom: lambda: cache.get("c"),
        CacheClosed: lambda: cache.get("d"),
    }
    lease = cache.lease("a")
    lease.acquire()
    noisy: dict[str, Any] = {}
    for expected, call in calls.items():
        if expected is CacheClosed:
            lease.release()
            cache.close()
        with pytest.raises(expected) as caught:
            call()
        if caught.value.__context__ is not None and not caught.value.__suppress_context__:
            noisy[expected.__name__] = caught.value.__context__
    assert noisy == {}


# Warm lookups


def test_warm_lookup_takes_no_lock(make_cache: MakeCache, spawn: Spawn) -> None:
    """While the cache's lock is held for however long, a model in memory is served and leased."""
    cache = make_cache()
    cache.get("a")

    def look() -> Any:
        with cache.lease("a") as model:
            return cache.get("a") is model

    with cache._parts.guard:
        assert spawn(look).result(3) is True
        assert not is_unlocked(cache)


def test_warm_lookup_asks_nobody(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """A warm lookup reads no gauge and touches no file."""
    reads: list[int] = []

    def read() -> int:
        reads.append(1)
        return book.bytes

    def times() -> list[tuple[str, int]]:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in cache.disk.path.rglob("*"))

    cache = make_cache(source, book, memory={"gauge": FakeGauge(read), "interval": 1000.0})
    cache.get("a")
    before, seen = times(), len(reads)
    for _ in range(100):
        cache.get("a")
        with cache.lease("a"):
            pass
    assert times() == before
    assert len(reads) == seen


# Loaders that ask for parts


def ensemble(parts: dict[str, list[str]], cache: list[ModelCache[Any]]) -> Book:
    """Return a loader whose models are made of other models of the same cache."""

    def load(path: Path, model: str) -> Any:
        return (model, *(cache[0].get(part) for part in parts.get(model, ())))

    return Book(load)


def test_loader_may_ask_for_parts(make_cache: MakeCache) -> None:
    """A load that a loader asks for runs on the same thread and takes no second slot."""
    cache: list[ModelCache[Any]] = []
    threads: dict[str, int] = {}
    book = ensemble({"a": ["b", "c"], "b": ["d"]}, cache)
    book.gate = lambda model: threads.update({model: threading.get_ident()})
    cache.append(make_cache(book=book, loaders=1))
    assert cache[0].get("a") == ("a", ("b", ("d",)), ("c",))
    assert book.loads == ["d", "b", "c", "a"]
    assert len(set(threads.values())) == 1


def test_part_that_another_thread_loads_is_waited_for(make_cache: MakeCache, spawn: Spawn) -> None:
    """A part that is on its way already is waited for, not loaded twice."""
    cache: list[ModelCache[Any]] = []
    book = ensemble({"a": ["b"]}, cache)
    with Gate("b") as gate:
        book.gate = gate
        cache.append(make_cache(book=book))
        part = spawn(cache[0].get, "b")
        gate.wait()
        whole = spawn(cache[0].get, "a")
        eventually(lambda: cache[0].stats().waiters == 3)
    assert whole.result(WAIT) == ("a", part.result(WAIT))
    assert sorted(book.loads) == ["a", "b"]


def test_failed_part_fails_the_whole(make_cache: MakeCache) -> None:
    """Where a part can't be had, the whole is LoadFailed, with the part's error as its cause."""
    cache: list[ModelCache[Any]] = []
    cache.append(make_cache(book=ensemble({"a": ["nope"]}, cache)))
    with pytest.raises(LoadFailed, match="'nope'") as caught:
        cache[0].get("a")
    assert caught.value.model == "a"
    assert isinstance(caught.value.__cause__, ModelNotFound)


@pytest.mark.parametrize("parts", [{"a": ["a"]}, {"a": ["b"], "b": ["a"]}, {"a": ["b"], "b": ["c"], "c": ["a"]}])
def test_circle_on_one_thread(make_cache: MakeCache, parts: dict[str, list[str]]) -> None:
    """Loaders that ask for each other in a circle fail at once, and the error says the way around."""
    cache: list[ModelCache[Any]] = []
    cache.append(make_cache(book=ensemble(parts, cache), timeout=WAIT))
    with pytest.raises(LoadFailed, match="circle") as caught:
        cache[0].get("a")
    for model in parts:
        assert repr(model) in str(caught.value)
    assert cache[0].stats().models == 0


def test_circle_on_two_threads(make_cache: MakeCache, spawn: Spawn) -> None:
    """A circle over two threads, each of which waits for the other's load, is found."""
    cache: list[ModelCache[Any]] = []
    book = ensemble({"a": ["b"], "b": ["a"]}, cache)
    both = threading.Barrier(2, timeout=WAIT)
    book.gate = lambda model: both.wait()
    cache.append(make_cache(book=book, timeout=WAIT))
    futures = [spawn(cache[0].get, model) for model in "ab"]
    for future in futures:
        assert isinstance(future.exception(WAIT), LoadFailed)
    assert any("circle" in str(future.exception()) for future in futures)


def test_circle_on_three_threads(make_cache: MakeCache, spawn: Spawn) -> None:
    """A circle over three threads is found as well."""
    cache: list[ModelCache[Any]] = []
    book = ensemble({"a": ["b"], "b": ["c"], "c": ["a"]}, cache)
    all_three = threading.Barrier(3, timeout=WAIT)
    book.gate = lambda model: all_three.wait()
    cache.append(make_cache(book=book, timeout=WAIT))
    futures = [spawn(cache[0].get, model) for model in "abc"]
    errors = [future.exception(WAIT) for future in futures]
    assert all(isinstance(error, LoadFailed) for error in errors)


def test_diamond_is_no_circle(make_cache: MakeCache) -> None:
    """Two parts that share a part load it once and are no circle."""
    cache: list[ModelCache[Any]] = []
    book = ensemble({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, cache)
    cache.append(make_cache(book=book))
    cache[0].get("a")
    assert sorted(book.loads) == ["a", "b", "c", "d"]


def test_loader_may_use_another_cache(make_cache: MakeCache, tmp_path: Path) -> None:
    """A loader may look up in another cache, also the same id, and no circle is seen."""
    inner = make_cache(folder=tmp_path / "inner")
    outer = make_cache(book=Book(lambda _, model: ("outer", inner.get(model).model)), folder=tmp_path / "outer")
    assert outer.get("a") == ("outer", "a")


# Where it came from


def test_fetched_once_loaded_twice(make_cache: MakeCache, source: DictSource, book: Book) -> None:
    """A model that was unloaded is loaded from disk again, and the source is not asked."""
    cache = make_cache(source, book)
    cache.get("a")
    assert cache.unload("a")
    cache.get("a")
    assert (source.finds, book.loads) == (["a"], ["a", "a"])
    assert [event.model for event in cache.history() if isinstance(event, Fetched)] == ["a"]


def test_lookup_waits_for_an_unload_under_way(make_cache: MakeCache, spawn: Spawn) -> None:
    """A lookup while ``unload=`` runs waits for its end, then loads anew: never two of a model at once."""
    with Gate() as gate:
        book = Book(unload=gate)
        cache = make_cache(book=book)
        first = cache.get("a")
        dropped = spawn(cache.unload, "a")
        gate.wait()
        future = spawn(cache.get, "a")
        eventually(lambda: cache.stats().waiters == 1)
        assert [row.state for row in cache.models()] == ["unloading"]
        assert book.loads == ["a"]
    assert dropped.result(WAIT) is True
    assert future.result(WAIT) is not first
    assert book.loads == ["a", "a"]


def test_get_warns_once_beside_unload(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """The first get() beside ``unload=`` logs one warning that points to lease()."""
    cache = make_cache()
    with cache.lease("a"):
        pass
    assert "lease" not in caplog.text
    for model in "aab":
        cache.get(model)
    assert caplog.text.count("use lease()") == 1


def test_get_without_unload_does_not_warn(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    """Without ``unload=`` a get() is fine, and nothing is logged."""
    cache = make_cache(unload=None, load=lambda path: path.name)
    cache.get("a")
    cache.get("a")
    assert caplog.text == ""


def test_lookup_from_a_finalizer_of_a_model(make_cache: MakeCache) -> None:
    """A model whose ``__del__`` looks at the cache is dropped outside its locks."""
    seen: list[bool] = []

    class Talkative:
        def __del__(self) -> None:
            seen.append(is_unlocked(cache))

    cache = make_cache(load=lambda path: Talkative(), unload=None)
    cache.get("a")
    assert cache.unload("a")
    assert seen == [True]
