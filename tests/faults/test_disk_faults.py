"""Faults of the disk and of the system around it, by their number."""

import contextlib
import json
import mmap
import os
import shutil
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from modelcache import ModelCacheError, NoRoom
from modelcache.monitor import Monitor
from tests.support.children import run
from tests.support.fakes import DictSource, tar
from tests.support.mounts import open_path, small_disk
from tests.support.racing import Call, Counting, Gate, allocated, descriptors, load_model, small_cache, together


def test_f027_disk_full(tmp_path: Path) -> None:
    """F027: a disk that others fill is NoRoom with path, need and free; nothing is left, loaded models serve on."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        source = DictSource().add("small", "other", size=1000).add("big", size=3_000_000)
        with small_cache(tmp_path, source) as cache:
            assert cache.get("small").name == "small"
            filler = disk / "filler"
            before = allocated(disk)

            def fill() -> None:
                with filler.open("ab") as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                        file.flush()

            source.gate = fill
            with pytest.raises(NoRoom) as refusal:
                cache.get("big")
            assert refusal.value.tier == "disk"
            assert refusal.value.model == "big"
            assert str(disk) in str(refusal.value)
            assert refusal.value.need > 0
            assert "free" in str(refusal.value)
            assert allocated(disk) == before
            assert cache.get("small").name == "small"
            source.gate = None
            filler.unlink()
            assert cache.get("other").name == "other"
            assert cache.get("big").name == "big"


def test_f027_disk_full_makes_room_of_its_own_first(tmp_path: Path) -> None:
    """F027: where others fill the disk beyond what min_free foresaw, artifacts that can go give way before NoRoom."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        source = DictSource().add("old", size=1_500_000).add("new", size=1_500_000)
        with small_cache(tmp_path, source, disk={"min_free": 4096}) as cache:
            cache.prefetch(["old"], tier="disk").wait(5)
            (disk / "filler").write_bytes(bytes(1_500_000))
            assert cache.get("new").name == "new"
            assert [model.model for model in cache.models()] == ["new"]


def test_f027_no_inodes(tmp_path: Path) -> None:
    """F027: a file system without inodes left is NoRoom too, and nothing is left behind."""
    with small_disk(tmp_path / "disk", "size=4m,nr_inodes=40") as disk:
        source = DictSource().add("small")
        source.artifacts["many"] = tar({f"{number}": b"x" for number in range(60)})
        with small_cache(tmp_path, source) as cache:
            cache.get("small")
            before = sorted(disk.rglob("*"))
            with pytest.raises(NoRoom):
                cache.get("many")
            assert sorted(disk.rglob("*")) == before
            assert cache.get("small").name == "small"


def ids() -> list[str]:
    """Return ids that are long, or alike."""
    long = ["x" * length for length in (200, 250, 255, 256, 1024)]
    long += ["é" * 127, "é" * 128, "é" * 512, "語" * 341, "a/" * 511 + "a", "/".join(["n" * 255] * 4)]
    alike = [
        "Model",
        "model",
        "MODEL",
        "mOdel",
        "straße",
        "STRASSE",
        "\u017f",
        "s",
        "a/b",
        "a__b",
        "a%2Fb",
        "a b",
        "a_b",
        "a.b",
    ]
    alike += [unicodedata.normalize(form, "Ångström") for form in ("NFC", "NFD")] + [
        "\u212b",
        "\u00c5",
        "x.",
        "x",
        "x ",
        " x",
    ]
    alike += [
        "CON",
        "nul",
        "-rf",
        "~",
        "$HOME",
        "a\\b",
        "a:b",
        "a?b",
        "record.json",
        "artifact",
        "tmp",
        "x.json",
        "x.tmp",
    ]
    return long + alike


def test_f031_f032_ids_stay_apart(tmp_path: Path) -> None:
    """F031, F032: long ids, and ids alike but for case, Unicode form or separators, stay apart, over a restart too."""
    names = ids()
    assert len(set(names)) == len(names)
    source = DictSource().add(*names)

    def load(path: Path, name: str) -> tuple[str, str]:
        return name, (path / "model.txt").read_text().rstrip("\0")

    with small_cache(tmp_path, source, load) as cache:
        for name in names:
            assert cache.get(name) == (name, name)
    folders = [folder.name for folder in (tmp_path / "disk" / "models").iterdir()]
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(folder.isascii() and len(folder) < 128 for folder in folders)
    with small_cache(tmp_path, DictSource(), load) as cache:
        assert {model.model for model in cache.models()} == set(names)
        for name in names:
            assert cache.get(name) == (name, name)
        for name in names[::2]:
            assert cache.delete(name) is True
        assert {model.model for model in cache.models()} == set(names[1::2])


