"""The application with a clock in its hub, for the tests that run it under gunicorn."""

import time

import gevent
from flask import Flask

import app


class HubClock:
    """Wakes every few milliseconds; ``worst`` is the longest delay in seconds since it was last read."""

    def __init__(self) -> None:
        self.worst = 0.0
        gevent.spawn(self._run)

    def _run(self) -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(0.002)
            self.worst = max(self.worst, time.perf_counter() - before - 0.002)

    def read(self) -> float:
        """Return the worst delay and start again."""
        worst, self.worst = self.worst, 0.0
        return worst


def create_app() -> Flask:
    """The real application and one more route."""
    made = app.create_app()
    service = made.extensions["tailrace"]
    clock = HubClock()

    @made.get("/_stats")
    def stats() -> dict[str, float]:
        return {
            "hub_lag_s": clock.read(),
            "open_requests": service.open_requests,
            "open_jobs": service.pool.open_jobs,
        }

    @made.post("/_drain")
    def drain() -> dict[str, bool]:
        service.drain(0)
        return {"ok": True}

    return made
