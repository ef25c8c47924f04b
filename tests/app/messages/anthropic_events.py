"""Reads Anthropic's event streams as their clients do."""

import json
from typing import Any

from tests.sse import named_events


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each event; comments left out."""
    return [(event["type"], event) for event in named_events(text)]


def joined(stream: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The message that the events make up; they must come in the order that clients rely on."""
    assert stream[0][0] == "message_start"
    assert [name for name, _ in stream[-2:]] == ["message_delta", "message_stop"]
    message = dict(stream[0][1]["message"])
    assert message["content"] == []
    assert message["stop_reason"] is None
    content: list[dict[str, Any]] = []
    arguments: dict[int, str] = {}
    is_open = False
    for name, body in stream[1:-2]:
        if name == "content_block_start":
            assert not is_open
            assert body["index"] == len(content)
            content.append(dict(body["content_block"]))
        elif name == "content_block_delta":
            assert is_open
            assert body["index"] == len(content) - 1
            delta = body["delta"]
            if delta["type"] == "input_json_delta":
                arguments[body["index"]] = arguments.get(body["index"], "") + delta["partial_json"]
            else:
                content[-1][delta["type"].removesuffix("_delta")] += delta[delta["type"].removesuffix("_delta")]
        else:
            assert name == "content_block_stop"
            assert body["index"] == len(content) - 1
        is_open = name != "content_block_stop"
    assert not is_open
    for index, text in arguments.items():
        content[index]["input"] = json.loads(text)
    ending = stream[-2][1]
    return {**message, "content": content, **ending["delta"], "usage": ending["usage"]}
