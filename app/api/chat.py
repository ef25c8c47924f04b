"""POST /v1/chat/completions"""

from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, g

from app.api import sse
from app.api.answers import answer_once, answer_streaming
from app.api.deltas import ReplyDeltas, message_of
from app.api.kept import Ticket, note_wish, parse_again
from app.api.logprobs import PromptScores, chat_logprobs
from app.api.reference.answers.chat import ChatCompletion, ChatEvent
from app.api.reference.describe import describes
from app.api.schemas import ChatRequest
from app.api.service import guarded_stream, parse, service, usage_body
from app.api.stored import ChatKeeper, chat_keeper
from app.api.streams import rereads, resumption
from app.api.turn import Turn, continued_turn, start_turn
from app.ids import new_id
from app.pool_stream import Stream
from app.text.generation import Answer, Generation, Piece
from app.text.reply.parts import Reply

blueprint = Blueprint("chat", __name__)

_ROUTE = "/v1/chat/completions"


@blueprint.post(_ROUTE)
@describes(
    tag="chat",
    request=ChatRequest,
    answer=ChatCompletion,
    events=ChatEvent,
    example={"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32},
)
def create_chat_completion() -> Response:
    """Answer a conversation."""
    again = resumption(_ROUTE)
    if again is not None:
        return again
    body = parse(ChatRequest)
    note_wish(_ROUTE, body.resumable)
    keeper = chat_keeper(body)
    turn = start_turn(body, new_id("chatcmpl-"), guarded_stream())

    if not body.stream:
        kept = keeper.kept if keeper is not None else _as_it_is
        return answer_once(turn.generation, turn.id, lambda answers: kept(completion(turn, answers)))
    return answer_streaming(*_streamed(turn, keeper), turn.id)


@rereads(_ROUTE)
def read_again(ticket: Ticket, stream: Stream) -> tuple[Generation, sse.Frames]:
    """A kept chat completion, as a stream."""
    body = parse_again(ChatRequest, ticket)
    return _streamed(continued_turn(body, ticket, stream), chat_keeper(body))


def _streamed(turn: Turn, keeper: ChatKeeper | None) -> tuple[Generation, sse.Frames]:
    generation: Generation = turn.generation
    frames: sse.Frames = ChatFrames(turn)
    if keeper is None:
        return generation, frames
    return keeper.recorded(generation, frames, lambda answers: completion(turn, answers))


def wants_transcript(body: ChatRequest) -> bool:
    """Whether the choices are the whole conversation, as the demo answers."""
    asked = body.transcript_choices
    return service().settings.transcript_choices if asked is None else asked


def completion(turn: Turn, answers: list[Answer]) -> dict[str, Any]:
    """A complete answer."""
    replies = [turn.reply(answer, choice) for choice, answer in enumerate(answers)]
    return {
        "id": turn.id,
        "object": "chat.completion",
        "created": turn.created,
        "model": turn.name,
        "choices": choices(turn, answers, replies),
        "usage": usage(turn, [reply.reasoning for reply in replies]),
    }


def choices(turn: Turn, answers: list[Answer], replies: list[Reply]) -> list[dict[str, Any]]:
    """The choices of a complete answer: the conversation so far (if that is asked for), then the replies."""
    body, model, plain = turn.body, turn.model, turn.plain
    made: list[dict[str, Any]] = []
    if wants_transcript(body):
        said = ({"role": message.role, "content": message.content} for message in body.messages)
        made += [{"index": index, "message": message} for index, message in enumerate(said)]
    top = body.top_alternatives
    prompt_scores = PromptScores(model, body.prompt_logprobs or 0)
    for answer, reply in zip(answers, replies, strict=True):
        choice: dict[str, Any] = {
            "index": len(made),
            "message": message_of(reply, plain),
            "logprobs": None if top is None else chat_logprobs(model.token_names, answer.tokens, top),
            "finish_reason": turn.finish_reason(answer.finish_reason, len(reply.calls)),
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_scores(answer.prompt)
        made.append(choice)
    return made


def usage(turn: Turn, thoughts: list[str]) -> dict[str, Any]:
    """The usage of an answer; ``thoughts``: the reasoning of each choice."""
    reasoning_tokens = turn.reasoning_tokens(thoughts)
    details = {} if reasoning_tokens is None else {"completion_tokens_details": {"reasoning_tokens": reasoning_tokens}}
    return {**usage_body(turn.generation), **details}


def _as_it_is(body: dict[str, Any]) -> dict[str, Any]:
    return body


class ChatFrames(sse.OpenAIEnding):
    """The events of a streamed chat answer."""

    def __init__(self, turn: Turn) -> None:
        body, model = turn.body, turn.model
        self._turn = turn
        self._ids = sse.EventIds(turn.id)
        self._head = {
            "id": turn.id,
            "object": "chat.completion.chunk",
            "created": turn.created,
            "model": turn.name,
        }
        self._include_usage = body.include_usage
        self._names = model.token_names
        self._top = body.top_alternatives or 0
        self._prompt_scores = PromptScores(model, body.prompt_logprobs or 0)
        # Empty if all is content: then no token is looked at.
        self._deltas = [] if turn.plain else [self._follow(choice) for choice in range(turn.generation.choices)]

    def _follow(self, choice: int) -> ReplyDeltas:
        return ReplyDeltas(self._turn.parser(choice), lambda delta: self._body(choice, delta), self._ids)

    def opening(self, count: int) -> bytes:
        """The role of each choice."""
        first = {"warnings": g.warnings} if g.get("warnings") else {}
        role = {"role": "assistant", "content": None if self._deltas else "", "refusal": None}
        return b"".join(
            self._ids.frame({**self._body(index, role), **(first if index == 0 else {})}) for index in range(count)
        )

    def text(self, index: int) -> Callable[[str], bytes]:
        """New text of choice ``index``."""
        if self._deltas:
            return self._deltas[index]
        return sse.TextFrame(self._ids, sse.frame(self._body(index, {"content": sse.TextFrame.SLOT})))

    def scored(self, piece: Piece) -> bytes:
        """New text with the scores of its tokens, which come with the first delta of it, or without any."""
        logprobs: dict[str, Any] | None = chat_logprobs(self._names, piece.tokens, self._top)
        if not self._deltas:
            return self._ids.frame(self._body(piece.choice, {"content": piece.text}, logprobs=logprobs))
        frames = []
        for delta in list(self._deltas[piece.choice].deltas(piece.text)) or [{}]:
            frames.append(self._ids.frame(self._body(piece.choice, delta, logprobs=logprobs)))
            logprobs = None
        return b"".join(frames)

    def prompt(self, piece: Piece) -> bytes:
        """The scores of the prompt."""
        return self._ids.frame(self._body(piece.choice, {}, prompt_logprobs=self._prompt_scores(piece.prompt)))

    def finish(self, index: int, reason: str) -> bytes:
        """What was held back of choice ``index``, and its end."""
        rest = b""
        if self._deltas:
            deltas = self._deltas[index]
            rest = deltas.finish()
            reason = self._turn.finish_reason(reason, deltas.calls)
        warnings = self._turn.generation.warnings
        return rest + self._ids.frame({**self._body(index, {}, reason), **({"warnings": warnings} if warnings else {})})

    def closing(self, generation: Generation) -> bytes:
        """What comes behind all choices, and the end."""
        if not self._include_usage:
            return self._ids(sse.DONE)
        told = usage(self._turn, ["".join(deltas.thoughts) for deltas in self._deltas])
        return self._ids.frame({**self._head, "choices": [], "usage": told}) + self._ids(sse.DONE)

    def _body(self, index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
        body = {**self._head, "choices": [choice]}
        return {**body, "usage": None} if self._include_usage else body
