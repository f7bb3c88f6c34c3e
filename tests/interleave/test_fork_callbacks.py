"""A user's code that forks wherever the cache calls it: the child has a whole cache, the parent an undisturbed one.

What else a child finds is ``test_fork``; forks by signal handlers, ``test_fork_locks`` and ``test_ledger``.
"""

from pathlib import Path

import pytest

from tests.interleave.test_fork import fork_script

STORY = """
kind, background, way = sys.argv[2], sys.argv[3] == "background", sys.argv[4]

def inherited(folder):
    '''Return what this child has open of the tier but the files of artifacts.'''
    names = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    parts = [Path(name).relative_to(folder).parts for name in names if name.startswith(f"{folder}/")]
    return [each for each in parts if len(each) <= 3]

def begin(job):
    '''Have a job done by a child; return a function that waits for its end.'''
    if way == "fork":
        return fork(job)
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    def join():
        child.join(10)
        assert child.exitcode == 0, child.exitcode
    return join

def story(folder, tight):
    source, done, joins, armed = DictSource().add("a", "b", "c"), Counting(), [], []

    def child():
        assert not inherited(folder)
        source._lock = threading.Lock()  # which another thread of the parent may have had
        before = cache.stats()
        assert cache.get("c", timeout=8).name == "c"
        assert cache.get("a", timeout=8).name == "a"
        assert cache.stats().misses > before.misses
        assert [row.model for row in cache.models() if row.tier == "memory"] == ["a"]
        if way == "fork":  # else its end closes it
            assert cache.close(timeout=5)

    def fork_once(*_):
        if armed and not joins:
            joins.append(None)
            joins[0] = begin(child)

    def at(place):
        return fork_once if kind == place else lambda *_: None

    def load(path, name):
        at("load")()
        return done.load(path, name)

    def unload(model):
        done.unload(model)
        at("unload")()

    cache = small_cache(folder, source, load, unload=unload, size_of=lambda *_: at("size_of")() or 10,
                        memory={"max_models": 1})
    cache.get("a")
    if tight:
        cache.disk.budget = cache.stats().disk_used * 3 // 2
    source.gate = at("source")
    if kind[0].isupper():
        cache.on(globals()[kind], fork_once, background=background)
    armed.append(True)
    assert cache.get("b").name == cache.get("b").name == "b"
    eventually(lambda: joins and joins[0])
    joins[0]()
    assert cache.get("a").name == "a"
    assert cache.close()
    assert [model.unloads for model in done.unloaded] == [1] * len(done.loaded)
    assert cache.stats().disk_used == allocated(folder / "disk")
    assert not list((folder / "disk" / "tmp").iterdir())

import multiprocessing
story(FOLDER / "roomy", tight=False)
story(FOLDER / "tight", tight=True)
"""

KINDS = ["load", "unload", "size_of", "source", "Missed", "Fetched", "Evicted", "Unloaded", "Loaded", "Hit"]


@pytest.mark.parametrize("kind", KINDS)
def test_fork_from_users_code(tmp_path: Path, kind: str) -> None:
    """The child fetches, loads, evicts and closes, with no lock of the parent's, which goes on undisturbed."""
    fork_script(tmp_path, STORY, kind, "foreground", "fork")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0].isupper()])
def test_fork_from_a_background_callback(tmp_path: Path, kind: str) -> None:
    """The same from the thread of the hooks, whatever the others are doing at that moment."""
    fork_script(tmp_path, STORY, kind, "background", "fork")


@pytest.mark.parametrize("kind", ["load", "unload", "Evicted"])
def test_multiprocessing_from_users_code(tmp_path: Path, kind: str) -> None:
    """The same by ``multiprocessing``, at whose end the child's cache is closed."""
    fork_script(tmp_path, STORY, kind, "foreground", "multiprocessing")
