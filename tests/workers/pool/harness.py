"""What the tests of the pool share: a pool process, a client of it, and waiting for conditions."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tests.lifeline import tied
from workers.messages import (
    ClientMessage,
    Event,
    Events,
    Failed,
    GenerateJob,
    Output,
    PoolMessage,
    PoolStatus,
    SamplingParams,
    Started,
    StatusQuery,
)
from workers.wire import Decoder, encode

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 20.0

_numbers = itertools.count(1)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Return the condition's value as soon as it is true; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)
    return value


def job(prompt: list[int], max_tokens: int = 20, *, n: int = 1, seed: int = 0, salt: str = "") -> GenerateJob:
    """A job with an id of its own."""
    return GenerateJob(
        id=f"job-{os.getpid()}-{next(_numbers)}",
        prompt=prompt,
        max_tokens=max_tokens,
        n=n,
        sampling=SamplingParams(seed=seed),
        salt=salt,
    )


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def wait_dead(pids: list[int], seconds: float = PATIENCE) -> None:
    """Wait until none of ``pids`` is left."""
    wait_until(lambda: not any(map(alive, pids)), f"the end of {[pid for pid in pids if alive(pid)]}", seconds)


class Connection:
    """An HTTP worker's connection to the pool, as a test sees it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.decoder: Decoder[PoolMessage] = Decoder(PoolMessage)
        self.events: dict[str, list[Event]] = {}
        self.frames: list[Events] = []
        self.status: PoolStatus | None = None
        # The longest time (seconds) in which a job that had begun to answer got nothing.
        self.longest_gap_s = 0.0
        self._heard: dict[str, float] = {}

    def send(self, *messages: ClientMessage) -> None:
        self.socket.sendall(b"".join(map(encode, messages)))

    def wait(self, condition: Callable[[], object], what: str = "the pool", seconds: float = PATIENCE) -> None:
        """Read until ``condition`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"waited {seconds:.0f} s in vain for {what}"
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                raise EOFError(f"the pool closed the connection; waited for {what}")
            for message in self.decoder.feed(data):
                if isinstance(message, PoolStatus):
                    self.status = message
                else:
                    self.frames.append(message)
                    for event in message.events:
                        self.events.setdefault(event.id, []).append(event)
                        if isinstance(event, Output):
                            now = time.monotonic()
                            self.longest_gap_s = max(self.longest_gap_s, now - self._heard.get(event.id, now))
                            self._heard[event.id] = now

    def wait_end(self) -> None:
        """Read until the pool closes the connection."""
        with suppress(EOFError, ConnectionResetError):
            self.wait(lambda: False, "the connection's end")

    def wait_ready(self, workers: int = 1) -> PoolStatus:
        """Wait until so many workers are ready."""
        self.wait(
            lambda: self.status and sum(worker.state == "ready" for worker in self.status.workers) >= workers,
            f"{workers} ready workers",
        )
        assert self.status is not None
        return self.status

    def ask_status(self) -> PoolStatus:
        """Return the pool's state, asked for now."""
        self.status = None
        self.send(StatusQuery())
        self.wait(lambda: self.status, "a status")
        assert self.status is not None
        return self.status

    def wait_status(self, condition: Callable[[PoolStatus], object], what: str, seconds: float = PATIENCE) -> None:
        """Ask the pool for its state until ``condition`` holds of it; events are taken in meanwhile."""
        wait_until(lambda: condition(self.ask_status()), what, seconds)

    def wait_seconds(self, seconds: float) -> None:
        """Let time pass, as the fault has it, and take in what comes."""
        over = time.monotonic() + seconds
        self.wait_status(lambda status: time.monotonic() >= over, "the time", seconds + PATIENCE)

    def tokens(self, wanted: GenerateJob, choice: int = 0) -> list[int]:
        """The tokens of a choice so far."""
        outputs = [event for event in self.events.get(wanted.id, []) if isinstance(event, Output)]
        return [token for output in outputs if output.choice == choice for token in output.ids]

    def finish_reasons(self, wanted: GenerateJob) -> dict[int, str]:
        """The finish reasons so far, by choice."""
        outputs = [event for event in self.events.get(wanted.id, []) if isinstance(event, Output)]
        return {output.choice: output.finish_reason for output in outputs if output.finish_reason}

    def failure(self, wanted: GenerateJob) -> Failed | None:
        """The job's failure, if it has failed."""
        return next((event for event in self.events.get(wanted.id, []) if isinstance(event, Failed)), None)

    def started(self, wanted: GenerateJob) -> int:
        """How often the client heard that the job started."""
        return sum(isinstance(event, Started) for event in self.events.get(wanted.id, []))

    def wait_tokens(self, wanted: GenerateJob, count: int, choice: int = 0) -> None:
        """Wait for so many tokens of a choice."""
        self.wait(lambda: len(self.tokens(wanted, choice)) >= count, f"{count} tokens of {wanted.id}")

    def wait_answer(self, *jobs: GenerateJob) -> None:
        """Wait until each job has ended, well or badly; there may be some lives of a worker, and trials, in between."""
        self.wait(
            lambda: all(self.failure(each) or len(self.finish_reasons(each)) == each.n for each in jobs),
            f"the end of {[each.id for each in jobs]}",
            3 * PATIENCE,
        )

    def close(self) -> None:
        self.socket.close()


def pool_status(path: Path) -> PoolStatus:
    """Ask the pool at the socket ``path``. Raises OSError or EOFError when there is none."""
    connection = Connection(path)
    try:
        connection.wait(lambda: connection.status)
        assert connection.status is not None
        return connection.status
    finally:
        connection.close()


class PoolProcess:
    """A running pool with the scripted engine; see `tests.workers.pool.run_pool` for the options."""

    def __init__(self, directory: Path, *arguments: str, lifeline: bool = False) -> None:
        self.directory = directory
        self.log_path = directory / "pool.log"
        ours, theirs = socket.socketpair()
        extra = ["--lifeline", str(theirs.fileno())] if lifeline else []
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                tied([sys.executable, "-m", "tests.workers.pool.run_pool", str(directory), *arguments, *extra]),
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        theirs.close()
        self.lifeline = ours
        self.path = directory / "pool.sock"

    @property
    def log(self) -> str:
        """What the pool has said."""
        return self.log_path.read_text()

    def connect(self, workers: int = 0) -> Connection:
        """Return a connection that has its first status, after waiting for so many ready workers."""
        wait_until(self._listens, "the pool's socket")
        connection = Connection(self.path)
        connection.wait(lambda: connection.status)
        if workers:
            connection.wait_ready(workers)
        return connection

    def open_gate(self, number: int) -> None:
        """Let the jobs (or the loading, 0) go on that wait for it."""
        (self.directory / f"gate-{number}").touch()

    def kill_all(self) -> None:
        """Leave nothing behind, however the test went."""
        pids = [self.process.pid, *descendants(self.process.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.lifeline.close()
        wait_dead(pids)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.path)) == 0


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="tr-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
