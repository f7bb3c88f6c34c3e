"""Callbacks: who hears what, in which order, and that nothing they do gets out."""

import functools
import gc
import itertools
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from modelcache.deliveries import Background, Calls
from modelcache.errors import ConfigError
from modelcache.events import Event, Evicted, Failed, Hit, Loaded, Missed
from modelcache.hooks import Hooks

WAIT = 10.0  # seconds until a test gives up


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    """Give hooks whose thread is gone after the test."""
    made = Hooks()
    yield made
    assert made.close(WAIT)


def evicted(seq: int = 1) -> Evicted:
    """Make an event."""
    return Evicted(seq=seq, time=0.0, model=f"m{seq}")


def hit(seq: int = 1) -> Hit:
    """Make an event."""
    return Hit(seq=seq, time=0.0)


class Gate:
    """A background callback that stands still until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.heard: list[int] = []

    def __call__(self, event: Event) -> None:
        """Stand still."""
        self.entered.set()
        assert self.open.wait(WAIT)
        self.heard.append(event.seq)


# Registry


def test_callback_hears_its_type_only(hooks: Hooks) -> None:
    """A callback hears the type it was registered for, and no other."""
    heard: list[Event] = []
    hooks.on(Evicted, heard.append)
    hooks.emit([evicted(), hit()])
    assert heard == [evicted()]


def test_base_class_hears_all(hooks: Hooks) -> None:
    """A callback for Event hears every subclass."""
    heard: list[Event] = []
    hooks.on(Event, heard.append)
    hooks.emit([evicted(1), hit(2)])
    assert [event.seq for event in heard] == [1, 2]


def test_decorator_returns_the_function(hooks: Hooks) -> None:
    """Without a callback, on() is a decorator that leaves the function as it is."""
    heard: list[Event] = []

    @hooks.on(Evicted)
    def tell(event: Evicted) -> None:
        heard.append(event)

    hooks.emit([evicted()])
    assert heard == [evicted()]
    assert hooks.off(tell)


def test_decorator_takes_background(hooks: Hooks) -> None:
    """The decorator form passes background on."""
    names: list[str] = []

    @hooks.on(Evicted, background=True)
    def tell(event: Evicted) -> None:
        names.append(threading.current_thread().name)

    hooks.emit([evicted()])
    assert hooks.close(WAIT)
    assert names == ["modelcache-hooks"]


def test_on_returns_the_callback(hooks: Hooks) -> None:
    """With a callback, on() returns it."""
    callback = mock.Mock()
    assert hooks.on(Evicted, callback) is callback


def test_callbacks_run_in_order_of_registration(hooks: Hooks) -> None:
    """Callbacks are called in order of registration, whether for a base class or not."""
    order: list[str] = []
    hooks.on(Event, lambda event: order.append("first"))
    hooks.on(Evicted, lambda event: order.append("second"))
    hooks.on(Event, lambda event: order.append("third"))
    hooks.emit([evicted()])
    assert order == ["first", "second", "third"]


def test_registered_twice_is_called_once(hooks: Hooks) -> None:
    """One callback registered twice for one type is one registration; bound methods count as equal."""
    heard: list[Event] = []
    hooks.on(Evicted, heard.append)
    hooks.on(Evicted, heard.append)
    hooks.emit([evicted()])
    assert len(heard) == 1
    assert hooks.off(heard.append)
    assert not hooks.wants(Evicted)


def test_registered_again_takes_the_latest_background(hooks: Hooks) -> None:
    """Registering again changes between background and the caller's thread."""
    names: list[str] = []

    def tell(event: Event) -> None:
        names.append(threading.current_thread().name)

    hooks.on(Evicted, tell, background=True)
    hooks.on(Evicted, tell)
    hooks.emit([evicted()])
    assert names == [threading.current_thread().name]


def test_overlapping_types_hear_an_event_once(hooks: Hooks) -> None:
    """A callback registered for a type and its base hears each event once."""
    heard: list[Event] = []
    hooks.on(Event, heard.append)
    hooks.on(Evicted, heard.append)
    hooks.emit([evicted()])
    assert len(heard) == 1


