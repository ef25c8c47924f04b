"""Two real services for the whole battery, one of them with keys, and what must hold of it whatever a row sends.

Every test that uses a door is framed by `unharmed`: no process was replaced, the stream of another client never
stopped, no body showed anything of the program's inside (`tests.battery.answers`). At the end every admitted request
has come to exactly one end.
"""

import re
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest

from tests.battery import nginx
from tests.battery.answers import Door
from tests.battery.door_rig import Guarded
from tests.battery.watch import ProbeStream
from tests.debian import NGINX
from tests.e2e.server import Server, free_port, wait_until

_ACCEPTED = re.compile(r"\baccepted\b.*?\bid=(\S+)")
_ENDED = re.compile(r"\b(finished|failed|cancelled)\b.*?\bid=(\S+)")


class Battery:
    """The service under test with its doors and its probe."""

    def __init__(self) -> None:
        # One thread for the model: the probe never stops, and the rows need a processor as well.
        self.server = Server("--cpu_threads", "1", "--max_queue", "512")
        self.nginx: nginx.Nginx | None = None
        self.doors: dict[str, Door] = {}

    def start(self) -> None:
        self.server.wait_ready()
        self.doors["straight"] = Door("straight", self.server.port)
        binary = nginx.program()
        if binary is not None:
            self.nginx = nginx.Nginx(binary, free_port(), self.server.port)
            self.doors["nginx"] = Door("nginx", self.nginx.port)
        self.born = {process: process.create_time() for process in self.server.processes()}
        self.restarts = self._restarts()

    def check_processes(self) -> None:
        """Fail if a process is another one than at the start."""
        gone = [process for process in self.born if not process.is_running()]
        assert not gone, f"ended: {gone}\n{self.server.log[-3000:]}"

    def check_at_the_end(self) -> None:
        """No restart, no stranger, and every admitted request has come to one end."""
        self.check_processes()
        assert {process.pid for process in self.server.processes()} == {process.pid for process in self.born}
        assert self._restarts() == self.restarts
        wait_until(lambda: self._running() == 0, "all requests to end", 60)
        wait_until(lambda: not self._unended(), "a last word on every request", 20)
        log = self.server.log
        ends = Counter(found[2] for found in _ENDED.finditer(log))
        assert not [each for each, count in ends.items() if count != 1]
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]

    def stop(self) -> None:
        for door in self.doors.values():
            door.close()
        if self.nginx is not None:
            self.nginx.stop()
        self.server.stop()

    def http_workers(self) -> list[psutil.Process]:
        """The processes that speak HTTP."""
        return [psutil.Process(pid) for pid in self.server.http_workers()]

    def _restarts(self) -> list[int]:
        health = self.server.http.get("/health").json()
        return [worker["restarts"] for worker in health["workers"]]

    def _running(self) -> int:
        health = self.server.http.get("/health").json()
        return int(health["queued"]) + int(health["running"])

    def _unended(self) -> set[str]:
        log = self.server.log
        accepted = [found[1] for found in _ACCEPTED.finditer(log)]
        assert len(accepted) == len(set(accepted))
        return set(accepted) - {found[2] for found in _ENDED.finditer(log)}


@pytest.fixture(scope="session")
def battery() -> Iterator[Battery]:
    made = Battery()
    try:
        made.start()
        yield made
        made.check_at_the_end()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def battery_probe(battery: Battery) -> Iterator[ProbeStream]:
    """Streams while a module's rows run, and no longer: it takes a processor."""
    made = ProbeStream(battery.server.url)
    yield made
    made.stop()


@pytest.fixture
def unharmed(battery: Battery, battery_probe: ProbeStream) -> Iterator[Battery]:
    """What must hold around every row."""
    battery_probe.report()
    yield battery
    battery.check_processes()
    battery_probe.check()


@pytest.fixture(params=["straight", "nginx"])
def door(unharmed: Battery, request: pytest.FixtureRequest) -> Door:
    """Straight to gunicorn, and through nginx."""
    if request.param not in unharmed.doors:
        assert NGINX.may_be_missing, "apt-get has not brought nginx"
        pytest.skip("there is no nginx here")
    return unharmed.doors[request.param]


@pytest.fixture
def straight(unharmed: Battery) -> Door:
    """Straight to gunicorn, for what nginx keeps away or changes nothing about."""
    return unharmed.doors["straight"]


@pytest.fixture(scope="session")
def guarded() -> Iterator[Guarded]:
    """A service with keys, for rows A and I."""
    made = Guarded()
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def guarded_probe(guarded: Guarded) -> Iterator[ProbeStream]:
    """The probe of the service with keys."""
    made = ProbeStream(guarded.server.url, guarded.keys["probe"])
    yield made
    made.stop()


@pytest.fixture
def watched(guarded: Guarded, guarded_probe: ProbeStream) -> Iterator[Guarded]:
    """What must hold around every row of A and I, but for the one that says so."""
    guarded_probe.report()
    yield guarded
    assert guarded.pids() == guarded.born
    guarded_probe.check()
