"""The start of a response: into the pool, and the object that describes it."""

from typing import Any

from app.api.responses.schemas import FunctionTool, ResponseRequest
from app.api.responses.translation import Translation
from app.api.schemas import ChatRequest
from app.api.service import engine_plan, resolve_model
from app.api.turn import Turn, start_turn, turn_prompt
from app.errors import ApiError
from app.pool_stream import Stream
from app.text.card import Model
from app.text.errors import JobFailed, RequestError
from app.text.sampling import max_tokens_for

_TOO_LONG = "context_length_exceeded"


def start(body: ResponseRequest, translation: Translation, response_id: str, stream: Stream) -> Turn:
    """Hand the turn to the pool. Raises whatever keeps it from being admitted, named as the client wrote it."""
    try:
        try:
            return start_turn(translation.chat, response_id, stream)
        except RequestError as error:
            if body.truncation != "auto" or error.code != _TOO_LONG:
                raise
            return start_turn(_shortened(translation.chat, error), response_id, stream)
    except (ApiError, RequestError, JobFailed) as error:
        raise translation.error(error) from error


def _shortened(chat: ChatRequest, error: RequestError) -> ChatRequest:
    """Return the request without so many of its oldest messages that it fits; raises ``error`` if nothing helps.

    Instructions stay, and what is left begins with a user's message, so that no tool's output loses its call.
    """
    messages = chat.messages
    first = next((place for place, each in enumerate(messages) if each.role not in ("system", "developer")), 0)
    cuts = [place for place in range(first + 1, len(messages)) if messages[place].role == "user"]
    model = resolve_model(chat.model)[0]
    fitting = None
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        shorter = chat.model_copy(update={"messages": [*messages[:first], *messages[cuts[middle] :]]})
        if _fits(shorter, model):
            fitting, high = shorter, middle
        else:
            low = middle + 1
    if fitting is None:
        raise error
    return fitting


def _fits(chat: ChatRequest, model: Model) -> bool:
    try:
        max_tokens_for(engine_plan(chat, model), model, len(turn_prompt(chat, model)), "messages")
    except RequestError as error:
        if error.code != _TOO_LONG:
            raise
        return False
    return True


def response_head(body: ResponseRequest, turn: Turn, kept: bool) -> dict[str, Any]:
    """The response object without results: what was asked for, and the values that are in force."""
    sampling = engine_plan(turn.body, turn.model).sampling
    text, reasoning = body.text, body.reasoning
    format_ = text.format.model_dump(by_alias=True, exclude_unset=True) if text and text.format else {"type": "text"}
    choice: Any = body.tool_choice or "auto"
    return {
        "id": turn.id,
        "object": "response",
        "access_programs": None,
        "created_at": turn.created,
        "status": "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": turn.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": kept,
        "temperature": sampling.temperature,
        "text": {"format": format_, "verbosity": (text.verbosity if text else None) or "medium"},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
