"""What a user may get wrong: each is refused where it is given, in words that say which, what and what to do."""

import functools
import math
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelcache import (
    ArtifactCorrupt,
    ConfigError,
    DiskTier,
    Evicted,
    InvalidModelId,
    LoadFailed,
    MemoryTier,
    ModelCache,
    ModelCacheError,
    TooLarge,
)
from modelcache.gauges import Reading
from tests.support.fakes import Book, DictSource, FakeGauge, MakeCache
from tests.support.waiting import Spawn

BAD_IDS: dict[str, Any] = {
    "up": "../x",
    "absolute": "/etc/passwd",
    "up in the middle": "a/../../b",
    "up at the end": "a/..",
    "only up": "..",
    "here": "./a",
    "only here": ".",
    "empty": "",
    "slash": "/",
    "two slashes": "a//b",
    "slash at the end": "a/",
    "NUL": "a\0b",
    "newline": "a\nb",
    "delete": "a\x7f",
    "lone surrogate": "a\ud800",
    "undecodable byte": os.fsdecode(b"caf\xe9"),
    "4 KiB": "x" * 4096,
    "too long in UTF-8 only": "\u00e9" * 600,
    "None": None,
    "int": 7,
    "bytes": b"a",
    "Path": Path("a"),
    "list": ["a"],
    "dict": {},
    "tuple": ("a",),
    "NaN": math.nan,
}
bad_id = pytest.mark.parametrize("model", BAD_IDS.values(), ids=BAD_IDS.keys())

VERBS: dict[str, Callable[[ModelCache[Any], Any], Any]] = {
    "get": lambda cache, model: cache.get(model),
    "lease": lambda cache, model: cache.lease(model).acquire(),
    "with lease": lambda cache, model: cache.lease(model).__enter__(),
    "prefetch": lambda cache, model: cache.prefetch(["a", model]),
    "prefetch to disk": lambda cache, model: cache.prefetch([model], tier="disk"),
    "unload": lambda cache, model: cache.unload(model),
    "delete": lambda cache, model: cache.delete(model),
}


# Ids


@bad_id
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
def test_bad_id(make_cache: MakeCache, source: DictSource, verb: Callable[..., Any], model: Any) -> None:
    """Every verb refuses an id that could not name a model safely; the source never hears of it."""
    cache = make_cache(source)
    with pytest.raises(InvalidModelId) as caught:
        verb(cache, model)
    error = caught.value
    assert isinstance(error, ValueError)
    assert len(str(error)) < 600
    assert str(error).isprintable()
    assert str(error).isascii()
    assert "id" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert source.finds == []
    assert cache.models() == []


@bad_id
def test_lease_refuses_a_bad_id_at_the_call(make_cache: MakeCache, model: Any) -> None:
    """Each verb that takes an id validates it, so lease() raises at once, not at its ``with``."""
    cache = make_cache()
    with pytest.raises(InvalidModelId):
        cache.lease(model)


def test_history_refuses_a_bad_id(make_cache: MakeCache) -> None:
    """history(id) validates its id; None stands for all."""
    cache = make_cache()
    with pytest.raises(InvalidModelId):
        cache.history("../x")
    assert cache.history(None) == []


