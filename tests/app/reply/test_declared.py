"""What a tokenizer declares of its model's replies is followed; what is not understood is said once and left."""

import json
from typing import Any

import pytest

from app.text.reply.declared import declaration
from app.text.reply.formats import ReplyFormat
from app.text.reply.grammars import HeldCalls
from app.text.reply.parts import Reply, Tool, ToolChoice, fold
from app.text.reply.thinking import Marks
from tests.app.reply.samples import LAX, NAMED_JSON, TAGGED, TEMPLATES, calls, in_pieces, numbered, read

PARIS = '{"city": "Paris"}'
OBJECTS: dict[str, Any] = {
    "fields": {
        "reasoning_content": {"open": "<r>", "close_pattern": r"\s*</r>"},
        "tool_calls": {
            "open": "<c>",
            "close": "</c>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    }
}


def test_names_in_the_opening_mark() -> None:
    reply = read(NAMED_JSON, f"<think>a</think>\nSo:\n<|call|>get_weather {PARIS}<|end|>\n<|call|>clock{{}}<|end|>")
    assert (reply.reasoning, reply.content) == ("a", "So:")
    assert calls(reply) == [("get_weather", PARIS), ("clock", "{}")]


def test_nearly_json_becomes_json() -> None:
    reply = read(LAX, '<|call|>get_weather{city: <q>St. "John\'s"<q>, days: 2, more: [{x:true}]}<|end|>')
    ((name, arguments),) = calls(reply)
    assert name == "get_weather"
    assert json.loads(arguments) == {"city": 'St. "John\'s"', "days": 2, "more": [{"x": True}]}
    assert reply.content == ""


def test_tags_become_the_types_that_the_schema_says() -> None:
    tool = Tool(
        "f",
        parameters={
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "share": {"type": "number"},
                "on": {"type": ["boolean", "null"]},
                "off": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                "list": {"type": "array"},
                "bad": {"type": "integer"},
            },
        },
    )
    values = {
        "text": "7",
        "count": "7",
        "share": "7",
        "on": "True",
        "off": "None",
        "list": "[1, 2]",
        "bad": "seven",
        "unknown": 'a "b"\n<c>',
    }
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=f>\n{tags}</function>\n</tool_call>\nDone."
    reader = TAGGED.parser([tool], new_id=numbered())
    reply = fold(in_pieces(reader, [text]))
    assert reply.content == "Done."
    assert json.loads(reply.calls[0].arguments) == {
        "text": "7",
        "count": 7,
        "share": 7,
        "on": True,
        "off": None,
        "list": [1, 2],
        "bad": "seven",
        "unknown": 'a "b"\n<c>',
    }


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ("<tool_call><function=clock></function></tool_call>", "{}", ""),
        ("<tool_call><function=clock>", "{}", ""),
        ("<tool_call><function=clock><parameter=a>1</parameter>", '{"a": "1"}', ""),
        ("<tool_call><function=clock><parameter=a>1</parameter><par", '{"a": "1"', ""),
        ("<tool_call><function=clock><parameter=a>1</para", '{"a": "1</para', ""),
        ("<tool_call><function=clock></function></tool", "{}", ""),
        ("<tool_call><function=clock>what?", "{}", "what?"),
        ('<tool_call>{"name": "clock", "arguments": {}}</tool_call>', "{}", ""),
    ],
)
def test_tags_that_are_cut_off_or_broken(text: str, arguments: str, content: str) -> None:
    reply = read(TAGGED, text)
    assert (calls(reply), reply.content) == ([("clock", arguments)], content)


@pytest.mark.parametrize(
    ("reply_format", "text"),
    [
        (TAGGED, "<tool_call><function=other><parameter=a>1</parameter></function></tool_call>"),
        (TAGGED, "<tool_call> <func"),
        (TAGGED, "<tool_call><function=clock"),
        (NAMED_JSON, "<|call|>other {}<|end|>"),
        (NAMED_JSON, "<|call|>clock 7<|end|>"),
        (LAX, "<|call|>clock{a: <q>x}<|end|>"),
        (LAX, "<|call|>clock{a: }<|end|>"),
        (LAX, "<|call|>clock{a: 1}"),
    ],
)
def test_what_is_no_call_is_content_to_the_letter(reply_format: ReplyFormat, text: str) -> None:
    assert read(reply_format, text) == Reply("", text, [])


def test_a_declaration_of_objects_is_read() -> None:
    found = declaration(OBJECTS)
    assert found.marks == Marks("<r>", "</r>")
    assert (found.kind, found.lead) == ("objects", "<c>")


@pytest.mark.parametrize(
    "change",
    [
        {"fields": None},
        {"fields": {"tool_calls": {"open_pattern": "<a|b>", "close": "x", "content": "json"}}},
        {"fields": {"tool_calls": {"open_pattern": "(?P<name>.*)", "close": "x", "content": "json"}}},
        {"fields": {"tool_calls": {"open_pattern": "(a+)+b", "close": "x", "content": "json"}}},
        {"fields": {"tool_calls": {"open": "<c>", "close": "</c>", "content": "kv-lines"}}},
        {"fields": {"tool_calls": {"open": "<c>", "content": "json"}}},
        {"fields": {"thinking": {"open_pattern": r"<(?P<x>\w+)>", "close": "</x>"}}},
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        declaration({**OBJECTS, **change})


def test_a_declaration_of_reasoning_alone_is_enough() -> None:
    found = declaration({"fields": {"thinking": {"open": "<t>", "close": "</t>"}}})
    assert (found.marks, found.kind) == (Marks("<t>", "</t>"), None)


@pytest.mark.parametrize(
    ("reply_format", "expected"),
    [(NAMED_JSON, '"clock"'), (LAX, '"{\\"name\\": \\"clock\\"'), (TAGGED, '"{\\"name\\": \\"clock\\"')],
)
def test_the_grammar_is_the_declared_format_or_hermes(reply_format: ReplyFormat, expected: str) -> None:
    held = reply_format.grammar([Tool("clock")], ToolChoice("required"), thinking=False)
    assert isinstance(held, HeldCalls)
    assert expected in held.grammar.source


def test_the_sample_templates_are_what_transformers_takes() -> None:
    from transformers.utils.chat_parsing import parse_response

    text = f"<think>a</think><|call|>get_weather {PARIS}<|end|>"
    message = parse_response(text, TEMPLATES["json"], prefix="")
    (call,) = message["tool_calls"]
    assert (message["thinking"], call["function"]["arguments"]) == ("a", json.loads(PARIS))
    reply = read(NAMED_JSON, text)
    assert (reply.reasoning, json.loads(reply.calls[0].arguments)) == ("a", json.loads(PARIS))


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"anyOf": [True, {"type": "integer"}, 5, None]}}},
        {"properties": {"a": {"oneOf": [["integer"]], "anyOf": "x"}}},
        {"properties": {"a": {"type": [{}, ["integer"]]}}},
        {"properties": {"a": {"type": {"integer": 1}}}},
        {"properties": {"a": True}},
        {"properties": {"a": 5}},
        {"properties": ["a"]},
        {"properties": None},
    ],
    ids=str,
)
def test_a_schema_that_is_odd_breaks_no_call(parameters: dict[str, Any]) -> None:
    reader = TAGGED.parser([Tool("f", parameters=parameters)], new_id=numbered())
    call = "<tool_call>\n<function=f>\n<parameter=a>\n7\n</parameter>\n</function>\n</tool_call>"
    reply = fold(in_pieces(reader, [call]))
    assert json.loads(reply.calls[0].arguments)["a"] in (7, "7")
