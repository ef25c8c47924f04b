"""How the parts of a reply become content blocks and events."""

from collections.abc import Iterable
from typing import Any

import pytest

from app.api.messages.answer import Blocks, parsed_arguments
from app.text.reply.parts import CallArguments, CallBegin, Content, Part, Reasoning


def content(parts: Iterable[Part], shows_thoughts: bool = True) -> list[dict[str, Any]]:
    """The blocks as a client puts them together; arguments as text."""
    blocks, made, is_open = Blocks(shows_thoughts), [], False
    for what, index, value in (*blocks.take(parts), *blocks.end()):
        if what == "start":
            assert not is_open
            assert index == len(made)
            made.append(dict(value))
        elif what == "delta":
            assert is_open
            assert index == len(made) - 1
            (field, text) = next(item for item in value.items() if item[0] != "type")
            made[-1][field] = made[-1].get(field, "") + text
        else:
            assert index == len(made) - 1
        is_open = what != "stop"
    assert not is_open
    return made


def thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def call(number: int, arguments: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"c{number}", "name": "look", "input": {}, "partial_json": arguments}


def test_each_kind_of_part_has_its_block() -> None:
    parts: list[Part] = [
        Reasoning("I "), Reasoning("think"), Content("\n\n"), Content("It "), Content("is."), Content("\n"),
        CallBegin(0, "c0", "look"), CallArguments(0, '{"a"'), CallArguments(0, ":1}"), Content("\n"),
        CallBegin(1, "c1", "look"), CallArguments(1, "{}"), Content("\n"),
    ]  # fmt: skip
    made = [thinking("I think"), text("\n\nIt is.\n"), call(0, '{"a":1}'), call(1, "{}")]
    assert content(parts) == made


def test_white_space_alone_is_no_block_unless_it_is_all_there_is() -> None:
    assert [block["type"] for block in content([Content(" "), CallBegin(0, "c0", "look")])] == ["tool_use"]
    assert content([Content(" "), Content("\n")]) == [text(" \n")]
    assert content([]) == []


def test_thoughts_can_be_left_out_of_their_block() -> None:
    parts: list[Part] = [Reasoning("I think"), Content("It is.")]
    assert content(parts, shows_thoughts=False) == [thinking(""), text("It is.")]


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ('{"a": 1, "b": [true]}', {"a": 1, "b": [True]}),
        ("", {}),
        ('{"a": 1, "b": "cut o', {"a": 1}),
        ('{"a": 1, "b"', {"a": 1}),
        ("[1]", {"unparsed": "[1]"}),
        ("get it", {"unparsed": "get it"}),
    ],
)
def test_arguments_are_an_object_whatever_was_written(written: str, parsed: dict[str, Any]) -> None:
    assert parsed_arguments(written) == parsed