def test_bad_id_leaves_no_files(make_cache: MakeCache, tmp_path: Path) -> None:
    """Ids that try to lead out of the folder leave nothing anywhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    cache = make_cache(folder=tmp_path / "in" / "cache")
    for model in ("../../outside/x", f"{outside}/x", "a/../../../outside/x"):
        with pytest.raises(InvalidModelId):
            cache.get(model)
    assert list(outside.iterdir()) == []


def test_bad_ids_are_not_remembered(make_cache: MakeCache) -> None:
    """An invalid id is no failure of a model: nothing is remembered or counted."""
    cache = make_cache(retry_after=60)
    for number in range(100):
        with pytest.raises(InvalidModelId):
            cache.get(f"../{number}")
    assert cache.stats().failures == 0
    assert cache.history() == []


@pytest.mark.parametrize(
    "model",
    ["C:\\x", "a b", "a:b", "-rf", "~", "~root/x", "$HOME", "%2e%2e/x", "a\\..\\b", "\u202eevil", "...", "x" * 1024],
)
def test_odd_ids_stay_inside(make_cache: MakeCache, tmp_path: Path, model: str) -> None:
    """An id that is odd but lawful is a model like others, and its files are below the folder."""
    cache = make_cache(DictSource().add(model, size=2000))
    assert cache.get(model).path.resolve().is_relative_to(tmp_path / "disk" / "models")
    assert [row.model for row in cache.models()] == [model]


def test_ids_that_differ_in_case_are_distinct(make_cache: MakeCache, book: Book) -> None:
    """Ids that differ only in case are two models, also on disk and for delete()."""
    cache = make_cache(DictSource().add("Fraud", "fraud"), book)
    upper, lower = cache.get("Fraud"), cache.get("fraud")
    assert (upper.model, lower.model) == ("Fraud", "fraud")
    assert str(upper.path).lower() != str(lower.path).lower()
    cache.delete("Fraud")
    assert [row.model for row in cache.models()] == ["fraud"]
    assert lower.path.exists()


# Sizes

BAD_SIZES: dict[str, Any] = {
    "negative": -1,
    "negative with unit": "-1 GiB",
    "NaN": math.nan,
    "infinity": math.inf,
    "float": 1e9,
    "half": 0.8,
    "no unit": "80",
    "unknown unit": "12 parsecs",
    "only a unit": "GiB",
    "empty": "",
    "nan%": "nan%",
    "above 100 %": "101%",
    "0 %": "0%",
    "negative %": "-5%",
    "two numbers": "1 2 GiB",
    "comma": "1,5 GiB",
    "exponent": "1e3 MB",
    "True": True,
    "bytes": b"1 GiB",
    "list": [1],
    "Reading": Reading(1, 2),
    "endless": "9" * 5000 + " GiB",
    "endless with a point": "9" * 400 + ".5 GiB",
}
bad_size = pytest.mark.parametrize("value", BAD_SIZES.values(), ids=BAD_SIZES.keys())


@bad_size
@pytest.mark.parametrize("setting", ["high", "low", "budget"])
def test_bad_size_of_the_memory_tier(setting: str, value: Any) -> None:
    """A size that can't be one is refused by the constructor, naming the setting and what was given."""
    with pytest.raises(ConfigError, match=setting) as caught:
        MemoryTier(**{setting: value})
    assert isinstance(caught.value, ValueError)
    assert caught.value.setting == setting


@bad_size
@pytest.mark.parametrize("setting", ["budget", "min_free"])
def test_bad_size_of_the_disk_tier(tmp_path: Path, setting: str, value: Any) -> None:
    """A size that can't be one is refused by the constructor, and no folder is made."""
    with pytest.raises(ConfigError, match=setting):
        DiskTier(tmp_path / "disk", **{setting: value})
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("setting", ["high", "low", "budget"])
def test_memory_of_zero_is_refused(setting: str) -> None:
    """A watermark or budget of 0 would keep nothing: it is refused."""
    with pytest.raises(ConfigError, match="above 0"):
        MemoryTier(**{setting: 0})


def test_disk_budget_of_zero_is_refused(tmp_path: Path) -> None:
    """A disk budget of 0 is refused; a min_free of 0 switches that guard off."""
    with pytest.raises(ConfigError, match="budget"):
        DiskTier(tmp_path / "disk", budget=0)
    assert DiskTier(min_free=0, budget="1 GiB").budget == 2**30


@pytest.mark.parametrize(
    ("high", "low"), [("70%", "80%"), (100, 200), ("1 MiB", "1 MB 1"), ("10%", 999), (10, "99%")], ids=str
)
def test_low_above_high_is_refused(high: Any, low: Any) -> None:
    """``low`` above ``high`` is refused, also where one is a percentage and the other a size."""
    with pytest.raises(ConfigError, match="low"):
        MemoryTier(high=high, low=low, gauge=FakeGauge(0, 1000))


@pytest.mark.parametrize("value", [0, -1, 1.0, "3", math.nan, True, "all"])
def test_bad_max_models(value: Any) -> None:
    """``max_models`` is a whole number above 0."""
    with pytest.raises(ConfigError, match="max_models"):
        MemoryTier(max_models=value)


@pytest.mark.parametrize("value", ["best", None, 7, object(), dict])
def test_bad_policy(value: Any) -> None:
    """A policy is one of the names, or an object with the methods; both tiers say so."""
    for tier in (MemoryTier, DiskTier):
        with pytest.raises(ConfigError, match="policy"):
            tier(policy=value)


@pytest.mark.parametrize("value", [7, "process", object(), FakeGauge])
def test_bad_gauge(value: Any) -> None:
    """A gauge has a read(); a class instead of an instance is refused."""
    with pytest.raises(ConfigError, match="gauge"):
        MemoryTier(gauge=value)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1 s", None, True, 10**400])
