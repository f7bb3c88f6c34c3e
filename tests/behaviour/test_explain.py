"""``explain()``: for each state that a model can be in, the paragraph says the true figures, once, in plain words.

What decides about evictions is ``test_memory_tier`` and ``test_disk_tier``; here only what is said of it.
"""

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modelcache import Evicted, InvalidModelId, LoadFailed, LocalSource, ModelCache, SourceUnavailable, Timeout
from modelcache.units import format_bytes
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Gate, Spawn, eventually

MEMORY = r" Memory: 20 B in use, high 800 B, low 700 B, limit 1000 B\."
GAUGE = {"gauge": FakeGauge(20, 1000)}
ROOMY = {"gauge": FakeGauge(20, 10**9)}
SPAN = r"\d+(\.\d)? (ms|s)"


def says(cache: ModelCache[Any], model: str, *sentences: str) -> str:
    """Assert that a model's paragraph consists of these sentences (patterns), and return it."""
    text = cache.explain(model)
    assert re.fullmatch(" ".join(sentences) + MEMORY, text), text
    assert_plain(text)
    return text


def assert_plain(text: str) -> None:
    """Assert that a text is one paragraph of sentences of which none stands there twice or is empty."""
    sentences = re.split(r"(?<=\.) (?=[A-Z'\d])", text)
    assert len(sentences) == len(set(sentences)), text
    assert text.endswith(".")
    assert "\n" not in text
    assert not re.search(r"\.\.|  |None| \(\)| ,|: \.", text), text


def fail(model: str) -> None:
    """Be a loader's step that fails."""
    raise ValueError("broken")


# Where it is


def test_absent(make_cache: MakeCache) -> None:
    """A model in no tier is said to be in none; the source is not asked."""
    source = DictSource()
    cache = make_cache(source, memory=GAUGE)
    says(cache, "a", r"'a' is neither in memory nor on disk\.")
    assert source.finds == []


@pytest.mark.parametrize("model", ["a b/c", "ü", "'\"", "x" * 255, "日本", "a{b}%s", "v1.2"])
def test_odd_ids(make_cache: MakeCache, model: str) -> None:
    """An id that is allowed makes a paragraph, whatever is in it."""
    cache = make_cache(memory=GAUGE)
    says(cache, model, re.escape(f"{model!a} is neither in memory nor on disk."))


@pytest.mark.parametrize("model", ["", "../a", "a\0", None, 7])
def test_wrong_ids(make_cache: MakeCache, model: Any) -> None:
    """An id that could not name a model is refused as everywhere."""
    with pytest.raises(InvalidModelId):
        make_cache().explain(model)


def test_on_disk(make_cache: MakeCache) -> None:
    """A model that is only on disk is said to take there what is allocated for it."""
    cache = make_cache(memory=GAUGE)
    cache.prefetch(["a"], tier="disk").wait(10)
    says(cache, "a", rf"'a' is on disk \({format_bytes(cache.models()[0].bytes)}\), not in memory\.")


def test_in_memory(make_cache: MakeCache) -> None:
    """A model in memory: its bytes and where that figure is from, its load, its uses."""
    cache = make_cache(DictSource().add("a", size=600), memory=GAUGE)
    cache.get("a")
    takes = rf"It takes 600 B, guessed from its artifact( \(too little to be measured\))?; its load took {SPAN}"
    says(
        cache,
        "a",
        r"'a' is in memory and on disk \(20\.0 KiB\)\.",
        rf"{takes}, no lookup has found it there yet, and it was last used {SPAN} ago\.",
    )
    cache.get("a")
    assert "1 lookup found it" in cache.explain("a")
    cache.get("a")
    assert "2 lookups found it" in cache.explain("a")


def test_size_of(make_cache: MakeCache) -> None:
    """A footprint that the user gave is said to be his word."""
    cache = make_cache(size_of=lambda model, path: 345, memory=GAUGE)
    cache.get("a")
    assert "It takes 345 B, by the word of size_of;" in cache.explain("a")
    cache.unload("a")
    assert "In memory it would take 345 B, by the word of size_of." in cache.explain("a")


