"""Signals: Ctrl-C and handlers that call the cache, at every line of the library that the main thread may be in."""

import sys

import pytest

from tests.support.children import run

traced = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="from 3.12 on a trace function also stops between a with block that ends in a comprehension and its exit, "
    "where no signal is handled",
)

TRACE = """
import linecache, modelcache, tempfile
ROOT = str(Path(modelcache.__file__).parent)
MAIN = threading.get_ident()

def at_line(number, act, body):
    '''Run body on this thread, and act before its number-th line of the library; return the lines passed.'''
    passed = 0
    def line(frame, event, argument):
        nonlocal passed, number
        if event != "line":
            return line
        passed += 1
        if passed == number:
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if text.startswith("with "):
                number += 1  # also seen on the way out, between the block and __exit__, where no signal is handled
            else:
                print(frame.f_code.co_filename[len(ROOT):], frame.f_lineno, file=sys.stderr, flush=True)
                act()
        return line
    def call(frame, event, argument):
        return line if passed < number and frame.f_code.co_filename.startswith(ROOT) else None
    sys.settrace(call)
    try:
        body()
    finally:
        sys.settrace(None)
    return passed

def fresh(number):
    gc.freeze()  # so that a collection looks at this round only
    done = Counting()
    source = DictSource().add("a", "b")
    cache = small_cache(Path(tempfile.mkdtemp(dir=sys.argv[1])), source, done.load, unload=done.unload,
                        memory={"max_models": 1, "interval": 3600.0})
    return cache, done

def story(cache):
    handle = cache.prefetch(["b"])
    handle.wait(5)
    with cache.lease("a") as model:
        cache.unload("a")
    cache.get("a")
    cache.memory.max_models = 2
    cache.delete("a")
"""

INTERRUPT = (
    TRACE
    + """
class Stop(KeyboardInterrupt): pass
def interrupt():
    raise Stop
def look_up(cache):
    cache.prefetch(["b"]).wait(5)
    with cache.lease("a"):
        cache.get("a")
        cache.get("b")
story = {"lookups": look_up, "all verbs": story}[sys.argv[4]]
number = int(sys.argv[2])
step = int(sys.argv[3])
ended = False
while not ended:
    cache, done = fresh(number)
    if story is look_up:
        cache.memory.max_models = 2
    signal.alarm(12)
    print("line", number, end=" ", file=sys.stderr, flush=True)
    try:
        at_line(number, interrupt, lambda: story(cache))
        ended = True
    except Stop as stop:
        stop.__traceback__ = None
        del stop
    gc.collect()
    for name in "ba":
        error = Call(cache.get, name, timeout=2 if story is look_up else 0.5).error(4)
        assert error is None or story is not look_up and isinstance(error, ModelCacheError), (number, error)
    started = time.monotonic()
    gone = Call(cache.close, timeout=1 if story is look_up else 0.2).result(5)
    if story is look_up:
        assert gone or Call(cache.close, timeout=1).result(5), number
        assert len(done.unloaded) == len(done.loaded), number
    assert all(model.unloads == 1 for model in done.unloaded), number
    modelcache.lifecycle._living.clear()
    number += step
print("whole story after", number)
"""
)

HANDLER = (
    TRACE
    + """
number = int(sys.argv[2])
step = int(sys.argv[3])
ended = False
while not ended:
    cache, done = fresh(number)
    signal.alarm(12)
    print("line", number, end=" ", file=sys.stderr, flush=True)
    fired = []
    def shut():
        fired.append(cache.close(timeout=0.5))
    try:
        at_line(number, shut, lambda: story(cache))
    except ModelCacheError as error:
        assert isinstance(error, CacheClosed), (number, error)
    ended = not fired
    gc.collect()
    assert eventually(lambda: cache.close(timeout=2), 5), number
    assert len(done.unloaded) == len(done.loaded), number
    assert all(model.unloads == 1 for model in done.unloaded), number
    number += step
print("whole story after", number)
"""
)


@traced
@pytest.mark.parametrize("story", ["lookups", "all verbs"])
def test_f056_ctrl_c_at_many_lines(tmp_path: str, story: str) -> None:
    """F056: Ctrl-C at any line of a lookup leaves a cache that works; at any line at all, one that hangs nobody."""
    step = {"lookups": 7, "all verbs": 31}[story]
    assert "whole story" in run(INTERRUPT, tmp_path, 1, step, story, watchdog=18)


@traced
def test_f056_close_from_a_handler_at_many_lines(tmp_path: str) -> None:
    """F056: close() from a signal handler, wherever the main thread is, does not hang, and ends the cache."""
    assert "whole story" in run(HANDLER, tmp_path, 1, 31, watchdog=18)


@traced
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("story", ["lookups", "all verbs"])
def test_f056_ctrl_c_at_every_line(tmp_path: str, story: str) -> None:
    """F056: the same at every line, one after the other."""
    assert "whole story" in run(INTERRUPT, tmp_path, 1, 1, story, timeout=500)


@traced
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_f056_close_from_a_handler_at_every_line(tmp_path: str) -> None:
    """F056: the same at every line, one after the other."""
    assert "whole story" in run(HANDLER, tmp_path, 1, 1, timeout=500)


def test_f056_real_ctrl_c_while_it_waits(tmp_path: str) -> None:
    """F056: SIGINT during a get that waits for its load raises KeyboardInterrupt at once, and the process ends soon."""
    script = """
    gate = Gate()
    done = Counting(a=gate)
    cache = small_cache(Path(sys.argv[1]), DictSource().add("a"), done.load)
    def shoot():
        gate.wait()
        eventually(lambda: cache.stats().waiters)
        os.kill(os.getpid(), signal.SIGINT)
    Call(shoot)
    started = time.monotonic()
    try:
        cache.get("a", timeout=None)
    except KeyboardInterrupt:
        print("interrupted")
    assert time.monotonic() - started < 5
    assert cache.stats().waiters == 0
    gate.open()
    assert cache.get("a").name == "a"
    assert cache.close()
    """
    assert "interrupted" in run(script, tmp_path)


def test_signal_handler_reads_while_the_lock_is_its_own(tmp_path: str) -> None:
    """A handler may look at models() and stats() in the middle of a decision; a lookup there is refused clearly."""
    script = (
        TRACE
        + """
errors = set()
for number in range(1, 1000, 29):
    cache, done = fresh(number)
    signal.alarm(12)
    def look():
        cache.models(), cache.stats(), cache.history()
        try:
            cache.get("b", timeout=1)
        except ModelCacheError as error:
            errors.add(str(error)[:40])
    at_line(number, look, lambda: story(cache))
    assert eventually(lambda: cache.close(timeout=2), 5), number
    assert len(done.unloaded) == len(done.loaded), number
print("looked", errors)
"""
    )
    assert "looked" in run(script, tmp_path, watchdog=18)
