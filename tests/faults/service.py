"""A whole service under test: arbiter, HTTP workers, pool, model worker with the scripted engine."""

import http.client
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.e2e.server import free_port
from tests.lifeline import tied
from tests.workers.pool.harness import PATIENCE, ROOT, alive, descendants, pool_status, wait_dead, wait_until
from workers.messages import PoolStatus


class Service:
    """gunicorn started as an operator would, in a session of its own.

    ``settings`` are those of `config.settings`; names in capitals are environment variables, but for ``APPLICATION``,
    which replaces the application of bare token ids, and ``BEFORE``, a command that executes the one behind it, and
    ``LISTENER``, a descriptor that it gets.
    """

    def __init__(self, directory: Path, settings: dict[str, object]) -> None:
        settings = dict(settings)
        self.directory = directory
        self.port = int(str(settings.get("port", 0))) or free_port()
        application = str(settings.pop("APPLICATION", "tests.faults.stream_app:application"))
        listener = settings.pop("LISTENER", None)
        before = [str(each) for each in settings.pop("BEFORE", [])]  # type: ignore[attr-defined]
        self.log_path = directory / "service.log"
        self.sign_of_life = "/pid" if "stream_app" in application else "/readyz"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
        defaults = {"graceful_timeout_s": 20, "http_workers": 2, "port": self.port}
        paths = {"runtime_dir": directory, "cache_dir": directory, "only_cpu": "true"}
        for name, value in (defaults | paths | settings).items():
            environ[name if name.isupper() else f"TAILRACE_{name.upper()}"] = str(value)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                tied(
                    [
                        *before,
                        sys.executable,
                        "-m",
                        "gunicorn",
                        "-c",
                        "tests/faults/gunicorn_pool.conf.py",
                        application,
                    ]
                ),
                cwd=ROOT,
                env=environ,
                pass_fds=[] if listener is None else [int(str(listener))],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.seen: set[int] = {self.process.pid}

    @property
    def log(self) -> str:
        """What all of them have said."""
        return self.log_path.read_text()

    def wait_ready(self) -> PoolStatus:
        """Wait until a stream would be answered; return the pool's state."""
        status: list[PoolStatus] = []

        def answers() -> bool:
            assert self.process.poll() is None, self.log
            with suppress(OSError, EOFError):
                status[:] = [self.pool_status()]
                return status[0].ready and self.get(self.sign_of_life)[0] == 200
            return False

        wait_until(answers, "the service", 3 * PATIENCE)
        self.note_processes()
        return status[0]

    def pool_status(self) -> PoolStatus:
        """Ask the pool itself."""
        return pool_status(self.directory / "pool.sock")

    def get(self, path: str) -> tuple[int, bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stream(self, prompt: list[int], max_tokens: int) -> "HttpStream":
        """Open a stream of token ids."""
        return HttpStream(self.port, prompt, max_tokens)

    def open_gate(self, number: int) -> None:
        """Let the jobs go on that wait for it."""
        (self.directory / f"gate-{number}").touch()

    def http_workers(self) -> set[int]:
        """The pids of the arbiter's HTTP workers."""
        pool = self.pool_pid()
        return {child.pid for child in psutil.Process(self.process.pid).children() if child.pid != pool}

    def pool_pid(self) -> int:
        """The pid of the pool."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(self.directory / "pool.sock"))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def note_processes(self) -> set[int]:
        """Remember all processes there are now; return all ever seen."""
        self.seen |= {self.process.pid, *descendants(self.process.pid)}
        return self.seen

    def wait_gone(self, seconds: float = PATIENCE) -> int:
        """Wait until no process is left; return the arbiter's exit code."""
        code = self.process.wait(seconds)
        wait_dead(sorted(self.seen), seconds)
        return code

    def wait_gone_but(self, others: set[int], seconds: float = PATIENCE) -> None:
        """Wait until the arbiter and its HTTP workers are gone, when the pool is somebody else's."""
        self.process.wait(seconds)
        wait_dead(sorted(self.seen - others), seconds)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to every process of the service, as a terminal does."""
        os.killpg(self.process.pid, number)

    def kill_all(self) -> None:
        """Leave nothing behind, however the test went."""
        for pid in sorted(self.note_processes()):
            with suppress(ProcessLookupError):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_dead(sorted(self.seen))


class HttpStream:
    """A running answer, read line by line."""

    def __init__(self, port: int, prompt: list[int], max_tokens: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self.connection.request("GET", f"/?prompt={','.join(map(str, prompt))}&max_tokens={max_tokens}")
        self.response = self.connection.getresponse()
        self.tokens: list[int] = []
        self.last = ""

    def read(self, count: int) -> None:
        """Read until there are so many tokens."""
        while len(self.tokens) < count and self._line():
            pass
        assert len(self.tokens) >= count, (self.tokens, self.last)

    def read_all(self) -> None:
        """Read to the end."""
        while self._line():
            pass

    def close(self) -> None:
        self.connection.close()

    def _line(self) -> bool:
        line = self.response.readline().decode().strip()
        if line.isdigit():
            self.tokens.append(int(line))
        elif line:
            self.last = line
        return bool(line)