def test_measured(make_cache: MakeCache) -> None:
    """A footprint that was measured is said to be."""
    held: list[int] = [0]

    def load(path: Path, model: str) -> bytes:
        held[0] += 64 * 2**20
        return b"model"

    gauge = FakeGauge(lambda: held[0], 2**30)
    cache = make_cache(book=Book(load), memory={"gauge": gauge})
    cache.get("a")
    assert "It takes 64.0 MiB, as measured;" in cache.explain("a")


def test_in_place(make_cache: MakeCache, tmp_path: Path) -> None:
    """A model that is loaded where it lies is in memory only."""
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "model.txt").write_bytes(b"x")
    cache = make_cache(LocalSource(tmp_path / "source", copy=False), memory=GAUGE)
    cache.get("a")
    assert cache.explain("a").startswith("'a' is in memory. It takes 1 B, ")


def test_closed(make_cache: MakeCache) -> None:
    """A closed cache still explains, and says that it is closed."""
    cache = make_cache(memory=GAUGE)
    cache.get("a")
    cache.close()
    text = cache.explain("a")
    assert re.search(rf"It was unloaded as the cache was closed {SPAN} ago\.", text), text
    assert text.endswith("The cache is closed.")
    assert_plain(text)


# Who holds it


def test_leased(make_cache: MakeCache, spawn: Spawn) -> None:
    """Leases are counted, with the threads that took them and the age of each thread's oldest, oldest first."""
    cache = make_cache(memory=GAUGE)
    with cache.lease("a"):
        cache.explain("a")  # an age counts from the first look at a lease
        text = cache.explain("a")
        name = re.escape(threading.current_thread().name)
        assert re.search(rf"1 lease holds it, taken by thread '{name}' \({SPAN}\)\.", text), text
        other = cache.lease("a")
        spawn(other.acquire).result(10)
        with cache.lease("a"):
            text = cache.explain("a")
            assert re.search(rf"3 leases hold it, taken by threads '{name}' \({SPAN}\), 'test' \({SPAN}\)\.", text), (
                text
            )
        other.release()
        assert_plain(text)
    assert "hold" not in cache.explain("a")


def test_many_holders(make_cache: MakeCache) -> None:
    """Of many threads that hold leases five are named."""
    cache = make_cache(memory=GAUGE)
    cache.get("a")
    leases = [cache.lease("a") for _ in range(8)]
    threads = [threading.Thread(target=lease.acquire, name=f"holder-{n}") for n, lease in enumerate(leases)]
    for thread in threads:
        thread.start()
        thread.join()
    text = cache.explain("a")
    assert text.count("'holder-") == 5
    assert "8 leases hold it, taken by threads " in text
    assert " and 3 more." in text
    for lease in leases:
        lease.release()


@pytest.mark.parametrize("verb", ["unload", "delete"])
def test_leaves_with_its_last_lease(make_cache: MakeCache, verb: str) -> None:
    """A model that was dropped while it is leased is said to leave with its last lease, and why; then, that it has."""
    cache = make_cache(memory=GAUGE)
    with cache.lease("a"):
        getattr(cache, verb)("a")
        assert f"It leaves with its last lease, since {verb}() was called." in cache.explain("a")
    done = {"unload": "unloaded by unload()", "delete": "deleted by delete()"}[verb]
    text = cache.explain("a")
    assert re.search(rf"It was {re.escape(done)} {SPAN} ago\.", text), text
    assert text.startswith("'a' is on disk" if verb == "unload" else "'a' is neither in memory nor on disk.")
    assert_plain(text)


