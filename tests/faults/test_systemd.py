"""What systemd is told by the whole service, while it loads, serves, reloads, stops, and while things die."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.manager import Manager
from tests.faults.service import Service
from tests.lifeline import tied
from tests.workers.pool.harness import ROOT, descendants, wait_dead, wait_until
from tests.workers.pool.scripted_engine import WAIT

GATED = [WAIT, 5, 0, 1]
WATCHDOG = {"WATCHDOG_USEC": "4000000"}


@pytest.fixture
def manager(directory: Path) -> Iterator[Manager]:
    made = Manager(directory)
    yield made
    made.close()


@pytest.fixture
def start_unit(start_service, manager):
    """Start the service as systemd would, but for the cgroup."""

    def start(**settings: object) -> Service:
        return start_service(NOTIFY_SOCKET=manager.path, **(WATCHDOG | settings))

    return start


def model_pid(service: Service) -> int:
    pid = service.pool_status().workers[0].pid
    assert pid is not None
    return pid


def test_ready_is_said_when_the_model_answers_and_not_before(start_unit, manager):
    service = start_unit(POOL_ENGINE="gated")
    loading = manager.wait_said("STATUS", "loading the model: 43 %, reading")
    manager.wait_said("EXTEND_TIMEOUT_USEC")
    manager.wait_said("WATCHDOG", "1", after=loading)
    # The HTTP side has been serving all the time.
    wait_until(lambda: len(service.http_workers()) == 2 and service.get("/pid")[0] == 200, "HTTP workers")
    assert not any("READY" in word.said for word in manager.words)
    service.open_gate(0)
    ready = manager.wait_said("READY", "1")
    assert ready.said["STATUS"] == "ready: 1 worker, 0 running, 0 waiting"
    assert service.pool_status().ready
    said_before = [word.said for word in manager.words[: manager.words.index(ready)]]
    assert all("gunicorn" not in said.get("STATUS", "").lower() for said in said_before)


def test_status_counts_what_runs_and_only_the_main_process_speaks(start_unit, manager):
    service = start_unit()
    service.wait_ready()
    stream = service.stream(GATED, 12)
    stream.read(5)
    manager.wait_said("STATUS", "ready: 1 worker, 1 running, 0 waiting")
    for pid in service.note_processes():
        with suppress(FileNotFoundError):
            assert b"NOTIFY_SOCKET=/" not in Path(f"/proc/{pid}/environ").read_bytes() or pid == service.process.pid
    assert {word.pid for word in manager.words} == {service.process.pid}
    stream.close()


def test_hup_is_reloading_until_new_workers_serve(start_unit, manager):
    service = start_unit()
    manager.wait_said("READY")
    old = service.http_workers()
    os.kill(service.process.pid, signal.SIGHUP)
    reloading = manager.wait_said("RELOADING", "1")
    assert int(reloading.said["MONOTONIC_USEC"]) > 0
    ready = manager.wait_said("READY", "1", after=reloading)
    assert ready.said["STATUS"].startswith("ready")
    assert service.http_workers() - old


def test_hup_with_a_wrong_configuration_ends_reloading_too(start_unit, manager, directory):
    config = directory / "config.toml"
    config.write_text("max_batch = 8\n")
    service = start_unit(config=config)
    manager.wait_said("READY")
    config.write_text("max_batsch = 8\n")
    os.kill(service.process.pid, signal.SIGHUP)
    manager.wait_said("READY", "1", after=manager.wait_said("RELOADING", "1"))


def test_term_is_stopping_and_the_time_that_it_may_take(start_unit, manager):
    service = start_unit(graceful_timeout_s=33)
    manager.wait_said("READY")
    os.kill(service.process.pid, signal.SIGTERM)
    stopping = manager.wait_said("STOPPING", "1")
    assert int(stopping.said["EXTEND_TIMEOUT_USEC"]) > (33 + 10) * 1_000_000
    assert service.wait_gone() == 0


def test_the_watchdog_is_let_down_while_a_model_worker_hangs_with_work_to_do(start_unit, manager):
    service = start_unit(watchdog_s=9)
    first = service.wait_ready().workers[0].pid
    # systemd's interval was shorter than the pool takes to mend this by itself.
    longer = manager.wait_said("WATCHDOG_USEC")
    assert int(longer.said["WATCHDOG_USEC"]) > 9_000_000
    stream = service.stream(GATED, 12)
    stream.read(5)
    os.kill(first, signal.SIGSTOP)
    hangs = manager.wait_said("STATUS", "worker 0 makes no step with work to do")
    goes_on = manager.wait(
        lambda word: "STATUS" in word.said and "makes no step with" not in word.said["STATUS"],
        "its replacement",
        after=hangs,
    )
    assert not [word for word in manager.between(hangs, goes_on) if "WATCHDOG" in word.said]
    # It is said each other second when all is well, so the silence is one.
    assert goes_on.at - hangs.at > 4
    manager.wait_said("WATCHDOG", "1", after=goes_on)
    service.open_gate(1)
    stream.read_all()
    assert stream.last == "end"
    assert model_pid(service) != first
    assert not [word for word in manager.words if "STOPPING" in word.said]


def test_the_death_of_a_model_worker_and_of_the_pool_are_told(start_unit, manager):
    service = start_unit()
    service.wait_ready()
    manager.wait_said("READY")
    os.kill(model_pid(service), signal.SIGKILL)
    died = manager.wait_said("STATUS", "worker 0 died: was killed by SIGKILL")
    back = manager.wait_said("STATUS", "ready: 1 worker", after=died)
    os.kill(service.pool_pid(), signal.SIGKILL)
    gone = manager.wait(
        lambda word: word.said.get("STATUS", "").startswith(("the pool died", "starting the pool again")),
        "the pool's death",
        after=back,
    )
    again = manager.wait_said("STATUS", "the pool died and was started again", after=gone)
    manager.wait_said("STATUS", "ready: 1 worker", after=gone)
    manager.wait_said("WATCHDOG", "1", after=again)


def test_a_model_that_cannot_be_served_is_named_as_the_reason(start_unit, manager):
    service = start_unit(POOL_ENGINE="fatal")
    assert service.process.wait(30) == 2
    stopping = manager.wait_said("STOPPING")
    assert stopping.said["STATUS"] == "stopping: this model cannot be served"
    assert not any("READY" in word.said for word in manager.words)


def test_a_wrong_setting_is_named_as_the_reason(start_unit, manager):
    service = start_unit(max_batch="many")
    assert service.process.wait(30) == 2
    manager.wait_said("STATUS", "TAILRACE_MAX_BATCH")


def test_usr2_makes_the_new_arbiter_the_main_process(start_unit, manager):
    service = start_unit()
    manager.wait_said("READY")
    old = service.process.pid
    os.kill(old, signal.SIGUSR2)
    wait_until(lambda: "took over the pool" in service.log, "the new arbiter")
    service.note_processes()
    wait_until(lambda: service.log.count("Booting worker") == 4, "its HTTP workers")
    service.note_processes()
    # Both live: the old one goes on hearing the pool, whatever the new one does.
    last = manager.words[-1]
    manager.wait_said("WATCHDOG", "1", after=manager.wait_said("WATCHDOG", "1", after=last))
    os.kill(old, signal.SIGTERM)
    assert service.process.wait(20) == 0
    handed = manager.wait_said("MAINPID")
    new = int(handed.said["MAINPID"])
    assert {word.pid for word in manager.words[: manager.words.index(handed) + 1]} == {old}
    assert not any("STOPPING" in word.said for word in manager.words)
    ready = manager.wait_said("READY", "1", after=handed)
    assert ready.pid == new
    manager.wait(lambda word: word.said.get("WATCHDOG") == "1" and word.pid == new, "the new one's watchdog")
    os.kill(new, signal.SIGTERM)
    manager.wait_said("STOPPING", "1", after=ready)


def test_http_alone_is_ready_when_it_serves_and_says_that_there_is_no_pool(start_unit, manager):
    service = start_unit(launch_pool="false")
    ready = manager.wait_said("READY", "1")
    assert "no pool listens at" in ready.said["STATUS"]
    assert service.get("/pid")[0] == 200


def test_a_pool_of_its_own_speaks_for_itself(manager, directory):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
    environ |= {f"TAILRACE_{name}_DIR": str(directory) for name in ("RUNTIME", "CACHE")} | {"TAILRACE_ONLY_CPU": "1"}
    environ |= {"NOTIFY_SOCKET": str(manager.path), "POOL_ENGINE": "gated"} | WATCHDOG
    command = tied([sys.executable, "-P", "-m", "tests.faults.chosen_pool"])
    pool = subprocess.Popen(command, cwd=ROOT, env=environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    seen = [pool.pid]
    try:
        manager.wait_said("STATUS", "loading the model: 43 %")
        seen += descendants(pool.pid)
        assert not any("READY" in word.said for word in manager.words)
        (directory / "gate-0").touch()
        manager.wait_said("READY", "1")
        manager.wait_said("WATCHDOG", "1")
        pool.terminate()
        manager.wait_said("STOPPING", "1")
        assert pool.wait(20) == 0
        assert {word.pid for word in manager.words} == {pool.pid}
    finally:
        if pool.poll() is None:
            pool.kill()
            pool.wait()
        wait_dead(seen)
