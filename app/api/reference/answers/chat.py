"""The answers of /v1/chat/completions."""

from typing import Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, ErrorResponse, PromptLogprobs, Usage, WithWarnings

FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(Answer):
    """One token and its score."""

    token: str
    logprob: float = Field(ge=-9999)
    bytes: list[int] | None = Field(description="the token's own bytes, which may be a part of a character")


class TokenLogprob(TopLogprob):
    """One token of the answer, its score and those of the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """The scores of a choice's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Answer):
    """What is called."""

    name: str
    arguments: str = Field(description="JSON text; of a call that was cut off as far as it goes")


class ToolCall(Answer):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ReplyMessage(Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None = Field(description="the text; null beside tool calls without any")
    refusal: None
    reasoning_content: str | None = Field(default=None, description="what the model thought before")
    tool_calls: list[ToolCall] = Field(default_factory=list, min_length=1)


class ChatChoice(Answer):
    """One reply."""

    index: int = Field(ge=0)
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class TranscriptMessage(Answer):
    """A message of the conversation so far."""

    role: str
    content: str | None


class TranscriptChoice(Answer):
    """A message of the conversation so far, with transcript_choices."""

    index: int = Field(ge=0)
    message: TranscriptMessage


class ChatCompletion(WithWarnings):
    """The answer to a conversation."""

    id: str = Field(pattern="^chatcmpl-")
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[ChatChoice | TranscriptChoice]
    usage: Usage


class CallDelta(Answer):
    """A piece of a call's function."""

    name: str = ""
    arguments: str = ""


class ToolCallDelta(Answer):
    """A piece of a call."""

    index: int = Field(ge=0)
    id: str = ""
    type: Literal["function"] = "function"
    function: CallDelta


class Delta(Answer):
    """What is new in a choice."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str = ""
    tool_calls: list[ToolCallDelta] = Field(default_factory=list)


class ChunkChoice(Answer):
    """What is new in one choice."""

    index: int = Field(ge=0)
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class ChatCompletionChunk(WithWarnings):
    """One event of a streamed answer."""

    id: str = Field(pattern="^chatcmpl-")
    object: Literal["chat.completion.chunk"]
    created: int = Field(description="seconds since 1970, the same in all chunks")
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, description="in the last chunk, with stream_options.include_usage")


ChatEvent = ChatCompletionChunk | ErrorResponse
