"""This HTTP worker's line to the pool: one Unix socket, shared by all its requests.

One greenlet reads: it never blocks the hub, because only complete frames are decoded, and hands each event to the
`Stream` of its request. Another one writes, from a bounded queue, so that asking for something (a cancel above all)
never waits. When the pool goes away every open request gets an error at once, and the client dials again with growing
pauses, by path: a new pool listens at the same place.
"""

import logging
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event as Signal

from app.text.errors import JobFailed, PoolUnavailable, ReaderTooSlow
from app.text.offload import give_way
from workers.messages import (
    Cancel,
    ClientMessage,
    Embedded,
    Event,
    Events,
    Failed,
    GenerateJob,
    Job,
    Output,
    PoolMessage,
    PoolStatus,
    StatusQuery,
)
from workers.wire import Decoder, WireError, encode

log = logging.getLogger("tailrace.app")

READ_BYTES = 256 * 1024
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
CONNECT_TIMEOUT_S = 2.0
# What may wait to be written to a pool that does not read.
MAX_OUTBOX_BYTES = 64 * 1024 * 1024
# What may wait for a client that does not read; at a few hundred bytes each about 1 MiB.
MAX_PENDING_EVENTS = 8192
# How long the reader may dispatch before other greenlets get their turn.
FRAMES_PER_TURN = 64


class Stream:
    """The events of one request, which may have several jobs. Always close it: that cancels what is unfinished."""

    def __init__(self, client: "PoolClient", max_pending: int) -> None:
        self._client = client
        self._max_pending = max_pending
        self._events: deque[Event] = deque()
        self._signal = Signal()
        self._error: BaseException | None = None
        # For each unfinished job the choices that are still growing.
        self._open: dict[str, set[int]] = {}

    def submit(self, job: Job) -> None:
        """Hand a job to the pool. Raises `PoolUnavailable` if there is none, or what `abort` was given."""
        if self._error is not None:
            raise self._error
        self._client._submit(job, self)
        self._open[job.id] = set(range(job.n)) if isinstance(job, GenerateJob) else {0}

    def get(self, timeout: float | None = None) -> list[Event]:
        """Return all events that have come, waiting for the first; [] after ``timeout`` seconds without one.

        Raises what `abort` was given, or `ReaderTooSlow` if they were not taken for too long.
        """
        if self._error is None and not self._events:
            self._signal.clear()
            self._signal.wait(timeout)
        if self._error is not None:
            raise self._error
        events = list(self._events)
        self._events.clear()
        return events

    def unget(self, events: list[Event]) -> None:
        """Give ``events`` back, to be the next ones."""
        self._events.extendleft(reversed(events))

    def end_choice(self, job_id: str, choice: int) -> None:
        """No more tokens of this choice are wanted."""
        growing = self._open.get(job_id)
        if growing is None or choice not in growing:
            return
        growing.discard(choice)
        if growing:
            self._client._send(Cancel(id=job_id, choice=choice))
        else:
            self._end_job(job_id)

    def abort(self, error: BaseException) -> None:
        """Cancel everything; whoever waits in `get` gets ``error``."""
        if self._error is None:
            self._error = error
        self.close()
        self._signal.set()

    def close(self) -> None:
        """Cancel every job that is not finished. May be called at any time, any number of times; never waits."""
        for job_id in list(self._open):
            self._end_job(job_id)

    def _end_job(self, job_id: str) -> None:
        if self._open.pop(job_id, None) is not None:
            self._client._forget(job_id)
            self._client._send(Cancel(id=job_id))

    def _put(self, event: Event) -> None:
        """Called by the client's reader."""
        if len(self._events) >= self._max_pending:
            self._events.clear()
            self.abort(ReaderTooSlow())
            return
        self._events.append(event)
        if isinstance(event, Output):
            if event.finish_reason is not None:
                growing = self._open.get(event.id)
                if growing is not None:
                    growing.discard(event.choice)
                    if not growing:
                        self._finished(event.id)
        elif isinstance(event, Failed | Embedded):
            self._finished(event.id)
        self._signal.set()

    def _finished(self, job_id: str) -> None:
        self._open.pop(job_id, None)
        self._client._forget(job_id)


