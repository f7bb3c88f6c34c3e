"""Fork: what a child finds, and what it may not disturb. All forks happen in processes of their own."""

import textwrap
from pathlib import Path

import pytest

from tests.support.children import run

FORK = """
def fork(body, seconds=10):
    '''Run body in a child; return a function that waits for it and checks that it ended well.'''
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        signal.alarm(seconds)
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    def join():
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
    join.pid = pid
    return join

FOLDER = Path(sys.argv[1])
"""


def fork_script(tmp_path: Path, script: str, *arguments: str, **settings: int) -> str:
    """Run a script that may fork."""
    return run(FORK + textwrap.dedent(script), tmp_path, *arguments, **settings)


def test_f094_child_serves_what_was_loaded_and_its_monitor_evicts(tmp_path: Path) -> None:
    """F094: a child serves the parent's models without a load, and its own monitor evicts there."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        used = [0]
        names = ["a", "b", "c"]
        cache = small_cache(FOLDER, DictSource().add(*names), done.load, unload=done.unload, size_of=lambda *_: 10,
                            memory={"gauge": FakeGauge(lambda: used[0], limit=1000), "high": 100, "interval": 0.02})
        models = [cache.get(name) for name in names]
        def child():
            assert [cache.get(name) for name in names] == models
            assert done.loaded == names
            used[0] = 105
            eventually(lambda: done.unloaded)
            used[0] = 0
            assert any(thread.name == "modelcache-monitor" for thread in threading.enumerate())
            assert cache.close()
            assert sorted(model.name for model in done.unloaded) == names
            assert all(model.unloads == 1 for model in done.unloaded)
        fork(child)()
        assert not done.unloaded
        assert [model.tier for model in cache.models()] == ["memory"] * 3
        assert cache.close()
        assert len(done.unloaded) == 3
        """,
    )


def test_child_of_a_child(tmp_path: Path) -> None:
    """A grandchild, forked before its parent used the cache or after, serves what the first process loaded."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        cache = small_cache(FOLDER, DictSource().add("a", "b"), done.load, unload=done.unload)
        model = cache.get("a")
        def grandchild():
            assert cache.get("a") is model
            assert cache.get("b").name == "b"
            assert cache.close()
            assert len(done.unloaded) == 2
        def early():
            fork(grandchild)()
            assert cache.get("a") is model
            assert cache.close()
        def late():
            assert cache.get("a") is model
            fork(grandchild)()
            assert cache.close()
        fork(early)()
        fork(late)()
        assert cache.close()
        """,
    )


def test_leases_of_other_threads_are_dropped(tmp_path: Path) -> None:
    """A child has the lease of the thread that forked, and none of the others."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        cache = small_cache(FOLDER, DictSource().add("mine", "theirs", "doomed"), done.load, unload=done.unload)
        mine = cache.lease("mine")
        mine.acquire()
        stop, ready = threading.Event(), threading.Barrier(2)
        def hold():
            with cache.lease("theirs"), cache.lease("doomed"):
                assert cache.unload("doomed") is False
                ready.wait(5)
                stop.wait(10)
        holder = Call(hold)
        ready.wait(5)
        def child():
            leases = {model.model: model.leases for model in cache.models() if model.tier == "memory"}
            assert leases == {"mine": 1, "theirs": 0}, leases
            assert [model.name for model in done.unloaded] == ["doomed"]
            assert cache.unload("theirs") is True
            assert cache.unload("mine") is False
            mine.release()
            assert len(done.unloaded) == 3
            assert cache.close()
            assert len(done.unloaded) == 3
        fork(child)()
        leases = {model.model: model.leases for model in cache.models() if model.tier == "memory"}
        assert leases == {"mine": 1, "theirs": 1, "doomed": 1}, leases
        stop.set()
        holder.result()
        mine.release()
        assert cache.close()
        """,
    )


def test_child_keeps_its_own_file_leases(tmp_path: Path) -> None:
    """Once a child has used the cache, no other process removes its models' files, even after the parent's end."""
    fork_script(
        tmp_path,
        """
        cache = small_cache(FOLDER, DictSource().add("a"))
        cache.get("a")
        used, gone = os.pipe(), os.pipe()
        def child():
            cache.get("a")
            os.write(used[1], b"x")
            assert os.read(gone[0], 1) == b"x"
            other = small_cache(FOLDER, DictSource())
            assert other.delete("a") is False
            assert list((FOLDER / "disk" / "models").iterdir())
            assert cache.unload("a")
            assert cache.delete("a") is True
            assert not list((FOLDER / "disk" / "models").iterdir())
            assert cache.close() and other.close()
        join = fork(child)
        os.read(used[0], 1)
        assert cache.close()
        os.write(gone[1], b"x")
        join()
        """,
    )


