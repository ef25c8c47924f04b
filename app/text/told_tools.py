"""Tools for a chat template that knows none: told in the system message, calls and results as text of the messages."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.text.reply.formats import ReplyFormat
from app.text.reply.parts import Call, Tool


def told_in_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: ReplyFormat
) -> list[Mapping[str, Any]]:
    """Return the conversation with all of its tools, calls and results written as text.

    Results become messages of the user, those of one turn together: templates know that role, and many want the roles
    to take turns.
    """
    told: list[Mapping[str, Any]] = []
    for is_result, turn in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            results = [form.write_result(message["content"], message.get("name")) for message in turn]
            told.append({"role": "user", "content": "\n".join(results)})
            continue
        for message in turn:
            calls = message.get("tool_calls")
            told.append(_with_calls(message, calls, form) if calls else message)
    if tools:
        prompt = form.tools_prompt(tools)
        if told and told[0]["role"] == "system":
            told[0] = {**told[0], "content": f"{told[0]['content']}\n\n{prompt}"}
        else:
            told.insert(0, {"role": "system", "content": prompt})
    return told


def _with_calls(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]], form: ReplyFormat) -> dict[str, Any]:
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        function = call["function"]
        given = function["arguments"]
        # What a model wrote wrongly is told as it wrote it.
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        texts.append(form.write_call(Call(call["id"], function["name"], arguments)))
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}
