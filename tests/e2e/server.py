"""A real server for the tests: started with the real command, talked to over real sockets."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from config.sources import ROOT
from tests.lifeline import tied
from tests.workers.pool.harness import wait_until

START_S = 180.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """``python -m app`` (or another command that starts the same) in a process group of its own, on a free port."""

    def __init__(self, *flags: str, command: Sequence[str] = (sys.executable, "-m", "app"), **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # Not below pytest's own directory: a Unix socket's path is short.
        self._home = Path(tempfile.mkdtemp(prefix="tailrace-e2e-"))
        self._log = self._home / "log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
        settings = {
            "TAILRACE_CONFIG": os.devnull,
            "TAILRACE_RUNTIME_DIR": str(self._home / "run"),
            "TAILRACE_STATE_DIR": str(self._home / "state"),
            "TAILRACE_ONLY_CPU": "1",
            "TAILRACE_PORT": str(self.port),
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                tied([*command, *flags]),
                cwd=ROOT, env=inherited | settings | environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.http = httpx.Client(base_url=self.url, timeout=120)

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self) -> "Server":
        """Return when a token can be produced."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            return self._status_code("/readyz") == 200

        try:
            wait_until(ready, "the server to be ready", START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return self

    def _status_code(self, path: str) -> int:
        try:
            return self.http.get(path).status_code
        except httpx.TransportError:
            return 0

    def worker(self) -> dict[str, Any]:
        """What /health says of the only model worker."""
        (worker,) = self.http.get("/health").json()["workers"]
        return dict(worker)

    def processes(self) -> list[psutil.Process]:
        """The arbiter and everything that it started, directly or not."""
        arbiter = psutil.Process(self.process.pid)
        return [arbiter, *arbiter.children(recursive=True)]

    def http_workers(self) -> set[int]:
        """Process ids of the HTTP workers: the arbiter's children, less the pool."""
        pool = psutil.Process(self.worker()["pid"]).parent()
        assert pool is not None
        return {child.pid for child in psutil.Process(self.process.pid).children()} - {pool.pid}

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask for the end, wait for it, and return the exit code; whatever is left is killed."""
        left = self.processes() if self.process.poll() is None else []
        if left:
            self.process.terminate()
        try:
            code = self.process.wait(60)
        finally:
            _, alive = psutil.wait_procs(left, timeout=10)
            for process in alive:
                process.kill()
            self.http.close()
            shutil.rmtree(self._home, ignore_errors=True)
        return code
