"""The load generator: streaming HTTP requests from one thread that takes little of the machine it measures.

While a run lasts, bytes are only kept, each piece with the time of its arrival; `benchmarks.answers` reads them
afterwards. Times are seconds of `time.perf_counter`.
"""

import errno
import heapq
import itertools
import random
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

Address = tuple[str, int]

# The end of a chunked body. JSON escapes line ends, so this cannot come in the middle of one.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_RECEIVE = 1 << 16


@dataclass(eq=False)
class Stream:
    """One request under way or over. ``pieces`` are (time, bytes) as they came, HTTP headers included."""

    sent_at: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended_at: float | None = None
    error: str | None = None


def post(address: Address, path: str, body: bytes) -> bytes:
    """Return the bytes of a POST request with a JSON body, on a connection of its own."""
    host, port = address
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body


class Generator:
    """Sends requests to one server and keeps what comes back; timers and answers call back within `run`."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._selector = selectors.DefaultSelector()
        self._open: dict[socket.socket, tuple[Stream, bytes, Callable[[Stream], None] | None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def send(self, request: bytes, done: Callable[[Stream], None] | None = None) -> Stream:
        """Send a request, as `post` makes it; ``done`` is called with the stream when its answer has ended."""
        stream = Stream(time.perf_counter())
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.setblocking(False)
        self._open[connection] = (stream, request, done)
        code = connection.connect_ex(self._address)
        if code in (0, errno.EINPROGRESS):
            self._selector.register(connection, selectors.EVENT_WRITE)
        else:
            # Not within the caller: who sends in answer to an end would recurse.
            self.call_at(0.0, lambda: self._end(connection, f"cannot connect: {errno.errorcode.get(code, code)}"))
        return stream

    def call_at(self, when: float, function: Callable[[], None]) -> None:
        """Call ``function`` within `run` at the time ``when``, or at once if that is past."""
        heapq.heappush(self._timers, (when, next(self._order), function))

    def run(self, deadline: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Go on until nothing is under way, or ``enough``, or the deadline. Returns False for the deadline only."""
        while (self._open or self._timers) and not enough():
            now = time.perf_counter()
            if now >= deadline:
                return False
            if self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
                continue
            until = min(deadline, self._timers[0][0]) if self._timers else deadline
            for key, events in self._selector.select(until - now):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if events & selectors.EVENT_WRITE:
                    self._write(connection)
                else:
                    self._read(connection)
        return True

    def close(self) -> None:
        """Leave whatever is still under way: its connections are closed, its streams have no end."""
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._timers.clear()
        self._selector.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _write(self, connection: socket.socket) -> None:
        stream, request, done = self._open[connection]
        try:
            sent = connection.send(request)
        except OSError as error:
            self._end(connection, f"cannot send: {error.strerror}")
            return
        self._open[connection] = (stream, request[sent:], done)
        if sent == len(request):
            self._selector.modify(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_RECEIVE)
        except OSError as error:
            self._end(connection, f"cannot receive: {error.strerror}")
            return
        if data:
            self._open[connection][0].pieces.append((time.perf_counter(), data))
        if not data or data.endswith(_LAST_CHUNK):
            self._end(connection, None)

    def _end(self, connection: socket.socket, error: str | None) -> None:
        stream, _, done = self._open.pop(connection)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        connection.close()
        stream.ended_at, stream.error = time.perf_counter(), error
        if done is not None:
            done(stream)


def closed_loop(generator: Generator, requests: Iterable[bytes], clients: int) -> list[Stream]:
    """Start ``clients`` that each send the next request when their last one has ended. Fills the list during `run`."""
    waiting: Iterator[bytes] = iter(requests)
    streams: list[Stream] = []

    def next_one(_ended: Stream | None = None) -> None:
        request = next(waiting, None)
        if request is not None:
            streams.append(generator.send(request, next_one))

    for _ in range(clients):
        next_one()
    return streams


def open_loop(generator: Generator, requests: Iterable[bytes], per_second: float, seed: int | None) -> list[Stream]:
    """Send requests at a mean rate whatever comes back: Poisson arrivals for a ``seed``, even ones for None.

    A stream's ``sent_at`` is the time when it was due, so that a late generator cannot flatter the server.
    """
    streams: list[Stream] = []
    pause = random.Random(seed).expovariate if seed is not None else lambda rate: 1 / rate
    due = time.perf_counter()

    def send(request: bytes, when: float) -> Callable[[], None]:
        def now() -> None:
            stream = generator.send(request)
            stream.sent_at = when
            streams.append(stream)

        return now

    for request in requests:
        due += pause(per_second)
        generator.call_at(due, send(request, due))
    return streams
