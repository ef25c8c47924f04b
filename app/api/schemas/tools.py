"""The tools of a request, and which of them may be called."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import orjson
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from app.api.values import ApiRequest, named
from app.errors import invalid
from app.text.reply.parts import Tool, ToolChoice

MAX_TOOLS = 128
MAX_TOOL_BYTES = 256 * 1024
MAX_DESCRIPTION = 65_536

_MAX_NAME = 64
# In the context of a validation: names may have 128 characters, as Anthropic's API lets them.
LONG_NAMES = "long names"


def _name(name: str, info: ValidationInfo) -> str:
    if len(name) > _MAX_NAME and not (info.context or {}).get(LONG_NAMES):
        raise ValueError(f"should have at most {_MAX_NAME} characters")
    return name


FunctionName = Annotated[
    str,
    Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$"),
    AfterValidator(_name),
    WithJsonSchema({"type": "string", "pattern": r"^[a-zA-Z0-9_-]{1,64}$"}),
]


class FunctionDefinition(ApiRequest):
    """What the model is told of a function."""

    name: FunctionName = Field(description="letters, digits, _ and -, up to 64")
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = Field(
        None, description="what the function does, for the model"
    )
    parameters: dict[str, Any] | None = Field(
        None, description="a JSON schema of the arguments, which are an object; left out: no arguments"
    )
    strict: bool | None = Field(None, description="hold the arguments of every call to the schema")


class ToolDefinition(ApiRequest):
    """A tool that the model may call."""

    type: Literal["function"] = Field(description="function")
    function: FunctionDefinition = Field(description="the function")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        return super().unknown_fields(prefix) + self.function.unknown_fields(f"{prefix}function.")

    @property
    def tool(self) -> Tool:
        """The tool as the text side knows it."""
        own = self.function
        return Tool(own.name, own.description or "", own.parameters, bool(own.strict))


class ToolName(ApiRequest):
    """The name of one of the tools."""

    name: FunctionName = Field(description="the name of one of `tools`")


class NamedTool(ApiRequest):
    """``tool_choice``: call this one."""

    type: Literal["function"] = Field(description="function")
    function: ToolName = Field(description="the function")


class AllowedToolList(ApiRequest):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"] = Field(description="auto: as the model likes; required: at least one call")
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)] = Field(
        description="the tools that may be called, by type and name"
    )


class AllowedTools(ApiRequest):
    """``tool_choice``: only these."""

    type: Literal["allowed_tools"] = Field(description="allowed_tools")
    allowed_tools: AllowedToolList = Field(description="the tools that may be called")


def _one_kind(value: Any, info: ValidationInfo) -> Any:
    """Decide by ``type``, so that an error speaks of what was meant."""
    if isinstance(value, dict):
        kind = value.get("type")
        if kind == "function":
            return NamedTool.model_validate(value, context=info.context)
        if kind == "allowed_tools":
            return AllowedTools.model_validate(value, context=info.context)
        raise named('must be "function" or "allowed_tools"', ".type")
    if value not in ("none", "auto", "required", None) or not isinstance(value, str | None):
        raise ValueError('must be "none", "auto", "required", or an object that names a function')
    return value


ToolList = Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None
Choice = Annotated[Literal["none", "auto", "required"] | NamedTool | AllowedTools | None, BeforeValidator(_one_kind)]


class ToolsAsked(ApiRequest):
    """A request with ``tools`` and, maybe, ``tool_choice``."""

    tools: ToolList = None

    @cached_property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return tuple(each.tool for each in self.tools or ())

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        for place, tool in enumerate(self.tools or ()):
            unknown += tool.unknown_fields(f"{prefix}tools[{place}].")
        return unknown

    def check(self) -> None:
        super().check()
        seen: set[str] = set()
        size = 0
        for place, tool in enumerate(self.tools or ()):
            own = tool.function
            if own.name in seen:
                raise invalid(f"Two tools have the name {own.name}.", f"tools[{place}].function.name")
            seen.add(own.name)
            _check_parameters(own.parameters, f"tools[{place}].function.parameters")
            size += len(own.description or "") + (len(orjson.dumps(own.parameters)) if own.parameters else 0)
            if size > MAX_TOOL_BYTES:
                raise invalid(f"The tools are larger than {MAX_TOOL_BYTES} bytes together.", "tools")


def _check_parameters(schema: Mapping[str, Any] | None, param: str) -> None:
    """What a client takes for a schema of arguments must at least be one of an object."""
    if schema is None:
        return
    if schema.get("type", "object") != "object":
        raise invalid('The arguments of a function are an object: type must be "object".', f"{param}.type")
    if not isinstance(schema.get("properties", {}), dict):
        raise invalid("properties must be an object.", f"{param}.properties")


def settled_choice(choice: Choice, tools: tuple[Tool, ...]) -> ToolChoice:
    """Return which of ``tools`` may be called. Raises `ApiError` 400 for a name that is none of theirs."""
    names = {tool.name for tool in tools}
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise invalid("tool_choice: there are no tools to call.", "tool_choice")
        return ToolChoice(choice if tools else "none")
    if isinstance(choice, NamedTool):
        _check_name(choice.function.name, names, "tool_choice.function.name")
        return ToolChoice("required", (choice.function.name,))
    allowed = choice.allowed_tools
    for place, each in enumerate(allowed.tools):
        _check_name(each.function.name, names, f"tool_choice.allowed_tools.tools[{place}].function.name")
    return ToolChoice(allowed.mode, tuple(dict.fromkeys(each.function.name for each in allowed.tools)))


def _check_name(name: str, names: set[str], param: str) -> None:
    if name not in names:
        raise invalid(f"There is no tool with the name {name}.", param)


def unknown_in_choice(choice: Choice, prefix: str) -> list[str]:
    """Return the unknown fields of ``tool_choice``."""
    if isinstance(choice, NamedTool):
        return choice.unknown_fields(prefix) + choice.function.unknown_fields(f"{prefix}function.")
    if isinstance(choice, AllowedTools):
        unknown = choice.unknown_fields(prefix) + choice.allowed_tools.unknown_fields(f"{prefix}allowed_tools.")
        for place, tool in enumerate(choice.allowed_tools.tools):
            unknown += unknown_in_choice(tool, f"{prefix}allowed_tools.tools[{place}].")
        return unknown
    return []
