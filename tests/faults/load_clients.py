"""Hundreds of clients in one thread: each asks on a connection of its own and writes down what it sees, and when."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

CHAT = "/v1/chat/completions"
PATIENCE_S = 180.0

T = TypeVar("T")


@dataclass
class Seen:
    """One answer. Times are `time.monotonic`, in seconds; ``status`` 0: the connection ended before one came.

    ``arrivals``: when each part with text came. ``whole``: whether the answer came to its end.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    began: float = 0.0
    answered: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    whole: bool = False

    @property
    def seconds_to_answer(self) -> float:
        return self.answered - self.began

    @property
    def seconds_to_text(self) -> float:
        return self.arrivals[0] - self.began

    @property
    def longest_gap_s(self) -> float:
        """Between two parts with text."""
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)

    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def verdict(self) -> str:
        """complete, error, refused or lost, as in the faults' table."""
        if self.status in (408, 429, 503):
            return "refused"
        if self.error is not None:
            return "refused" if self.error["type"] == "rate_limit_error" and not self.arrivals else "error"
        return "complete" if self.whole else "lost"


def request_bytes(body: dict[str, Any], path: str = CHAT) -> bytes:
    """A whole request, after whose answer the server closes."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"messages": [{"role": "user", "content": text}], **fields}


async def ask(port: int, body: dict[str, Any], path: str = CHAT, *, on_text: Callable[[], None] | None = None) -> Seen:
    """Ask, and read the whole answer."""
    seen = Seen(began=time.monotonic())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return seen
    try:
        writer.write(request_bytes(body, path))
        await asyncio.wait_for(_read(reader, seen, on_text), PATIENCE_S)
    except (OSError, asyncio.IncompleteReadError):
        # A connection that ended early: what is missing from the answer says so.
        pass
    finally:
        writer.close()
        seen.ended = time.monotonic()
    return seen


async def _read(reader: asyncio.StreamReader, seen: Seen, on_text: Callable[[], None] | None) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    seen.answered = time.monotonic()
    seen.status = int(head[0].split()[1])
    seen.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
    if seen.headers.get("transfer-encoding") != "chunked":
        body = json.loads(await reader.readexactly(int(seen.headers["content-length"])))
        seen.error = body.get("error")
        _take(seen, body, on_text)
        seen.whole = True
        return
    rest = b""
    # A stream that ends with an error is cut behind it: the next line is empty then.
    while size := int(await reader.readline() or b"0", 16):
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *events, rest = rest.split(b"\n\n")
        for event in events:
            _event(seen, event, on_text)
    await reader.readexactly(2)


def _event(seen: Seen, event: bytes, on_text: Callable[[], None] | None) -> None:
    for line in event.splitlines():
        if line.startswith(b":"):
            seen.comments.append(line.decode())
        elif line == b"data: [DONE]":
            seen.whole = True
        elif line.startswith(b"data: "):
            body = json.loads(line[6:])
            if body.get("error"):
                seen.error = body["error"]
            else:
                _take(seen, body, on_text)


def _take(seen: Seen, body: dict[str, Any], on_text: Callable[[], None] | None) -> None:
    new = False
    for choice in body.get("choices", ()):
        index = choice["index"]
        text = (choice.get("delta") or choice.get("message") or {}).get("content") or choice.get("text") or ""
        new = new or bool(text)
        seen.texts[index] = seen.texts.get(index, "") + text
        if choice.get("finish_reason"):
            seen.reasons[index] = choice["finish_reason"]
    if new:
        seen.arrivals.append(time.monotonic())
        if on_text is not None:
            on_text()


async def ask_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[Seen]:
    """Ask all at once."""
    return list(await asyncio.gather(*(ask(port, body) for body in bodies)))


async def asked_again_and_again(
    port: int, body: Callable[[int], dict[str, Any]], number: int, until: float
) -> list[Seen]:
    """One client that asks until the moment ``until``; refused, it comes again when it was told to."""
    seen = []
    while time.monotonic() < until:
        seen.append(await ask(port, body(number)))
        if seen[-1].verdict == "refused":
            pause = float(seen[-1].headers.get("retry-after", 1))
            await asyncio.sleep(max(0.0, min(pause, until - time.monotonic())))
    return seen


def run(work: Awaitable[T]) -> T:
    """Run it to its end."""

    async def main() -> T:
        return await work

    return asyncio.run(main())


def connect(port: int, *, receive_buffer: int | None = None, timeout: float = PATIENCE_S) -> socket.socket:
    """A plain connection."""
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(timeout)
    made.connect(("127.0.0.1", port))
    return made


def leave(connection: socket.socket, *, reset: bool) -> None:
    """Close it: with FIN, or with RST."""
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them are."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