def test_bad_interval(value: Any) -> None:
    """The monitor's interval is a finite number of seconds above 0."""
    with pytest.raises(ConfigError, match="interval"):
        MemoryTier(interval=value)


@pytest.mark.parametrize("value", [0, 0o1000, -1, "700", 0o600, 7.0, True, None])
def test_bad_mode(value: Any) -> None:
    """A mode gives its owner all, and is an int of permission bits."""
    with pytest.raises(ConfigError, match="mode"):
        DiskTier(mode=value)


@pytest.mark.parametrize("value", [7, b"/x", object(), ["/x"], "", "a\0b"], ids=repr)
def test_bad_path(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of the disk tier is a str or a path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        DiskTier(value)


# The cache's own settings


def build(tmp_path: Path, **settings: Any) -> ModelCache[Any]:
    """Make a cache that should not come about."""
    return ModelCache(settings.pop("source", DictSource()), settings.pop("load", lambda path: path), **settings)


SECONDS: list[Any] = [-1, math.nan, math.inf, "1 s", "60", True, [], 10**400]


@pytest.mark.parametrize("value", SECONDS, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("setting", ["timeout", "retry_after"])
def test_bad_seconds(tmp_path: Path, setting: str, value: Any) -> None:
    """Seconds are a finite number of 0 or more."""
    with pytest.raises(ConfigError, match=setting):
        build(tmp_path, **{setting: value})


def test_retry_after_none_is_refused(tmp_path: Path) -> None:
    """``retry_after`` has no None: 0 remembers nothing."""
    with pytest.raises(ConfigError, match="retry_after"):
        build(tmp_path, retry_after=None)


@pytest.mark.parametrize("value", SECONDS, ids=lambda value: str(value)[:10])
def test_bad_timeout_of_a_lookup(make_cache: MakeCache, value: Any) -> None:
    """A lookup's own timeout is checked before it waits; a warm hit, which does not wait, never looks at it."""
    cache = make_cache()
    with pytest.raises(ConfigError, match="timeout"):
        cache.get("a", timeout=value)
    with pytest.raises(ConfigError, match="timeout"):
        cache.lease("a", timeout=value).acquire()
    assert cache.stats().leases == 0


@pytest.mark.parametrize("value", SECONDS, ids=lambda value: str(value)[:10])
def test_bad_timeout_of_close(make_cache: MakeCache, value: Any) -> None:
    """close() checks its timeout before it closes anything."""
    cache = make_cache()
    with pytest.raises(ConfigError, match="timeout"):
        cache.close(timeout=value)
    assert cache.get("a").model == "a"


@pytest.mark.parametrize("value", [0, -1, 1.0, "4", None, math.nan, True])
def test_bad_loaders(tmp_path: Path, value: Any) -> None:
    """``loaders`` is a whole number above 0."""
    with pytest.raises(ConfigError, match="loaders"):
        build(tmp_path, loaders=value)


@pytest.mark.parametrize(
    "value",
    [None, 7, b"s3://x", object(), DictSource, [], {}, "", "gs://bucket/x", "https://", "s3://", "file://host/x"],
    ids=repr,
)
def test_bad_source(tmp_path: Path, value: Any) -> None:
    """A source is an s3:// or file:// URL, a folder or a Source; anything else is refused, and says so."""
    with pytest.raises(ConfigError) as caught:
        build(tmp_path, source=value)
    assert len(str(caught.value)) < 600


def test_source_that_is_a_file(tmp_path: Path) -> None:
    """A plain path that is a file is no folder with models."""
    (tmp_path / "model.pkl").write_bytes(b"x")
    with pytest.raises(ConfigError, match="file"):
        build(tmp_path, source=tmp_path / "model.pkl")


async def coroutine(path: Path) -> str:
    """Be a loader that nobody would await."""
    return "model"


class AsyncCall:
    """A callable whose call is a coroutine."""

    async def __call__(self, path: Path) -> str:
        """Be a loader that nobody would await."""
        return "model"


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "joblib.load",
        coroutine,
        functools.partial(coroutine),
        AsyncCall(),
        lambda: 1,
        lambda path, model, third: 1,
        lambda *, path: 1,
        Path("x"),
    ],
    ids=["None", "int", "str", "coroutine", "partial coroutine", "async call", "none", "three", "keyword", "Path"],
)
def test_bad_load(tmp_path: Path, value: Any) -> None:
    """A loader is a plain function of path, or path and model: told at construction, not at the first request."""
    with pytest.raises(ConfigError, match="load"):
        build(tmp_path, load=value)


