"""POST /v1/chat/completions"""

from collections.abc import Sequence
from typing import Any

from flask import Blueprint, Response, g

from app.api import sse
from app.api.answers import answer_once, answer_streaming
from app.api.logprobs import PromptScores, chat_logprobs
from app.api.schemas import ChatRequest, Message
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
from app.text.generation import Answer, Generation, Piece
from app.text.prompts import chat_prompt

blueprint = Blueprint("chat", __name__)


@blueprint.post("/v1/chat/completions")
def create_chat_completion() -> Response:
    """Answer a conversation."""
    body = parse(ChatRequest)
    model, name, adapter = resolve_model(body.model)
    settled = engine_plan(body, model)
    stream = guarded_stream()
    messages = conversation(body.messages)
    prompt = chat_prompt(
        model,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
    )
    request_id = new_id("chatcmpl-")
    generation = start_generation(stream, request_id, body, model, adapter, settled, [prompt], "messages")
    head = {"id": request_id, "object": "chat.completion", "created": now(), "model": name}
    if body.stream:
        return answer_streaming(generation, ChatFrames(head, body, model), request_id)
    transcript = (
        [{"role": message.role, "content": message.content} for message in body.messages]
        if wants_transcript(body)
        else []
    )
    return answer_once(
        generation,
        request_id,
        lambda answers: {
            **head,
            "choices": choices(transcript, answers, body, model),
            "usage": usage_body(generation),
        },
    )


def conversation(given: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as the template sees them, behind the server's own system prompt if they have none."""
    messages = [message.for_template() for message in given]
    system_prompt = service().settings.system_prompt
    if system_prompt and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def wants_transcript(body: ChatRequest) -> bool:
    """Whether the choices are the whole conversation, as the demo answers."""
    asked = body.transcript_choices
    return service().settings.transcript_choices if asked is None else asked


def choices(
    transcript: list[dict[str, str]], answers: list[Answer], body: ChatRequest, model: Model
) -> list[dict[str, Any]]:
    """The choices of a complete answer: the conversation so far (usually empty), then the replies."""
    said = [{"index": index, "message": message} for index, message in enumerate(transcript)]
    top = body.top_alternatives
    prompt_scores = PromptScores(model, body.prompt_logprobs or 0)
    replies = []
    for index, answer in enumerate(answers, len(said)):
        reply: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": None if top is None else chat_logprobs(model.token_names, answer.tokens, top),
            "finish_reason": answer.finish_reason,
        }
        if body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_scores(answer.prompt)
        replies.append(reply)
    return said + replies


class ChatFrames:
    """The events of a streamed chat answer."""

    def __init__(self, head: dict[str, Any], body: ChatRequest, model: Model) -> None:
        self._head = {**head, "object": "chat.completion.chunk"}
        self._include_usage = body.include_usage
        self._names = model.token_names
        self._top = body.top_alternatives or 0
        self._prompt_scores = PromptScores(model, body.prompt_logprobs or 0)

    def opening(self, count: int) -> bytes:
        """The role of each choice."""
        first = {"warnings": g.warnings} if g.get("warnings") else {}
        return b"".join(
            sse.frame({**self._body(index, {"role": "assistant", "content": ""}), **(first if index == 0 else {})})
            for index in range(count)
        )

    def text(self, index: int) -> sse.TextFrame:
        """New text of choice ``index``."""
        return sse.TextFrame(self._body(index, {"content": sse.TextFrame.SLOT}))

    def scored(self, piece: Piece) -> bytes:
        """New text with the scores of its tokens."""
        logprobs = chat_logprobs(self._names, piece.tokens, self._top)
        return sse.frame(self._body(piece.choice, {"content": piece.text}, logprobs=logprobs))

    def prompt(self, piece: Piece) -> bytes:
        """The scores of the prompt."""
        return sse.frame(self._body(piece.choice, {}, prompt_logprobs=self._prompt_scores(piece.prompt)))

    def finish(self, index: int, reason: str) -> bytes:
        """The end of choice ``index``."""
        return sse.frame(self._body(index, {}, reason))

    def closing(self, generation: Generation) -> bytes:
        """What comes behind all choices."""
        if not self._include_usage:
            return b""
        return sse.frame({**self._head, "choices": [], "usage": usage_body(generation)})

    def _body(self, index: int, delta: dict[str, str], reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
        body = {**self._head, "choices": [choice]}
        return {**body, "usage": None} if self._include_usage else body
