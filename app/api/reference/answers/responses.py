"""The answers of /v1/responses: the response object, its items and its events."""

from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, WithWarnings
from app.api.reference.answers.chat import TopLogprob


class OutputLogprob(TopLogprob):
    """One token of the answer, its score and those of the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class OutputText(Answer):
    """Words."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(max_length=0, description="always empty")
    logprobs: list[OutputLogprob]


class ReasoningText(Answer):
    """Thoughts."""

    type: Literal["reasoning_text"]
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Answer):
    """What the model said."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class OutputReasoning(Answer):
    """What it thought before."""

    id: str
    type: Literal["reasoning"]
    summary: list[Any] = Field(max_length=0, description="always empty")
    content: list[ReasoningText]
    status: ItemStatus


class OutputCall(Answer):
    """A call that the model wants made."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="JSON text; of a call that was cut off as far as it goes")
    status: ItemStatus


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputCall, Field(discriminator="type")]


class InputTokensDetails(Answer):
    """Where the tokens of the input came from."""

    cached_tokens: int = Field(ge=0)
    cache_write_tokens: Literal[0]


class OutputTokensDetails(Answer):
    """What the tokens of the output are."""

    reasoning_tokens: int = Field(ge=0)


class ResponseUsage(Answer):
    """The tokens of a response."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: InputTokensDetails
    output_tokens: int = Field(ge=0)
    output_tokens_details: OutputTokensDetails
    total_tokens: int = Field(ge=0)


class ResponseError(Answer):
    """Why it failed."""

    code: str
    message: str


class Incomplete(Answer):
    """Why it is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseReasoning(Answer):
    """As it was asked for."""

    effort: str | None
    summary: str | None


class ResponseText(Answer):
    """As it was asked for."""

    format: dict[str, Any]
    verbosity: str


class ResponseTool(Answer):
    """As it was given."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class ResponseObject(WithWarnings):
    """A response: what was asked for, the values that are in force, and the results."""

    id: str = Field(pattern="^resp_")
    object: Literal["response"]
    access_programs: None
    created_at: int = Field(description="seconds since 1970")
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class ItemList(WithWarnings):
    """A page of the items that the model read."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="whether there are more behind last_id")


class Event(Answer):
    """What all events have."""

    sequence_number: int = Field(ge=0)


class StateEvent(Event):
    """The response, at the beginning and at the end."""

    type: Literal[
        "response.created",
        "response.queued",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemEvent(Event):
    """An item begins or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int = Field(ge=0)
    item: OutputItem


class _OfItem(Event):
    item_id: str
    output_index: int = Field(ge=0)


class PartEvent(_OfItem):
    """A part of an item begins or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int = Field(ge=0)
    part: OutputText | ReasoningText


class OutputTextDelta(_OfItem):
    """New words."""

    type: Literal["response.output_text.delta"]
    content_index: int = Field(ge=0)
    delta: str
    logprobs: list[OutputLogprob]


class OutputTextDone(_OfItem):
    """All words."""

    type: Literal["response.output_text.done"]
    content_index: int = Field(ge=0)
    text: str
    logprobs: list[OutputLogprob]


class ReasoningDelta(_OfItem):
    """New thoughts."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int = Field(ge=0)
    delta: str


class ReasoningDone(_OfItem):
    """All thoughts."""

    type: Literal["response.reasoning_text.done"]
    content_index: int = Field(ge=0)
    text: str


class ArgumentsDelta(_OfItem):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(_OfItem):
    """A call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(Event):
    """Something went wrong; the failed response follows."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


ResponseEvent = (
    StateEvent
    | ItemEvent
    | PartEvent
    | OutputTextDelta
    | OutputTextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)