@pytest.mark.parametrize("setting", ["unload", "size_of"])
@pytest.mark.parametrize(
    "value", [7, "close", coroutine, lambda: 1, lambda a, b, c: 1], ids=["int", "str", "coroutine", "none", "three"]
)
def test_bad_unload_and_size_of(tmp_path: Path, setting: str, value: Any) -> None:
    """``unload`` takes a model, ``size_of`` id and path; anything else is refused at construction."""
    with pytest.raises(ConfigError, match=setting):
        build(tmp_path, **{setting: value})


@pytest.mark.parametrize("setting", ["memory", "disk"])
@pytest.mark.parametrize("value", ["20 GiB", 7, {}, MemoryTier, DiskTier])
def test_bad_tier(tmp_path: Path, setting: str, value: Any) -> None:
    """A tier is a MemoryTier or a DiskTier, not a size, a class, or the other one."""
    with pytest.raises(ConfigError, match=setting):
        build(tmp_path, **{setting: value})


def test_a_tier_serves_one_cache(make_cache: MakeCache, tmp_path: Path) -> None:
    """A tier that serves a cache is refused by the next; the refusal costs the other tier nothing."""
    cache = make_cache()
    other = DiskTier(tmp_path / "other", min_free=0)
    with pytest.raises(ConfigError, match="MemoryTier"):
        build(tmp_path, memory=cache.memory, disk=other)
    memory = MemoryTier()
    with pytest.raises(ConfigError, match="DiskTier"):
        build(tmp_path, memory=memory, disk=cache.disk)
    with build(tmp_path, memory=memory, disk=other) as made:
        assert made.memory is memory
    assert cache.get("a").model == "a"


def test_failed_construction_leaves_nothing_open(tmp_path: Path) -> None:
    """A cache that could not be made leaves no thread and no descriptor, and its tiers can be used again."""
    disk = DiskTier(tmp_path / "disk", min_free=0)
    with pytest.raises(ConfigError):
        build(tmp_path, disk=disk, loaders=0)
    with build(tmp_path, disk=disk):
        pass


@pytest.mark.parametrize("value", ["memery", "", None, 7, "Memory", "source", ["disk"]])
def test_unknown_tier_in_prefetch(make_cache: MakeCache, value: Any) -> None:
    """prefetch() knows two tiers, and begins nothing for another."""
    cache = make_cache()
    with pytest.raises(ConfigError, match="'memory' or 'disk'"):
        cache.prefetch(["a"], tier=value)
    assert cache.history() == []


@pytest.mark.parametrize("value", ["fraud", b"fraud", ""])
def test_bare_str_in_prefetch(make_cache: MakeCache, value: Any) -> None:
    """A bare str is no list of ids, though one could walk over its letters."""
    with pytest.raises(ConfigError, match="list"):
        make_cache().prefetch(value)


@pytest.mark.parametrize("value", [None, 7])
def test_no_list_in_prefetch(make_cache: MakeCache, value: Any) -> None:
    """What is no list of ids at all is refused like a bare str."""
    with pytest.raises(ConfigError, match="list"):
        make_cache().prefetch(value)


@pytest.mark.parametrize("value", [None, "Evicted", int, Exception, 7])
def test_unknown_event(make_cache: MakeCache, value: Any) -> None:
    """on() takes an event class."""
    with pytest.raises(ConfigError):
        make_cache().on(value, print)


@pytest.mark.parametrize("value", [7, "print", coroutine])
def test_bad_callback(make_cache: MakeCache, value: Any) -> None:
    """A callback is a plain function."""
    with pytest.raises(ConfigError, match="callback"):
        make_cache().on(Evicted, value)


# Loaders and artifacts


@pytest.mark.parametrize(
    "error", [ValueError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit, RecursionError, StopIteration]
)
def test_loader_that_raises(make_cache: MakeCache, error: type[BaseException]) -> None:
    """Whatever a loader raises becomes LoadFailed with it as the cause; the cache serves on."""

    def load(path: Path, model: str) -> str:
        if model == "a":
            raise error("from the loader")
        return model

    cache = make_cache(book=Book(load))
    with pytest.raises(LoadFailed, match=r"'a'.*from the loader") as caught:
        cache.get("a")
    assert isinstance(caught.value.__cause__, error)
    assert error.__name__ in str(caught.value)
    assert caught.value.model == "a"
    assert cache.get("b") == "b"
    assert cache.stats().memory_reserved == 0


