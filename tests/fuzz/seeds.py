"""Inputs to begin with: what each harness reads when nothing is wrong with it."""

import json

from workers.messages import Cancel, Events, Failed, GenerateJob, Output, StatusQuery
from workers.wire import encode

_CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
_TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
_USER = {"role": "user", "content": "x"}
BODIES = [
    {"messages": "x", "temperature": 0.5, "stop": ["a"], "n": 2, "seed": -1, "logit_bias": {"5": 1}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stream": True, "top_logprobs": 2},
    {"messages": [_USER, {"role": "assistant", "tool_calls": [_CALL]}, {"role": "tool", "tool_call_id": "1"}]},
    {"messages": [_USER], "tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}},
    {"messages": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": []}}}},
    {"messages": "x", "guided_choice": ["a", "b"], "chat_template_kwargs": {"enable_thinking": False}, "store": False},
    {"prompt": ["a", "b"], "echo": True, "logprobs": 2, "max_tokens": 0, "suffix": "", "best_of": 2},
    {"prompt": [[1, 2], [3]], "guided_json": {"type": "string"}, "stop_token_ids": [1], "num_beams": 2},
    {"input": ["a"], "encoding_format": "base64", "dimensions": 2},
    {"tokens": [1, 2, 3]},
    {"input": "x", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": 5}, "include": ["x"]},
    {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}, {"id": "msg_1"}]},
    {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}], "tools": [{"name": "f"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 9, "system": ["x"]},
    {"messages": [_USER], "max_tokens": 9, "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {}},
    {"messages": [_USER], "max_tokens": 9, "thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"text_1": "a", "text_2": ["b", "c"], "method": "embedding"},
    {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1},
    {"metadata": {"a": "b"}},
    {"messages": "x", "guided_json": "{}"},
]
_TEXTS = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Berlin", "days": 2}}\n</tool_call>',
    '<think>so</think>text <tool_call>{"name": "clock", "arguments": {}}</tool_call> more',
    '[TOOL_CALLS] [{"name": "clock", "arguments": {"a": [1, "]"]}}]',
    '[TOOL_CALLS]get_weather[ARGS]{"city": "x"}',
    '<|python_tag|>{"name": "get_weather", "parameters": {"city": "x"}}; {"name": "clock", "parameters": {}}',
    '{"name": "clock", "parameters": {"a": "\\u00e9\\""}}',
    "<function=get_weather><parameter=city>Berlin</parameter></function>",
    "<|call|>clock {a: <q>x<q>}<|end|>",
    "<think>never ends <tool_call>{",
]
_MESSAGES = [
    GenerateJob(id="a", prompt=[1, 2], max_tokens=3),
    Cancel(id="a", choice=1),
    StatusQuery(),
    Events(events=[Output(id="a", ids=[1], finish_reason="stop"), Failed(id="b", kind="internal", message="x")]),
]


def seeds(name: str) -> list[bytes]:
    """Return the inputs to begin the harness ``name`` with."""
    bodies = [json.dumps(each).encode() for each in BODIES]
    match name:
        case "gate":
            return bodies
        case "schemas":
            return [bytes([0, kind, 0, 0]) + body for body in bodies for kind in range(11)]
        case "replies":
            return [
                bytes([0, kind, 0, mind, 0, 7]) + text.encode()
                for text in _TEXTS
                for kind in range(8)
                for mind in range(3)
            ]
        case "wire":
            return [
                bytes([0, kind, 0, cuts, *(0, 3) * cuts]) + encode(each)[skip:]
                for each in _MESSAGES
                for kind in (0, 1)
                for cuts, skip in ((0, 0), (1, 4))
            ]
        case "stops":
            return [b"\x00\x02\x00\x07END,aab,ab\nthe aaab text E END", b"\x00\x00\x00\x01a\nbbb"]
        case "detokenizer":
            return [b"\x00\x02" + bytes(range(200)), b"\x00\x01\xf0\x9f\x98\x80"]
        case _:
            return [b"\x00\x01line\r\ndata: x\n\nevent: y\x00TEXT\x00\xe2\x80\xa8"]