def test_f035_published_files_never_change(tmp_path: Path) -> None:
    """F035: fetching a model anew makes new files; a mapping of the old ones reads what it read before."""
    source = DictSource().add("a", size=8192)
    with (
        small_cache(tmp_path, source, lambda path: path) as cache,
        cache.lease("a") as path,
        (path / "model.txt").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        before = bytes(mapped)
        assert cache.delete("a") is False
        with small_cache(tmp_path, source) as other:
            assert other.get("a").name == "a"
            other.delete("a")
        assert bytes(mapped) == before


@pytest.mark.parametrize("lost", ["", "models", "tmp", "modelcache.json", "leases", "ledger.sqlite3"])
@pytest.mark.parametrize("moment", ["idle", "read", "load"])
def test_f043_folder_removed_under_a_running_cache(tmp_path: Path, lost: str, moment: str) -> None:
    """F043: rm -rf of the folder, or of a part, leaves loaded models served; the next fetch works or says why not."""
    source = DictSource().add("a", "b", "c", "d", size=5000)
    goal = tmp_path / "disk" / lost

    def remove(*_: object) -> None:
        if goal.is_dir():
            shutil.rmtree(goal, ignore_errors=True)
        else:
            goal.unlink(missing_ok=True)

    done = Counting()
    before = descriptors()
    with small_cache(tmp_path, source, done.load, unload=done.unload, retry_after=0, disk={"budget": "50%"}) as cache:
        model = cache.get("a")
        if moment == "read":
            source.gate = remove
        elif moment == "load":
            done.gates["b"] = remove
        else:
            remove()
        error = Call(cache.get, "b").error()
        assert error is None or isinstance(error, ModelCacheError), error
        source.gate = None
        done.gates.clear()
        assert cache.get("a") is model
        for name in "bcd":
            error = Call(cache.get, name).error()
            assert error is None or isinstance(error, ModelCacheError), error
        assert cache.get("a") is model
        cache.models()
        cache.stats()
        cache.disk.min_free = "1%"
        assert cache.unload("a") is True
        cache.delete("a")
        error = Call(cache.get, "a").error()
        assert error is None or isinstance(error, ModelCacheError), error
    assert descriptors() <= before
    assert len(done.unloaded) == len([one for one in done.loaded if one]) or moment == "load"
    with small_cache(tmp_path, source) as cache:
        assert cache.get("a").name == "a"


def test_f044_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F044: a relative folder stays where it was when the process changes its directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with small_cache(Path("here"), DictSource().add("a", "b")) as cache:
        cache.get("a")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert cache.get("b").name == "b"
        cache.unload("a")
        assert cache.get("a").name == "a"
        assert cache.delete("a")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert list((tmp_path / "here" / "disk" / "models").iterdir())


def damage_record(folder: Path) -> None:
    """Cut the record."""
    (folder / "record.json").write_text('{"format": 1, "mod')


def lose_record(folder: Path) -> None:
    """Remove the record."""
    (folder / "record.json").unlink()


def not_text(folder: Path) -> None:
    """Write bytes that are no text."""
    (folder / "record.json").write_bytes(b"\xff\xfe\x00")


def lose_artifact(folder: Path) -> None:
    """Remove the artifact."""
    shutil.rmtree(folder / "artifact")


def dangling_link(folder: Path) -> None:
    """Put a link to nowhere in its place."""
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent / "nowhere")


def link_to_itself(folder: Path) -> None:
    """Put a link to itself in its place."""
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def plain_file(folder: Path) -> None:
    """Put a file in its place."""
    shutil.rmtree(folder)
    folder.write_text("a file")


def record_is_a_folder(folder: Path) -> None:
    """Put a folder in place of its record."""
    (folder / "record.json").unlink()
    (folder / "record.json").mkdir()


def lies(folder: Path) -> None:
    """Let the record name a file outside."""
    fields = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**fields, "single": "../../../escape"}))


def huge_number(folder: Path) -> None:
    """Let the record hold numbers that no clock has."""
    fields = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**fields, "fetched": float("nan"), "size": -1}))


