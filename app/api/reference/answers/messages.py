"""The answers of /v1/messages."""

from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, AnthropicErrorResponse, WithWarnings


class ReplyText(Answer):
    """Words."""

    type: Literal["text"]
    text: str


class ReplyThinking(Answer):
    """What the model thought before."""

    type: Literal["thinking"]
    thinking: str
    signature: str = Field(description="always empty")


class ReplyToolUse(Answer):
    """A call that the model wants made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ReplyBlock = Annotated[ReplyText | ReplyThinking | ReplyToolUse, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class ThinkingTokens(Answer):
    """How many of the tokens were thoughts."""

    thinking_tokens: int = Field(ge=0)


class AnthropicUsage(Answer):
    """The tokens of a message."""

    input_tokens: int = Field(ge=0, description="those that the cache did not have")
    cache_creation_input_tokens: int = Field(ge=0)
    cache_read_input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    output_tokens_details: ThinkingTokens | None = Field(default=None, description="of models with reasoning")


class MessageAnswer(WithWarnings):
    """The answer to a conversation."""

    id: str = Field(pattern="^msg_")
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ReplyBlock]
    stop_reason: StopReason | None = Field(description="null only at the beginning of a stream")
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(WithWarnings):
    """How many tokens the model reads."""

    input_tokens: int = Field(ge=0)


class MessageStart(Answer):
    """The message without content."""

    type: Literal["message_start"]
    message: MessageAnswer


class BlockStart(Answer):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int = Field(ge=0)
    content_block: ReplyBlock


class TextDelta(Answer):
    """New words."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Answer):
    """New thoughts."""

    type: Literal["thinking_delta"]
    thinking: str


class InputDelta(Answer):
    """A piece of a call's arguments."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Answer):
    """What is new in a block."""

    type: Literal["content_block_delta"]
    index: int = Field(ge=0)
    delta: Annotated[TextDelta | ThinkingDelta | InputDelta, Field(discriminator="type")]


class BlockStop(Answer):
    """A block is complete."""

    type: Literal["content_block_stop"]
    index: int = Field(ge=0)


class Ending(Answer):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Answer):
    """The end of the content."""

    type: Literal["message_delta"]
    delta: Ending
    usage: AnthropicUsage


class MessageStop(Answer):
    """The last event."""

    type: Literal["message_stop"]


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | AnthropicErrorResponse