def test_child_that_never_uses_the_cache_disturbs_nothing(tmp_path: Path) -> None:
    """An idle child does not keep the parent from removing what the child can't have in memory."""
    fork_script(
        tmp_path,
        """
        gate = Gate()
        done = Counting(late=gate)
        source = DictSource().add("late")
        cache = small_cache(FOLDER, source, done.load)
        get = Call(cache.get, "late")
        gate.wait()
        stop, ready = os.pipe(), os.pipe()
        join = fork(lambda: (os.write(ready[1], b"x"), os.read(stop[0], 1)))
        os.read(ready[0], 1)
        gate.open()
        get.result()
        assert cache.delete("late") is True, "a dead thread's file lease lives on in the child"
        assert not list((FOLDER / "disk" / "models").iterdir())
        os.write(stop[1], b"x")
        join()
        assert cache.close()
        """,
    )


@pytest.mark.parametrize("moment", ["read", "load"])
def test_fork_in_the_middle_of_a_flight(tmp_path: Path, moment: str) -> None:
    """A child forked during a load elsewhere loads anew; during a fetch it waits for that; no file is touched."""
    fork_script(
        tmp_path,
        f"""
        gate = Gate()
        done = Counting()
        source = DictSource().add("a", size=50000)
        if "{moment}" == "read":
            source.gate = gate
        else:
            done.gates["a"] = gate
        """
        """
        cache = small_cache(FOLDER, source, done.load, unload=done.unload)
        get = Call(cache.get, "a")
        gate.wait()
        staged = set((FOLDER / "disk" / "tmp").rglob("*"))
        assert staged
        waiting = os.pipe()
        def child():
            source.gate = None
            done.gates.clear()
            get = Call(cache.get, "a", timeout=9)
            eventually(lambda: cache._parts.flights.active)
            os.write(waiting[1], b"x")
            assert get.result().name == "a"
            cache.get("a")
            assert cache.close()
            assert len(done.unloaded) == 1
            again = small_cache(FOLDER, source)
            assert again.get("a").name == "a"
            assert again.close()
        join = fork(child)
        os.read(waiting[0], 1)
        assert staged <= set((FOLDER / "disk" / "tmp").rglob("*")), "the child removed what the parent stages"
        gate.open()
        join()
        assert get.result().name == "a"
        assert cache.close()
        assert not list((FOLDER / "disk" / "tmp").iterdir())
        """,
    )


def test_fork_while_an_unload_runs(tmp_path: Path) -> None:
    """A child forked while unload= runs on another thread does not wait for it, and loads the model anew."""
    fork_script(
        tmp_path,
        """
        gate, done = Gate(), Counting()
        def unload(model):
            if os.getpid() == parent:
                gate()
        parent = os.getpid()
        cache = small_cache(FOLDER, DictSource().add("a"), done.load, unload=unload, memory={"max_models": 1})
        cache.get("a")
        leaving = Call(cache.unload, "a")
        gate.wait()
        def child():
            assert cache.get("a", timeout=5).name == "a"
            assert done.loaded == ["a", "a"]
            assert cache.close()
        fork(child)()
        gate.open()
        assert leaving.result() is True
        assert cache.close()
        """,
    )


def test_children_and_threads_download_at_once(tmp_path: Path) -> None:
    """Four children of eight threads each fetch at once; each stages in one locked folder, and leaves none."""
    fork_script(
        tmp_path,
        """
        import fcntl
        barrier = threading.Barrier(8)
        source = DictSource()
        cache = small_cache(FOLDER, source, loaders=8)
        def child():
            names = [f"{os.getpid()}/m{number}" for number in range(8)]
            source.add(*names, size=3000)
            staging = []
            def gate():
                if threading.current_thread() not in staging:
                    staging.append(threading.current_thread())
                    barrier.wait(5)
                    if barrier.n_waiting == 0 and not unlocked and cache.disk.store.workshop is not None:
                        look()
            unlocked = []
            def look():
                mine = cache.disk.store.workshop
                for other in (FOLDER / "disk" / "tmp").iterdir():
                    try:
                        descriptor = os.open(other, os.O_RDONLY)
                    except FileNotFoundError:  # of a child that has closed its cache
                        continue
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    else:
                        if os.listdir(descriptor):  # nothing where it was removed meanwhile
                            unlocked.append(other)
                    finally:
                        os.close(descriptor)
            source.gate = gate
            outcomes = together(*[lambda name=name: cache.get(name, timeout=8).name for name in names])
            assert outcomes == names, outcomes
            assert not unlocked, "somebody stages in a folder that any sweep may delete"
            assert cache.close()
        joins = [fork(child) for _ in range(4)]
        for join in joins:
            join()
        assert cache.close()
        assert not list((FOLDER / "disk" / "tmp").iterdir())
        """,
    )


