"""The whole service under signals and deaths: arbiter, HTTP workers, pool and model worker, run as in operation."""

import http.client
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.service import Service
from tests.workers.pool.harness import ROOT, PoolProcess, alive, job, wait_dead, wait_until
from tests.workers.pool.scripted_engine import PLAIN, SILENT, WAIT, expected

GATED = [WAIT, 5, 0, 1]


def gated_stream(service: Service, max_tokens: int = 12):
    """A stream that has five tokens and then waits for gate 1."""
    stream = service.stream(GATED, max_tokens)
    stream.read(5)
    return stream


def assert_whole(stream, max_tokens: int = 12) -> None:
    stream.read_all()
    assert stream.last == "end"
    assert stream.tokens == expected(job(GATED, max_tokens))


def assert_serving(service: Service) -> None:
    stream = service.stream([PLAIN], 9)
    assert stream.response.status == 200
    stream.read_all()
    assert (stream.tokens, stream.last) == (expected(job([PLAIN], 9)), "end")


def model_pid(service: Service) -> int:
    pid = service.pool_status().workers[0].pid
    assert pid is not None
    return pid


def test_kill_9_of_the_model_worker_is_a_pause_in_the_stream(start_service):
    service = start_service()
    service.wait_ready()
    stream = gated_stream(service)
    os.kill(model_pid(service), signal.SIGKILL)
    service.open_gate(1)
    assert_whole(stream)


def test_hup_replaces_http_workers_and_touches_neither_model_nor_open_streams(start_service):
    service = start_service()
    service.wait_ready()
    model, pool, old = model_pid(service), service.pool_pid(), service.http_workers()
    stream = gated_stream(service)
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: len(service.http_workers() - old) == 2, "new HTTP workers")
    assert_serving(service)
    service.open_gate(1)
    assert_whole(stream)
    wait_until(lambda: not service.http_workers() & old, "the end of the old HTTP workers")
    assert (model_pid(service), service.pool_pid()) == (model, pool)
    assert service.process.poll() is None


def test_hup_with_a_broken_configuration_changes_nothing(start_service, directory):
    config = directory / "config.toml"
    config.write_text("max_batch = 8\n")
    service = start_service(config=config)
    service.wait_ready()
    old = service.http_workers()
    config.write_text("max_batsch = 8\n")
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: "not reloaded" in service.log, "the complaint")
    assert service.http_workers() == old
    assert_serving(service)
    config.write_text("max_batch = 9\n")
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: "only after a restart of the service settings=max_batch" in service.log, "the notice")
    assert_serving(service)


def test_kill_9_of_the_pool_ends_open_streams_with_an_error_and_the_service_comes_back(start_service):
    service = start_service()
    service.wait_ready()
    pool, model = service.pool_pid(), model_pid(service)
    stream = gated_stream(service)
    os.kill(pool, signal.SIGKILL)
    stream.read_all()
    assert stream.last.startswith("error")
    wait_dead([pool, model], 5)
    service.wait_ready()
    assert service.pool_pid() != pool
    # Each HTTP worker dials again after a pause of its own, at most 0.2 s, and answers 503 until then.
    wait_until(lambda: service.get("/?prompt=0&max_tokens=1")[0] == 200, "an HTTP worker with a line to the pool", 5)
    wait_until(lambda: all(service.get("/?prompt=0&max_tokens=1")[0] == 200 for _ in range(8)), "all of them", 5)
    assert_serving(service)


def test_kill_9_of_the_arbiter_leaves_nothing(start_service):
    service = start_service()
    service.wait_ready()
    stream = gated_stream(service)
    service.note_processes()
    os.kill(service.process.pid, signal.SIGKILL)
    service.wait_gone(15)
    stream.close()


def test_term_lets_open_streams_finish_and_leaves_nothing(start_service):
    service = start_service()
    service.wait_ready()
    idle = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    idle.request("GET", "/pid")
    idle.getresponse().read()
    stream = gated_stream(service)
    os.kill(service.process.pid, signal.SIGTERM)
    wait_until(lambda: "Handling signal: term" in service.log, "the arbiter's attention")
    service.open_gate(1)
    assert_whole(stream)
    start = time.monotonic()
    assert service.wait_gone() == 0
    # The idle connection, kept alive for 75 s, holds nobody up.
    assert time.monotonic() - start < 10
    assert not (service.directory / "pool.sock").exists()


