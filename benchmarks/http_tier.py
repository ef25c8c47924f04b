"""What a streamed token costs on its way from a model worker to the client: CPU time of HTTP workers and pool, latency.

Run as ``make bench-http`` or ``python -m benchmarks.http_tier``. The real server runs, with HTTP workers and pool as it
starts them, but its model worker follows a script (`benchmarks.scripted`): at a fixed rate each stream gets one token.
The client is this process; it only drains its sockets.

CPU time (user and system, also what the kernel does for the process's own system calls) is divided by the tokens that
were emitted meanwhile. Latency is from the model worker's emitting a step's tokens to the client's
having read a part of them; one that is as long as a step would be taken for a short one.
"""

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.scripted import MAX_MODEL_LEN, STEPS_PER_SECOND, Progress
from config.sources import ROOT

START_S = 60.0
SETTLE_S = 1.0
READ_BYTES = 65536


@dataclass(frozen=True)
class Sample:
    """One window of steady streaming: CPU in microseconds for each token, latencies in seconds, sorted."""

    tokens: int
    http_us: float
    pool_us: float
    latencies: Sequence[float]


class Service:
    """gunicorn, and beside it a pool with the scripted engine, in a directory of their own."""

    def __init__(self, http_workers: int, steps_per_second: float, busy_threads: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tailrace-bench-"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TAILRACE_")}
        environ |= {
            "TAILRACE_CONFIG": os.devnull,
            "TAILRACE_RUNTIME_DIR": str(self.directory),
            "TAILRACE_CACHE_DIR": str(self.directory),
            "TAILRACE_ONLY_CPU": "1",
            "TAILRACE_LAUNCH_POOL": "0",
            "TAILRACE_PORT": str(self.port),
            "TAILRACE_HTTP_WORKERS": str(http_workers),
            "TAILRACE_MAX_BATCH": "256",
            "STEPS_PER_SECOND": str(steps_per_second),
            "BUSY_THREADS": str(busy_threads),
        }
        self._log = self.directory / "log"
        with self._log.open("wb") as log:
            self._pool, self._gunicorn = (
                subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=environ, stdout=log, stderr=log)
                for command in (["benchmarks.scripted"], ["gunicorn", "-c", "gunicorn.conf.py"])
            )

    def wait_ready(self) -> None:
        """Return when a stream would be answered. Raises RuntimeError with the log if that does not come about."""
        deadline = time.monotonic() + START_S
        while not self._ready():
            if time.monotonic() > deadline or self._pool.poll() is not None or self._gunicorn.poll() is not None:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.05)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as probe:
            probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            return b" 200 " in probe.recv(READ_BYTES)
        return False

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU time spent up to now by the HTTP workers and by the pool."""
        workers = psutil.Process(self._gunicorn.pid).children()
        return sum(_cpu_seconds(worker.pid) for worker in workers), _cpu_seconds(self._pool.pid)

    def stop(self) -> None:
        """End all of it."""
        for process in (self._gunicorn, self._pool):
            process.send_signal(signal.SIGQUIT if process is self._gunicorn else signal.SIGTERM)
        for process in (self._gunicorn, self._pool):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


class Clients:
    """``count`` open streams, drained by `run`."""

    def __init__(self, port: int, count: int) -> None:
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": "Tell me about the sea."}],
                "stream": True,
                "ignore_eos": True,
                "max_tokens": MAX_MODEL_LEN - 1024,
            }
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n"
        self._selector = selectors.DefaultSelector()
        self._sockets = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
            self._sockets.append(connection)

    def run(self, seconds: float, progress: Progress) -> list[float]:
        """Drain all streams; return how long after its emission each part of a stream was read, in seconds, sorted.

        Raises RuntimeError when a stream ends.
        """
        latencies = []
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for key, _ in self._selector.select(end - now):
                assert isinstance(key.fileobj, socket.socket)
                if not key.fileobj.recv(READ_BYTES):
                    raise RuntimeError("a stream has ended")
                latencies.append(time.monotonic() - progress.read()[1])
        return sorted(latencies)

    def close(self) -> None:
        """Leave."""
        self._selector.close()
        for connection in self._sockets:
            connection.close()


@contextlib.contextmanager
def service(http_workers: int, steps_per_second: float, busy_threads: int) -> Iterator[Service]:
    """A running service."""
    started = Service(http_workers, steps_per_second, busy_threads)
    try:
        started.wait_ready()
        yield started
    finally:
        started.stop()


def measure(running: Service, streams: int, seconds: float, repetitions: int) -> list[Sample]:
    """Open ``streams`` streams and look at ``repetitions`` windows of steady streaming."""
    progress = Progress(running.directory)
    clients = Clients(running.port, streams)
    samples = []
    try:
        clients.run(SETTLE_S, progress)
        for _ in range(repetitions):
            tokens, (http, pool) = progress.read()[0], running.cpu_seconds()
            latencies = clients.run(seconds, progress)
            new, (http_after, pool_after) = progress.read()[0] - tokens, running.cpu_seconds()
            samples.append(Sample(new, (http_after - http) / new * 1e6, (pool_after - pool) / new * 1e6, latencies))
    finally:
        clients.close()
    return samples


def _cpu_seconds(pid: int) -> float:
    """Return the time that ``pid``, with all threads that it ever had, has spent on a CPU.

    Linux has a clock for each process (clock_getcpuclockid(3)), with a resolution of nanoseconds; /proc/PID/stat counts
    ticks of 10 ms, which is more than the pool needs for a whole window of few streams.
    """
    return time.clock_gettime((~pid << 3) | 2)


def main() -> None:
    """Measure, and print one line for each number of streams."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_tier", description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a window")
    parser.add_argument("--repetitions", type=int, default=5, help="windows for each number of streams")
    parser.add_argument("--rate", type=float, default=STEPS_PER_SECOND, help="tokens per second of each stream")
    parser.add_argument("--http_workers", type=int, default=2)
    parser.add_argument(
        "--busy_threads", type=int, default=0, help="threads of the model worker that compute all along"
    )
    options = parser.parse_args()
    with service(options.http_workers, options.rate, options.busy_threads) as running:
        for streams in options.streams:
            samples = measure(running, streams, options.seconds, options.repetitions)
            http, pool = [each.http_us for each in samples], [each.pool_us for each in samples]
            latencies = sorted(latency for each in samples for latency in each.latencies)
            rate = sum(each.tokens for each in samples) / (options.seconds * len(samples))
            print(
                f"{streams:4d} streams, {rate:5.0f} tokens/s: CPU per token "
                f"HTTP {statistics.median(http):5.1f} us ({min(http):.1f} to {max(http):.1f}), "
                f"pool {statistics.median(pool):4.1f} us ({min(pool):.1f} to {max(pool):.1f}); "
                f"latency median {latencies[len(latencies) // 2] * 1e3:.2f} ms, "
                f"99% {latencies[len(latencies) * 99 // 100] * 1e3:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
