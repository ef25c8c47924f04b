"""A server under test as the operating system sees it: started, ready, how much memory and CPU it takes, ended."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import ROOT
from benchmarks.results import Memory

_STOP_S = 20.0


class NotStarted(RuntimeError):
    """The server ended, or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Process:
    """A running server. ``port`` is where it listens, ``log`` what it wrote."""

    root: subprocess.Popen[bytes]
    port: int
    log: Path

    def tree(self) -> list[psutil.Process]:
        """The server's process and all below it; empty when it has ended."""
        try:
            root = psutil.Process(self.root.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_s(self) -> float:
        """CPU seconds that its processes have taken so far, those that ended and were waited for included."""
        total = 0.0
        for process in self.tree():
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
        return total

    def memory(self) -> Memory:
        """What all its processes hold now. PSS divides a page among those who share it, RSS counts it for each."""
        pss = rss = processes = 0
        for process in self.tree():
            with suppress(psutil.Error, OSError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
                kilobytes = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
                pss, rss, processes = pss + kilobytes["Pss:"], rss + kilobytes["Rss:"], processes + 1
        return Memory(pss * 1024, rss * 1024, processes)

    def wait_ready(self, path: str, seconds: float) -> float:
        """Return how many seconds from now a GET of ``path`` is answered 200. Raises `NotStarted`."""
        started = time.perf_counter()
        while not self._answers(path):
            if self.root.poll() is not None:
                raise NotStarted(f"ended with {self.root.returncode}: {self._last_words()}")
            if time.perf_counter() - started > seconds:
                raise NotStarted(f"not ready after {seconds:.0f} s: {self._last_words()}")
            time.sleep(0.05)
        return time.perf_counter() - started

    def get(self, path: str) -> Any:
        """Return the JSON behind a path. Raises `OSError`, `http.client.HTTPException` or `ValueError`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until its processes take less than a twentieth of a core for 2 s. Returns False if they never do."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            before = self.cpu_s()
            time.sleep(2.0)
            if self.cpu_s() - before < 0.1:
                return True
        return False

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-400:] or "it wrote nothing"


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[Process]:
    """Start a server in a session of its own; at the end of the block it and all that it started are gone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TAILRACE_", "VLLM_"))}
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as home:
        log = Path(home) / "log"
        with log.open("wb") as output:
            root = subprocess.Popen(
                command, cwd=ROOT, env=inherited | dict(environment), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        process = Process(root, port, log)
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: Process) -> None:
    tree = process.tree()
    with suppress(ProcessLookupError):
        process.root.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.root.wait(_STOP_S)
    _, alive = psutil.wait_procs(tree, timeout=2)
    for each in alive:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    # Children that came after the look at the tree are still in the session's process group.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.root.pid, signal.SIGKILL)
    process.root.wait()
    # The memory of a large process takes a while to be given back; the next server shall have it.
    psutil.wait_procs(alive, timeout=10)


class MemoryWatch:
    """Takes the server's memory every two seconds on a thread of its own, for the ``most`` that a load needs."""

    def __init__(self, process: Process) -> None:
        self.most = Memory(0, 0, 0)
        self._process = process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(2.0):
            self.most = max(self.most, self._process.memory(), key=lambda memory: memory.pss_bytes)
