"""The Procfile as a platform runs it: its line in a shell, or honcho, with PORT and WEB_CONCURRENCY."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.server import free_port
from tests.faults.service import HttpStream, Service
from tests.lifeline import tied
from tests.workers.pool.harness import ROOT, alive, descendants, job, wait_dead, wait_until
from tests.workers.pool.scripted_engine import SILENT, WAIT, expected

GATED = [WAIT, 5, 0, 1]
HONCHO = [str(Path(sys.executable).with_name("honcho")), "start", "-f"]


class Platform(Service):
    """A service started from the Procfile, but for its model; its first process is the shell, or honcho."""

    def __init__(self, directory: Path, settings: dict[str, str], *, honcho: bool) -> None:
        self.directory = directory
        self.sign_of_life = "/pid"
        self.port = free_port()
        self.log_path = directory / "platform.log"
        procfile = (ROOT / "Procfile").read_text()
        scripted = "tests/faults/gunicorn_pool.conf.py tests.faults.stream_app:application"
        assert procfile.count(" -c gunicorn.conf.py") == 1
        procfile = procfile.replace(" -c gunicorn.conf.py", f" -c {scripted}")
        (directory / "Procfile").write_text(procfile)
        line = next(each for each in procfile.splitlines() if each.startswith("web: ")).removeprefix("web: ")
        command = [*HONCHO, str(directory / "Procfile"), "-d", str(ROOT)] if honcho else ["sh", "-c", line]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
        environ |= {f"TAILRACE_{name}_DIR": str(directory) for name in ("RUNTIME", "CACHE", "STATE")}
        environ |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": str(self.port)}
        environ |= {"WEB_CONCURRENCY": "3", "TAILRACE_ONLY_CPU": "1", "TAILRACE_HOST": "127.0.0.1"} | settings
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                tied(command), cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
        self.seen = {self.process.pid}

    def answers(self, path: str) -> bool:
        """Whether a request for ``path`` succeeds now."""
        assert self.process.poll() is None, self.log
        with suppress(OSError):
            return self.get(path)[0] == 200
        return False

    def term_to_all(self) -> None:
        """What a platform does: TERM to every process at once."""
        for pid in (self.process.pid, *descendants(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Platform]]:
    platforms: list[Platform] = []

    def begin(*, honcho: bool, **settings: str) -> Platform:
        platforms.append(Platform(directory, settings, honcho=honcho))
        return platforms[-1]

    yield begin
    for each in platforms:
        each.kill_all()


def gated(platform: Platform) -> HttpStream:
    """A stream that waits for its gate. Each HTTP worker hears for itself that the pool is ready: one may be late."""
    tried: list[HttpStream] = []

    def begun() -> bool:
        tried.append(platform.stream(GATED, 12))
        return tried[-1].response.status == 200

    wait_until(begun, "an HTTP worker that knows of the pool")
    tried[-1].read(5)
    return tried[-1]


def assert_whole(stream: HttpStream) -> None:
    stream.read_all()
    assert (stream.tokens, stream.last) == (expected(job(GATED, 12)), "end")


def test_port_and_web_concurrency_are_taken_and_term_to_all_lets_streams_finish_or_tells_them(start):
    platform = start(honcho=False, TAILRACE_GRACEFUL_TIMEOUT_S="8")
    platform.wait_ready()
    # The shell has become gunicorn: a platform's signal to "the process" reaches the arbiter.
    assert len(platform.http_workers()) == 3
    finishes, never_ends = gated(platform), platform.stream([SILENT], 9)
    platform.term_to_all()
    wait_until(lambda: "Handling signal: term" in platform.log, "the arbiter's attention")
    platform.open_gate(1)
    assert_whole(finishes)
    never_ends.read_all()
    assert never_ends.last.startswith("error")
    assert platform.wait_gone() == 0
    assert "SIGKILL" not in platform.log


def test_honcho_runs_it_and_term_to_all_ends_it_in_order(start):
    platform = start(honcho=True)
    wait_until(lambda: platform.answers("/?prompt=0&max_tokens=1"), "the service", 60)
    platform.note_processes()
    stream = gated(platform)
    platform.term_to_all()
    wait_until(lambda: "Handling signal: term" in platform.log, "the arbiter's attention")
    platform.open_gate(1)
    assert_whole(stream)
    # Told to stop, which it was: honcho makes that 128 and the signal's number, or the code of what it ran.
    assert platform.wait_gone() in (0, 128 + signal.SIGTERM)


def test_what_cannot_be_served_is_honchos_exit_code_too(start):
    platform = start(honcho=True, POOL_ENGINE="fatal")
    assert platform.process.wait(60) == 2
    assert "this model cannot be served" in platform.log
    wait_dead([pid for pid in platform.seen if alive(pid)])