def test_off_removes_from_every_type(hooks: Hooks) -> None:
    """off() removes a callback from all types, and says whether it was there."""
    heard: list[Event] = []
    hooks.on(Evicted, heard.append)
    hooks.on(Hit, heard.append)
    assert hooks.off(heard.append)
    hooks.emit([evicted(), hit()])
    assert heard == []
    assert not hooks.off(heard.append)


@pytest.mark.parametrize("bad", [int, object, "Evicted", None, evicted()], ids=repr)
def test_other_types_are_refused(hooks: Hooks, bad: Any) -> None:
    """Only event types can be listened for."""
    with pytest.raises(ConfigError, match="event type"):
        hooks.on(bad, print)
    with pytest.raises(ConfigError, match="event type"):
        hooks.on(bad)


def test_not_callable_is_refused(hooks: Hooks) -> None:
    """A callback must be callable, also in the decorator form."""
    with pytest.raises(ConfigError, match="not callable"):
        hooks.on(Evicted, 3)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="not callable"):
        hooks.on(Evicted)(3)  # type: ignore[arg-type]


async def _coroutine(event: Event) -> None: ...


class _Async:
    async def __call__(self, event: Event) -> None: ...
    async def method(self, event: Event) -> None: ...


@pytest.mark.parametrize("callback", [_coroutine, functools.partial(_coroutine), _Async(), _Async().method])
def test_coroutine_functions_are_refused(hooks: Hooks, callback: Callable[[Event], object]) -> None:
    """A coroutine function, which nobody would await, is refused in whatever form it comes."""
    with pytest.raises(ConfigError, match="coroutine"):
        hooks.on(Evicted, callback)


# Wants


def test_wants_follows_the_registry(hooks: Hooks) -> None:
    """wants() and listens_hit are true exactly while somebody listens."""
    assert not hooks.wants(Evicted)
    assert not hooks.listens_hit
    hooks.on(Evicted, print)
    assert hooks.wants(Evicted)
    assert not hooks.wants(Missed)
    assert not hooks.listens_hit
    hooks.on(Hit, repr)
    assert hooks.listens_hit
    hooks.off(repr)
    assert not hooks.listens_hit


def test_base_class_wants_hits(hooks: Hooks) -> None:
    """Whoever listens for Event also wants Hit."""
    hooks.on(Event, print)
    assert hooks.wants(Hit)
    assert hooks.listens_hit


def test_wants_and_emit_take_no_lock(hooks: Hooks) -> None:
    """While another thread changes the registry, events are handed on without waiting for it."""
    heard: list[Event] = []
    hooks.on(Evicted, heard.append)
    with hooks._lock:
        thread = threading.Thread(target=lambda: hooks.wants(Evicted) and hooks.emit([evicted()]))
        thread.start()
        thread.join(WAIT)
        assert heard == [evicted()]


def test_registration_from_many_threads_loses_none(hooks: Hooks) -> None:
    """Registrations that meet are all kept."""
    threads, each = 8, 50
    barrier = threading.Barrier(threads)

    def register() -> None:
        barrier.wait(WAIT)
        for _ in range(each):
            hooks.on(Evicted, lambda event: counts.append(1))

    counts: list[int] = []
    workers = [threading.Thread(target=register) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
    hooks.emit([evicted()])
    assert len(counts) == threads * each


# Isolation


@pytest.mark.parametrize("error", [ValueError("no"), GeneratorExit(), type("Odd", (BaseException,), {})()], ids=repr)
def test_what_a_callback_raises_is_logged_and_counted(
    hooks: Hooks, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """A callback that raises breaks nothing: the others are called, it is logged by name and counted."""
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise error

    hooks.on(Evicted, broken)
    hooks.on(Evicted, heard.append)
    hooks.emit([evicted(1), evicted(2)])
    assert [event.seq for event in heard] == [1, 2]
    assert hooks.errors == 2
    assert "broken" in caplog.text
    assert "'m1'" in caplog.text
    assert {record.name for record in caplog.records} == {"modelcache"}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_on_after_all_deliveries(hooks: Hooks, kind: type[BaseException]) -> None:
    """KeyboardInterrupt and SystemExit are raised by emit() after everybody has heard everything, the first of them."""
    heard: list[Event] = []
    errors = iter([kind("first"), SystemExit("second")])

    def interrupted(event: Event) -> None:
        raise next(errors)

    hooks.on(Evicted, interrupted)
    hooks.on(Evicted, heard.append)
    with pytest.raises(kind, match="first"):
        hooks.emit([evicted(1), evicted(2)])
    assert [event.seq for event in heard] == [1, 2]
    assert hooks.errors == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, ValueError])
