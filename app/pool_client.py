"""This HTTP worker's line to the pool: one Unix socket, shared by all its requests.

One greenlet reads: it never blocks the hub, because only complete frames are decoded, and hands each event to the
`Stream` of its request. Another one writes, from a bounded queue, so that asking for something (a cancel above all)
never waits. When the pool goes away every open request gets an error at once, and the client dials again with growing
pauses, by path: a new pool listens at the same place.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent import socket
from gevent.event import Event as Signal

from app.pool_stream import Stream
from app.text.errors import JobFailed, PoolUnavailable
from app.text.offload import give_way
from app.timings import Timings
from config import logs
from workers.messages import (
    ClientMessage,
    Events,
    Failed,
    PoolMessage,
    PoolStatus,
    StatusQuery,
)
from workers.wire import READ_BYTES, Decoder, WireError, encode

log = logs.logger("tailrace.app")

# To try costs next to nothing, and until it works every request gets a 503.
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.2
# For so long after the pool went away (or this process began) requests wait for it: it may be on its way back.
COMEBACK_S = 3.0
CONNECT_TIMEOUT_S = 2.0
# What may wait to be written to a pool that does not read.
MAX_OUTBOX_BYTES = 64 * 1024 * 1024
# What may wait for a client that does not read; at a few hundred bytes each about 1 MiB.
MAX_PENDING_EVENTS = 8192
# How long the reader may dispatch before other greenlets get their turn, and how many events are a frame's work.
FRAMES_PER_TURN = 64
EVENTS_PER_FRAME = 32


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
        self.timings = Timings()
        self._streams: dict[str, Stream] = {}
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._outbox_signal = Signal()
        self._connected = False
        self._was_lost = False
        # Until then requests wait for the pool; never for one that has been away for longer.
        self._expected_until = time.monotonic() + COMEBACK_S
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
        """Return the pool's last word; while it may be on its way, wait for its first up to ``timeout`` seconds."""
        if self._status is None:
            wait = timeout if self._connected else min(timeout, self._expected_until - time.monotonic())
            if wait > 0:
                self._status_signal.clear()
                self._status_signal.wait(wait)
        return self._status

    def query_status(self, timeout: float) -> PoolStatus | None:
        """Ask the pool now; None if it does not answer within ``timeout`` seconds, at once if it has gone away."""
        if not self._connected:
            return None if self._was_lost else self.wait_status(timeout)
        self._status_signal.clear()
        self.tell(StatusQuery())
        return self._status if self._status_signal.wait(timeout) else None

    # --- for Stream

    def post(self, message: ClientMessage, stream: Stream, name: str) -> None:
        """Send something whose answers, called ``name``, are for ``stream``. Raises `PoolUnavailable`."""
        if not self._connected:
            raise PoolUnavailable("The model pool is not running.")
        frame = encode(message)
        if self._outbox_bytes + len(frame) > MAX_OUTBOX_BYTES:
            raise PoolUnavailable("The model pool does not take requests at the moment.")
        self._streams[name] = stream
        self._enqueue(frame)

    def forget(self, name: str) -> None:
        """Nobody waits for answers of this name any more."""
        self._streams.pop(name, None)

    def pending_events(self) -> int:
        """How many events wait for all who read here."""
        return sum(stream.pending for stream in set(self._streams.values()))

    def tell(self, message: ClientMessage) -> None:
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
                gevent.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, LONGEST_PAUSE_S)
                continue
            pause = FIRST_PAUSE_S
            self._connected = True
            writer = gevent.spawn(self._write, connection)
            try:
                self._read(connection)
                log.warning("the model pool closed the connection")
            except (OSError, WireError) as error:
                log.warning("lost the model pool", reason=str(error))
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
                    self.timings.arrived(time.monotonic())
                    for event in message.events:
                        stream = self._streams.get(event.id) or self._reader_of(event.id)
                        # Events of a cancelled job may still be on their way.
                        if stream is not None:
                            stream.put(event)
                    frames += len(message.events) // EVENTS_PER_FRAME
                else:
                    self._take_status(message)
                if frames >= FRAMES_PER_TURN:
                    frames = 0
                    give_way()

    def _reader_of(self, event_id: str) -> Stream | None:
        """Return who reads the kept request that has this job; a reader cannot know the jobs before they speak."""
        request, slash, _ = event_id.partition("/")
        return self._streams.get(request) if slash else None

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
        self._was_lost = True
        self._expected_until = time.monotonic() + COMEBACK_S
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
