"""The shipped units under a real systemd, with the real model; only where root may boot one. Minutes, so nightly."""

import http.client
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from config.sources import ROOT
from tests.e2e.server import free_port
from tests.faults.booted import Machine, why_not
from tests.workers.pool.harness import wait_until

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
MINUTES = 600.0


@cache
def port() -> int:
    """The port of all services here; chosen when the first one is about to start, for it is nobody's until then."""
    return free_port()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if reason := why_not():
        pytest.skip(reason)
    settings = {"TAILRACE_ONLY_CPU": "true", "TAILRACE_PORT": str(port()), "TAILRACE_WATCHDOG_S": "5"}
    # Only this test's interpreter needs it: it stands elsewhere than it was built for.
    made = Machine(ROOT, settings | {"LD_LIBRARY_PATH": "/opt/python/lib"})
    yield made
    made.kill()


def ask(key: str = "") -> tuple[int, str]:
    """One chat; return status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", port(), timeout=120)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4})
    try:
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def pid_of(machine: Machine, unit: str, title: str) -> str:
    """The pid, inside, of the unit's process with this title."""
    code, told = machine.run("pgrep", "-f", title)
    assert code == 0, machine.run("systemctl", "status", "--no-pager", unit)
    return told.split()[0]


def restarted(machine: Machine, unit: str, before: int) -> Callable[[], bool]:
    def done() -> bool:
        times = int(machine.shown(unit, "NRestarts") or 0)
        return times > before and machine.shown(unit, "ActiveState") == "active"

    return done


def test_one_unit_starts_reloads_comes_back_and_stops(machine):
    machine.run(
        "sh", "-c", "mkdir -p /etc/credstore; umask 077; echo 'alice: sk-of-alice' > /etc/credstore/tailrace.keys"
    )
    drop_in = "/etc/systemd/system/tailrace.service.d"
    # 35 s is what watchdog_s leads to at least, see Announcer.
    machine.run("sh", "-c", f"mkdir {drop_in}; printf '[Service]\\nWatchdogSec=36\\n' > {drop_in}/quick.conf")
    machine.run("systemctl", "daemon-reload")
    code, told = machine.run("systemctl", "start", "tailrace", seconds=MINUTES)
    assert code == 0, told + machine.run("journalctl", "--no-pager", "-u", "tailrace")[1]
    # Started means that the model answers, with the keys that systemd handed over.
    assert ask("sk-of-alice")[0] == 200
    assert ask()[0] == 401
    assert machine.shown("tailrace", "StatusText").startswith("ready: 1 worker")
    owner = machine.run("stat", "-c", "%a", "/run/tailrace")[1].strip()
    assert owner == "700"
    main, model = machine.shown("tailrace", "MainPID"), pid_of(machine, "tailrace", "tailrace: model worker 0")
    assert machine.run("systemctl", "reload", "tailrace")[0] == 0
    wait_until(lambda: machine.shown("tailrace", "StatusText").startswith("ready"), "the end of the reload", 120)
    assert machine.shown("tailrace", "ActiveState") == "active"
    assert (machine.shown("tailrace", "MainPID"), pid_of(machine, "tailrace", "tailrace: model worker 0")) == (
        main,
        model,
    )
    assert ask("sk-of-alice")[0] == 200

    # The pool dies: systemd need not know, but it is told.
    machine.run("kill", "-9", pid_of(machine, "tailrace", "tailrace: pool"))
    told_of = ("the pool died", "starting the pool", "starting a model", "loading")
    wait_until(lambda: machine.shown("tailrace", "StatusText").startswith(told_of), "the news", 60)
    wait_until(lambda: machine.shown("tailrace", "StatusText").startswith("ready"), "the new pool", MINUTES)
    assert (machine.shown("tailrace", "NRestarts"), machine.shown("tailrace", "MainPID")) == ("0", main)

    # The main process hangs: the watchdog ends all of it, and it is started again.
    machine.run("systemctl", "kill", "--kill-whom=main", "-s", signal.SIGSTOP.name, "tailrace")
    wait_until(restarted(machine, "tailrace", 0), "the restart by the watchdog", MINUTES)
    assert "Watchdog timeout" in machine.run("journalctl", "--no-pager", "-u", "tailrace")[1]
    # It is killed: the same.
    machine.run("systemctl", "kill", "--kill-whom=main", "-s", signal.SIGKILL.name, "tailrace")
    wait_until(restarted(machine, "tailrace", 1), "the restart after KILL", MINUTES)
    assert ask("sk-of-alice")[0] == 200
    assert machine.run("systemctl", "stop", "tailrace", seconds=MINUTES)[0] == 0
    assert machine.shown("tailrace", "Result") == "success"
    assert machine.run("pgrep", "-f", "tailrace: ")[0] == 1


def test_two_units_share_a_pool_and_a_wrong_setting_is_not_tried_again(machine):
    assert machine.run("systemd-sysusers")[0] == 0
    machine.run("rm", "-f", "/etc/credstore/tailrace.keys")
    code, told = machine.run("systemctl", "start", "tailrace-pool", "tailrace-http", seconds=MINUTES)
    assert code == 0, told + machine.run("journalctl", "--no-pager", "-u", "tailrace-*")[1]
    wait_until(lambda: ask()[0] == 200, "an answer", 60)
    assert machine.shown("tailrace-pool", "StatusText").startswith("ready: 1 worker")
    assert "a pool of its own listens" in machine.shown("tailrace-http", "StatusText")
    model = pid_of(machine, "tailrace-pool", "tailrace: model worker 0")
    assert machine.run("systemctl", "restart", "tailrace-http", seconds=MINUTES)[0] == 0
    wait_until(lambda: ask()[0] == 200, "an answer", 60)
    assert pid_of(machine, "tailrace-pool", "tailrace: model worker 0") == model
    assert machine.run("systemctl", "stop", "tailrace-http", "tailrace-pool", seconds=MINUTES)[0] == 0
    machine.run("sh", "-c", "echo TAILRACE_MAX_BATCH=many >> /etc/default/tailrace")
    assert machine.run("systemctl", "start", "tailrace-http")[0] != 0
    assert "TAILRACE_MAX_BATCH" in machine.shown("tailrace-http", "StatusText")
    assert machine.shown("tailrace-http", "ActiveState") == "failed"
    assert os.waitstatus_to_exitcode(int(machine.shown("tailrace-http", "ExecMainStatus")) << 8) == 2
