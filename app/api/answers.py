"""The two ways to hand out one generation: joined, or as an event stream."""

import logging
import time
from collections.abc import Callable
from typing import Any

from flask import Response, g

from app.api import sse
from app.api.service import json_answer, service
from app.text.generation import Answer, Generation

log = logging.getLogger("tailrace.requests")


def answer_once(generation: Generation, request_id: str, body: Callable[[list[Answer]], dict[str, Any]]) -> Response:
    """Wait for the complete answer; ``body`` makes the JSON object of it."""
    begun = time.monotonic()
    outcome = "failed"
    try:
        answers = generation.answers()
        outcome = "finished"
    finally:
        log.info(
            "%s id=%s completion_tokens=%d seconds=%.3f",
            outcome,
            request_id,
            generation.usage.completion_tokens,
            time.monotonic() - begun,
        )
    return json_answer(body(answers))


def answer_streaming(generation: Generation, frames: sse.Frames, request_id: str) -> Response:
    """Return the event stream of ``generation``; from here on the stream owns it."""
    owner = service()
    tick_s = owner.settings.keepalive_comment_s or None
    parts = sse.events(generation, frames, frames.opening(generation.choices), tick_s)
    stream, guard = g.pop("stream"), g.pop("guard")
    return sse.event_stream_response(sse.EventStream(request_id, parts, owner, stream, guard, generation))
