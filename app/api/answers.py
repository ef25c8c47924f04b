"""The two ways to hand out one generation: joined, or as an event stream."""

import time
from collections.abc import Callable
from typing import Any

from flask import Response, g

from app.api import life, sse
from app.api.kept import dress
from app.api.service import json_answer, service, warn
from app.text.generation import Answer, Generation


def answer_once(generation: Generation, request_id: str, body: Callable[[list[Answer]], dict[str, Any]]) -> Response:
    """Wait for the complete answer; ``body`` makes the JSON object of it."""
    begun = time.monotonic()
    outcome = "finished"
    try:
        answers = generation.answers()
    except BaseException as error:
        outcome = life.outcome_of(error)
        raise
    finally:
        life.ended(request_id, g.stream, generation, outcome, begun)
    warn(generation.warnings)
    return dress(json_answer(body(answers)))


def answer_streaming(generation: Generation, frames: sse.Frames, request_id: str, after: int = 0) -> Response:
    """Return the event stream of ``generation``, behind event ``after``; from here on the stream owns it."""
    owner = service()
    tick_s = owner.settings.keepalive_comment_s or None
    parts = sse.events(generation, frames, frames.opening(generation.choices), tick_s)
    if after:
        parts = sse.behind(parts, after)
    stream, guard = g.pop("stream"), g.pop("guard")
    body = sse.EventStream(request_id, parts, frames.error, owner, stream, guard, generation)
    return dress(sse.event_stream_response(body))
