"""Content of a message: a string, or blocks of text, thinking, tool calls and their results."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from app.api.messages.known import BLOCK_HARMLESS, BLOCK_REFUSED, AnthropicRequest
from app.api.values import CallId
from app.errors import invalid

MAX_BLOCKS = 4096
MAX_ALL_BLOCKS = 16384


class _Block(AnthropicRequest):
    def refused(self) -> Mapping[str, tuple[Any, ...]]:
        return BLOCK_REFUSED

    def harmless(self) -> frozenset[str]:
        return BLOCK_HARMLESS


class TextBlock(_Block):
    """Words."""

    type: Literal["text"] = Field(description="text")
    text: str = Field(description="the text")


class ThinkingBlock(_Block):
    """What the model thought in an earlier turn."""

    type: Literal["thinking"] = Field(description="thinking")
    thinking: str = Field(description="the text of the thoughts, for templates that show them to the model")


class ToolUseBlock(_Block):
    """A call that the model made."""

    type: Literal["tool_use"] = Field(description="tool_use")
    id: CallId = Field(description="the call's id")
    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="the tool's name")
    input: dict[str, Any] = Field(description="the call's arguments")


class OtherBlock(_Block):
    """Any block that this server cannot read."""

    type: Annotated[Any, AfterValidator(lambda kind: _refuse(kind))]


def _refuse(kind: Any) -> Any:
    if not isinstance(kind, str):
        raise ValueError("must be the type of a content block")
    raise ValueError(f"this server does not read content of type {kind[:64]!r} here")


def _among(*kinds: str) -> Discriminator:
    def tag(block: Any) -> str:
        kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
        # The colon keeps the tag out of the names of fields in errors.
        return f":{kind}" if kind in kinds else ":other"

    return Discriminator(tag)


def as_blocks(value: Any) -> Any:
    """A string is one block of text, and nothing is none."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    return value


def bounded(messages: Any) -> Any:
    """Refuse messages with too many blocks, before time is spent on each. Raises `ApiError`."""
    contents = (
        [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    count = 0
    for blocks in contents:
        if isinstance(blocks, list):
            inner = [block.get("content") for block in blocks if isinstance(block, dict)]
            count += len(blocks) + sum(len(each) for each in inner if isinstance(each, list))
    if count > MAX_ALL_BLOCKS:
        raise invalid(f"messages can have at most {MAX_ALL_BLOCKS} blocks together.", "messages")
    return messages


TextOnly = Annotated[
    Annotated[TextBlock, Tag(":text")] | Annotated[OtherBlock, Tag(":other")],
    _among("text"),
]
Texts = Annotated[
    list[TextOnly],
    Field(max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(as_blocks, json_schema_input_type=str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)]),
]


class ToolResultBlock(_Block):
    """What a tool answered."""

    type: Literal["tool_result"] = Field(description="tool_result")
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="the id of the call")
    content: Texts = Field(default_factory=list, description="the tool's answer: a string or blocks of text")
    is_error: bool | None = Field(None, description="true: the model reads `Error: ` before the answer")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        for place, block in enumerate(self.content):
            unknown += block.unknown_fields(f"{prefix}content[{place}].")
        return unknown


Block = Annotated[
    Annotated[TextBlock, Tag(":text")]
    | Annotated[ThinkingBlock, Tag(":thinking")]
    | Annotated[ToolUseBlock, Tag(":tool_use")]
    | Annotated[ToolResultBlock, Tag(":tool_result")]
    | Annotated[OtherBlock, Tag(":other")],
    _among("text", "thinking", "tool_use", "tool_result"),
]
Content = Annotated[
    list[Block],
    Field(max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(
        as_blocks,
        json_schema_input_type=str
        | Annotated[list[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock], Field(max_length=MAX_BLOCKS)],
    ),
]


def text_of(blocks: Sequence[TextBlock | OtherBlock], between: str = "\n") -> str:
    """Return the text of the blocks."""
    return between.join(block.text for block in blocks if isinstance(block, TextBlock))
