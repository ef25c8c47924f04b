"""The request for a response, checked."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema

from app.api.fields import asks_for_nothing
from app.api.guided import MAX_CHOICES
from app.api.responses.items import MAX_ITEMS, InputItem, input_items
from app.api.schemas import MAX_STOP_TOKENS, MAX_TOP_LOGPROBS
from app.api.schemas.tools import MAX_TOOLS, FunctionName
from app.api.values import STOP_STRINGS, TOKEN_BIASES, ApiRequest, Metadata, TokenId
from app.errors import invalid

_INT64 = 2**63
LOGPROBS = "message.output_text.logprobs"
# All that OpenAI's API knows, several times over.
MAX_INCLUDE = 64
_INCLUDE = {"type": "array", "items": {"const": LOGPROBS}, "maxItems": MAX_INCLUDE}

# Known fields that this server cannot honour, and the values of them that ask for nothing; null always is one.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background_options": ({}, {"completion_window": "soonest"}),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "echo": (False,),
    "image": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "moderation": (),
    "n": (1,),
    "prompt": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
}
# About the client, its bill or its cache; has no influence on the answer.
_HARMLESS = frozenset({"prompt_cache_retention"})


class ResponseFormat(ApiRequest):
    """What the text must be."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {
                    "properties": {"name": {"type": "string"}, "schema": {"type": "object"}},
                    "required": ["name", "schema"],
                },
            ]
        }
    )

    type: Literal["text", "json_object", "json_schema"] = Field(description="any text, any JSON object, or a schema")
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="name of the schema")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="the JSON schema")
    strict: bool | None = Field(None, description="answers are held to the schema with it and without")
    description: str | None = Field(None, description="what the schema is for; not shown to the model")

    def check(self) -> None:
        if self.type != "json_schema":
            return
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if value is None:
                raise invalid(f"text.format.{name}: is required.", f"text.format.{name}")


class TextOptions(ApiRequest):
    """Options of the text."""

    format: ResponseFormat | None = Field(None, description="text, json_object or json_schema")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="handed to the chat template")


class ReasoningOptions(ApiRequest):
    """Options of the thoughts before the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="handed to the chat template"
    )
    summary: Literal["auto"] | None = Field(
        None, description="auto: whatever the server has, which is the thoughts themselves and no summary"
    )


class FunctionTool(ApiRequest):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="function; hosted tools are refused")
    name: FunctionName = Field(description="its name")
    description: str | None = Field(None, description="what it does, for the model")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments")
    strict: bool | None = Field(None, description="hold the arguments to the schema")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = []
        neutral = {"allowed_callers": ["direct"], "async": False, "defer_loading": False, "output_schema": None}
        for name, value in (self.model_extra or {}).items():
            if name not in neutral:
                unknown.append(prefix + name)
            elif value is not None and value != neutral[name]:
                raise invalid(f"This server does not support {prefix}{name}.", prefix + name)
        return unknown


class NamedTool(ApiRequest):
    """A tool by name."""

    type: Literal["function"] = Field(description="function")
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="its name")


class AllowedTools(ApiRequest):
    """Some of the tools."""

    type: Literal["allowed_tools"] = Field(description="allowed_tools")
    mode: Literal["auto", "required"] = Field(description="as the model likes, or at least one call")
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] = Field(
        description="the tools that may be called"
    )


def _tools(value: Any) -> Any:
    for place, tool in enumerate(value if isinstance(value, list) else ()):
        if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
            raise invalid("This server has no hosted tools, only functions.", f"tools[{place}].type")
    return value


def _tool_choice(value: Any) -> Any:
    """Raises `ApiError` 400 for what is no choice, or one of a hosted tool."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        raise invalid('tool_choice must be "none", "auto", "required" or an object.', "tool_choice")
    if value.get("type") not in ("function", "allowed_tools"):
        raise invalid("This server has no hosted tools, only functions.", "tool_choice.type")
    tools = value.get("tools") if value["type"] == "allowed_tools" else None
    for place, tool in enumerate(tools if isinstance(tools, list) else ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise invalid("This server has no hosted tools, only functions.", f"tool_choice.tools[{place}].type")
    return value


def _choice_kind(value: Any) -> str:
    if isinstance(value, str):
        return "choice-mode"
    return f"choice-{value['type'] if isinstance(value, dict) else value.type}"


# The tags are no identifiers, so that they are no part of a field's name in an error.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice-mode")]
    | Annotated[AllowedTools, Tag("choice-allowed_tools")]
    | Annotated[NamedTool, Tag("choice-function")],
    Discriminator(_choice_kind),
    BeforeValidator(_tool_choice),
]


class ResponseStreamOptions(ApiRequest):
    """``include_obfuscation`` is accepted and means nothing here."""

    include_obfuscation: bool | None = Field(None, description="has no influence")


