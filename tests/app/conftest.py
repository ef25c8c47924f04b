"""Fixtures: a runtime directory, a scripted pool in it, and the application, in this process or under gunicorn."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flask import Flask
from flask.testing import FlaskClient

from app import create_app
from config.settings import Settings
from tests.app.scripted_pool import ScriptedPool, eventually
from tests.app.tiny import write_card
from tests.lifeline import tied

ROOT = Path(__file__).parents[2]

# As Llama 3.1 has it.
LONG_CONTEXT = 131_072


@contextlib.contextmanager
def runtime_directory() -> Iterator[Path]:
    """A short path, for the sake of the socket's."""
    folder = Path(tempfile.mkdtemp(prefix="tailrace-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def runtime() -> Iterator[Path]:
    with runtime_directory() as folder:
        yield folder


@pytest.fixture
def pool(runtime: Path) -> Iterator[ScriptedPool]:
    scripted = ScriptedPool(runtime / "pool.sock", write_card(runtime)).start()
    yield scripted
    scripted.stop()


@contextlib.contextmanager
def application(runtime: Path, **settings: object) -> Iterator[Flask]:
    """The application in this process."""
    given = {"base_model": "tiny", "runtime_dir": runtime, "state_dir": runtime / "state", **settings}
    app = create_app(Settings(**given))
    try:
        yield app
    finally:
        app.extensions["tailrace"].pool.close()


@pytest.fixture
def client(runtime: Path, pool: ScriptedPool) -> Iterator[FlaskClient]:
    with application(runtime) as app:
        yield app.test_client()


@dataclass
class Server:
    """The application under gunicorn with one gevent worker, and the pool that it talks to."""

    url: str
    port: int
    pool: ScriptedPool
    log: Path

    def stats(self) -> dict[str, float]:
        """What the worker says of itself: the longest time for which its hub did not turn, open streams and jobs."""
        return httpx.get(f"{self.url}/_stats", timeout=60).json()


@contextlib.contextmanager
def serving(**settings: object) -> Iterator[Server]:
    """Start gunicorn and wait until it answers."""
    with runtime_directory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        pool = ScriptedPool(folder / "pool.sock", write_card(folder, max_model_len=LONG_CONTEXT)).start()
        config = folder / "gunicorn_test.py"
        config.write_text("control_socket_disable = True\n")
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
        environ |= {f"TAILRACE_{name.upper()}": str(value) for name, value in settings.items()}
        environ |= {"TAILRACE_RUNTIME_DIR": str(folder), "TAILRACE_BASE_MODEL": "tiny"}
        environ["TAILRACE_STATE_DIR"] = str(folder / "state")
        log = folder / "gunicorn.log"
        command = [sys.executable, "-m", "gunicorn", "-c", str(config), "-k", "gevent", "-w", "1"]
        command += ["--keep-alive", "30", "--graceful-timeout", "5", "--bind", f"127.0.0.1:{port}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                tied([*command, "tests.app.measured:create_app()"]),
                cwd=ROOT,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            server = Server(f"http://127.0.0.1:{port}", port, pool, log)
            eventually(lambda: process.poll() is not None or _answers(server.url))
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pool.stop()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    with serving(keepalive_comment_s=0.1, send_timeout_s=2, receive_timeout_s=2) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """One gunicorn for all tests; each gets a pool without a past."""
    shared_server.pool.reset()
    yield shared_server
    eventually(lambda: shared_server.stats()["open_jobs"] == 0)
