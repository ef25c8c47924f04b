"""POST /v1/messages and /v1/messages/count_tokens"""

from flask import Blueprint, Response, g

from app.api.answers import answer_once, answer_streaming
from app.api.kept import Ticket, note_wish, parse_again
from app.api.messages.answer import MessageFrames, whole
from app.api.messages.failures import error_response
from app.api.messages.request import CountTokensRequest, MessagesRequest, Thinking
from app.api.messages.translate import chat_request
from app.api.reference.answers.messages import MessageAnswer, MessageEvent, TokenCount
from app.api.reference.describe import describes
from app.api.schemas import ChatRequest
from app.api.service import guarded_stream, json_answer, parse, resolve_model
from app.api.sse import Frames
from app.api.streams import rereads, resumption
from app.api.turn import continued_turn, start_turn, turn_prompt
from app.errors import register_shape
from app.ids import new_id
from app.pool_stream import Stream
from app.text.card import Model
from app.text.generation import Generation
from app.text.offload import off_hub_if_large
from app.text.reply.formats import reply_format

blueprint = Blueprint("messages", __name__)

_ROUTE = "/v1/messages"

register_shape(_ROUTE, error_response)


@blueprint.after_request
def name_request(response: Response) -> Response:
    """Say the request's id as Anthropic's client looks for it."""
    response.headers["request-id"] = g.request_id
    return response


@blueprint.post(_ROUTE)
@describes(
    tag="messages",
    request=MessagesRequest,
    answer=MessageAnswer,
    events=MessageEvent,
    example={"max_tokens": 32, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
)
def create_message() -> Response:
    """Answer a conversation."""
    again = resumption(_ROUTE)
    if again is not None:
        return again
    body = parse(MessagesRequest)
    note_wish(_ROUTE, body.resumable)
    turn = start_turn(_translated(body), new_id("msg_"), guarded_stream())
    g.warnings = [*g.get("warnings", ()), *_unheeded(body.thinking, turn.model)]
    if body.stream:
        return answer_streaming(turn.generation, MessageFrames(turn, g.request_id, _shows_thoughts(body)), turn.id)
    return answer_once(turn.generation, turn.id, lambda answers: whole(turn, answers[0], _shows_thoughts(body)))


@rereads(_ROUTE)
def read_again(ticket: Ticket, stream: Stream) -> tuple[Generation, Frames]:
    """A kept message, as a stream."""
    body = parse_again(MessagesRequest, ticket)
    turn = continued_turn(off_hub_if_large(len(ticket.body), chat_request, body), ticket, stream)
    g.warnings = [*g.get("warnings", ()), *_unheeded(body.thinking, turn.model)]
    return turn.generation, MessageFrames(turn, g.request_id, _shows_thoughts(body))


def _shows_thoughts(body: MessagesRequest) -> bool:
    return body.thinking is None or body.thinking.display != "omitted"


@blueprint.post("/v1/messages/count_tokens")
@describes(
    tag="messages",
    request=CountTokensRequest,
    answer=TokenCount,
    example={"messages": [{"role": "user", "content": "What is the capital of France?"}]},
)
def count_tokens() -> Response:
    """Tell how many tokens the model reads for a conversation."""
    chat = _translated(parse(CountTokensRequest))
    model, _, _ = resolve_model(chat.model)
    return json_answer({"input_tokens": len(turn_prompt(chat, model))})


def _unheeded(thinking: Thinking | None, model: Model) -> list[str]:
    """Return warnings of what was asked for in ``thinking`` and has no effect."""
    if thinking is None or thinking.type == "adaptive":
        return []
    warnings = []
    if thinking.budget_tokens is not None:
        warnings.append("thinking.budget_tokens is no limit here; max_tokens is.")
    known = model.template is not None and "enable_thinking" in model.template.variables
    thinks = reply_format(model).marks is not None
    if not known and thinks != (thinking.type == "enabled"):
        can = "can only answer with" if thinks else "has no"
        warnings.append(f"thinking has no effect: this model {can} thoughts.")
    return warnings


def _translated(body: CountTokensRequest) -> ChatRequest:
    return off_hub_if_large(len(g.body), chat_request, body)
