"""A chat server that says what the test wrote: streamed completions over real sockets, no model."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Script = Callable[[dict[str, Any]], Iterator[bytes]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(text: str | None, finish_reason: str | None = None) -> bytes:
    """One event of a chat stream; no text for the first one, which names the role, and the last one."""
    delta = {"role": "assistant"} if text is None else {"content": text}
    message = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}
    return b"data: " + json.dumps(message).encode() + b"\n\n"


def words(body: dict[str, Any]) -> Iterator[bytes]:
    """As many words as tokens were asked for, each an event of its own."""
    yield HEAD + chunk(event(None))
    for number in range(body["max_tokens"]):
        yield chunk(event(f" word{number}"))
    yield chunk(event(None, "length")) + chunk(DONE) + END


class ScriptedServer:
    """``bodies`` are the requests that came, ``most`` how many of them were open at the same time."""

    def __init__(self, script: Script) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most = 0
        self._open = 0
        self._lock = threading.Lock()
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # A thread in accept() is woken by this, and not by close() alone.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            length = 0
            while (line := reader.readline()) != b"\r\n":
                if not line:
                    return  # a client that left before it had asked
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = json.loads(reader.read(length))
            with self._lock:
                self.bodies.append(body)
                self._open += 1
                self.most = max(self.most, self._open)
            try:
                for piece in self._script(body):
                    # Counted as over before its last bytes are out: with them the client may send the next one.
                    if piece.endswith(END):
                        with self._lock:
                            self._open -= 1
                    connection.sendall(piece)
            except OSError:
                return


@contextmanager
def scripted(script: Script = words) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script)
    try:
        yield server
    finally:
        server.close()
