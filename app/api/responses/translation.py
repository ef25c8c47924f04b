"""A response's request as the `ChatRequest` of the one road, and the errors of that road in the client's own words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.api.responses.items import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    ItemReference,
    MessageItem,
    ReasoningItem,
    TextPart,
)
from app.api.responses.schemas import AllowedTools, NamedTool, ResponseRequest, Sampling
from app.api.schemas import ChatRequest, validate
from app.errors import ApiError, as_api_error, invalid
from app.text.errors import JobFailed, RequestError
from app.text.offload import off_hub_if_large

# Fields that are called otherwise in chat.
_NAMES = {
    "messages": "input",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema.name": "text.format.name",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.function": "tool_choice.name",
    "tool_choice.allowed_tools": "tool_choice",
    "logprobs": "include",
}
_PLACE = re.compile(r"^messages\[(\d+)\](?:\.(.*))?$")
_CALL = re.compile(r"^tool_calls\[(\d+)\](?:\.function)?(.*)$")
_TOOL = re.compile(r"^tools\[(\d+)\]\.function(.*)$")
# An item in the measure of `off_hub_if_large`.
_ITEM_COST = 128
# A stored part of the conversation: none of its fields is in the request.
STORED = "previous_response_id"


@dataclass(frozen=True, slots=True)
class Said:
    """An item of the conversation and where the client wrote it: ``input[2]``, or `STORED`."""

    item: InputItem
    origin: str


@dataclass(slots=True)
class _Draft:
    """A message for chat, and where its parts come from."""

    message: dict[str, Any]
    # Field of the message (or tool_calls[i]) -> field of the request; "" is the whole.
    origins: dict[str, str] = field(default_factory=dict)


class Translation:
    """``chat`` is the request for the one road."""

    def __init__(self, body: ResponseRequest, said: Sequence[Said]) -> None:
        """Raises `ApiError` 400 that names the client's own field."""
        self._drafts: list[_Draft] = []
        if body.instructions is not None:
            message = {"role": "system", "content": body.instructions}
            self._drafts.append(_Draft(message, {"": "instructions"}))
        self._calls: set[str] = set()
        for each in said:
            self._add(each)
        fields = {**_shared_fields(body), "messages": [draft.message for draft in self._drafts]}
        with_errors = self.error
        try:
            self.chat = validate(ChatRequest, fields, strict=False)[0]
        except ApiError as error:
            raise with_errors(error) from None

    def error(self, error: Exception) -> ApiError:
        """Return an error of the road as one that names the client's own field."""
        answer = as_api_error(error)
        if answer.param is None or not isinstance(error, ApiError | RequestError | JobFailed):
            return answer
        param = self._own_name(answer.param)
        return ApiError(
            answer.status,
            answer.message.replace(answer.param, param),
            kind=answer.kind,
            param=param,
            code=answer.code,
            retry_after=answer.retry_after,
            should_retry=answer.should_retry,
        )

    def _own_name(self, param: str) -> str:
        if param in _NAMES:
            return _NAMES[param]
        if tool := _TOOL.match(param):
            return f"tools[{tool[1]}]{tool[2]}"
        place = _PLACE.match(param)
        if place is None or int(place[1]) >= len(self._drafts):
            return param
        origins, rest = self._drafts[int(place[1])].origins, place[2] or ""
        whole = origins[""]
        if call := _CALL.match(rest):
            origin = origins.get(f"tool_calls[{call[1]}]", whole)
            return origin if origin == STORED else origin + call[2].replace(".id", ".call_id")
        origin = origins.get(rest.partition("[")[0], "")
        if origin:
            return origin
        return whole if whole in (STORED, "instructions") or not rest else f"{whole}.{rest}"

    def _add(self, said: Said) -> None:
        item, origin = said.item, said.origin
        match item:
            case MessageItem(role="assistant"):
                draft = self._assistant(origin, continues=("content",))
                draft.message["content"] = _text(item.content)
                draft.origins["content"] = _field(origin, "content")
            case MessageItem():
                message = {"role": item.role, "content": _text(item.content)}
                self._drafts.append(_Draft(message, {"": origin}))
            case ReasoningItem():
                draft = self._assistant(origin, continues=("content", "tool_calls", "reasoning_content"))
                draft.message["reasoning_content"] = _text(item.content or item.summary)
                draft.origins["reasoning_content"] = _field(origin, "content")
            case FunctionCallItem():
                draft = self._assistant(origin, continues=())
                calls = draft.message.setdefault("tool_calls", [])
                draft.origins[f"tool_calls[{len(calls)}]"] = origin
                function = {"name": item.name, "arguments": item.arguments}
                calls.append({"id": item.call_id, "type": "function", "function": function})
                self._calls.add(item.call_id)
            case FunctionOutputItem():
                if item.call_id not in self._calls:
                    raise invalid("No function call before it has this call_id.", _field(origin, "call_id"))
                message = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
                origins = {"": origin, "content": _field(origin, "output"), "tool_call_id": _field(origin, "call_id")}
                self._drafts.append(_Draft(message, origins))
            case ItemReference():
                raise invalid("This item is not stored.", _field(origin, "id"))

    def _assistant(self, origin: str, continues: Sequence[str]) -> _Draft:
        """Return the assistant's message that the next part belongs to: the last one, if it has nothing of
        ``continues`` yet. Thoughts, words and calls of one turn are one message for a chat template.
        """
        last = self._drafts[-1] if self._drafts else None
        if last is None or last.message["role"] != "assistant" or any(last.message.get(name) for name in continues):
            last = _Draft({"role": "assistant", "content": ""}, {"": origin})
            self._drafts.append(last)
        return last


def translate(body: ResponseRequest, said: Sequence[Said]) -> Translation:
    """Return the translation, made on a native thread if it is much. Raises `ApiError` 400."""
    return off_hub_if_large(_ITEM_COST * len(said), Translation, body, said)


def _field(origin: str, name: str) -> str:
    return origin if origin == STORED else f"{origin}.{name}"


def _text(parts: Sequence[TextPart]) -> str:
    return "\n".join(part.words for part in parts)


def _shared_fields(body: ResponseRequest) -> dict[str, Any]:
    """What is not the conversation; fields that were not given are left out."""
    given: dict[str, Any] = body.model_dump(include=set(Sampling.model_fields), exclude_unset=True)
    given |= {"model": body.model, "temperature": body.temperature, "top_p": body.top_p}
    given["max_completion_tokens"] = body.max_output_tokens
    if body.wants_logprobs:
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.text is not None:
        given["verbosity"] = body.text.verbosity
        if body.text.format is not None:
            given["response_format"] = _response_format(body.text.format.model_dump(by_alias=True, exclude_unset=True))
    if body.reasoning is not None:
        given["reasoning_effort"] = body.reasoning.effort
    if body.tools:
        given["tools"] = [
            {"type": "function", "function": tool.model_dump(include={"name", "description", "parameters", "strict"})}
            for tool in body.tools
        ]
        given["parallel_tool_calls"] = body.parallel_tool_calls
    given["tool_choice"] = _tool_choice(body.tool_choice)
    if not body.tools and body.tool_choice in ("none", "auto"):
        given["tool_choice"] = None
    return {name: value for name, value in given.items() if value is not None}


def _response_format(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["type"] != "json_schema":
        return {"type": given["type"]}
    return {"type": "json_schema", "json_schema": {name: each for name, each in given.items() if name != "type"}}


def _tool_choice(choice: str | AllowedTools | NamedTool | None) -> Any:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice
