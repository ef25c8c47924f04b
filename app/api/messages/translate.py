"""A conversation as Anthropic's clients write it, turned into the request of a chat completion."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.api.messages.blocks import Block, TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock, text_of
from app.api.messages.request import CountTokensRequest, InputMessage, InputToolChoice, MessagesRequest
from app.api.schemas import ChatRequest, validate
from app.api.schemas.tools import LONG_NAMES
from app.errors import ApiError, invalid

# Fields of a chat request and how Anthropic calls them.
_NAMES = (
    (re.compile(r"^tools\[(\d+)\]\.function\.parameters"), r"tools[\1].input_schema"),
    (re.compile(r"^tools\[(\d+)\]\.function"), r"tools[\1]"),
    (re.compile(r"^response_format(\.json_schema)?(\.schema)?"), "output_config.format.schema"),
    (re.compile(r"^reasoning_effort"), "output_config.effort"),
    (re.compile(r"^parallel_tool_calls"), "tool_choice.disable_parallel_tool_use"),
    (re.compile(r"^tool_choice\.function"), "tool_choice"),
    (re.compile(r"^stop\b(?!_)"), "stop_sequences"),
    (re.compile(r"^continue_final_message"), "messages"),
)


def anthropic_name(param: str) -> str:
    """Return Anthropic's name of a field of a chat request."""
    for pattern, name in _NAMES:
        param, found = pattern.subn(name, param)
        if found:
            break
    return param


def chat_request(body: CountTokensRequest) -> ChatRequest:
    """Return the request as one of chat completions. Raises `ApiError` that names the field as the client wrote it."""
    messages: list[dict[str, Any]] = []
    origins: list[str] = []
    if body.system is not None:
        messages.append({"role": "system", "content": text_of(body.system)})
        origins.append("system")
    tools_named: dict[str, str] = {}
    for place, role, blocks in _turns(body.messages):
        made = [_assistant(blocks, tools_named)] if role == "assistant" else list(_others(role, blocks, tools_named))
        messages += made
        origins += [f"messages[{place}]"] * len(made)
    fields: dict[str, Any] = {"model": body.model, "messages": messages, **_tools(body), **_form(body)}
    variables = dict(body.chat_template_kwargs or {})
    if body.thinking is not None and body.thinking.type != "adaptive":
        variables["enable_thinking"] = body.thinking.type == "enabled"
    if variables:
        fields["chat_template_kwargs"] = variables
    if body.is_prefilled:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesRequest):
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k", "seed", "min_p", "repetition_penalty")
        fields |= {name: getattr(body, name) for name in (*names, "timeout")}
    try:
        given = {name: value for name, value in fields.items() if value is not None}
        chat, _ = validate(ChatRequest, given, strict=False, context={LONG_NAMES: True})
    except ApiError as error:
        raise _renamed(error, origins) from None
    if isinstance(body, MessagesRequest) and body.stop_sequences:
        # More of them than chat completions allow.
        chat = chat.model_copy(update={"stop": body.stop_sequences})
    return chat


def _turns(messages: Sequence[InputMessage]) -> Iterator[tuple[int, str, list[Block]]]:
    """Yield place, role and blocks of each turn: templates want the speakers to alternate."""
    first, blocks = 0, list(messages[0].content)
    for place, message in enumerate(messages[1:], 1):
        if message.role == messages[first].role:
            blocks += message.content
        else:
            yield first, messages[first].role, blocks
            first, blocks = place, list(message.content)
    yield first, messages[first].role, blocks


def _others(role: str, blocks: Sequence[Block], tools_named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the messages of a turn of the user's (or the system's): results of tools are messages of their own."""
    texts: list[TextBlock] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": role, "content": text_of(texts)}
                texts = []
            text = text_of(block.content)
            answer = f"Error: {text}" if block.is_error else text
            name = tools_named[block.tool_use_id]
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": answer}
        elif isinstance(block, TextBlock):
            texts.append(block)
    if texts or not blocks:
        yield {"role": role, "content": text_of(texts)}


def _assistant(blocks: Sequence[Block], tools_named: dict[str, str]) -> dict[str, Any]:
    # The model's own words were cut into blocks by its calls; nothing stood between.
    made: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    if thoughts:
        made["reasoning_content"] = thoughts
    calls = []
    for block in blocks:
        if isinstance(block, ToolUseBlock):
            tools_named[block.id] = block.name
            arguments = json.dumps(block.input, ensure_ascii=False)
            calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
    if calls:
        made["tool_calls"] = calls
    return made


def _tools(body: CountTokensRequest) -> dict[str, Any]:
    if not body.tools:
        return {}
    fields: dict[str, Any] = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    **({} if tool.description is None else {"description": tool.description}),
                    "parameters": tool.input_schema,
                    **({} if tool.strict is None else {"strict": tool.strict}),
                },
            }
            for tool in body.tools
        ]
    }
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice)
        if body.tool_choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    return fields


def _choice(choice: InputToolChoice) -> Any:
    match choice.type:
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": choice.name}}
        case kind:
            return kind


def _form(body: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.form is not None:
        schema = {"name": "output", "schema": body.form[0].schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.output_config is not None and body.output_config.effort is not None:
        fields["reasoning_effort"] = body.output_config.effort
    return fields


def _renamed(error: ApiError, origins: list[str]) -> ApiError:
    """The same error with the field's name as the client wrote it."""
    if error.param is None:
        return error
    found = re.match(r"messages\[(\d+)\]", error.param)
    # Blocks have other places in a chat message, so only the message is named.
    name = origins[int(found[1])] if found and int(found[1]) < len(origins) else anthropic_name(error.param)
    return invalid(error.message.replace(error.param, name), name)