def test_background_survives_whatever_is_raised(hooks: Hooks, kind: type[BaseException]) -> None:
    """In the background everything raised, interrupts too, is logged and counted, and the thread goes on."""
    heard: list[Event] = []
    hooks.on(Evicted, mock.Mock(side_effect=kind), background=True)
    hooks.on(Evicted, heard.append, background=True)
    hooks.emit([evicted(1), evicted(2)])
    assert hooks.close(WAIT)
    assert [event.seq for event in heard] == [1, 2]
    assert hooks.errors == 2


def test_broken_log_handler_breaks_nothing(hooks: Hooks) -> None:
    """A log filter that raises while a failure is told does not reach the caller."""
    hooks.on(Evicted, mock.Mock(side_effect=ValueError))
    logger = logging.getLogger("modelcache")
    broken = mock.Mock(spec=[], side_effect=RuntimeError)
    logger.addFilter(broken)
    try:
        hooks.emit([evicted()])
    finally:
        logger.removeFilter(broken)
    assert broken.called
    assert hooks.errors == 1


def test_callback_without_a_usable_repr_is_named_by_its_type(hooks: Hooks, caplog: pytest.LogCaptureFixture) -> None:
    """A callback whose repr raises is named by its class."""

    class Unprintable:
        def __repr__(self) -> str:
            raise ValueError

        def __call__(self, event: Event) -> None:
            raise KeyError

    hooks.on(Evicted, Unprintable())
    hooks.emit([evicted()])
    assert "Unprintable" in caplog.text


def test_slow_callback_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that takes more than a second is warned about once, not at each event; quick ones never."""
    ticks = itertools.count(step=2)  # two seconds between two looks at the clock
    hooks = Hooks(clock=lambda: float(next(ticks)))
    hooks.on(Evicted, print)
    hooks.emit([evicted(1), evicted(2)])
    assert caplog.text.count("print took 2.0 s for Evicted") == 1
    assert hooks.errors == 0


def test_quick_and_background_callbacks_are_not_told_slow(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a quick callback nor one in the background is warned about."""
    quick = Hooks(clock=lambda: 1.0)
    quick.on(Evicted, print)
    quick.emit([evicted()])
    ticks = itertools.count(step=2)
    behind = Hooks(clock=lambda: float(next(ticks)))
    behind.on(Evicted, print, background=True)
    behind.emit([evicted()])
    assert behind.close(WAIT)
    assert caplog.text == ""


def test_callback_may_register_and_emit(hooks: Hooks) -> None:
    """A callback may call on(), off() and emit() itself; what it registers hears the next event."""
    heard: list[Event] = []

    def first(event: Event) -> None:
        hooks.off(first)
        hooks.on(Evicted, heard.append)
        hooks.emit([evicted(7)])

    hooks.on(Evicted, first)
    hooks.emit([evicted(1), evicted(2)])
    assert [event.seq for event in heard] == [7, 2]


def test_no_lock_is_held_in_a_callback(hooks: Hooks) -> None:
    """While a callback runs, another thread can register and hand on events."""
    done = threading.Event()

    def other() -> None:
        hooks.on(Loaded, repr)
        hooks.emit([hit()])
        done.set()

    def callback(event: Event) -> None:
        threading.Thread(target=other).start()
        assert done.wait(WAIT)

    hooks.on(Evicted, callback)
    hooks.emit([evicted()])
    assert hooks.errors == 0


