"""POST /v1/completions"""

from typing import Any

from flask import Blueprint, Response, g

from app.api import sse
from app.api.answers import answer_once, answer_streaming
from app.api.schemas import CompletionRequest
from app.api.service import (
    engine_plan,
    guarded_stream,
    new_id,
    now,
    parse,
    resolve_model,
    service,
    start_generation,
    usage_body,
)
from app.text.card import Model
from app.text.errors import RequestError
from app.text.generation import Answer, Generation
from app.text.prompts import completion_prompt

blueprint = Blueprint("completions", __name__)


@blueprint.post("/v1/completions")
def create_completion() -> Response:
    """Continue one or several prompts."""
    body = parse(CompletionRequest)
    model, name, adapter = resolve_model(body.model)
    settled = engine_plan(body, model, len(body.prompt))
    stream = guarded_stream()
    wrap = wraps_prompt(body, model)
    single = len(body.prompt) == 1
    prompts = [
        completion_prompt(model, prompt, wrap=wrap, param="prompt" if single else f"prompt[{place}]")
        for place, prompt in enumerate(body.prompt)
    ]
    request_id = new_id("cmpl-")
    generation = start_generation(stream, request_id, body, model, adapter, settled, prompts, "prompt")
    head = {"id": request_id, "object": "text_completion", "created": now(), "model": name}
    if body.stream:
        return answer_streaming(generation, CompletionFrames(head, body.include_usage), request_id)
    return answer_once(
        generation, request_id, lambda answers: {**head, "choices": choices(answers), "usage": usage_body(generation)}
    )


def wraps_prompt(body: CompletionRequest, model: Model) -> bool:
    """Whether texts go into the chat template, as the demo did it. Raises `RequestError` without one."""
    asked: str = body.template or "auto"
    if asked == "auto":
        asked = {"auto": "auto", "always": "chat", "never": "raw"}[service().settings.completion_template]
    if asked == "chat" and model.template is None:
        raise RequestError("This model has no chat template.", "template")
    return asked == "chat" or (asked == "auto" and model.template is not None)


def choices(answers: list[Answer]) -> list[dict[str, Any]]:
    """The choices of a complete answer."""
    return [
        {"index": index, "text": answer.text, "logprobs": None, "finish_reason": answer.finish_reason}
        for index, answer in enumerate(answers)
    ]


class CompletionFrames:
    """The events of a streamed completion."""

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage

    def opening(self, count: int) -> bytes:
        """Nothing but the headers, which a comment brings on their way; warnings come as a chunk without choices."""
        warnings = g.get("warnings")
        return sse.frame({**self._head, "choices": [], "warnings": warnings}) if warnings else sse.KEEP_ALIVE

    def text(self, index: int) -> sse.TextFrame:
        """New text of choice ``index``."""
        return sse.TextFrame(self._body(index, sse.TextFrame.SLOT))

    def finish(self, index: int, reason: str) -> bytes:
        """The end of choice ``index``."""
        return sse.frame(self._body(index, "", reason))

    def closing(self, generation: Generation) -> bytes:
        """What comes behind all choices."""
        if not self._include_usage:
            return b""
        return sse.frame({**self._head, "choices": [], "usage": usage_body(generation)})

    def _body(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        body = {**self._head, "choices": [choice]}
        return {**body, "usage": None} if self._include_usage else body