class PoolClient:
    """The connection. ``on_status`` is called with each `PoolStatus`, and with None when the pool goes away."""

    def __init__(
        self,
        path: Path,
        on_status: Callable[[PoolStatus | None], None] = lambda status: None,
        max_pending_events: int = MAX_PENDING_EVENTS,
    ) -> None:
        self._path = path
        self._on_status = on_status
        self._max_pending = max_pending_events
        self._streams: dict[str, Stream] = {}
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._outbox_signal = Signal()
        self._connected = False
        # Whether the last attempt to reach the pool failed: then nobody waits for it.
        self._unreachable = False
        self._status: PoolStatus | None = None
        self._status_signal = Signal()
        self._runner: Any = None

    def start(self) -> None:
        """Begin to keep the connection up."""
        if self._runner is None:
            self._runner = gevent.spawn(self._run)

    def close(self) -> None:
        """Hang up for good."""
        if self._runner is not None:
            self._runner.kill()
            self._runner = None

    @property
    def status(self) -> PoolStatus | None:
        """The pool's last word; None while no pool is connected."""
        return self._status

    @property
    def open_jobs(self) -> int:
        """Jobs that wait for events."""
        return len(self._streams)

    def open_stream(self) -> Stream:
        """Return a stream for the jobs of one request."""
        return Stream(self, self._max_pending)

    def wait_status(self, timeout: float) -> PoolStatus | None:
        """Return the pool's last word; while it is being dialled, wait for its first up to ``timeout`` seconds."""
        if self._status is None and not self._unreachable:
            self._status_signal.clear()
            self._status_signal.wait(timeout)
        return self._status

    def query_status(self, timeout: float) -> PoolStatus | None:
        """Ask the pool now; None if it does not answer within ``timeout`` seconds."""
        if not self._connected:
            return self.wait_status(timeout)
        self._status_signal.clear()
        self._send(StatusQuery())
        return self._status if self._status_signal.wait(timeout) else None

    # --- for Stream

    def _submit(self, job: Job, stream: Stream) -> None:
        if not self._connected:
            raise PoolUnavailable("The model pool is not running.")
        frame = encode(job)
        if self._outbox_bytes + len(frame) > MAX_OUTBOX_BYTES:
            raise PoolUnavailable("The model pool does not take requests at the moment.")
        self._streams[job.id] = stream
        self._enqueue(frame)

    def _forget(self, job_id: str) -> None:
        self._streams.pop(job_id, None)

    def _send(self, message: ClientMessage) -> None:
        """Without a pool there is nobody to tell: it takes the end of the connection as a cancel of everything."""
        if self._connected:
            self._enqueue(encode(message))

    def _enqueue(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self._outbox_bytes += len(frame)
        self._outbox_signal.set()

    # --- the connection

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            connection = self._dial()
            if connection is None:
                self._unreachable = True
                self._status_signal.set()
                gevent.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, LONGEST_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            self._connected, self._unreachable = True, False
            writer = gevent.spawn(self._write, connection)
            try:
                self._read(connection)
                log.warning("the model pool closed the connection")
            except (OSError, WireError) as error:
                log.warning("lost the model pool: %s", error)
            finally:
                self._connected = False
                writer.kill(block=False)
                connection.close()
                self._lost()

    def _dial(self) -> Any:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        try:
            connection.connect(str(self._path))
        except OSError:
            connection.close()
            return None
        connection.settimeout(None)
        return connection

    def _read(self, connection: Any) -> None:
        decoder: Decoder[PoolMessage] = Decoder(PoolMessage)
        frames = 0
        while data := connection.recv(READ_BYTES):
            for message in decoder.feed(data):
                frames += 1
                if isinstance(message, Events):
                    for event in message.events:
                        stream = self._streams.get(event.id)
                        # Events of a cancelled job may still be on their way.
                        if stream is not None:
                            stream._put(event)
                else:
                    self._take_status(message)
                if frames % FRAMES_PER_TURN == 0:
                    give_way()

    def _write(self, connection: Any) -> None:
        try:
            while True:
                self._outbox_signal.wait()
                self._outbox_signal.clear()
                while self._outbox:
                    frame = self._outbox.popleft()
                    connection.sendall(frame)
                    self._outbox_bytes -= len(frame)
        except OSError:
            # Wakes the reader, which sees the end and cleans up.
            connection.close()

    def _take_status(self, status: PoolStatus) -> None:
        self._status = status
        self._on_status(status)
        self._status_signal.set()

    def _lost(self) -> None:
        self._outbox.clear()
        self._outbox_bytes = 0
        self._outbox_signal.clear()
        self._status = None
        self._on_status(None)
        for stream in set(self._streams.values()):
            failure = Failed(
                id="", kind="unavailable", message="The model pool went away; retry the request.", retry_after=2.0
            )
            stream.abort(JobFailed(failure))
        self._streams.clear()
