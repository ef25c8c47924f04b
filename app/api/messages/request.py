"""The requests of /v1/messages and /v1/messages/count_tokens, checked as Anthropic's clients write them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from app.api.messages.blocks import Content, TextBlock, Texts, ThinkingBlock, ToolResultBlock, ToolUseBlock, bounded
from app.api.messages.known import HARMLESS, REFUSED, TOOL_HARMLESS, TOOL_REFUSED, AnthropicRequest
from app.api.schemas import MAX_MESSAGES
from app.api.values import MAX_STOP_CHARACTERS
from app.errors import invalid

MAX_STOP_SEQUENCES = 16
MAX_TOOLS = 128
MIN_THINKING_BUDGET = 1024
_INT64 = 2**63

# Who may say what.
_ROLES: Mapping[str, tuple[type[Any], ...]] = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class InputMessage(AnthropicRequest):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"] = Field(description="who speaks")
    content: Content = Field(description="a string, or blocks: text, thinking, tool_use, tool_result")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        for place, block in enumerate(self.content):
            unknown += block.unknown_fields(f"{prefix}content[{place}].")
        return unknown


def _only_custom(kind: str | None) -> str | None:
    if kind not in (None, "custom"):
        raise ValueError("this server has no tools of its own; give tools with an input_schema, of type custom or none")
    return kind


class InputTool(AnthropicRequest):
    """A tool of the client's."""

    type: Annotated[str | None, AfterValidator(_only_custom), WithJsonSchema({"enum": ["custom", None]})] = Field(
        None, description="custom"
    )
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")] = Field(description="the tool's name")
    description: str | None = Field(None, description="what it is for")
    input_schema: dict[str, Any] = Field(description="the JSON schema of its arguments")
    strict: bool | None = Field(None, description="true: the arguments are held to the schema")

    def refused(self) -> Mapping[str, tuple[Any, ...]]:
        return TOOL_REFUSED

    def harmless(self) -> frozenset[str]:
        return TOOL_HARMLESS


class InputToolChoice(AnthropicRequest):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"] = Field(description="as the model likes; one of them; `name`; never")
    name: Annotated[str, Field(max_length=128)] | None = Field(None, description="the tool that is to be called")
    disable_parallel_tool_use: bool | None = Field(None, description="true: at most one call")


class Thinking(AnthropicRequest):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="the template's `enable_thinking`: true, false, or left to the template"
    )
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_BUDGET, lt=_INT64)] | None = Field(
        None, description="checked (1024 or more, below `max_tokens`), but not held to: thoughts count for `max_tokens`"
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: thinking blocks without their text; otherwise all of it is shown"
    )


class OutputFormat(AnthropicRequest):
    """The form of the answer."""

    type: Literal["json_schema"] = Field(description="json_schema")
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(description="the JSON schema of the answer")


