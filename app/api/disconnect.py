"""Notices that a client has left, or has stopped reading, while its request is being answered.

gunicorn tells neither: a departed client is seen at a later write only, a client that does not read blocks the write
for ever. So a greenlet watches the socket beside the request. A half-closed connection counts as left. Watching ends at
the first byte of a pipelined request, which is the next request's business (and would wake it for ever).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
from gevent import socket


class ClientGuard:
    """Watches one client's socket; ``on_gone`` is called once, when the client has left or been given up.

    Without a socket (another server than gunicorn, a test client) it does nothing.
    """

    def __init__(self, environ: dict[str, Any], on_gone: Callable[[], None], send_timeout_s: float) -> None:
        self._socket = environ.get("gunicorn.socket")
        self._on_gone = on_gone
        self._send_timeout_s = send_timeout_s
        self._writing_since: float | None = None
        self._watcher: Any = None
        self.gone = False
        if self._socket is not None:
            # Later than we ourselves, who end the connection without an error that the log would show.
            _set_user_timeout(self._socket, 1.5 * send_timeout_s)
            self._watcher = gevent.spawn(self._watch)

    def writing(self) -> None:
        """From now on bytes are being sent."""
        self._writing_since = time.monotonic()

    def waiting(self) -> None:
        """The bytes were taken."""
        self._writing_since = None

    def cut(self) -> None:
        """End the connection at once, without the mark of a complete answer."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.kill(block=False)
            self._watcher = None

    def _watch(self) -> None:
        connection: Any = self._socket
        look_again_s = min(self._send_timeout_s / 4, 5.0)
        while True:
            try:
                socket.wait_read(connection.fileno(), timeout=look_again_s, timeout_exc=TimeoutError())
                # SSL sockets cannot peek: there only writing notices.
                if connection.recv(1, socket.MSG_PEEK):
                    break
                self._leave()
                return
            except TimeoutError:
                if self._stalled():
                    return
            except ValueError:
                break
            except OSError:
                self._leave()
                return
        while not self._stalled():
            gevent.sleep(look_again_s)

    def _stalled(self) -> bool:
        since = self._writing_since
        if since is None or time.monotonic() - since < self._send_timeout_s:
            return False
        # Wakes the writer with an error that gunicorn takes for an ordinary departure.
        self.cut()
        self._leave()
        return True

    def _leave(self) -> None:
        self.gone = True
        self._on_gone()


class WatchedBody:
    """A long answer in parts: the client may take as long as it likes for all, but not for one of them."""

    def __init__(self, parts: Iterator[bytes], guard: ClientGuard) -> None:
        self._parts = parts
        self._guard = guard

    def __iter__(self) -> "WatchedBody":
        return self

    def __next__(self) -> bytes:
        self._guard.waiting()
        part = next(self._parts)
        self._guard.writing()
        return part

    def close(self) -> None:
        """Called by gunicorn at the end, whatever happened."""
        self._guard.close()


def _set_user_timeout(connection: Any, seconds: float) -> None:
    """Let the kernel give up a peer that acknowledges nothing (powered off, or its window closed) for so long."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        # Not on a Unix socket.
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
