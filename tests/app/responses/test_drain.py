"""An HTTP worker that is told to stop lets its background responses finish, or tells why they did not."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.store.record import Retention
from app.store.store import Store
from tests.app.conftest import ROOT
from tests.app.scripted_pool import ScriptedPool, eventually
from tests.app.tiny import IM_END, ids_of
from tests.lifeline import tied
from workers.messages import Output, Started


@contextlib.contextmanager
def http_worker(runtime: Path, graceful_s: int) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """One HTTP worker of the project's own class under gunicorn."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (runtime / "gunicorn_test.py").write_text("control_socket_disable = True\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
    environ |= {"TAILRACE_RUNTIME_DIR": str(runtime), "TAILRACE_STATE_DIR": str(runtime / "state")}
    environ |= {"TAILRACE_BASE_MODEL": "tiny", "TAILRACE_CONFIG": os.devnull}
    with (runtime / "gunicorn.log").open("wb") as log:
        process = subprocess.Popen(
            tied([
                sys.executable, "-m", "gunicorn", "-c", str(runtime / "gunicorn_test.py"), "-w", "1",
                "-k", "config.http_worker.HttpWorker", "--graceful-timeout", str(graceful_s),
                "--bind", f"127.0.0.1:{port}", "app:create_app()",
            ]),
            cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def ready() -> bool:
                assert process.poll() is None, (runtime / "gunicorn.log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/readyz").status_code == 200
                return False

            eventually(ready)
            yield process, client
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kept(runtime: Path, response_id: str) -> dict:
    """What is stored of the response, the lock files that are left with it."""
    store = Store(runtime / "state", Retention(100, 10**8, 10**6))
    try:
        found = store.get("response", "", response_id)
        assert found is not None
        return found.body
    finally:
        store.close()


@pytest.fixture
def go_on(pool: ScriptedPool) -> Iterator[threading.Event]:
    event = threading.Event()

    def reply(job):
        yield Started(id=job.id)
        yield Output(id=job.id, choice=0, ids=ids_of("Paris"))
        event.wait(30)
        yield Output(id=job.id, choice=0, ids=[*ids_of(" is"), IM_END], finish_reason="stop", stop_token_id=IM_END)

    pool.reply = reply
    yield event
    event.set()


def begin(client: httpx.Client) -> str:
    """A background response that has begun; returns its id."""
    response_id = client.post("/v1/responses", json={"input": "x", "background": True}).json()["id"]
    url = f"/v1/responses/{response_id}"
    eventually(lambda: client.get(url).json()["status"] == "in_progress")
    client.close()
    return response_id


def test_a_background_response_may_finish(runtime, pool, go_on):
    with http_worker(runtime, 30) as (process, client):
        response_id = begin(client)
        process.terminate()
        eventually(lambda: b"Handling signal: term" in (runtime / "gunicorn.log").read_bytes())
        # The worker would be gone by now if it did not wait: its last connection is closed.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2.5)
        go_on.set()
        assert process.wait(60) == 0
    assert [path.name for path in (runtime / "state").glob("runner-*")] == []
    body = kept(runtime, response_id)
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("completed", "Paris is")


def test_one_that_does_not_finish_in_time_fails_with_a_reason(runtime, pool, go_on):
    with http_worker(runtime, 4) as (process, client):
        response_id = begin(client)
        process.terminate()
        assert process.wait(60) == 0
    body = kept(runtime, response_id)
    assert (body["status"], body["output"][0]["content"][0]["text"]) == ("failed", "Paris")
    assert "shutting down" in body["error"]["message"]