def test_being_unloaded(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model whose ``unload=`` runs is said to be on its way out."""
    with Gate() as gate:
        cache = make_cache(book=Book(unload=gate), memory=GAUGE)
        cache.get("a")
        unload = spawn(cache.unload, "a")
        gate.wait()
        assert "It is being unloaded now." in cache.explain("a")
    assert unload.result(10)


def test_replaced(make_cache: MakeCache) -> None:
    """While an old version is leased both versions are told of; later, that one was replaced."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source, memory=GAUGE)
    with cache.lease("a"):
        source.add("a", size=200)
        cache.refresh("a")
        text = cache.explain("a")
        assert "It takes 200 B" in text
        assert re.search(r"An older version is still in memory \(10 B\)\. 1 lease holds it, taken by thread '.*'", text)
        assert "That version leaves with its last lease." in text
        assert_plain(text)
    text = cache.explain("a")
    assert "older version" not in text
    assert re.search(rf"It was replaced by a new version {SPAN} ago\.", text), text
    assert_plain(text)


def test_new_version_that_does_not_load(make_cache: MakeCache) -> None:
    """Where a new version failed the old one is told of, and what is on disk, and the error."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book, memory=GAUGE)
    cache.get("a")
    source.add("a", size=200)
    book.gate = fail
    with pytest.raises(LoadFailed):
        cache.refresh("a")
    text = cache.explain("a")
    assert "What is on disk is another version, which has not been loaded." in text
    assert re.search(rf"The last try to bring in a new version failed {SPAN} ago: .*ValueError: broken", text), text
    assert_plain(text)


def test_source_that_was_down(make_cache: MakeCache) -> None:
    """A refresh that failed since the source was down is told, until something went well again."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source, memory=GAUGE)
    cache.get("a")
    source.down = SourceUnavailable("down", source="dict")
    with pytest.raises(SourceUnavailable):
        cache.refresh("a")
    assert re.search(rf"The last try to bring in a new version failed {SPAN} ago: down\.", cache.explain("a"))
    source.down = None
    source.add("a", size=20)
    assert cache.refresh("a")
    assert "failed" not in cache.explain("a")


# On its way


def test_fetching(make_cache: MakeCache, spawn: Spawn) -> None:
    """A model that is being fetched is said to be, with how many lookups wait."""
    source = DictSource().add("a")
    cache = make_cache(source, memory=GAUGE)
    with Gate() as gate:
        source.gate = gate
        lookups = [spawn(cache.get, "a") for _ in range(2)]
        gate.wait()
        eventually(lambda: cache.stats().waiters == 2)
        fetching = rf"It is being fetched \({SPAN} so far\), and 2 lookups wait for it\."
        says(cache, "a", r"'a' is neither in memory nor on disk\.", fetching)
    for lookup in lookups:
        lookup.result(10)


def test_loader_that_hangs(make_cache: MakeCache) -> None:
    """A load that hangs stays visible with its reservation after its callers have given up; what it brings is used."""
    book = Book()
    cache = make_cache(book=book, memory=GAUGE, size_of=lambda model, path: 345)
    with Gate("a") as gate:
        book.gate = gate
        cache.prefetch(["a"])
        gate.wait()
        with pytest.raises(Timeout, match="is loading"):
            cache.get("a", timeout=0.02)
        assert re.search(rf"It is being loaded \({SPAN} so far\), with 345 B reserved for it\.", cache.explain("a"))
        assert cache.stats().memory_reserved == 345
        assert cache.get("b").model == "b"
        assert_plain(cache.explain("a"))
    assert cache.get("a") is cache.get("a")
    assert book.loads == ["b", "a"]


def test_how_long_it_has_been_under_way(make_cache: MakeCache, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that is said is that of the fetch while it is fetched, and that of the load alone after it."""
    real, later = time.monotonic, [0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + later[0])
    source, book = DictSource().add("a"), Book()
    cache = make_cache(source, book, memory=GAUGE)
    with Gate() as loads:
        book.gate = loads
        with Gate() as fetches:
            source.gate = fetches
            lookup = spawn(cache.get, "a", timeout=10**6)
            fetches.wait()
            later[0] = 600
            assert re.search(r"It is being fetched \(10 min so far\)", cache.explain("a"))
        loads.wait()
        later[0] += 300
        assert re.search(r"It is being loaded \(5 min so far\)", cache.explain("a"))
    assert lookup.result(10).model == "a"


def test_refreshing(make_cache: MakeCache, spawn: Spawn) -> None:
    """Of a model that is refreshed, what is done is said of its new version."""
    source, book = DictSource().add("a", size=10), Book()
    cache = make_cache(source, book, memory=GAUGE)
    cache.get("a")
    source.add("a", size=20)
    with Gate() as gate:
        book.gate = gate
        refresh = spawn(cache.refresh, "a")
        gate.wait()
        text = cache.explain("a")
        assert re.search(rf"A new version is being loaded \({SPAN} so far\), with \d+ B reserved for it\.", text), text
        assert "It takes 10 B" in text
    assert refresh.result(10)


def test_waiting_for_room(make_cache: MakeCache, spawn: Spawn) -> None:
    """Of a model that waits for room, what is in its way is said: which model, and how many leases hold it."""
    cache = make_cache(memory={**GAUGE, "max_models": 1})
    with cache.lease("b"):
        lookup = spawn(cache.get, "a")
        eventually(lambda: "In its way" in cache.explain("a"))
        text = cache.explain("a")
        assert re.search(rf"It waits for room \({SPAN} so far\), and 1 lookup waits for it\.", text), text
        assert re.search(r"In its way: .*memory\.max_models allows 1 and 1 are used; leases hold 'b'", text), text
        assert_plain(text)
    assert lookup.result(10).model == "a"


def test_failing(make_cache: MakeCache) -> None:
    """Of a model whose load failed, the error and its age, and whether it is remembered."""
    book = Book()
    cache = make_cache(book=book, memory=GAUGE, retry_after=3600.0)
    other = make_cache(book=Book(fail_load), memory=GAUGE, retry_after=0, folder=cache.disk.path / "other")
    book.gate = fail
    for each in (cache, other):
        with pytest.raises(LoadFailed):
            each.get("a")
    text = cache.explain("a")
    assert re.search(
        rf"Its last fetch or load failed {SPAN} ago, and lookups get that error until it is tried again: .*ValueError",
        text,
    ), text
    assert text.count("ValueError") == 1
    assert "measured" not in text
    text = other.explain("a")
    assert re.search(rf"Its last fetch or load failed {SPAN} ago: .*ValueError: broken", text), text
    assert "until" not in text


def fail_load(path: Path, model: str) -> Any:
    """Be a loader that fails."""
    raise ValueError("broken")


# What pushed it out


def test_evicted_for_max_models(make_cache: MakeCache) -> None:
    """An eviction for ``max_models`` is told with the counts, the newcomer, and that nothing has asked since."""
    cache = make_cache(memory={**GAUGE, "max_models": 1})
    cache.get("a")
    cache.get("b")
    text = cache.explain("a")
    assert re.search(
        rf"It was evicted from memory {SPAN} ago to make room for 'b': with 1 in use and 1 needed, 2 would have passed "
        r"memory\.max_models = 1\.",
        text,
    ), text
    assert "It has not been loaded again since." in text
    cache.get("a")
    text = cache.explain("a")
    assert re.search(rf"It was loaded again once after evictions, which took {SPAN} in all\.", text), text
    assert "since." not in text
    assert_plain(text)


def test_evicted_for_the_budget(make_cache: MakeCache) -> None:
    """An eviction for ``memory.budget`` is told in bytes of footprints."""
    cache = make_cache(memory={**GAUGE, "budget": 100}, size_of=lambda model, path: 60)
    cache.get("a")
    cache.get("b")
    assert "with 60 B in use and 60 B needed, 120 B would have passed memory.budget = 100 B." in cache.explain("a")


def test_evicted_for_the_watermark(make_cache: MakeCache) -> None:
    """An eviction for the watermark is told with what the gauge read, what it promised and what came back."""
    book = Book()
    cache = make_cache(
        DictSource().add("a", "b", size=400), book, memory={"gauge": book.gauge(1000), "high": 700, "low": 700}
    )
    cache.get("a")
    cache.get("b")
    text = cache.explain("a")
    assert "with 400 B in use and 400 B needed, 800 B would have passed memory.high = 700 B." in text
    assert "That promised 400 B, and 400 B came back." in text
    assert text.endswith("Memory: 400 B in use, high 700 B, low 700 B, limit 1000 B.")
    assert_plain(text)


def test_evicted_for_growth_from_outside(make_cache: MakeCache) -> None:
    """An eviction for nobody, since something grew or a limit was lowered, is told without a newcomer."""
    book = Book()
    cache = make_cache(DictSource().add("a", size=400), book, memory={"gauge": book.gauge(1000), "high": 900})
    cache.get("a")
    cache.memory.low = None
    cache.memory.high = 300
    assert re.search(
        rf"It was evicted from memory {SPAN} ago: the 400 B in use were above memory\.high = 300 B\.",
        cache.explain("a"),
    ), cache.explain("a")


def test_evicted_as_idle(make_cache: MakeCache) -> None:
    """An eviction of a model that nobody used is told as that, and is no reload later."""
    cache = make_cache(memory={**GAUGE, "idle_after": 0.02, "interval": 0.01})
    cache.get("a")
    eventually(lambda: cache.stats().models == 0)
    text = cache.explain("a")
    assert re.search(
        rf"evicted from memory {SPAN} ago, since nobody had used it for memory\.idle_after seconds\.", text
    )
    assert "loaded again" not in text
    assert_plain(text)


def test_evicted_for_its_new_version(make_cache: MakeCache) -> None:
    """An old version that gave way to its own new one is told as that."""
    source = DictSource().add("a", size=10)
    cache = make_cache(source, memory={**GAUGE, "max_models": 1})
    cache.get("a")
    source.add("a", size=20)
    cache.refresh("a")
    assert "ago to make room for its new version: with 1 in use" in cache.explain("a")


def test_evicted_from_disk(make_cache: MakeCache) -> None:
    """A model that left disk, or both tiers at once, is told with the disk's figures, once."""
    source = DictSource().add("a", "b", "c", size=100_000)
    cache = make_cache(source, disk={"budget": 250_000}, memory=ROOMY)
    cache.get("a")
    cache.unload("a")
    cache.get("b")
    cache.get("c")
    (disk,) = [event for event in cache.history("a") if isinstance(event, Evicted)]
    figures = (
        rf"{SPAN} ago to make room for 'c': with {format_bytes(disk.used or 0)} in use and "
        rf"{format_bytes(disk.need or 0)} needed, .* would have passed disk\.budget = 244\.1 KiB\."
    )
    text = cache.explain("a")
    assert text.startswith("'a' is neither in memory nor on disk. In memory it would take 97.7 KiB")
    assert re.search(f"Its artifact was evicted from disk {figures}", text), text
    assert_plain(text)
    cache.get("a")
    text = cache.explain("b")
    assert re.search(rf"It was evicted from memory and from disk {SPAN} ago to make room for 'a'", text), text
    assert text.count("disk.budget") == 1
    assert "evicted" not in cache.explain("a")
    assert_plain(text)


def test_lingering(make_cache: MakeCache) -> None:
    """Loads that were unloaded and that somebody still references are counted, with the age of the oldest."""
    cache = make_cache(load=lambda path: threading.Event(), unload=None, memory=GAUGE)
    held = [cache.get("a")]
    cache.unload("a")
    assert re.search(rf"A load of it that was unloaded {SPAN} ago lingers: somebody", cache.explain("a"))
    held.append(cache.get("a"))
    cache.unload("a")
    assert re.search(rf"2 loads of it that were unloaded up to {SPAN} ago linger: somebody", cache.explain("a"))
    assert cache.models()[0].lingering == 2
    held.clear()
    assert "linger" not in cache.explain("a")


def test_no_reading(make_cache: MakeCache) -> None:
    """A gauge that can't read is told as that."""

    def broken() -> int:
        raise OSError("no /proc")

    cache = make_cache(memory={"gauge": FakeGauge(broken)})
    text = cache.explain("a")
    assert text.endswith("Memory in use can't be read now, so that no watermark holds.")
    assert_plain(text)


# Looking


def test_looking_is_no_use(make_cache: MakeCache) -> None:
    """``explain`` changes no order, no time of last use and no count."""
    cache = make_cache(memory={**GAUGE, "max_models": 2})
    cache.get("a")
    cache.get("b")
    rows, stats = cache.models(), cache.stats()
    for _ in range(3):
        cache.explain("a")
    assert cache.models() == rows
    assert (cache.stats().hits, cache.stats().misses) == (stats.hits, stats.misses)
    cache.get("c")
    assert [row.model for row in cache.models() if row.tier == "memory"] == ["b", "c"]
