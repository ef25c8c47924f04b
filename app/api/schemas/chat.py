"""POST /v1/chat/completions"""

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.schemas.generation import INT64, MAX_TOP_LOGPROBS, GenerationRequest
from app.api.schemas.messages import Messages, check_messages, unknown_in_messages
from app.api.schemas.tools import Choice, ToolList, ToolsAsked, settled_choice, unknown_in_choice
from app.api.values import Metadata
from app.errors import invalid
from app.text.reply.parts import Tool, ToolChoice


class ChatRequest(ToolsAsked, GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Messages = Field(
        description="the conversation: a list of 1 to 4096 messages (roles system, developer, user, assistant, "
        "tool; content as a string, null or text parts), or a string, which is one user message"
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = Field(
        None, description="the newer name of `max_tokens`, and goes before it"
    )
    tools: ToolList = Field(
        None,
        description='up to 128 functions that the model may call: `{"type": "function", "function": {"name", '
        '"description", "parameters", "strict"}}`; with `strict: true` the arguments always match the schema',
    )
    tool_choice: Choice = Field(
        None,
        description='"none", "auto", "required" (at least one call), `{"type": "function", "function": {"name"}}` (one '
        'call), or `{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}`. A call that must be made always '
        "parses, and matches the schema",
    )
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None,
        description='given to the chat template; where that knows only `enable_thinking`, "none" turns it off and any '
        'other turns it on. A model whose template knows neither takes only "none"',
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description='given to the chat template; one that does not know it takes only "medium"'
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="more variables for the chat template")
    add_generation_prompt: bool | None = Field(None, description="let the chat template begin the assistant's turn")
    continue_final_message: bool | None = Field(
        None, description="go on with the last message, which must be the assistant's"
    )
    transcript_choices: bool | None = Field(
        None, description="answer with the whole conversation as choices, as the demo does; not with `stream`"
    )
    logprobs: bool | None = Field(None, description="tell each token's log-probability, see below")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="so many of the most likely tokens at each place, 0 to 20; needs `logprobs: true`"
    )
    metadata: Metadata | None = Field(
        None, description="up to 16 pairs of texts (64 and 512 characters); kept with what is stored"
    )
    store: bool | None = Field(None, description="keep the answer, to be read again")

    @property
    def asked_max_tokens(self) -> int | None:
        """``max_completion_tokens`` is the newer name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def max_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def top_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @cached_property
    def choice(self) -> ToolChoice:
        """Which tools may be called. Raises `ApiError` 400."""
        return settled_choice(self.tool_choice, tuple(each.tool for each in self.tools or ()))

    @cached_property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of: none if it must not call any."""
        return () if self.choice.mode == "none" else tuple(each.tool for each in self.tools or ())

    @cached_property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        names = self.choice.names
        return tuple(tool for tool in self.offered if names is None or tool.name in names)

    def unknown_fields(self, prefix: str = "") -> list[str]:
        choice = unknown_in_choice(self.tool_choice, f"{prefix}tool_choice.")
        return super().unknown_fields(prefix) + choice + unknown_in_messages(self.messages)

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise invalid("best_of greater than n is only for /v1/completions.", "best_of")
        if self.transcript_choices and self.stream:
            raise invalid("transcript_choices cannot be streamed.", "transcript_choices")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is only allowed with logprobs: true.", "top_logprobs")
        # Names of tools that are not there are found here too.
        choice, guided = self.choice, self.grammar()
        if guided is not None and choice.mode == "required":
            raise invalid(f"{guided[1]} and a tool that must be called cannot be combined.", guided[1])