class OutputConfig(AnthropicRequest):
    """How to answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="given to the chat template as `reasoning_effort`"
    )
    format: OutputFormat | None = Field(None, description="a JSON schema that the answer is held to")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        return unknown + (self.format.unknown_fields(f"{prefix}format.") if self.format else [])


class CountTokensRequest(AnthropicRequest):
    """POST /v1/messages/count_tokens: a conversation as the model reads it."""

    model: Annotated[str, Field(max_length=1024)] | None = Field(None, description="one of the names in `/v1/models`")
    messages: Annotated[
        list[InputMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(
            bounded,
            json_schema_input_type=Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)],
        ),
    ] = Field(description="the conversation; the answer goes on with a final message of the assistant")
    system: Texts | None = Field(None, description="the system prompt: a string or blocks of text")
    tools: Annotated[list[InputTool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="the client's tools"
    )
    tool_choice: InputToolChoice | None = Field(None, description="whether tools are called")
    thinking: Thinking | None = Field(None, description="whether the model thinks first")
    output_config: OutputConfig | None = Field(None, description="`effort` and `format` of the answer")
    output_format: OutputFormat | None = Field(None, description="the older name of `output_config.format`")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the chat template")

    def refused(self) -> Mapping[str, tuple[Any, ...]]:
        return REFUSED

    def harmless(self) -> frozenset[str]:
        return HARMLESS

    @property
    def form(self) -> tuple[OutputFormat, str] | None:
        """The form of the answer and the field that asks for it."""
        if self.output_config is not None and self.output_config.format is not None:
            return self.output_config.format, "output_config.format"
        return None if self.output_format is None else (self.output_format, "output_format")

    @property
    def is_prefilled(self) -> bool:
        """Whether the answer goes on with the last message."""
        return self.messages[-1].role == "assistant"

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        for place, message in enumerate(self.messages):
            unknown += message.unknown_fields(f"{prefix}messages[{place}].")
        for place, block in enumerate(self.system or ()):
            unknown += block.unknown_fields(f"{prefix}system[{place}].")
        for place, tool in enumerate(self.tools or ()):
            unknown += tool.unknown_fields(f"{prefix}tools[{place}].")
        for name in ("tool_choice", "thinking", "output_config", "output_format"):
            part: AnthropicRequest | None = getattr(self, name)
            unknown += part.unknown_fields(f"{prefix}{name}.") if part is not None else []
        return unknown

    def check(self) -> None:
        self._check_messages()
        self._check_tools()
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise invalid("output_format and output_config.format cannot be combined.", "output_format")
        if self.is_prefilled and self.form is not None:
            raise invalid(f"{self.form[1]} cannot be combined with a final message of the assistant.", self.form[1])
        thinking = self.thinking
        if thinking is not None and (thinking.type == "enabled") != (thinking.budget_tokens is not None):
            raise invalid("budget_tokens belongs to thinking of type enabled.", "thinking.budget_tokens")
        if thinking is not None and "enable_thinking" in (self.chat_template_kwargs or {}):
            raise invalid("Give thinking or enable_thinking, not both.", "chat_template_kwargs.enable_thinking")

    def _check_messages(self) -> None:
        called: set[str] = set()
        for place, message in enumerate(self.messages):
            for number, block in enumerate(message.content):
                param = f"messages[{place}].content[{number}]"
                if not isinstance(block, _ROLES[message.role]):
                    raise invalid(f"A message of the {message.role} cannot have {block.type} blocks.", f"{param}.type")
                if isinstance(block, ToolUseBlock):
                    called.add(block.id)
                elif isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                    raise invalid("No tool_use block before it has this id.", f"{param}.tool_use_id")
            if not message.content and place < len(self.messages) - 1:
                raise invalid("Only the last message may be empty.", f"messages[{place}].content")
        last = self.messages[-1]
        if self.is_prefilled and any(isinstance(block, ToolUseBlock) for block in last.content):
            raise invalid("The last message calls tools, but the conversation does not have their results.", "messages")
        if last.role == "system":
            raise invalid("The last message must be the user's or the assistant's.", "messages")

    def _check_tools(self) -> None:
        names = [tool.name for tool in self.tools or ()]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise invalid("Two tools have the same name.", f"tools[{place}].name")
        choice = self.tool_choice
        if choice is None:
            return
        if not names and choice.type != "none":
            raise invalid("tool_choice is only allowed with tools.", "tool_choice")
        if (choice.type == "tool") != (choice.name is not None):
            raise invalid("name belongs to tool_choice of type tool.", "tool_choice.name")
        if choice.name is not None and choice.name not in names:
            raise invalid("There is no tool of this name in tools.", "tool_choice.name")


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] = Field(description="the most tokens that the answer may have")
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
            Field(max_length=MAX_STOP_SEQUENCES),
        ]
        | None
    ) = Field(
        None, description="up to 16 strings that end the answer and are no part of it, up to 1024 characters each"
    )
    stream: bool | None = Field(None, description="answer as server-sent events")
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0 to 1; 0 is greedy decoding")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="the most likely tokens that together have this probability, 0 to 1"
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="the k most likely tokens; 0: no limit"
    )
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = Field(
        None, description="the same seed and request give the same answer"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="as for chat completions")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="as for chat completions"
    )
    resumable: bool | None = Field(
        None, description="go on when the client leaves, so that the answer can be read again"
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds that the request may take, at most the server's"
    )

    def check(self) -> None:
        super().check()
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise invalid("budget_tokens must be less than max_tokens.", "thinking.budget_tokens")
