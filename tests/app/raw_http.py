"""An HTTP client that does what no library lets one do: stop reading, leave in the middle, send two requests."""

import json
import socket
import struct
from typing import Any

import gevent

from tests.app.scripted_pool import DEADLINE_S


class RawClient:
    """One connection. What comes back is kept as it is."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(("127.0.0.1", port))
        self.received = b""

    def post(self, path: str, body: dict[str, Any], version: str = "1.1") -> "RawClient":
        self.socket.sendall(request(path, body, version))
        return self

    def read_until(self, mark: bytes) -> bytes:
        """Return everything up to and including ``mark``."""
        while mark not in self.received:
            data = self.socket.recv(65536)
            assert data, f"closed before {mark!r}: {self.received!r}"
            self.received += data
        head, _, self.received = self.received.partition(mark)
        return head + mark

    def read_all(self) -> bytes:
        """Return the rest, until the server closes."""
        while data := self.socket.recv(65536):
            self.received += data
        return self.received

    def leave(self, reset: bool = False) -> None:
        """Close the connection, politely or not."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        gevent.sleep(0)


def request(path: str, body: dict[str, Any], version: str = "1.1") -> bytes:
    """A POST as bytes."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data