class Sampling(ApiRequest):
    """The extensions, as in chat: field, bounds and meaning are the same."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="the k most likely tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="as in chat")
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="as in chat")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="as in chat")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="as in chat")
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(None, description="as in chat")
    logit_bias: Annotated[dict[int, float], TOKEN_BIASES] = Field(default_factory=dict, description="as in chat")
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = Field(None, description="as in chat")
    stop: Annotated[list[str], STOP_STRINGS] = Field(default_factory=list, description="as in chat")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="as in chat"
    )
    ignore_eos: bool | None = Field(None, description="as in chat")
    min_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = Field(None, description="as in chat")
    do_sample: bool | None = Field(None, description="as in chat")
    num_beams: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="as in chat")
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = Field(None, description="as in chat")
    early_stopping: bool | Literal["never"] | None = Field(None, description="as in chat")
    guided_json: dict[str, Any] | str | None = Field(None, description="as in chat")
    guided_regex: Annotated[str, Field(min_length=1)] | None = Field(None, description="as in chat")
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, description="as in chat"
    )
    guided_grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="as in chat")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="as in chat")
    timeout: Annotated[float, Field(gt=0)] | None = Field(None, description="seconds that the response may take")


class ResponseRequest(Sampling):
    """POST /v1/responses"""

    # For the reference: what is refused, and what is accepted without influence.
    KNOWN: ClassVar = (_REFUSED, {name: {"type": ["string", "null"]} for name in sorted(_HARMLESS)})

    model: Annotated[str, Field(max_length=1024)] | None = Field(None, description="one of the names in /v1/models")
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True),
        BeforeValidator(
            input_items,
            json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)],
        ),
    ] = Field(description="the conversation: a string, or a list of items")
    instructions: str | None = Field(None, description="system message before the conversation; not inherited")
    previous_response_id: str | None = Field(None, description="a stored response that this one continues")
    store: bool | None = Field(None, description="keep the response")
    background: bool | None = Field(None, description="answer at once and go on without the client; needs store")
    stream: bool | None = Field(None, description="answer as server-sent events")
    stream_options: ResponseStreamOptions | None = Field(None, description="include_obfuscation has no influence")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0 is greedy decoding")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="as in chat")
    max_output_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="the most tokens of the answer, thoughts included"
    )
    max_tool_calls: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="bounds calls of hosted tools, of which there are none"
    )
    tools: (
        Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True), BeforeValidator(_tools)] | None
    ) = Field(None, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(None, description="none, auto, required, a function, or allowed_tools")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    text: TextOptions | None = Field(None, description="format and verbosity")
    reasoning: ReasoningOptions | None = Field(None, description="effort and summary")
    include: Annotated[list[str], Field(max_length=MAX_INCLUDE, fail_fast=True), WithJsonSchema(_INCLUDE)] | None = (
        Field(None, description=f"{LOGPROBS}; others are refused")
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="so many alternatives with each token; needs include"
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: drop the oldest messages if the conversation is too long"
    )
    metadata: Metadata | None = Field(None, description="up to 16 pairs of strings, kept with the response")
    user: str | None = Field(None, description="no influence")
    safety_identifier: str | None = Field(None, description="no influence")
    prompt_cache_key: str | None = Field(None, description="no influence")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="mode and ttl have no influence")
    service_tier: str | None = Field(None, description="no influence")

    @property
    def wants_store(self) -> bool:
        """Whether the response is kept, as far as the client says."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token comes with its log-probability."""
        return LOGPROBS in (self.include or ())

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in _HARMLESS:
                continue
            if name not in _REFUSED:
                unknown.append(prefix + name)
            elif not asks_for_nothing(value, _REFUSED[name]):
                raise invalid(f"This server does not support {name}.", name)
        parts: list[tuple[str, ApiRequest | None]] = [("text.", self.text), ("reasoning.", self.reasoning)]
        parts.append(("stream_options.", self.stream_options))
        if self.text is not None:
            parts.append(("text.format.", self.text.format))
        parts += [(f"tools[{place}].", tool) for place, tool in enumerate(self.tools or ())]
        if isinstance(self.tool_choice, ApiRequest):
            parts.append(("tool_choice.", self.tool_choice))
        parts += [(f"input[{place}].", item) for place, item in enumerate(self.input)]
        for name, part in parts:
            if part is not None:
                unknown += part.unknown_fields(name)
        return unknown

    def check(self) -> None:
        for place, name in enumerate(self.include or ()):
            if name != LOGPROBS:
                shown = name[:64]
                raise invalid(f"This server does not support include: {shown!r}.", f"include[{place}]")
        if self.top_logprobs and not self.wants_logprobs:
            raise invalid(f'top_logprobs is only allowed with include: ["{LOGPROBS}"].', "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed with stream: true.", "stream_options")
        if self.background and not self.wants_store:
            raise invalid("background: true needs store: true.", "background")
        if self.text is not None and self.text.format is not None:
            self.text.format.check()
        for name, value in (self.prompt_cache_options or {}).items():
            if name not in ("mode", "ttl") and value not in (None, False):
                raise invalid("This server does not support this option.", f"prompt_cache_options.{name}")
