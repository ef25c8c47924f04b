"""One connection of an HTTP worker: frames in, frames out through a bounded buffer, never waiting."""

import socket
from collections.abc import Iterator

from workers.messages import ClientMessage, Event, Events
from workers.pool.journal import Entry
from workers.wire import READ_BYTES, Decoder, WireError, encode


class Gone(Exception):
    """The connection is of no use any more; the text says why, "" for an ordinary end."""


class Client:
    """An HTTP worker as the pool sees it.

    ``max_pending`` bytes may wait for it, and for ``patience_s`` seconds it may read nothing: whoever stands still for
    longer is cut off, because its tokens would pile up here.
    """

    def __init__(self, connection: socket.socket, *, max_pending: int, patience_s: float) -> None:
        connection.setblocking(False)
        self.jobs: dict[str, Entry] = {}
        self.events: list[Event] = []
        self.post = self.events.append
        self.pending = bytearray()
        # Whether the selector is asked to tell when `pending` can be written.
        self.watched_for_room = False
        self._connection = connection
        self._decoder: Decoder[ClientMessage] = Decoder(ClientMessage)
        self._max_pending = max_pending
        self._patience = patience_s
        self._stuck_since: float | None = None

    def fileno(self) -> int:
        """The socket, for a selector."""
        return self._connection.fileno()

    def read(self) -> Iterator[ClientMessage]:
        """Yield the messages that have arrived. Raises `Gone` at the connection's end and on garbage."""
        try:
            data = self._connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise Gone("") from error
        if not data:
            raise Gone("")
        try:
            yield from self._decoder.feed(data)
        except WireError as error:
            raise Gone(f"sent garbage: {error}") from error

    def flush_events(self, now: float) -> None:
        """Send the events of this turn as one frame."""
        if self.events:
            frame = encode(Events(events=self.events))
            self.events.clear()
            self.send(frame, now)

    def send(self, frame: bytes, now: float) -> None:
        """Send ``frame``, or keep what the socket does not take. Raises `Gone` when too much waits."""
        if self.pending:
            self.pending += frame
        else:
            sent = self._write(frame)
            if sent == len(frame):
                return
            self.pending += memoryview(frame)[sent:]
            self._stuck_since = now
        if len(self.pending) > self._max_pending:
            raise Gone(f"left {len(self.pending)} bytes unread")

    def write_pending(self, now: float) -> None:
        """Send more of what waits, now that the socket takes some. Raises `Gone` if the other side is gone."""
        if sent := self._write(self.pending):
            del self.pending[:sent]
            self._stuck_since = now if self.pending else None

    def check_patience(self, now: float) -> None:
        """Raises `Gone` if the other side has read nothing for too long."""
        if self._stuck_since is not None and now - self._stuck_since > self._patience:
            raise Gone(f"read nothing for {self._patience:.0f} s")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return self._connection.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Gone("") from error
