"""Event streams: the frames of an answer as it grows, and what happens when something goes wrong in the middle.

Only ``data:`` lines and comments are sent; a bare ``event:`` or ``retry:`` line breaks openai's client. Each frame of
text is put together from parts that were encoded once for the stream, since its cost is paid for every token.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import orjson
from flask import Response

from app.api.disconnect import ClientGuard
from app.api.errors import as_api_error
from app.api.service import Service
from app.pool_client import Stream
from app.text.errors import ClientGone, JobFailed, ReaderTooSlow
from app.text.generation import Generation, Piece

log = logging.getLogger("tailrace.requests")
errors = logging.getLogger("tailrace.app")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_SLOT = "\x00TEXT\x00"


def frame(body: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


class TextFrame:
    """An event whose JSON is constant but for one text; ``body`` holds `SLOT` in its place."""

    SLOT = _SLOT
    __slots__ = ("_head", "_tail")

    def __init__(self, body: dict[str, Any]) -> None:
        self._head, _, self._tail = frame(body).partition(orjson.dumps(_SLOT))

    def __call__(self, text: str) -> bytes:
        return self._head + orjson.dumps(text) + self._tail


class Frames(Protocol):
    """The events of one kind of answer."""

    def opening(self, count: int) -> bytes: ...
    def text(self, index: int) -> Callable[[str], bytes]: ...
    def scored(self, piece: Piece) -> bytes: ...
    def prompt(self, piece: Piece) -> bytes: ...
    def finish(self, index: int, reason: str) -> bytes: ...
    def closing(self, generation: Generation) -> bytes: ...


def events(generation: Generation, frames: Frames, opening: bytes, tick_s: float | None) -> Iterator[bytes]:
    """Yield the whole stream of one generation, each time all that has become known."""
    if opening:
        yield opening
    text_frames = [frames.text(choice) for choice in range(generation.choices)]
    for pieces in generation.pieces(tick_s):
        if not pieces:
            yield KEEP_ALIVE
            continue
        parts = []
        for piece in pieces:
            if piece.prompt:
                parts.append(frames.prompt(piece))
            if piece.tokens:
                parts.append(frames.scored(piece))
            elif piece.text:
                parts.append(text_frames[piece.choice](piece.text))
            if piece.finish_reason is not None:
                parts.append(frames.finish(piece.choice, piece.finish_reason))
        if generation.finished:
            parts += [frames.closing(generation), DONE]
        yield b"".join(parts)


class EventStream:
    """The body of a streamed answer, as gunicorn iterates over it.

    gunicorn asks for the next part when the last one was taken, and calls `close` whatever happens. A fault becomes an
    error event, after which the connection is cut: without ``[DONE]``, an invented finish reason or the mark of a
    complete body, nobody can take a part for the whole.
    """

    def __init__(
        self,
        request_id: str,
        parts: Iterator[bytes],
        owner: Service,
        stream: Stream,
        guard: ClientGuard,
        generation: Generation,
    ) -> None:
        self._id = request_id
        self._parts = parts
        self._owner = owner
        self._stream = stream
        self._guard = guard
        self._generation = generation
        self._begun = time.monotonic()
        self._outcome = "cancelled"
        self._failed = False
        self._closed = False

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> bytes:
        self._guard.waiting()
        if self._failed:
            self._guard.cut()
            raise StopIteration
        try:
            part = next(self._parts)
        except StopIteration:
            self._outcome = "finished"
            raise
        except ClientGone:
            raise StopIteration from None
        except Exception as error:
            part = self._error_event(error)
        self._guard.writing()
        return part

    def close(self) -> None:
        """End the request: cancels its jobs if they are not finished."""
        if self._closed:
            return
        self._closed = True
        self._guard.close()
        self._owner.close_stream(self._stream)
        if self._outcome == "cancelled" and self._generation.finished:
            self._outcome = "finished"
        usage = self._generation.usage
        log.info(
            "%s id=%s completion_tokens=%d seconds=%.3f",
            self._outcome,
            self._id,
            usage.completion_tokens,
            time.monotonic() - self._begun,
        )

    def _error_event(self, error: Exception) -> bytes:
        self._failed = True
        self._outcome = "failed"
        answer = as_api_error(error)
        known = isinstance(error, JobFailed | ReaderTooSlow)
        if answer.status == 500:
            errors.error("stream id=%s failed: %s", self._id, error, exc_info=None if known else error)
        return b"data: " + answer.encoded() + b"\n\n"


def event_stream_response(body: EventStream) -> Response:
    """Return the answer; passed through as it is, since every layer costs time for each token."""
    return Response(body, headers=HEADERS, content_type="text/event-stream; charset=utf-8", direct_passthrough=True)
