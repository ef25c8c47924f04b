"""Event streams: the frames of an answer as it grows, and what happens when something goes wrong in the middle.

Only ``id:`` and ``data:`` lines and comments are sent; a bare ``event:`` or ``retry:`` line breaks openai's client.
Each frame of text is put together from parts that were encoded once for the stream, since its cost is paid for every
token.

The events of an answer are numbered. Which event has which number depends on what the pool says and not on when it
does, so the same numbers come out when a kept request is read again. An event that tells an error has none: it is the
end of a reading, and what follows its predecessor may still be read.
"""

import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Protocol

import orjson
from flask import Response

from app.api import life
from app.api.disconnect import ClientGuard
from app.api.service import Service
from app.errors import ApiError, as_api_error
from app.pool_stream import Stream
from app.text.errors import ClientGone, JobFailed, ReaderTooSlow
from app.text.generation import Generation, Piece

# A comment is a line and no block of its own: to openai's and Anthropic's clients an empty line, once there has been an
# id, is the end of an event, and a comment before it one without data, on which they fail.
KEEP_ALIVE = b": keep-alive\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_SLOT = "\x00TEXT\x00"
_END = b"\n\n"
_NUMBER = re.compile(rb"id: [^\n]*:(\d+)\n")


def frame(body: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def comment(generation: Generation) -> bytes:
    """Return what is said while there is nothing to say: the place in the queue, if the request waits there."""
    position = generation.queue_position
    return KEEP_ALIVE if position is None else b": queued, position %d\n" % position


class EventIds:
    """Gives the events of one stream their ids: the request's own, and the number of the event, from 1."""

    __slots__ = ("head", "numbers")

    def __init__(self, request_id: str) -> None:
        self.head = b"id: " + request_id.encode() + b":"
        self.numbers = count(1)

    def __call__(self, event: bytes) -> bytes:
        """Return the next event of the stream."""
        return b"%b%d\n%b" % (self.head, next(self.numbers), event)

    def frame(self, body: dict[str, Any]) -> bytes:
        """Return the next event of the stream, with this data."""
        return self(frame(body))


class TextFrame:
    """An event whose JSON is constant but for one text; ``body`` holds `SLOT` in its place."""

    SLOT = _SLOT
    __slots__ = ("_head", "_id", "_numbers", "_tail")

    def __init__(self, ids: EventIds, event: bytes) -> None:
        self._id, self._numbers = ids.head, ids.numbers
        head, _, self._tail = event.partition(orjson.dumps(_SLOT))
        self._head = b"\n" + head

    def __call__(self, text: str) -> bytes:
        return b"%b%d%b%b%b" % (self._id, next(self._numbers), self._head, orjson.dumps(text), self._tail)


class Frames(Protocol):
    """The events of one kind of answer."""

    def opening(self, count: int) -> bytes: ...
    def text(self, index: int) -> Callable[[str], bytes]: ...
    def scored(self, piece: Piece) -> bytes: ...
    def prompt(self, piece: Piece) -> bytes: ...
    def finish(self, index: int, reason: str) -> bytes: ...
    def closing(self, generation: Generation) -> bytes: ...
    def error(self, error: ApiError) -> bytes: ...


class OpenAIEnding:
    """How the streams of chat and completions break off."""

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""
        return b"data: " + error.encoded() + b"\n\n"


def behind(parts: Iterator[bytes], number: int) -> Iterator[bytes]:
    """Yield a stream without its events up to ``number``, at once something that brings the headers on their way."""
    yield KEEP_ALIVE
    for part in parts:
        found = part.split(_END)[:-1]
        if part.startswith(b":"):
            # While there is nothing to say, this connection too must be kept alive.
            yield part
            continue
        wanted = [event for event in found if not _NUMBER.match(event) or _number(event) > number]
        if wanted:
            yield _END.join(wanted) + _END
        if any(_NUMBER.match(event) for event in wanted):
            break
    yield from parts


def _number(event: bytes) -> int:
    found = _NUMBER.match(event)
    return int(found[1]) if found else 0


def events(generation: Generation, frames: Frames, opening: bytes, tick_s: float | None) -> Iterator[bytes]:
    """Yield the whole stream of one generation, each time all that has become known."""
    if opening:
        yield opening
    text_frames = [frames.text(choice) for choice in range(generation.choices)]
    for pieces in generation.pieces(tick_s):
        if not pieces:
            if tick_s is not None:
                yield comment(generation)
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
            parts.append(frames.closing(generation))
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
        encode_error: Callable[[ApiError], bytes],
        owner: Service,
        stream: Stream,
        guard: ClientGuard,
        generation: Generation,
    ) -> None:
        self._id = request_id
        self._parts = parts
        self._encode_error = encode_error
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
        life.ended(self._id, self._stream, self._generation, self._outcome, self._begun)

    def _error_event(self, error: Exception) -> bytes:
        self._failed = True
        self._outcome = "failed"
        self._owner.meter.failed(error, self._stream)
        answer = as_api_error(error)
        known = isinstance(error, JobFailed | ReaderTooSlow)
        if answer.status == 500:
            life.failed_unexpectedly(self._id, error, known)
        return self._encode_error(answer)


def event_stream_response(body: EventStream) -> Response:
    """Return the answer; passed through as it is, since every layer costs time for each token."""
    return Response(body, headers=HEADERS, content_type="text/event-stream; charset=utf-8", direct_passthrough=True)