DAMAGES = [
    damage_record,
    lose_record,
    not_text,
    lose_artifact,
    dangling_link,
    link_to_itself,
    plain_file,
    record_is_a_folder,
    lies,
    huge_number,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_f045_one_damaged_folder_hides_no_other(tmp_path: Path, damage: Any) -> None:
    """F045: whatever happened to one published folder, the start shows all others, and the model is fetched again."""
    source = DictSource().add("a", "b", "c")
    with small_cache(tmp_path, source) as cache:
        cache.prefetch(["a", "b", "c"]).wait(10)
    folder = next(path for path in (tmp_path / "disk" / "models").iterdir() if path.name.startswith("b-"))
    damage(folder)
    with small_cache(tmp_path, source) as cache:
        assert {"a", "c"} <= {model.model for model in cache.models()} <= {"a", "b", "c"}
        for name in "abc":
            assert cache.get(name).name == name
        for name in "abc":
            cache.unload(name)
            cache.delete(name)
        cache.disk.budget = 4096
        assert cache.models() == []
        assert cache.stats().disk_used <= 4096


@pytest.mark.parametrize("damage", [dangling_link, plain_file, link_to_itself])
def test_f045_damaged_while_it_runs(tmp_path: Path, damage: Any) -> None:
    """F045: a folder that is damaged under a running cache is fetched again or a typed error; its room comes back."""
    source = DictSource().add("a", "b", size=5000)
    with small_cache(tmp_path, source, retry_after=0) as cache:
        cache.prefetch(["a", "b"], tier="disk").wait(10)
        folder = next(path for path in (tmp_path / "disk" / "models").iterdir() if path.name.startswith("b-"))
        damage(folder)
        error = Call(cache.get, "b").error()
        assert error is None or isinstance(error, ModelCacheError), error
        assert cache.get("a").name == "a"
        for name in "ab":
            cache.unload(name)
        Call(setattr, cache.disk, "budget", 4096).result(5)
        assert cache.stats().disk_used <= 4096
        cache.disk.budget = 10**6
        assert Call(cache.get, "b", timeout=4).result(5).name == "b"


def test_f045_unreadable_folder(tmp_path: Path) -> None:
    """F045: a folder that this user may not read hides no other, and its model is fetched again."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a folder of another user's")
    run(
        """
        folder = Path(sys.argv[1])
        os.umask(0o22)
        with small_cache(folder / "first", DictSource().add("a")) as cache:  # all imports, as root
            cache.get("a")
        os.chown(folder, 65534, 65534)
        os.setegid(65534), os.seteuid(65534)
        source = DictSource().add("a", "b", "c")
        with small_cache(folder, source) as cache:
            cache.prefetch(["a", "b", "c"]).wait(10)
        os.seteuid(0)
        for path in (folder / "disk" / "models").iterdir():
            if path.name.startswith("b-"):
                os.chown(path, 0, 0), os.chmod(path, 0)
        os.seteuid(65534)
        with small_cache(folder, source) as cache:
            assert {model.model for model in cache.models()} >= {"a", "c"}
            assert [cache.get(name).name for name in "abc"] == ["a", "b", "c"]
            cache.disk.budget = 10**9
        """,
        open_path(tmp_path),
    )


def test_f046_few_descriptors(tmp_path: Path) -> None:
    """F046: with ulimit -n 64 and memory for ten of 100 models, three rounds of all of them leak no descriptor."""
    run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        names = [f"m{number}" for number in range(100)]
        cache = small_cache(Path(sys.argv[1]), DictSource().add(*names, size=3000), size_of=lambda *_: 10,
                            memory={"budget": 100}, retry_after=0)
        cache.get(names[0])
        counts = []
        for _ in range(3):
            for name in names:
                assert cache.get(name).name == name
            counts.append(descriptors())
        assert len(set(counts)) == 1 and counts[0] < 40, counts
        assert cache.close()
        """,
        tmp_path,
    )


