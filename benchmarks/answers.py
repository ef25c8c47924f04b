"""What came back, read after the run: HTTP and server-sent events out of the bytes that `benchmarks.load` kept."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.load import Stream


class BadAnswer(ValueError):
    """The bytes are no HTTP response that this reader knows."""


@dataclass(frozen=True)
class Answer:
    """A chat answer. ``texts`` are its non-empty pieces with their times; ``error`` is None when it is whole."""

    sent_at: float
    texts: list[tuple[float, str]]
    finish_reason: str | None
    error: str | None

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.texts)

    @property
    def first_text_s(self) -> float | None:
        """Seconds from sending to the first text, or None if none came."""
        return self.texts[0][0] - self.sent_at if self.texts else None

    def gaps(self, since: float = float("-inf"), until: float = float("inf")) -> list[float]:
        """Seconds between one piece of text and the next, for the gaps that end between ``since`` and ``until``."""
        return [after - before for (before, _), (after, _) in pairwise(self.texts) if since < after <= until]


def read_answer(stream: Stream) -> Answer:
    """Read a streamed chat completion; what is wrong with it becomes its ``error``."""
    texts: list[tuple[float, str]] = []
    finish_reason, error = None, stream.error
    try:
        for at, event in _events(stream):
            if event == "[DONE]":
                continue
            message = json.loads(event)
            if "error" in message:
                raise BadAnswer(json.dumps(message["error"])[:300])
            for choice in message.get("choices") or ():
                if text := _text(choice):
                    texts.append((at, text))
                finish_reason = choice.get("finish_reason") or finish_reason
    except ValueError as wrong:
        error = error or str(wrong)
    if error is None and finish_reason is None:
        error = "not ended" if stream.ended_at is None else "cut off" if stream.pieces else "no answer"
    return Answer(stream.sent_at, texts, finish_reason, error)


def _text(choice: dict[str, Any]) -> str:
    return (choice.get("delta") or {}).get("content") or ""


def _events(stream: Stream) -> Iterator[tuple[float, str]]:
    """Yield each event's data with the time when its last byte was there. Raises `BadAnswer`."""
    rest = b""
    for at, body in _body(stream):
        *lines, rest = (rest + body).split(b"\n")
        for line in lines:
            # Each event of an OpenAI stream is one data line; comments and other fields are none of its tokens.
            if line.startswith(b"data:"):
                yield at, line[5:].strip().decode("utf-8")


def _body(stream: Stream) -> Iterator[tuple[float, bytes]]:
    """Yield the body's bytes without chunk framing, with their times. Raises `BadAnswer` if the status is not 200."""
    buffer, pieces = bytearray(), iter(stream.pieces)
    at = stream.sent_at
    while b"\r\n\r\n" not in buffer:
        try:
            at, data = next(pieces)
        except StopIteration:
            return
        buffer += data
    head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        said = rest + b"".join(data for _, data in pieces)
        raise BadAnswer(f"status {b''.join(status).decode()}: {said.decode('utf-8', 'replace')[:300]}")
    if b"transfer-encoding: chunked" not in head.lower():
        yield at, rest
        yield from pieces
        return
    buffer = bytearray(rest)
    while True:
        yield from ((at, chunk) for chunk in _take_chunks(buffer))
        try:
            at, data = next(pieces)
        except StopIteration:
            return
        buffer += data


def _take_chunks(buffer: bytearray) -> Iterator[bytes]:
    """Yield the whole chunks at the start of ``buffer`` and remove them from it."""
    while (end := buffer.find(b"\r\n")) >= 0:
        size = int(buffer[:end].split(b";")[0], 16)
        if len(buffer) < end + 2 + size + 2:
            return
        chunk = bytes(buffer[end + 2 : end + 2 + size])
        del buffer[: end + 2 + size + 2]
        yield chunk