def test_loader_that_returns_none(make_cache: MakeCache) -> None:
    """A loader that returns None forgot its return: LoadFailed says so."""
    cache = make_cache(load=lambda path: None, unload=None)
    with pytest.raises(LoadFailed, match=r"'a'.*None.*return"):
        cache.get("a")
    assert cache.stats().models == 0


def test_size_of_that_is_wrong(make_cache: MakeCache) -> None:
    """``size_of`` must return bytes; what it raises or returns instead is told with the model's id."""
    wrong: dict[str, Any] = {"a": 1.5, "b": None, "c": -1, "d": "1 GiB", "e": True}

    def size_of(model: str, path: Path) -> Any:
        if model not in wrong:
            raise OSError("unreadable")
        return wrong[model]

    cache = make_cache(size_of=size_of)
    for model in [*wrong, "f"]:
        with pytest.raises(LoadFailed, match=f"size_of.*'{model}'"):
            cache.get(model)


def test_size_of_that_exits(make_cache: MakeCache) -> None:
    """``size_of`` that raises SystemExit does not end the server."""

    def size_of(model: str, path: Path) -> int:
        sys.exit(3)

    with pytest.raises(LoadFailed, match="size_of"):
        make_cache(size_of=size_of).get("a")


@pytest.mark.parametrize(
    "data",
    [b"", b"not an archive at all", b"<html><title>404</title></html>", b"\x1f\x8b garbage", b"PK\x03\x04 garbage"],
    ids=["empty", "text", "html", "gzip", "zip"],
)
def test_archive_that_is_none(make_cache: MakeCache, data: bytes) -> None:
    """An object named like an archive that holds none is ArtifactCorrupt, with the model and what to do."""
    cache = make_cache(DictSource({"m": data}))
    with pytest.raises(ArtifactCorrupt, match="'m'") as caught:
        cache.get("m")
    assert caught.value.model == "m"
    assert "upload" in str(caught.value)
    assert cache.models() == []
    assert cache.stats().disk_used == 0


def test_model_larger_than_the_disk_budget(make_cache: MakeCache) -> None:
    """A model larger than the whole disk budget is refused before a byte of it is read."""
    source = DictSource().add_file("big", "big.bin", bytes(200_000))
    cache = make_cache(source, disk={"budget": "100 KB"})
    with pytest.raises(TooLarge, match=r"'big'.*disk\.budget") as caught:
        cache.get("big")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert (error.model, error.tier, error.limit) == ("big", "disk", 100_000)
    assert error.need is not None
    assert error.need >= 200_000
    assert source.opens == []


@pytest.mark.parametrize(("setting", "value"), [("high", 500), ("budget", 500)])
def test_model_larger_than_a_memory_limit(make_cache: MakeCache, book: Book, setting: str, value: int) -> None:
    """A model larger than a limit of memory is refused before it is loaded, and nothing is evicted for it."""
    source = DictSource().add("a", size=10).add("big", size=600)
    cache = make_cache(source, book, memory={setting: value, "gauge": book.gauge()})
    cache.get("a")
    with pytest.raises(TooLarge, match=rf"'big'.*memory\.{setting}") as caught:
        cache.get("big")
    error = caught.value
    assert (error.model, error.tier, error.need, error.limit) == ("big", "memory", 600, 500)
    assert book.alive == ["a"]


def test_errors_are_ours(make_cache: MakeCache) -> None:
    """Each refusal is a ModelCacheError, so one except clause catches all."""
    cache = make_cache()
    wrong: list[Callable[[], Any]] = [
        lambda: cache.get(""),
        lambda: cache.prefetch("a"),
        lambda: MemoryTier(high=-1),
        lambda: cache.on(int, print),
        lambda: cache.get("nope"),
    ]
    for call in wrong:
        with pytest.raises(ModelCacheError):
            call()


def test_gauge_that_fails_is_no_reason_to_fail(make_cache: MakeCache, book: Book, spawn: Spawn) -> None:
    """A gauge that raises, or reads nonsense, leaves the other limits in force and the cache serving."""
    gauge = FakeGauge(0, 0)
    cache = make_cache(book=book, memory={"gauge": gauge, "max_models": 1})
    for model in "abc":
        assert cache.get(model).model == model
    assert book.alive == ["c"]
    assert cache.stats().memory_used is None
