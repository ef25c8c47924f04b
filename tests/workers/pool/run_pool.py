"""A pool process with the scripted engine: ``python -m tests.workers.pool.run_pool DIR [options]``."""

import argparse
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from config import logs
from workers.config import WorkerConfig
from workers.pool.console import Console
from workers.pool.model_worker import Limits
from workers.pool.rendezvous import Rendezvous, Taken
from workers.pool.server import Pool, PoolOptions

ENGINE = "tests.workers.pool.scripted_engine:run"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--lifeline", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--model", default="scripted:plain")
    parser.add_argument("--engine", default=ENGINE)
    parser.add_argument("--watchdog", type=float, default=30.0)
    parser.add_argument("--backoff", type=float, default=0.05)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--max-queue", type=int, default=256)
    parser.add_argument("--max-queue-tokens", type=int, default=1_000_000)
    parser.add_argument("--queue-timeout", type=float, default=0.0)
    parser.add_argument("--max-replays", type=int, default=3)
    parser.add_argument("--breaker", type=int, default=5)
    parser.add_argument("--client-bytes", type=int, default=64 * 1024 * 1024)
    parser.add_argument("--client-patience", type=float, default=30.0)
    parser.add_argument("--drain", type=float, default=10.0)
    parser.add_argument("--wall-clock", action="store_true", help="shift the date by the seconds in DIR/wall-clock")
    options = parser.parse_args()
    if options.wall_clock:
        _shift_date(options.directory)
    logs.configure("debug", "pool")
    configs = [
        WorkerConfig(
            index=index,
            base_model=options.model,
            runtime_dir=str(options.directory),
            cache_dir=str(options.directory),
            engine=options.engine,
        )
        for index in range(options.workers)
    ]
    try:
        rendezvous = Rendezvous(options.directory / "pool.sock")
    except Taken as error:
        print(error, file=sys.stderr)
        return 2
    pool = Pool(
        configs,
        rendezvous,
        PoolOptions(
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_queue_tokens=options.max_queue_tokens,
            queue_timeout_s=options.queue_timeout,
            max_replays=options.max_replays,
            client_pending_bytes=options.client_bytes,
            client_patience_s=options.client_patience,
            drain_s=options.drain,
            limits=Limits(
                watchdog_s=options.watchdog,
                backoff_first_s=options.backoff,
                breaker_deaths=options.breaker,
                stop_s=2.0,
            ),
        ),
        display=Console("http://127.0.0.1:1"),
        lifeline=None if options.lifeline is None else socket.socket(fileno=options.lifeline),
    )
    return pool.run()


def _shift_date(directory: Path) -> None:
    """Let the date jump as an operator, or a time server, would; DIR/dates notes by how much it was seen shifted."""
    date, date_ns = time.time, time.time_ns

    def shift() -> int:
        with suppress(OSError, ValueError):
            seconds = int((directory / "wall-clock").read_text())
            (directory / "dates").open("a").write(f"{seconds}\n")
            return seconds
        return 0

    time.time = lambda: date() + shift()
    time.time_ns = lambda: date_ns() + shift() * 1_000_000_000


if __name__ == "__main__":
    sys.exit(main())