# Background


def test_background_keeps_the_order(hooks: Hooks) -> None:
    """Background callbacks run on one other thread, in the order of emit()."""
    heard: list[tuple[int, str]] = []
    hooks.on(Evicted, lambda event: heard.append((event.seq, threading.current_thread().name)), background=True)
    for seq in range(100):
        hooks.emit([evicted(seq)])
    assert hooks.close(WAIT)
    assert heard == [(seq, "modelcache-hooks") for seq in range(100)]


def test_no_thread_without_need(hooks: Hooks) -> None:
    """No thread is started until a background callback has something to hear."""
    before = threading.active_count()
    hooks.on(Evicted, print, background=True)
    hooks.emit([hit()])
    assert threading.active_count() == before


def test_blocked_background_callback_delays_nobody(hooks: Hooks) -> None:
    """While a background callback stands still, emit() returns and other callbacks are called."""
    gate, heard = Gate(), list[Event]()
    hooks.on(Evicted, gate, background=True)
    hooks.on(Evicted, heard.append)
    hooks.emit([evicted(1)])
    assert gate.entered.wait(WAIT)
    hooks.emit([evicted(2)])
    assert [event.seq for event in heard] == [1, 2]
    gate.open.set()


def test_full_queue_drops_the_newest_and_counts() -> None:
    """When the queue is full the newest events are dropped and counted; those before arrive in order."""
    hooks, gate = Hooks(limit=3), Gate()
    hooks.on(Evicted, gate, background=True)
    hooks.emit([evicted(0)])
    assert gate.entered.wait(WAIT)  # now the queue is empty
    hooks.emit([evicted(seq) for seq in range(1, 6)])
    gate.open.set()
    assert hooks.close(WAIT)
    assert gate.heard == [0, 1, 2, 3]
    assert hooks.dropped == 2


def test_off_also_stops_what_waits(hooks: Hooks) -> None:
    """After off(), what waits in the queue for the callback is not delivered."""
    gate = Gate()
    hooks.on(Evicted, gate, background=True)
    hooks.emit([evicted(1), evicted(2)])
    assert gate.entered.wait(WAIT)
    hooks.off(gate)
    gate.open.set()
    assert hooks.close(WAIT)
    assert gate.heard == [1]


def test_close_gives_up_after_its_timeout(hooks: Hooks) -> None:
    """close() returns False when a callback stands still past the timeout, True once it has gone on."""
    gate = Gate()
    hooks.on(Evicted, gate, background=True)
    hooks.emit([evicted(1), evicted(2)])
    assert gate.entered.wait(WAIT)
    assert not hooks.close(0.0)
    gate.open.set()
    assert hooks.close(WAIT)
    assert gate.heard == [1, 2]


def test_close_from_the_background_thread(hooks: Hooks) -> None:
    """A background callback that closes does not wait for itself; what waits is still delivered."""
    answers: list[bool] = []
    both = threading.Event()

    def close(event: Event) -> None:
        both.wait(WAIT)
        answers.append(hooks.close(WAIT))

    hooks.on(Evicted, close, background=True)
    hooks.emit([evicted(1), evicted(2)])
    both.set()
    assert hooks.close(WAIT)
    assert answers == [False, False]


def test_after_close(hooks: Hooks) -> None:
    """After close(), background deliveries are dropped and counted, others are made, and no thread comes back."""
    heard: list[Event] = []
    hooks.on(Evicted, heard.append)
    hooks.on(Evicted, print, background=True)
    assert hooks.close(WAIT)
    assert hooks.close(0.0)
    before = threading.active_count()
    hooks.emit([evicted()])
    assert heard == [evicted()]
    assert hooks.dropped == 1
    assert threading.active_count() == before


