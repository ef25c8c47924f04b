"""The first code of ours that runs in a model worker: everything between the process and its engine.

The order of `main` matters: signals, then the watch over the parent, then the devices, and only then the engine's
import, which may take seconds and touch the GPU.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from typing import Any

import msgspec

from config import logs
from workers.config import WorkerConfig
from workers.messages import Fatal, LogAs, Order, Report
from workers.wire import encode

log = logs.logger("tailrace.worker")

Inbox = queue.SimpleQueue[Order | None]
Emit = Callable[[list[Report]], None]
Engine = Callable[[WorkerConfig, Inbox, Emit], None]

# Signals that reach a whole process group (Ctrl-C, a platform's TERM to all, `systemctl kill -s HUP`) are addressed to
# the arbiter. A model worker leaves when the pool says so or is gone, never before: weights take minutes to load.
IGNORED_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)

# What the pool sends for "stop and return": no message of ours is empty.
STOP = b""

# Bytes of reports that may wait for a pool that does not read. Only a stopped or wedged pool gets here: at 1,000 tokens
# a second it takes many minutes, and afterwards nobody would want the answers.
MAX_PENDING_BYTES = 64 * 1024 * 1024

_PIPE_BYTES = 1024 * 1024
_FLUSH_SECONDS = 2.0
_F_SETPIPE_SZ = 1031
_PR_SET_PDEATHSIG = 1

EXIT_ORPHAN = 70
EXIT_UNHEARD = 71


def main(config: WorkerConfig, jobs: "Queue[bytes]", reports: Connection, log_as: logs.LogSettings) -> None:
    """Run the engine that ``config`` names until the pool says stop, then leave the process.

    ``jobs`` carries msgpack-encoded `Order` s (`STOP` to end), ``reports`` is the writing end of a pipe for frames of
    ``list[Report]``. Never returns: interpreter shutdown may hang in the libraries that an engine loads.
    """
    for each in IGNORED_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    watch_parent()
    if "gevent" in sys.modules:
        raise SystemExit("a model worker must not run under gevent: its patched locks would deadlock the job queue")
    logs.configure(log_as, f"worker-{config.index}")
    _keep_from_grandchildren(jobs, reports)
    _choose_devices(config)
    set_title(f"tailrace: model worker {config.index} ({config.device})")
    pipe = ReportPipe(reports.fileno())
    code = 0
    try:
        engine = _resolve(config.engine)
        inbox: Inbox = queue.SimpleQueue()
        threading.Thread(target=_read_jobs, args=(jobs, inbox), name="jobs", daemon=True).start()
        engine(config, inbox, pipe.emit)
    except ImportError as error:
        pipe.emit([Fatal(message=f"the engine cannot be loaded: {error}")])
    except Exception:
        log.exception("model worker failed")
        code = 1
    pipe.flush(_FLUSH_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch_parent() -> None:
    """End this process as soon as its parent is dead, whatever it is doing.

    A thread waits for the end of the pipe that only the parent holds open. It needs the interpreter's lock to act,
    which a wedged library may hold for ever, so on Linux the kernel is asked for a KILL as well.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait_for_the_end() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(EXIT_ORPHAN)

    threading.Thread(target=wait_for_the_end, name="parent watch", daemon=True).start()


class ReportPipe:
    """The way up: a frame goes straight into the pipe; what does not fit waits for a thread. `emit` never blocks."""

    def __init__(self, fd: int, max_pending: int = MAX_PENDING_BYTES) -> None:
        os.set_blocking(fd, False)
        _enlarge_pipe(fd)
        self._fd = fd
        self._max_pending = max_pending
        self._pending = bytearray()
        self._changed = threading.Condition()
        threading.Thread(target=self._write_pending, name="reports", daemon=True).start()

    def emit(self, reports: list[Report]) -> None:
        """Send ``reports`` as one frame. A pool that is gone, or has not read for far too long, ends this process."""
        if not reports:
            return
        frame = encode(reports)
        with self._changed:
            if not self._pending:
                frame = frame[self._write(frame) :]
                if not frame:
                    return
            if len(self._pending) + len(frame) > self._max_pending:
                os._exit(EXIT_UNHEARD)
            self._pending += frame
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until everything is written, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._pending and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            os._exit(EXIT_ORPHAN)

    def _write_pending(self) -> None:
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        while True:
            with self._changed:
                while not self._pending:
                    self._changed.wait()
            writable.poll()
            with self._changed:
                del self._pending[: self._write(self._pending)]
                if not self._pending:
                    self._changed.notify_all()


def _read_jobs(jobs: "Queue[bytes]", inbox: Inbox) -> None:
    """Move orders from the pool's queue to the engine's inbox, always, so that a long prompt never blocks the pool.

    If it cannot go on the process ends: an engine that gets no orders looks idle, and its jobs would wait for ever.
    """
    try:
        _move_jobs(jobs, inbox)
    except Exception:
        log.exception("orders cannot be read any more")
        os._exit(1)


def _move_jobs(jobs: "Queue[bytes]", inbox: Inbox) -> None:
    decoder: msgspec.msgpack.Decoder[Order | LogAs] = msgspec.msgpack.Decoder(Order | LogAs)
    while True:
        body = jobs.get()
        if body == STOP:
            inbox.put(None)
            return
        order = decoder.decode(body)
        if isinstance(order, LogAs):
            logs.change(order.level, order.form)
            log.info("reloaded", log_level=order.level, log_format=order.form)
        else:
            inbox.put(order)


def _resolve(name: str) -> Engine:
    """Import "module:function". Raises ImportError if there is no such thing."""
    module, _, function = name.partition(":")
    engine: Any = getattr(importlib.import_module(module), function, None)
    if engine is None:
        raise ImportError(f"{module} has no {function!r}")
    return engine  # type: ignore[no-any-return]


def _choose_devices(config: WorkerConfig) -> None:
    """Say which devices exist, before anything imports torch and asks."""
    os.environ["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # How long an idle thread of torch spins before it sleeps. libgomp's default is to spin on: fine while every thread
    # has a core of its own, but a step then takes up to ten times as long when the HTTP side or a client needs one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if config.cpu_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.cpu_threads)
    # systemd's messages are the arbiter's to send.
    os.environ.pop("NOTIFY_SOCKET", None)


def _keep_from_grandchildren(jobs: "Queue[bytes]", reports: Connection) -> None:
    """Close what is not ours to hold, and keep the rest from processes that a library may start.

    A copy of the pipe in a grandchild would hide this process's end from the pool.
    """
    jobs._writer.close()  # type: ignore[attr-defined]
    for held in (jobs._reader, reports):  # type: ignore[attr-defined]
        os.set_inheritable(held.fileno(), False)
    parent = multiprocessing.parent_process()
    if parent is not None:
        os.set_inheritable(parent.sentinel, False)


def _enlarge_pipe(fd: int) -> None:
    if sys.platform != "linux":
        return
    import fcntl

    with contextlib.suppress(OSError):  # over the user's limit for pipes: the default of 64 KiB works too
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)


def set_title(title: str) -> None:
    """Name this process for `ps`."""
    try:
        from setproctitle import setproctitle
    except ImportError:
        return
    setproctitle(title)