def test_term_ends_a_stream_that_would_never_end_with_a_reason_before_anybody_is_killed(start_service):
    service = start_service(graceful_timeout_s=4)
    service.wait_ready()
    stream = service.stream([SILENT], 9)
    os.kill(service.process.pid, signal.SIGTERM)
    stream.read_all()
    assert stream.last.startswith("error")
    assert service.wait_gone() == 0
    assert "SIGKILL" not in service.log


def test_ctrl_c_leaves_nothing(start_service):
    service = start_service()
    service.wait_ready()
    stream = service.stream([SILENT], 9)
    service.signal_group(signal.SIGINT)
    assert service.wait_gone() == 0
    stream.close()


def test_ctrl_c_while_the_model_loads_leaves_nothing(start_service):
    service = start_service(POOL_ENGINE="never_ready")
    wait_until(lambda: (service.directory / "pool.sock").exists() and service.pool_status().workers[0].pid, "a worker")
    service.note_processes()
    service.signal_group(signal.SIGINT)
    assert service.wait_gone() == 0


def test_term_to_every_process_still_lets_streams_finish(start_service):
    service = start_service()
    service.wait_ready()
    stream = gated_stream(service)
    service.signal_group(signal.SIGTERM)
    wait_until(lambda: "Handling signal: term" in service.log, "the arbiter's attention")
    service.open_gate(1)
    assert_whole(stream)
    assert service.wait_gone() == 0


def test_hup_to_every_process_keeps_pool_and_model(start_service):
    service = start_service()
    service.wait_ready()
    model, pool, old = model_pid(service), service.pool_pid(), service.http_workers()
    service.signal_group(signal.SIGHUP)
    wait_until(lambda: len(service.http_workers() - old) == 2 and not service.http_workers() & old, "new HTTP workers")
    service.wait_ready()
    assert (model_pid(service), service.pool_pid()) == (model, pool)
    assert_serving(service)


def test_usr2_hands_the_loaded_model_to_the_new_arbiter(start_service):
    service = start_service()
    service.wait_ready()
    model, pool = model_pid(service), service.pool_pid()
    os.kill(service.process.pid, signal.SIGUSR2)
    wait_until(lambda: "took over the pool" in service.log, "the new arbiter")
    service.note_processes()
    wait_until(lambda: service.log.count("Booting worker") == 4, "its HTTP workers")
    service.note_processes()
    os.kill(service.process.pid, signal.SIGTERM)
    assert service.process.wait(20) == 0
    assert (model_pid(service), service.pool_pid()) == (model, pool)
    assert_serving(service)


def test_a_model_that_cannot_be_served_stops_the_service_with_code_2_and_one_line(start_service):
    service = start_service(POOL_ENGINE="fatal")
    assert service.process.wait(30) == 2
    assert "Reason: this model cannot be served" in service.log
    assert "Traceback" not in service.log


def test_a_wrong_setting_stops_it_before_anything_starts(start_service):
    service = start_service(max_batch="many")
    assert service.process.wait(30) == 2
    assert service.log.startswith("tailrace: error: TAILRACE_MAX_BATCH")
    assert len(service.log.splitlines()) == 1


def test_a_pool_that_the_operator_runs_is_used_and_left_alone(start_service, directory):
    pool = PoolProcess(directory)
    try:
        pool.connect(workers=1).close()
        service = start_service()
        service.wait_ready()
        assert service.pool_pid() == pool.process.pid
        assert_serving(service)
        os.kill(service.process.pid, signal.SIGTERM)
        assert service.process.wait(20) == 0
        assert alive(pool.process.pid)
    finally:
        pool.kill_all()


def test_http_processes_have_neither_the_lifeline_nor_a_heavy_library(start_service):
    service = start_service()
    service.wait_ready()
    for pid in (*service.http_workers(), service.pool_pid(), service.process.pid):
        maps = open(f"/proc/{pid}/maps").read()  # noqa: PTH123, SIM115
        assert "/torch/" not in maps
        assert "/transformers/" not in maps


@pytest.mark.parametrize("module", ["workers.pool.server", "workers.entry", "workers.__main__"])
def test_importing_the_pool_loads_neither_torch_nor_gevent(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'gevent', 'flask'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("what", ["pool", "worker"])
def test_pool_and_model_worker_refuse_to_run_under_gevent(what, directory):
    code = {
        "pool": "import gevent, sys; from workers.__main__ import main; sys.exit(main([]))",
        "worker": "import gevent; from workers.entry import main; main(None, None, None, 'INFO')",
    }[what]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert "must not run under gevent" in done.stderr
