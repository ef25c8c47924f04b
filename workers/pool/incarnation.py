"""One life of one model worker: a process, its job queue and its pipe. A successor gets new ones of all three."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Protocol

from config import logs
from workers.config import WorkerConfig
from workers.entry import IGNORED_SIGNALS, main
from workers.messages import LogAs, Order, Report
from workers.pool.job_queue import JobQueue
from workers.wire import READ_BYTES, Decoder, WireError


class Ended(Exception):
    """Nothing more can come from a worker. ``cause`` is None if its pipe just ended, else what is wrong with it."""

    def __init__(self, cause: str | None = None) -> None:
        super().__init__(cause or "end of the pipe")
        self.cause = cause


class Life(Protocol):
    """What the supervisor needs of a running model worker; tests have one without a process."""

    @property
    def pid(self) -> int | None: ...
    def fileno(self) -> int: ...
    def send(self, order: Order | LogAs) -> None: ...
    def read(self) -> Iterator[list[Report]]: ...
    def ask_to_stop(self) -> None: ...
    def kill(self) -> None: ...
    def exit_cause(self) -> str | None: ...
    def close(self) -> None: ...


class Incarnation:
    """A model worker that was started with spawn: no memory, no listening socket and no lock of the pool in it."""

    def __init__(self, config: WorkerConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs = JobQueue(context)
        self._reports, child_end = context.Pipe(duplex=False)
        self._decoder: Decoder[list[Report]] = Decoder(list[Report])
        self._process = context.Process(
            target=main,
            args=(config, self._jobs.queue, child_end, logs.present()),
            name=f"model worker {config.index}",
            daemon=True,
        )
        # A signal to the group must not end the child in the moment before it has asked to ignore it: the mask is
        # inherited, and `workers.entry.main` lifts it.
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
            # Only the worker may hold the writing end, or its death would not be the pipe's end.
            child_end.close()
            self._jobs.child_has_it()
        os.set_blocking(self._reports.fileno(), False)

    @property
    def pid(self) -> int | None:
        """The process id, valid until `exit_cause` returns something."""
        return self._process.pid

    def fileno(self) -> int:
        """The reading end of the pipe, for a selector."""
        return self._reports.fileno()

    def send(self, order: Order | LogAs) -> None:
        """Hand ``order`` to the worker. Never blocks."""
        self._jobs.put(order)

    def read(self) -> Iterator[list[Report]]:
        """Yield what has arrived, without waiting. Raises `Ended` when nothing more can come.

        The pipe is read as raw bytes: `Connection.recv` would wait for the rest of a message that its writer never
        finishes, and would unpickle it.
        """
        try:
            data = os.read(self._reports.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise Ended(f"cannot be read: {error.strerror}") from error
        if not data:
            raise Ended
        try:
            yield from self._decoder.feed(data)
        except WireError as error:
            raise Ended(f"sent garbage and was killed ({error})") from error

    def ask_to_stop(self) -> None:
        """Tell the engine to return."""
        self._jobs.put_stop()

    def kill(self) -> None:
        """End the process now. It cannot hit a stranger: the pid is ours until `exit_cause` has collected it."""
        self._process.kill()

    def exit_cause(self) -> str | None:
        """Return how the process ended, or None while it lives."""
        code = self._process.exitcode
        if code is None:
            return None
        if code >= 0:
            return f"exited with code {code}"
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
        return f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")

    def close(self) -> None:
        """Give back pipe and queue of a process that has exited."""
        self._reports.close()
        self._jobs.close()
        if self._process.exitcode is not None:
            self._process.close()
