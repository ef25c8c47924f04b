"""Start, reload and stop, as an operator does them."""

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server, wait_until
from tests.e2e.test_streams import ENDLESS, message, pieces


@pytest.fixture
def own_server():
    server = Server("--dtype", "float32", "--graceful-timeout-s", "30")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def test_hup_replaces_http_workers_and_touches_neither_model_nor_open_streams(own_server):
    model, http_workers = own_server.worker()["pid"], own_server.http_workers()
    assert len(http_workers) == 2
    with ThreadPoolExecutor(1) as pool:
        stream = iter(pieces(own_server, messages=message("Tell me a long story."), max_tokens=60, **ENDLESS))
        first = next(stream)
        rest = pool.submit(lambda: list(stream))
        own_server.signal(signal.SIGHUP)
        wait_until(lambda: len(own_server.http_workers() - http_workers) == 2, "new HTTP workers", 30)
        assert own_server.worker()["pid"] == model
        text = first + "".join(rest.result())
    wait_until(lambda: not own_server.http_workers() & http_workers, "the old HTTP workers' end", 40)
    body = {"messages": message("Tell me a long story."), "max_tokens": 60, **ENDLESS}
    answer = own_server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == text
    assert own_server.worker()["restarts"] == 0


def test_term_lets_streams_finish_and_leaves_no_process(own_server):
    processes = own_server.processes()
    assert len(processes) >= 5
    stream = iter(pieces(own_server, messages=message("Tell me a story."), max_tokens=40, **ENDLESS))
    next(stream)
    own_server.signal(signal.SIGTERM)
    assert "".join(stream)
    assert own_server.process.wait(60) == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_ctrl_c_ends_everything_at_once_and_in_order(own_server):
    processes = own_server.processes()
    body = {"messages": message("Tell me a story."), "max_tokens": 2000, "stream": True, **ENDLESS}
    with own_server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        last = next(lines)
        os.killpg(own_server.process.pid, signal.SIGINT)
        with suppress(httpx.RemoteProtocolError):  # the connection is cut behind the error, on purpose
            for line in lines:
                last = line or last
    assert "error" in json.loads(last.removeprefix("data: "))
    assert own_server.process.wait(30) == 0
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert "Traceback" not in own_server.log


def test_the_death_of_the_arbiter_leaves_no_process(own_server):
    processes = own_server.processes()
    own_server.signal(signal.SIGKILL)
    own_server.process.wait(30)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


@pytest.mark.parametrize("way", ["gunicorn", "honcho"])
def test_gunicorn_and_the_procfile_start_the_same_thing(way):
    tools = Path(sys.executable).parent
    command = {
        "gunicorn": [str(tools / "gunicorn"), "-c", "gunicorn.conf.py"],
        "honcho": [str(tools / "honcho"), "start", "--no-prefix"],
    }[way]
    server = Server(command=command, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    # honcho gives its processes a PORT of its own choice; ours is given by name and wins.
    try:
        server.wait_ready()
        assert server.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2}).status_code == 200
        left = server.processes()
    finally:
        server.stop()
    assert [process for process in left if process.is_running()] == []


def test_a_second_server_on_the_port_is_refused_in_one_line(server):
    second = Server(TAILRACE_PORT=str(server.port))
    assert second.process.wait(60) == 2
    assert second.log == f"tailrace: error: --port: {server.port} on 127.0.0.1 is in use by another process\n"
    second.stop()


def test_a_model_that_cannot_be_loaded_ends_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    ended = Server("--base_model", str(tmp_path))
    assert ended.process.wait(60) == 2
    assert ended.log.splitlines()[0].startswith(f"tailrace: error: --base_model: {tmp_path}: has no weights")
    assert "Traceback" not in ended.log
    ended.stop()
