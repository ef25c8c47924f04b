"""Row F5 from the client's side, with the real service: the HTTP side answers at once while a model worker stands."""

import http.client
import os
import signal
import time

import psutil  # type: ignore[import-untyped]
import pytest

from tests.beside import Beside
from tests.faults.rig import CHAT, Ask, Rig, mixed, tally
from tests.faults.table import Row

STREAMS = 32
WATCHDOG_S = 8.0
STOP_S = 5.0


class Probe(Beside):
    """Asks /livez all along; notes the statuses and the slowest answer."""

    period_s = 0.05

    def __init__(self, port: int) -> None:
        self.statuses: list[int] = []
        self.slowest_s = 0.0
        self._port = port

    def look(self) -> None:
        """Ask once."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", "/livez")
        self.statuses.append(connection.getresponse().status)
        connection.close()
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def stop(pid: int) -> None:
    """Stop the process, and see that it stands."""
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)


@pytest.mark.nightly
def test_f5_live_is_answered_while_a_worker_stands_and_bodies_of_1_mb_arrive(row: Row) -> None:
    with Rig(watchdog_s=WATCHDOG_S) as rig:
        asks = mixed(STREAMS)
        references = rig.alone(asks)
        long = Ask("1 MB", CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "All of it. " * 90_000}]})
        with Probe(rig.port) as probe:
            crowd = rig.start(asks)
            crowd.wait_events(100)
            (first,) = rig.worker_pids()
            stop(first)
            seen, over = crowd.events, time.monotonic() + STOP_S
            while time.monotonic() < over:
                rig.pool_status()
            stood = crowd.events - seen
            os.kill(first, signal.SIGCONT)
            tally(row, crowd.finish(), references)
            assert rig.worker_pids() == [first]

            crowd = rig.start(asks)
            crowd.wait_events(100)
            stop(first)
            bodies = rig.start([long] * 4).finish()
            # Longer than the model's context: refused by the HTTP side, which reads them while the worker stands.
            assert [record.status for record in bodies] == [400] * 4
            tally(row, crowd.finish(), references)
        status = rig.pool_status()
        row.replayed = status.counters.replayed
    assert stood < STREAMS  # what was under way already
    assert status.counters.hangs == 1
    assert row.complete == 2 * STREAMS
    assert set(probe.statuses) == {200}
    assert probe.slowest_s < 2.0
    row.fault = f"the same over HTTP with the real engine: SIGSTOP for {STOP_S:.0f} s, then for ever, bodies of 1 MB"
    row.hit = f"state T; {stood} events in {STOP_S:.0f} s; killed by the watchdog ({WATCHDOG_S:.0f} s)"
    row.notes.append(f"slowest of {len(probe.statuses)} answers of /livez: {probe.slowest_s * 1e3:.0f} ms")
