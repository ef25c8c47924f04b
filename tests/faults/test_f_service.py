"""Rows F10 to F14, F17 and F19: deaths, signals and shortages of the service's own processes, under load.

The service is the real one, application and pool included; only the engine behind it is scripted, so that each stream
can be stopped in its middle and its text is known.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.faults.callers import URL, Caller, Regular, Watcher, body, call, finish, gated, plain
from tests.faults.service import Service
from tests.faults.table import Row
from tests.faults.text_engine import lost_device
from tests.workers.pool.harness import PATIENCE, alive, descendants, wait_dead, wait_until

LOAD = 32
# The battery's bounds are promises of a machine that has time; one that is shared may be so much later. The table has
# what was measured.
LATE_S = PATIENCE / 4
ENGINE = "tests.faults.text_engine:run"


@pytest.fixture
def start(start_service: Callable[..., Service], directory: Path) -> Callable[..., Service]:
    """Start a service with the real application and wait until it answers."""

    def started(**settings: object) -> Service:
        usual: dict[str, object] = {"APPLICATION": "app:create_app()", "POOL_ENGINE": ENGINE, "max_batch": 64}
        service = start_service(**{**usual, "state_dir": directory / "state", **settings})
        service.wait_ready()
        # Each HTTP worker hears of it by itself, and the answers so far may all be one worker's.
        workers = int(str(settings.get("http_workers", 2)))
        wait_until(lambda: len(_booted(service)) == workers, "each HTTP worker's line to the pool", 3 * PATIENCE)
        wait_until(
            lambda: all(_answers(service, number) for number in range(6)), "an answer from each of them", 3 * PATIENCE
        )
        return service

    return started


def _answers(service: Service, number: int) -> bool:
    return Caller(url(service), plain(number)).wait().outcome == "complete"


def url(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}"


def model_pid(service: Service) -> int:
    pid = service.pool_status().workers[0].pid
    assert pid is not None
    return pid


def serving_all(service: Service, times: int = 12) -> None:
    """Every HTTP worker answers."""
    answers = [Caller(url(service), plain(number)).wait() for number in range(times)]
    assert {each.outcome for each in answers} == {"complete"}, [(each.status, each.error) for each in answers]


def back(service: Service) -> None:
    """Return when the service answers again, whichever HTTP worker is asked."""
    wait_until(lambda: Caller(url(service), plain(1)).wait().outcome == "complete", "an answer", 3 * PATIENCE)
    wait_until(
        lambda: all(Caller(url(service), plain(1)).wait().outcome == "complete" for _ in range(8)),
        "all of them",
        3 * PATIENCE,
    )


def test_f10_the_death_of_an_http_worker_is_an_error_for_its_clients_and_nothing_for_others(
    start: Callable[..., Service], row: Row
) -> None:
    service = start()
    model, workers = model_pid(service), service.http_workers()
    callers = call(url(service), LOAD)
    victim = min(workers)
    row.fault = "SIGKILL of one of two HTTP workers"
    os.kill(victim, signal.SIGKILL)
    moment = time.monotonic()
    wait_until(lambda: any(each.over for each in callers), "clients that notice")
    wait_until(lambda: service.pool_status().running == sum(not each.over for each in callers), "their jobs' end")
    stopped_s = time.monotonic() - moment
    wait_until(lambda: len(service.http_workers()) == 2, "another HTTP worker")
    respawned_s = time.monotonic() - moment
    service.open_gate(1)
    found = finish(row, callers, cuts_are_errors=True)
    assert not alive(victim)
    assert found["cut"]
    assert found["complete"]
    assert not found["error"]
    row.hit = f"{len(found['cut'])} clients saw their connection cut in mid-answer"
    row.notes.append(f"jobs stopped after {stopped_s:.1f} s, another worker after {respawned_s:.1f} s")
    assert stopped_s < 1 + LATE_S
    assert respawned_s < 2 + LATE_S
    assert victim not in service.http_workers()
    assert model_pid(service) == model
    serving_all(service)


@pytest.mark.parametrize("how", ["stopped", "spinning"])
def test_f11_an_http_worker_that_hangs_stalls_nobody_else_and_is_replaced(
    start: Callable[..., Service], row: Row, how: str
) -> None:
    # Long enough that all that is asked of the others meanwhile is done before the arbiter acts.
    service = start(GUNICORN_CMD_ARGS="--timeout 10", APPLICATION="tests.faults.text_app:application()")
    workers, model = service.http_workers(), model_pid(service)
    callers = call(url(service), LOAD)
    row.fault = "SIGSTOP of an HTTP worker" if how == "stopped" else "an HTTP worker that computes and lets nothing run"
    if how == "stopped":
        victim = min(workers)
        os.kill(victim, signal.SIGSTOP)
    else:
        used = {pid: _cpu_s(pid) for pid in workers}
        with suppress(httpx.HTTPError):
            httpx.get(f"{url(service)}/spin", timeout=2)
        victim = max(workers, key=lambda pid: _cpu_s(pid) - used[pid])
    steps = _steps(service)
    # Streams of the other worker go on, and the model with them.
    service.open_gate(1)
    wait_until(lambda: any(each.over for each in callers), "the others' answers")
    assert all(each.outcome == "complete" for each in callers if each.over)
    assert alive(victim)
    wait_until(lambda: _steps(service) > steps, "the model's steps")
    wait_until(lambda: not alive(victim), "its end", 3 * PATIENCE)
    assert "WORKER TIMEOUT" in service.log
    found = finish(row, callers, cuts_are_errors=True)
    row.hit = f"WORKER TIMEOUT; {len(found['cut'])} clients were cut, {len(found['error'])} got an error event"
    assert found["complete"]
    assert found["cut"] or found["error"]
    wait_until(lambda: len(service.http_workers() - {victim}) == 2, "another HTTP worker")
    assert model_pid(service) == model
    serving_all(service)


def _cpu_s(pid: int) -> float:
    return sum(psutil.Process(pid).cpu_times()[:2])


def _steps(service: Service) -> int:
    stats = service.pool_status().workers[0].stats
    return stats.steps if stats else 0


def test_f12_the_death_of_the_arbiter_is_told_and_nothing_is_left_of_a_service_in_one_unit(
    start: Callable[..., Service], row: Row
) -> None:
    service = start()
    processes = service.note_processes()
    callers = call(url(service), LOAD)
    row.fault = "SIGKILL of the arbiter, which holds the pool"
    os.kill(service.process.pid, signal.SIGKILL)
    moment = time.monotonic()
    found = finish(row, callers)
    assert len(found["error"]) == LOAD
    service.wait_gone()
    gone_s = time.monotonic() - moment
    assert gone_s < 10 + LATE_S
    row.hit = f"none of {len(processes)} processes left after {gone_s:.1f} s"
    row.notes.append("the model is loaded again, by whoever starts the service")
    again = start(port=service.port)
    serving_all(again)


def test_f12_the_death_of_the_arbiter_leaves_a_pool_of_its_own_and_http_is_back_without_a_reload(
    start: Callable[..., Service], start_service: Callable[..., Service], row: Row, directory: Path
) -> None:
    holder = start()  # only its pool is of interest: an arbiter of its own tends it
    pool, model = holder.pool_pid(), model_pid(holder)
    service = start(launch_pool="false")
    callers = call(url(service), LOAD)
    row.fault = "SIGKILL of the arbiter, the pool being a unit of its own"
    os.kill(service.process.pid, signal.SIGKILL)
    moment = time.monotonic()
    found = finish(row, callers)
    assert len(found["error"]) == LOAD
    service.wait_gone_but({pool, model})
    gone_s = time.monotonic() - moment
    begun = time.monotonic()
    again = start(port=service.port, launch_pool="false")
    back_s = time.monotonic() - begun
    assert gone_s < 5 + LATE_S
    row.hit = f"its HTTP workers gone after {gone_s:.1f} s; the next arbiter serves with the same pool and model"
    row.notes.append(f"it answers {back_s:.1f} s after its start")
    assert (again.pool_pid(), model_pid(again)) == (pool, model)
    serving_all(again)


def test_f12_the_death_of_the_pool_is_told_and_it_comes_back_without_an_orphan(
    start: Callable[..., Service], row: Row
) -> None:
    service = start()
    pool, http_workers = service.pool_pid(), service.http_workers()
    below = [pool, *descendants(pool)]
    callers = call(url(service), LOAD)
    row.fault = "SIGKILL of the pool"
    with Watcher(url(service)) as ready:
        moment = time.monotonic()
        os.kill(pool, signal.SIGKILL)
        found = finish(row, callers)
        wait_dead(below)
        gone_s = time.monotonic() - moment
        service.wait_ready()
        back(service)
        back_s = time.monotonic() - moment
    assert len(found["error"]) == LOAD
    assert service.pool_pid() != pool
    assert service.http_workers() == http_workers
    assert gone_s < 10 + LATE_S
    row.hit = f"{len(below)} processes gone after {gone_s:.1f} s, a new pool with a model serves after {back_s:.1f} s"
    row.notes.append(f"/readyz said no after {ready.first(503, moment):.1f} s")


def test_f13_term_refuses_newcomers_in_words_lets_the_running_ones_finish_and_ends_with_0(
    start: Callable[..., Service], row: Row
) -> None:
    service = start(graceful_timeout_s=60)
    processes = service.note_processes()
    callers = call(url(service), LOAD)
    row.fault = "TERM to the arbiter"
    os.kill(service.process.pid, signal.SIGTERM)
    wait_until(lambda: _get(service, "/readyz").status_code == 503, "the end of readiness")
    late = [Caller(url(service), plain(number)).wait() for number in range(8)]
    for each in late:
        assert (each.status, each.outcome) == (503, "refused")
        assert each.error is not None
        assert set(each.error) == {"message", "type", "param", "code"}
        assert each.error["type"] == "service_unavailable_error"
        assert each.headers["connection"] == "close"
        assert int(each.headers["retry-after"]) >= 1
    assert _get(service, "/livez").status_code == 200
    assert "shutting down" in _get(service, "/readyz").json()["reason"]
    assert not any(each.over for each in callers)
    service.open_gate(1)
    found = finish(row, [*callers, *late])
    assert len(found["complete"]) == LOAD
    assert service.wait_gone() == 0
    row.hit = f"{len(late)} newcomers got 503 with Connection: close; {len(processes)} processes gone, exit code 0"
    assert "SIGKILL" not in service.log


def _get(service: Service, path: str) -> httpx.Response:
    return httpx.get(url(service) + path, timeout=PATIENCE)


def test_f13_what_is_left_at_the_deadline_gets_an_error_event(start: Callable[..., Service], row: Row) -> None:
    service = start(graceful_timeout_s=4)
    callers = call(url(service), LOAD)
    row.fault = "TERM with streams that go on beyond the graceful timeout of 4 s"
    os.kill(service.process.pid, signal.SIGTERM)
    found = finish(row, callers)
    assert len(found["error"]) == LOAD
    assert all(each.error and "shutting down" in each.error["message"] for each in callers)
    assert service.wait_gone() == 0
    row.hit = f"{LOAD} error events, exit code 0, nobody killed"
    assert "SIGKILL" not in service.log


def test_f13_a_second_term_stops_sooner_but_one_that_comes_twice_does_not(
    start: Callable[..., Service], row: Row
) -> None:
    service = start(graceful_timeout_s=120)
    callers = call(url(service), LOAD)
    row.fault = "TERM, twice at once as platforms send it, and again later"
    os.kill(service.process.pid, signal.SIGTERM)
    os.kill(service.process.pid, signal.SIGTERM)
    moment = time.monotonic()
    wait_until(lambda: _get(service, "/readyz").status_code == 503, "the end of readiness")
    # Only now is it certain that the arbiter has begun to stop: from here on it takes what comes as the same stop.
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 3, "a while")
    assert not any(each.over for each in callers)
    os.kill(service.process.pid, signal.SIGTERM)
    found = finish(row, callers)
    assert len(found["error"]) == LOAD
    assert service.wait_gone() == 0
    row.hit = (
        f"streams went on after two at once; ended with an event {time.monotonic() - moment:.0f} s after the first"
    )


def _reload(service: Service) -> None:
    """HUP, and wait until it has replaced every HTTP worker that takes connections."""
    old = service.http_workers()
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: len(_booted(service) - old) >= 2, "new HTTP workers", 3 * PATIENCE)


def _booted(service: Service) -> set[int]:
    """HTTP workers with a line to the pool."""
    return {pid for pid in service.http_workers() if _has_line(pid)}


def _has_line(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return any(each.family == socket.AF_UNIX for each in psutil.Process(pid).net_connections("unix"))
    return False


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_f14_reloads_under_load_lose_and_refuse_nothing_and_leave_the_model_alone(
    start: Callable[..., Service], row: Row, directory: Path, times: int
) -> None:
    config = directory / "config.toml"
    config.write_text("strict = false\n")
    # Far less than the streams take, which wait for the end of all reloads.
    service = start(config=config, graceful_timeout_s=1)
    pids = model_pid(service), service.pool_pid()
    regulars = [Regular(url(service)) for _ in range(4)]
    callers = []
    begun = time.monotonic()
    for _ in range(times):
        callers += call(url(service), LOAD // 4)
        _reload(service)
    config.write_text("strict = true\n")
    _reload(service)
    seconds = time.monotonic() - begun
    service.open_gate(1)
    found = finish(row, callers)
    for each in regulars:
        each.stop()
        row.requests += each.answers + len(each.others)
        row.complete += each.answers
    assert [each.others for each in regulars] == [[]] * 4
    assert len(found["complete"]) == len(callers)
    row.fault = f"HUP {times + 1} times in {seconds:.0f} s, streams longer than the graceful timeout of 1 s"
    row.hit = f"{service.log.count('Booting worker')} HTTP workers, one model worker; the new setting holds"
    assert service.log.count("Booting worker") == 2 * (times + 2)
    assert (model_pid(service), service.pool_pid()) == pids
    strange = {**body(plain(1), 3), "no_such_field": 1}

    def all_strict() -> bool:
        return all(httpx.post(url(service) + URL, json=strict).status_code == 400 for strict in [strange] * 8)

    wait_until(all_strict, "the new setting everywhere")
    wait_until(lambda: len(service.http_workers()) == 2, "the end of the old HTTP workers")


def test_f14_a_reload_to_code_that_cannot_start_leaves_the_old_workers_in_place(
    start: Callable[..., Service], row: Row, directory: Path
) -> None:
    service = start(APPLICATION="tests.faults.text_app:application()")
    old = service.http_workers()
    callers = call(url(service), 8)
    (directory / "broken").touch()
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: service.log.count("exited with code 255") >= 3, "starts in vain", 3 * PATIENCE)
    serving_all(service)
    assert old <= service.http_workers()
    (directory / "broken").unlink()
    wait_until(lambda: len(_booted(service) - old) >= 2, "new HTTP workers", 3 * PATIENCE)
    service.open_gate(1)
    found = finish(row, callers)
    assert len(found["complete"]) == 8
    wait_until(lambda: not service.http_workers() & old, "the end of the old ones", 3 * PATIENCE)
    row.fault = "HUP while the application cannot be loaded"
    row.hit = f"{service.log.count('exited with code 255')} HTTP workers could not start"


def test_f14_a_restart_behind_a_socket_of_systemd_refuses_nobody(
    start: Callable[..., Service], start_service: Callable[..., Service], row: Row, directory: Path
) -> None:
    start()  # for its pool, which is a unit of its own to the service that is restarted
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        # What systemd does: the socket as descriptor 3, and the process id of who shall have it.
        hand_over = (
            "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3); os.close(fd);"
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"
        )
        before = [sys.executable, "-I", "-S", "-c", hand_over, listener.fileno()]
        settings = {"port": port, "BEFORE": before, "LISTENER": listener.fileno()}
        settings |= {"graceful_timeout_s": 30, "launch_pool": "false"}
        service = start(**settings)
        callers = call(url(service), 8)
        os.kill(service.process.pid, signal.SIGTERM)
        wait_until(lambda: "Handling signal: term" in service.log, "the arbiter's attention")
        # The first of them may still be told, as long as the old workers accept.
        wait_until(lambda: not _accepts(port, service), "the old ones to let go of the socket")
        waiting = [Caller(url(service), plain(number)) for number in range(8)]
        service.open_gate(1)
        found = finish(row, callers)
        assert len(found["complete"]) == 8
        assert service.process.wait(PATIENCE) == 0
        assert not any(each.over for each in waiting)
        start(**settings)
        found = finish(row, waiting)
        assert len(found["complete"]) == 8
    row.fault = "restart of the HTTP side, the listening socket being held by systemd's side"
    row.hit = "8 newcomers came while nothing accepted, and were answered by the next service"


def _accepts(port: int, service: Service) -> bool:
    """Whether an HTTP worker holds the listening socket."""
    for pid in service.http_workers():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(each.status == psutil.CONN_LISTEN for each in psutil.Process(pid).net_connections("tcp")):
                return True
    return False


def test_f17_one_of_two_devices_is_lost_and_the_other_serves(start: Callable[..., Service], row: Row) -> None:
    service = start(POOL_WORKERS=2)
    wait_until(lambda: all(each.state == "ready" for each in service.pool_status().workers), "both model workers")
    callers = call(url(service), LOAD)
    lost_device(service.directory, 1).touch()
    victim = service.pool_status().workers[1].pid
    assert victim is not None
    row.fault = "one of two model workers dies and cannot be started any more"
    with Watcher(url(service)) as ready:
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: service.pool_status().workers[1].restarts >= 2, "a start in vain", 3 * PATIENCE)
        service.open_gate(1)
        found = finish(row, callers)
        serving_all(service)
    assert len(found["complete"]) == LOAD
    row.replayed = service.pool_status().counters.replayed
    row.hit = f"{service.pool_status().workers[1].restarts} deaths of the second worker"
    assert {status for _, status in ready.samples} == {200}


def test_f17_with_few_descriptors_the_accept_loop_waits_and_recovers(start: Callable[..., Service], row: Row) -> None:
    service = start(BEFORE=["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"], http_workers=1)
    (worker,) = service.http_workers()
    idle = []
    with suppress(OSError):
        for _ in range(100):
            idle.append(socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE))  # noqa: PERF401
    assert len(idle) == 100
    late = Caller(url(service), plain(1))
    row.fault = "at most 64 descriptors for each process, and 100 idle connections"
    wait_until(lambda: psutil.Process(worker).num_fds() >= 16, "its connections")
    most = psutil.Process(worker).num_fds()
    assert most <= 64
    assert not late.over
    for each in idle:
        each.close()
    found = finish(row, [late])
    assert len(found["complete"]) == 1
    serving_all(service)
    row.requests, row.complete = row.requests + 12, row.complete + 12
    row.hit = f"a worker with {most} descriptors open kept the others waiting, and served once they had gone"
    assert "Traceback" not in service.log
    assert service.http_workers() == {worker}


def test_f17_no_name_has_to_be_resolved(start: Callable[..., Service], row: Row) -> None:
    service = start(NO_NAMES=1)
    row.fault = "no name can be resolved"
    finish(row, [Caller(url(service), plain(number)).wait() for number in range(12)])
    row.hit = "every look-up of a name in the arbiter and its HTTP workers fails"
    assert "names are out of order" in service.log


def test_f19_ready_is_true_exactly_while_a_token_can_be_produced(start: Callable[..., Service], row: Row) -> None:
    service = start(max_batch=4)
    row.fault = "a full batch and a full queue; SIGKILL of the only model worker; SIGSTOP of the pool"
    with Watcher(url(service)) as ready:
        callers = [Caller(url(service), gated(number)) for number in range(LOAD)]
        wait_until(lambda: service.pool_status().queued >= LOAD // 2, "a queue")
        loaded = len(ready.samples)
        wait_until(lambda: len(ready.samples) > loaded + 10, "samples under load")
        assert {status for _, status in ready.samples} == {200}

        lost_device(service.directory, 0).touch()
        moment = time.monotonic()
        os.kill(model_pid(service), signal.SIGKILL)
        wait_until(lambda: ready.samples[-1][1] == 503, "not ready", 3 * PATIENCE)
        death_s = ready.first(503, moment)
        assert _get(service, "/livez").status_code == 200
        wait_until(lambda: service.pool_status().workers[0].restarts >= 2, "a start in vain", 3 * PATIENCE)
        # From the first no on, no yes while there is no model worker.
        assert {status for at, status in ready.samples if at >= moment + death_s} == {503}
        lost_device(service.directory, 0).unlink()
        wait_until(lambda: ready.samples[-1][1] == 200, "ready again", 3 * PATIENCE)
        assert service.pool_status().ready
        service.open_gate(1)
        found = finish(row, callers)
        row.replayed = service.pool_status().counters.replayed

        pool = service.pool_pid()
        moment = time.monotonic()
        os.kill(pool, signal.SIGSTOP)
        wait_until(lambda: ready.samples[-1][1] == 503, "not ready", 3 * PATIENCE)
        hang_s = ready.first(503, moment)
        os.kill(pool, signal.SIGCONT)
        wait_until(lambda: ready.samples[-1][1] == 200, "ready again")
    assert len(found["complete"]) == LOAD
    row.hit = (
        f"not ready {death_s:.1f} s after the death and {hang_s:.1f} s after the stop, by {len(ready.samples)} samples"
    )
    assert max(death_s, hang_s) < 2 + LATE_S