def test_workers_and_hook_thread_are_made_anew(tmp_path: Path) -> None:
    """Loads and background callbacks work in a child of a cache that had used all its threads."""
    fork_script(
        tmp_path,
        """
        cache = small_cache(FOLDER, DictSource().add(*"abcdef"), loaders=2)
        heard = []
        cache.on(Loaded, lambda event: heard.append((os.getpid(), event.model)), background=True)
        together(*[lambda name=name: cache.get(name) for name in "abc"])
        eventually(lambda: len(heard) == 3)
        def child():
            heard.clear()
            together(*[lambda name=name: cache.get(name) for name in "abcdef"])
            eventually(lambda: len(heard) == 3)
            assert {pid for pid, _ in heard} == {os.getpid()}
            assert cache.close()
        fork(child)()
        assert len(heard) == 3
        assert cache.close()
        """,
    )


def test_prefetch_begun_before_the_fork_is_not_waited_for(tmp_path: Path) -> None:
    """In a child, the handle of a prefetch whose flights stayed with the parent does not wait for ever."""
    fork_script(
        tmp_path,
        """
        gate = Gate()
        done = Counting(a=gate)
        cache = small_cache(FOLDER, DictSource().add("a"), done.load)
        handle = cache.prefetch(["a"])
        gate.wait()
        def child():
            done.gates.clear()
            assert handle.wait(3), "nobody will ever finish this prefetch here"
            assert cache.get("a", timeout=5).name == "a"
            assert cache.close()
        fork(child)()
        gate.open()
        assert handle.wait(5)
        assert cache.close()
        """,
    )


def test_close_in_the_child_only(tmp_path: Path) -> None:
    """Close in a child ends the cache there and nowhere else."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        cache = small_cache(FOLDER, DictSource().add("a", "b"), done.load, unload=done.unload)
        cache.get("a")
        def child():
            assert cache.close()
            assert [model.unloads for model in done.unloaded] == [1]
            try:
                cache.get("a")
            except CacheClosed:
                pass
            else:
                raise AssertionError("open")
        fork(child)()
        assert cache.get("b").name == "b"
        assert cache.get("a").name == "a"
        assert cache.close()
        """,
    )


def test_fork_after_close(tmp_path: Path) -> None:
    """A child of a process whose cache is closed, or whose leases outlive it, stays closed."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        cache = small_cache(FOLDER, DictSource().add("a"), done.load, unload=done.unload)
        lease = cache.lease("a")
        lease.acquire()
        assert cache.close(timeout=1) is False
        def child():
            try:
                cache.get("a")
            except CacheClosed:
                pass
            else:
                raise AssertionError("open")
            lease.release()
            assert len(done.unloaded) == 1
            assert cache.close()
        fork(child)()
        assert not done.unloaded
        lease.release()
        assert len(done.unloaded) == 1
        assert cache.close()
        """,
    )


def test_two_threads_fork_at_once(tmp_path: Path) -> None:
    """Forks from two threads at one moment leave parent and children with caches that work."""
    fork_script(
        tmp_path,
        """
        caches = [small_cache(FOLDER / str(number), DictSource().add("a", "b")) for number in range(3)]
        for cache in caches:
            cache.get("a")
        def child():
            for cache in caches:
                assert cache.get("a", timeout=3).name == "a"
                assert cache.get("b", timeout=3).name == "b"
        def work():
            for _ in range(15):
                fork(child, 6)()
        outcomes = together(work, work, work, timeout=16)
        assert outcomes == [None] * 3, outcomes
        for cache in caches:
            assert Call(cache.unload, "a").result(3)
            assert cache.close()
        """,
        watchdog=18,
    )


def test_f095_200_forks_while_others_log_and_use_the_cache(tmp_path: Path) -> None:
    """F095: 200 forks while four threads log at full speed and two use the cache; each child uses it and ends."""
    fork_script(
        tmp_path,
        """
        import logging
        null = os.open(os.devnull, os.O_WRONLY)
        class Unbuffered(logging.Handler):  # a buffered stream has a lock of its own that a fork may inherit
            def emit(self, record):
                os.write(null, self.format(record).encode())
        log = logging.getLogger("modelcache")
        log.setLevel(logging.DEBUG)
        log.addHandler(Unbuffered())
        done = Counting()
        names = ["a", "b", "c", "d"]
        cache = small_cache(FOLDER, DictSource().add(*names), done.load, unload=done.unload, memory={"max_models": 3})
        from modelcache.events import Event
        cache.on(Event, lambda event: log.info("%s", event))
        cache.get("a")
        stop = threading.Event()
        def talk():
            while not stop.is_set():
                log.info("word")
        def use():
            number = 0
            while not stop.is_set():
                number += 1
                with cache.lease(names[number % 4], timeout=5):
                    pass
        threads = [Call(talk) for _ in range(4)] + [Call(use) for _ in range(2)]
        def child():
            log.info("child")
            assert cache.get(names[os.getpid() % 4], timeout=5)
        started = time.monotonic()
        forks = 0
        while forks < 200 and time.monotonic() - started < 60:
            joins = [fork(child, 12) for _ in range(4)]
            for join in joins:
                join()
            forks += 4
        stop.set()
        for thread in threads:
            thread.result(8)
        assert cache.close()
        assert len(done.unloaded) == len(done.loaded)
        print(forks)
        """,
        watchdog=75,
        timeout=80,
    )


