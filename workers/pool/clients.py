"""The connections of all HTTP workers: taken in, listened to, written to, and dropped when they are of no use."""

import selectors
from collections.abc import Callable

from config import logs
from workers.messages import ClientMessage
from workers.pool.client import Client, Gone
from workers.pool.rendezvous import Rendezvous
from workers.wire import WireError

log = logs.logger("tailrace.pool")

_ACCEPT_PAUSE_S = 1.0
_CHECK_SOCKET_S = 5.0


class Clients:
    """Everybody connected at ``rendezvous``, ``most`` at a time.

    ``greet(client)`` is called for each new one, ``hear(client, message)`` with each message, ``gone(client)`` when one
    has been dropped. What a callback does with a client may end that client, never the caller.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        selector: selectors.BaseSelector,
        *,
        most: int,
        max_pending: int,
        patience_s: float,
        greet: Callable[[Client], None],
        hear: Callable[[Client, ClientMessage], None],
        gone: Callable[[Client], None],
    ) -> None:
        self._rendezvous = rendezvous
        self._selector = selector
        self._most = most
        self._max_pending = max_pending
        self._patience_s = patience_s
        self._greet = greet
        self._hear = hear
        self._gone = gone
        self._clients: set[Client] = set()
        self._accept_at: float | None = None
        self._check_socket_at = 0.0
        self._now = 0.0

    def open(self) -> None:
        """Begin to accept connections."""
        self._selector.register(self._rendezvous, selectors.EVENT_READ, self.accept)

    def close(self) -> None:
        """Hang up, for all of them."""
        for client in list(self._clients):
            self._drop(client)
        self._rendezvous.close()

    @property
    def have_unread(self) -> bool:
        """Whether somebody has not read yet what is meant for them."""
        return any(client.pending or client.events for client in self._clients)

    def accept(self) -> None:
        """Take in whoever knocks."""
        try:
            connection = self._rendezvous.accept()
        except OSError as error:
            log.error("cannot accept connections", reason=error.strerror)
            self._selector.unregister(self._rendezvous)
            self._accept_at = self._now + _ACCEPT_PAUSE_S
            return
        if connection is None:
            return
        if len(self._clients) >= self._most:
            log.error("refused a connection", open=len(self._clients))
            connection.close()
            return
        client = Client(connection, max_pending=self._max_pending, patience_s=self._patience_s)
        self._clients.add(client)
        self._selector.register(client, selectors.EVENT_READ, client)
        self._guarded(client, self._greet, client)

    def serve(self, client: Client, ready: int, now: float) -> None:
        """Do what the selector found ``client`` ready for."""
        if client not in self._clients:
            return  # cut off earlier in this turn
        if ready & selectors.EVENT_WRITE:
            self._guarded(client, client.write_pending, now)
        if ready & selectors.EVENT_READ and client in self._clients:
            self._guarded(client, self._listen, client)

    def flush(self, now: float) -> None:
        """Send everybody the events of this turn."""
        for client in list(self._clients):
            if client.events:
                self._guarded(client, client.flush_events, now)

    def broadcast(self, frame: bytes, now: float) -> None:
        """Send ``frame`` to everybody."""
        for client in list(self._clients):
            self._guarded(client, client.send, frame, now)

    def tend(self, now: float) -> None:
        """Do what is due by the clock: give up on those who read nothing, and see to it that we can be found."""
        self._now = now
        for client in list(self._clients):
            self._guarded(client, client.check_patience, now)
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self.open()
        if now >= self._check_socket_at:
            self._check_socket_at = now + _CHECK_SOCKET_S
            self._check_rendezvous()

    def watch(self) -> None:
        """Ask to be woken when a client with pending bytes can take more."""
        for client in self._clients:
            if client.watched_for_room != bool(client.pending):
                client.watched_for_room = not client.watched_for_room
                room = selectors.EVENT_WRITE if client.watched_for_room else 0
                self._selector.modify(client, selectors.EVENT_READ | room, client)

    def _listen(self, client: Client) -> None:
        for message in client.read():
            self._hear(client, message)

    def _guarded(self, client: Client, action: Callable[..., None], *args: object) -> None:
        """Do something with a client; if it turns out to be gone, everything that it wanted is cancelled."""
        try:
            action(*args)
        except (Gone, WireError) as gone:
            if str(gone):
                log.error("disconnected an HTTP worker", reason=str(gone))
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._gone(client)
        self._selector.unregister(client)
        client.close()

    def _check_rendezvous(self) -> None:
        if self._accept_at is None and self._rendezvous.lost:
            log.warning("the socket has vanished: listening there again", path=str(self._rendezvous.path))
            self._selector.unregister(self._rendezvous)
            try:
                self._rendezvous.renew()
            except OSError as error:  # those who are connected are served on
                log.error("cannot listen", reason=error.strerror)
            self.open()