@pytest.mark.parametrize("spare", range(12))
def test_f046_no_descriptor_left(tmp_path: Path, spare: int) -> None:
    """F046: with few descriptors left, a cold get works or is a typed error; afterwards all works, all room is back."""
    run(
        """
        import resource
        spare = int(sys.argv[2])
        source = DictSource().add("a", "b", "c", "d", size=5000)
        cache = small_cache(Path(sys.argv[1]), source, retry_after=0)
        cache.get("a")
        cache.prefetch(["d"], tier="disk").wait(5)
        tiers = allocated(Path(sys.argv[1]) / "disk")
        hogs = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        try:
            while True:
                hogs.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        for _ in range(spare):
            os.close(hogs.pop())
        before = len(hogs)
        outcomes = []
        for name in "bcd":
            try:
                outcomes.append(cache.get(name, timeout=5).name)
            except ModelCacheError as error:
                outcomes.append(type(error).__name__)
        assert cache.get("a").name == "a"
        for name in "abcd":
            try:
                cache.unload(name)
                cache.delete(name)
            except ModelCacheError:
                pass
        for hog in hogs:
            os.close(hog)
        print(outcomes)
        for name in "abcd":
            assert cache.get(name, timeout=5).name == name
        for name in "abcd":
            assert cache.delete(name) is True, name
        assert cache.stats().disk_used == 0, cache.stats()
        workshop, = (Path(sys.argv[1]) / "disk" / "tmp").iterdir()
        assert not list(workshop.iterdir()), "left behind while there were no descriptors"
        assert cache.close()
        assert allocated(Path(sys.argv[1]) / "disk") == 0
        assert descriptors() < 15, os.listdir("/proc/self/fd")
        """,
        tmp_path,
        spare,
    )


def test_f046_failures_leak_nothing(tmp_path: Path) -> None:
    """F046: 300 fetches and loads that fail in every way leave no descriptor, thread or file."""
    source = DictSource().add("bad", "good", size=5000)
    source.artifacts["cut"] = source.artifacts["good"][:-20]
    broken = threading.local()

    def gate() -> None:
        broken.count = getattr(broken, "count", 0) + 1
        if broken.count % 3 == 0:
            raise OSError(5, "the source broke")

    def load(path: Path, name: str) -> Any:
        if name == "bad":
            raise ValueError
        return load_model(path)

    with small_cache(tmp_path, source, load, retry_after=0) as cache:
        cache.get("good")
        before = descriptors()
        source.gate = gate
        for _ in range(100):
            for name in ("bad", "cut", "missing"):
                with contextlib.suppress(ModelCacheError):
                    cache.get(name)
            cache.delete("bad")
        assert descriptors() == before
        workshop, *more = (tmp_path / "disk" / "tmp").iterdir()
        assert not more
        assert not list(workshop.iterdir())
        assert cache.stats().memory_reserved == 0


def test_leftovers_are_swept_when_room_is_short(tmp_path: Path) -> None:
    """What a process that died after our start left under tmp/ is swept as soon as a fetch finds no room."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        source = DictSource().add("a", size=2_000_000)
        with small_cache(tmp_path, source, disk={"min_free": 4096}) as cache:
            dead = disk / "tmp" / "0123456789abcdef"
            dead.mkdir()
            (dead / "half").write_bytes(bytes(2_500_000))
            assert cache.get("a").name == "a"
            assert not dead.exists()


def test_monitor_ends_however_close_meets_its_look() -> None:
    """A monitor that is told to stop during its look does not go to sleep for ever."""
    gate = Gate()

    def look() -> bool:
        gate()
        return False

    monitor = Monitor(look, 0.01)
    monitor.start()
    gate.wait()
    stop = Call(monitor.stop, 5)
    gate.open()
    assert stop.result(6) is True


def test_many_closes_and_starts(tmp_path: Path) -> None:
    """F037: a folder that 20 caches open, fill and close in turn holds each model once, and no leftovers."""
    source = DictSource().add("a", "b", size=20_000)
    sizes = set()
    for _ in range(20):
        with small_cache(tmp_path, source) as cache:
            assert together(lambda: cache.get("a").name, lambda: cache.get("b").name) == ["a", "b"]
        sizes.add(allocated(tmp_path / "disk"))
    assert len(sizes) == 1
    assert source.opens.count("a") == 1


def test_a_sweeper_takes_the_new_workshop_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start whose new folder under tmp/ is swept by another start, before it could lock it, makes another one."""
    real = os.mkdir
    swept: list[object] = []

    def make(path: object, *arguments: Any, **settings: Any) -> None:
        real(path, *arguments, **settings)  # type: ignore[call-overload]
        if Path(str(path)).parent.name == "tmp" and len(swept) < 3:
            swept.append(path)
            os.rmdir(str(path))  # noqa: PTH106 - between mkdir and whatever comes next

    monkeypatch.setattr(os, "mkdir", make)
    with small_cache(tmp_path, DictSource().add("a")) as cache:
        assert cache.get("a").name == "a"
    assert len(swept) == 3