def test_multiprocessing_fork_inside_a_loader(tmp_path: Path) -> None:
    """A loader may fork: the child uses the cache like any other, and is not taken for the parent's load."""
    fork_script(
        tmp_path,
        """
        def load(path, name):
            if name == "whole":
                def child():
                    assert cache.get("part", timeout=4).name == "part"
                    assert Call(cache.get, "other", timeout=4).result().name == "other"
                fork(child)()
                return Model(name)
            return load_model(path)
        cache = small_cache(FOLDER, DictSource().add("whole", "part", "other"), load, loaders=1)
        assert cache.get("whole", timeout=9).name == "whole"
        assert cache.close()
        """,
    )


def test_fork_from_a_callback(tmp_path: Path) -> None:
    """A callback may fork."""
    fork_script(
        tmp_path,
        """
        cache = small_cache(FOLDER, DictSource().add("a", "b"))
        joins = []
        def child():
            assert cache.get("b", timeout=4).name == "b"
        def hook(event):
            if not joins:
                joins.append(fork(child))
        cache.on(Missed, hook)
        cache.get("a")
        joins[0]()
        assert cache.close()
        """,
    )


def test_own_server_of_children_leaves_nothing(tmp_path: Path) -> None:
    """Ten children one after the other, killed in the middle of a fetch, leave folders that the next one sweeps."""
    fork_script(
        tmp_path,
        """
        source = DictSource().add("a", size=30000)
        cache = small_cache(FOLDER, source)
        for _ in range(10):
            def child():
                def die():
                    os.kill(os.getpid(), signal.SIGKILL)
                source.gate = die
                cache.get("a")
            try:
                fork(child)()
            except AssertionError as error:
                assert "-9" in str(error)
        assert len(list((FOLDER / "disk" / "tmp").iterdir())) == 2  # each sweeps what the one before it left
        again = small_cache(FOLDER, source)
        assert len(list((FOLDER / "disk" / "tmp").iterdir())) == 2
        assert cache.get("a").name == "a"
        assert cache.close() and again.close()
        assert not list((FOLDER / "disk" / "tmp").iterdir())
        """,
    )


def test_newcomer_in_a_child_of_a_full_parent(tmp_path: Path) -> None:
    """A child of a parent that is full serves a cold model: it gives up idle inherited ones, as last resort."""
    fork_script(
        tmp_path,
        """
        import psutil
        MIB = 2**20
        def load(path, name):
            model = Model(name)
            model.weights = bytearray(b"1") * (40 * MIB)
            return model
        from modelcache.gauges import ProcessGauge
        gauge = ProcessGauge()
        cache = small_cache(FOLDER, DictSource().add(*"abcd"), load, size_of=lambda *_: 40 * MIB,
                            memory={"gauge": gauge, "high": gauge.read().used + 140 * MIB})
        for name in "abc":
            cache.get(name)
        def child():
            assert cache.get("d", timeout=3).name == "d"
            cache.close()
        fork(child)()
        assert cache.get("d").name == "d"
        assert cache.close()
        """,
    )


def test_limit_unmet_at_the_fork_is_met_by_a_release(tmp_path: Path) -> None:
    """A limit that leases kept from being met at the fork is met in the child by their release, at once."""
    fork_script(
        tmp_path,
        """
        done = Counting()
        cache = small_cache(FOLDER, DictSource().add("a", "b"), done.load, unload=done.unload,
                            memory={"interval": 1000.0})
        leases = [cache.lease(name) for name in "ab"]
        for lease in leases:
            lease.acquire()
        cache.memory.max_models = 1
        def child():
            leases[0].release()
            assert [model.name for model in done.unloaded] == ["a"]
            leases[1].release()
            assert cache.close()
        fork(child)()
        leases[0].release()
        assert [model.name for model in done.unloaded] == ["a"]
        leases[1].release()
        assert cache.close()
        """,
    )
