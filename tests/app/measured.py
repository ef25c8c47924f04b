"""The application with a clock in its hub, for the tests that run it under gunicorn."""

import threading
import time
from pathlib import Path

import gevent
from flask import Flask

import app


class HubClock:
    """Wakes every few milliseconds; ``worst`` is the longest delay in seconds since it was last read.

    Time in which the machine ran other processes instead of the hub's thread is not counted: a busy machine delays
    everybody, and only what this process does to its own clients is of interest.
    """

    def __init__(self) -> None:
        self.worst = 0.0
        self.worst_with_machine = 0.0
        self._schedule = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            before, waited = time.perf_counter(), self._waited_for_cpu()
            gevent.sleep(0.002)
            delay = time.perf_counter() - before - 0.002
            self.worst_with_machine = max(self.worst_with_machine, delay)
            self.worst = max(self.worst, delay - (self._waited_for_cpu() - waited))

    def _waited_for_cpu(self) -> float:
        """Seconds that the hub's thread was ready to run but another process had the processor."""
        return int(self._schedule.read_text().split()[1]) / 1e9

    def read(self) -> tuple[float, float]:
        """Return the worst delays, without and with the machine's share, and start again."""
        worst = self.worst, self.worst_with_machine
        self.worst = self.worst_with_machine = 0.0
        return worst


def create_app() -> Flask:
    """The real application and one more route."""
    made = app.create_app()
    service = made.extensions["tailrace"]
    clock = HubClock()

    @made.get("/_stats")
    def stats() -> dict[str, float]:
        own, with_machine = clock.read()
        return {
            "hub_lag_s": own,
            "hub_lag_with_machine_s": with_machine,
            "open_requests": service.open_requests,
            "open_jobs": service.pool.open_jobs,
        }

    @made.post("/_drain")
    def drain() -> dict[str, bool]:
        service.drain()
        return {"ok": True}

    return made
