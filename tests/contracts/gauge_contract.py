"""What every Gauge must do, ours or a user's: inherit, give ``make``, and pytest runs it."""

import os
import signal
import threading

import pytest

from modelcache.gauges import Gauge, Reading, SafeGauge, check_reading

WAIT = 10.0


class GaugeContract:
    """The contract."""

    def make(self) -> Gauge:
        """Return a new gauge."""
        raise NotImplementedError

    def test_is_a_gauge(self) -> None:
        """It has read()."""
        assert isinstance(self.make(), Gauge)

    def test_reading_is_sound(self) -> None:
        """A reading holds whole bytes: used 0 or more, limit above 0."""
        reading = self.make().read()
        assert check_reading(reading) == Reading(reading.used, reading.limit)

    def test_readings_repeat(self) -> None:
        """Read again at once, the limit is the same."""
        gauge = self.make()
        assert gauge.read().limit == gauge.read().limit

    def test_many_threads_at_once(self) -> None:
        """Several threads may read at the same time."""
        gauge, threads = self.make(), 4
        barrier = threading.Barrier(threads)
        readings: list[Reading] = []

        def read() -> None:
            barrier.wait(WAIT)
            readings.extend(gauge.read() for _ in range(50))

        workers = [threading.Thread(target=read) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(WAIT)
        assert len(readings) == threads * 50
        assert all(check_reading(reading) for reading in readings)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_works_after_fork(self) -> None:
        """A child that was forked reads the gauge that its parent made and has read."""
        gauge = self.make()
        limit = gauge.read().limit
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(10)
                os._exit(0 if check_reading(gauge.read()).limit == limit else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert gauge.read().limit == limit

    def test_is_safe_to_guard(self) -> None:
        """Guarded, it gives the same."""
        reading = SafeGauge(self.make()).read()
        assert reading is not None
        assert reading.limit == self.make().read().limit