def test_thread_that_cannot_start_is_told_once_and_tried_again(
    hooks: Hooks, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started the caller is not bothered, and the events arrive once one can."""
    heard: list[int] = []
    hooks.on(Evicted, lambda event: heard.append(event.seq), background=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        hooks.emit([evicted(1), evicted(2)])
    assert caplog.text.count("did not start") == 1
    hooks.emit([evicted(3)])
    assert hooks.close(WAIT)
    assert heard == [1, 2, 3]


def test_close_counts_what_no_thread_could_deliver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that wait for a thread that never started are dropped and counted by close()."""
    hooks = Hooks()
    hooks.on(Evicted, print, background=True)
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError))
    hooks.emit([evicted(1), evicted(2)])
    assert hooks.close(0.0)
    assert hooks.dropped == 2


def test_dropped_hooks_end_their_thread() -> None:
    """Hooks that nobody holds any more are collected, though their thread waits, and it ends."""
    entered = threading.Event()

    def start() -> tuple[threading.Thread, weakref.ref[Hooks]]:
        hooks = Hooks()

        hooks.on(Evicted, lambda event: hooks.errors, background=True)  # a circle, as with a callback of a cache
        hooks.on(Loaded, lambda event: entered.set(), background=True)
        hooks.emit([evicted(), Loaded(seq=2, time=0.0)])
        thread = hooks._background._thread
        assert thread is not None
        return thread, weakref.ref(hooks)

    thread, gone = start()
    assert entered.wait(WAIT)  # so the callback before has returned
    gc.collect()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert gone() is None


def test_signal_handler_may_emit_and_close_while_the_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that runs in the middle of the thread's start neither deadlocks nor starts another."""
    hooks = Hooks()
    heard: list[int] = []
    hooks.on(Evicted, lambda event: heard.append(event.seq), background=True)
    start, answers = threading.Thread.start, []

    def interrupted(thread: threading.Thread) -> None:
        hooks.emit([evicted(2)])
        answers.append(hooks.close(WAIT))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    hooks.emit([evicted(1)])
    assert answers == [False]
    assert hooks.close(WAIT)
    assert heard == [1, 2]


# Fork


def _in_child(check: Callable[[], bool]) -> int:
    """Run a check in a forked child and return its exit code, 14 if it was killed for taking too long."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(10)
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_starts_anew(hooks: Hooks) -> None:
    """In a forked child locks held by other threads do not matter, and the background thread starts again."""
    gate, heard = Gate(), list[int]()
    hooks.on(Loaded, gate, background=True)
    hooks.on(Evicted, lambda event: heard.append(event.seq), background=True)
    hooks.emit([Loaded(seq=1, time=0.0)])
    assert gate.entered.wait(WAIT)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with hooks._lock, hooks._calls.lock, hooks._background._lock:
            held.set()
            release.wait(WAIT)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(WAIT)

    def check() -> bool:
        hooks.reset_after_fork()
        hooks.on(Hit, print)
        hooks.emit([evicted(2)])
        return hooks.close(5) and heard == [2] and hooks.listens_hit

    try:
        assert _in_child(check) == 0
    finally:
        release.set()
        gate.open.set()
        holder.join(WAIT)


def test_reset_keeps_callbacks_counters_and_being_closed(hooks: Hooks) -> None:
    """reset_after_fork() keeps who listens, what was counted, and that the hooks are closed."""
    hooks.on(Hit, mock.Mock(side_effect=ValueError))
    hooks.on(Evicted, print, background=True)
    hooks.emit([hit()])
    hooks.close(WAIT)
    hooks.reset_after_fork()
    assert hooks.errors == 1
    assert hooks.listens_hit
    hooks.emit([evicted()])
    assert hooks.dropped == 1


def test_end_of_an_unused_queue_is_no_error() -> None:
    """A queue whose thread never ran can be closed and ended any number of times."""
    background = Background(Calls(lambda: 0.0), 1)
    background.end()
    assert background.close(0.0)
    assert background.close(0.0)


def test_failed_event_reaches_its_listener(hooks: Hooks) -> None:
    """Events of all classes pass through alike."""
    heard: list[Failed] = []
    hooks.on(Failed, heard.append)
    hooks.emit(iter([Failed(seq=1, time=0.0, error="LoadFailed")]))
    assert heard[0].error == "LoadFailed"
