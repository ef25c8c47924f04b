"""The messages of a conversation."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

from app.api.fields import short_text
from app.api.json_gate import MAX_DEPTH, TooDeep, parse_object
from app.api.schemas.tools import FunctionName
from app.api.values import NO_CONTROLS, ApiRequest, CallId, content_text
from app.errors import ApiError, invalid

MAX_MESSAGES = 4096
MAX_CALLS = 128
# Of all messages together: each costs far more than the few bytes that it may be written with.
MAX_PARTS = 16_384
# What OpenAI's client adds to an answer that it has parsed or joined, and sends back with it.
_OF_CLIENT = frozenset({"parsed", "parsed_arguments", "index"})

_ROLES_OF_PARTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "null"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"type": {"const": kind}, kind: {"type": "string"}},
                        "required": ["type", kind],
                    }
                    for kind in ("text", "refusal")
                ]
            },
        },
    ]
}


def _arguments(text: str) -> str:
    """Check that nobody reads too deep a text. It need not be JSON: what models write comes back as it was."""
    try:
        parse_object(text.encode())
    except TooDeep:
        raise ValueError(f"must be the JSON text of an object, at most {MAX_DEPTH} levels deep") from None
    except ApiError:
        pass
    return text


class FunctionCall(ApiRequest):
    """A function that the model called."""

    name: FunctionName = Field(description="the function's name")
    arguments: Annotated[str, AfterValidator(_arguments)] = Field(
        description="the JSON text of an object, as the model wrote it"
    )

    @property
    def parsed_arguments(self) -> dict[str, Any] | str:
        """The arguments; the very text, if it is no JSON object. Nothing at all is one without members."""
        if not self.arguments.strip():
            return {}
        try:
            parse_object(self.arguments.encode())
        except ApiError:
            return self.arguments
        # Not orjson, which makes floats of long integers.
        return dict(json.loads(self.arguments))

    def unknown_fields(self, prefix: str = "") -> list[str]:
        return [prefix + name for name in self.model_extra or () if name not in _OF_CLIENT]


class ToolCall(ApiRequest):
    """A call of an earlier turn."""

    id: CallId = Field(description="the call's id, which the message with its result repeats")
    type: Literal["function"] = Field("function", description="function")
    function: FunctionCall = Field(description="the function and its arguments")

    def for_template(self) -> dict[str, Any]:
        """Return the call with its arguments as an object, as templates take them; as text if they are none."""
        function = {"name": self.function.name, "arguments": self.function.parsed_arguments}
        return {"id": self.id, "type": "function", "function": function}

    def unknown_fields(self, prefix: str = "") -> list[str]:
        own = [prefix + name for name in self.model_extra or () if name not in _OF_CLIENT]
        return own + self.function.unknown_fields(f"{prefix}function.")


class Message(ApiRequest):
    """One turn of a conversation; ``content`` is its text."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="who speaks: system, developer, user, assistant or tool (or function, its older name)"
    )
    content: Annotated[str, BeforeValidator(content_text), WithJsonSchema(_ROLES_OF_PARTS)] = Field(
        "", description="the text: a string, null, or a list of text parts"
    )
    name: Annotated[str, Field(max_length=256), AfterValidator(short_text), NO_CONTROLS] | None = Field(
        None, description="the speaker's name, for templates that show it"
    )
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="assistant: the calls of this turn"
    )
    function_call: FunctionCall | None = Field(None, description="assistant: the older form of one call")
    tool_call_id: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="tool: the id of the call whose result this is"
    )
    reasoning_content: str | None = Field(None, description="assistant: what it thought, for templates that show it")
    refusal: str | None = Field(None, description="assistant: its text, if it refused")
    _given: str | list[dict[str, Any]] | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def _remember(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        message = validate(value)
        message._given = value.get("content") if isinstance(value, dict) else message.content
        return message

    @property
    def given_content(self) -> str | list[dict[str, Any]] | None:
        """The content as the client wrote it."""
        return self._given

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The calls of this turn, the older form among them."""
        if self.function_call is not None:
            return [ToolCall(id=older_id(self.function_call.name), type="function", function=self.function_call)]
        return self.tool_calls or ()

    @property
    def answers(self) -> str | None:
        """The id of the call whose result this is."""
        return older_id(self.name or "") if self.role == "function" else self.tool_call_id

    @property
    def text(self) -> str:
        """What is said."""
        return self.content or self.refusal or ""

    def for_template(self, tool_names: Mapping[str, str]) -> dict[str, Any]:
        """Return what the chat template sees, in the shape that transformers' templates are written for.

        Templates know the system role, not its newer name. ``tool_names``: the function of each call so far, by id.
        """
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.text}
        name = tool_names.get(self.answers or "") if role == "tool" else self.name
        if name:
            message["name"] = name
        if role == "tool":
            message["tool_call_id"] = self.answers
        if self.calls:
            message["tool_calls"] = [call.for_template() for call in self.calls]
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        return message

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name == "audio" and value is not None:
                raise invalid(f"This server does not support {prefix}{name}.", prefix + name)
            # The others are of answers that come back as history.
            if name not in ("audio", "annotations") and name not in _OF_CLIENT:
                unknown.append(prefix + name)
        for place, part in enumerate(self._given if isinstance(self._given, list) else ()):
            # The last is a hint for a cache.
            known = ("type", part["type"], "prompt_cache_breakpoint")
            unknown += [f"{prefix}content[{place}].{name}" for name in part if name not in known]
        for place, call in enumerate(self.tool_calls or ()):
            unknown += call.unknown_fields(f"{prefix}tool_calls[{place}].")
        return unknown


def older_id(name: str) -> str:
    """Return the id of a call that has none: the name of its function."""
    return f"function_{name}"


def check_messages(messages: Sequence[Message]) -> None:
    """Check what the messages have to do with each other. Raises `ApiError` 400 that names one."""
    called: set[str] = set()
    for place, message in enumerate(messages):
        at = f"messages[{place}]"
        if "content" not in message.model_fields_set and not message.calls and message.refusal is None:
            raise invalid(f"{at}.content: is required.", f"{at}.content")
        for field in ("tool_calls", "function_call", "reasoning_content", "refusal"):
            if message.role != "assistant" and getattr(message, field) not in (None, []):
                raise invalid(f"{at}.{field}: only messages of the assistant have it.", f"{at}.{field}")
        if message.role == "tool" and message.tool_call_id not in called:
            raise invalid(f"{at}.tool_call_id: must be the id of a call before it.", f"{at}.tool_call_id")
        if message.role == "function" and message.answers not in called:
            raise invalid(f"{at}.name: must be the name of a function that was called before.", f"{at}.name")
        if message.role not in ("tool", "function") and message.tool_call_id is not None:
            raise invalid(f"{at}.tool_call_id: only messages of the role tool have it.", f"{at}.tool_call_id")
        called.update(call.id for call in message.calls)


def unknown_in_messages(messages: Sequence[Message]) -> list[str]:
    """Return the unknown fields of all messages. Raises `ApiError` 400 for what is known but not supported."""
    return [name for place, message in enumerate(messages) for name in message.unknown_fields(f"messages[{place}].")]


def message_list(value: Any) -> Any:
    """A string is one message of the user, as in the demo. Raises ValueError for too many parts, before any is read."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and len(value) <= MAX_MESSAGES and sum(map(_parts, value)) > MAX_PARTS:
        raise ValueError(f"can have at most {MAX_PARTS} parts and tool calls together")
    return value


def _parts(message: Any) -> int:
    if not isinstance(message, dict):
        return 0
    lists = (message.get("content"), message.get("tool_calls"))
    return sum(len(each) for each in lists if isinstance(each, list))


_MessageList = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Messages = Annotated[_MessageList, BeforeValidator(message_list, json_schema_input_type=str | _MessageList)]
