"""Hostile output costs no more per character than any other: four times the text, about four times the time."""

import time

import pytest

from app.text.reply.formats import ReplyFormat
from tests.app.reply.samples import FORMATS, HERMES, parser

# Characters of the longer text, read whole and character by character.
WHOLE, SINGLE = 20_000, 2_000
# What each format's calls begin with.
OPENINGS = {
    "hermes": '<tool_call>{"arguments":{"a":',
    "mistral": "[TOOL_CALLS][",
    "mistral-named": "[TOOL_CALLS]clock[ARGS]{",
    "llama3": '{"parameters":{"a":"',
    "tags": "<tool_call><function=clock>",
    "named-json": "<|call|>clock {",
    "lax": "<|call|>clock {",
}

HOSTILE = [
    "<tool_call>",
    "<tool_cal",
    "<",
    '<tool_call>{"arguments":[',
    '<tool_call>{"arguments":{"a":"',
    '<tool_call>{"name":"clock","arguments":{',
    '<tool_call>{"name":"clock","arguments":{}}',
    '<tool_call>{"name":"',
    '<tool_call>[{"name":"clock"},',
    "[TOOL_CALLS]",
    "[TOOL_CALLS][",
    "[TOOL_CALLS]clock[ARGS]{",
    "[TOOL_CALLS]clock",
    "<|python_tag|>{",
    '{"name":',
    '{"parameters":{"a":',
    "{",
    "[",
    "}",
    '"',
    "\\",
    '{"a":"\\',
    " ",
    " \n<tool_call> ",
    "<tool_call><function=clock>",
    "<parameter=a>",
    "<parameter=a>1</parameter>",
    "<|call|>clock",
    "<|call|>clock{a:",
    "<|call|>clock {a: <q>",
    "a_",
    "{a:",
    "<think>",
    "</think",
    " </think",
]


def seconds(reply_format: ReplyFormat, text: str, thinking: bool | None, whole: bool) -> float:
    """The time of one reading of ``text``."""
    pieces = [text] if whole else list(text)
    reader = parser(reply_format, thinking)
    begin = time.process_time()
    for piece in pieces:
        reader.push(piece)
    reader.finish()
    return time.process_time() - begin


def grows_linearly(reply_format: ReplyFormat, opening: str, unit: str, thinking: bool | None, whole: bool) -> bool:
    """Whether four times the text takes at most nine times the time; a square would make it sixteen.

    Whatever the machine does besides, one of a few tries then does.
    """
    size = WHOLE if whole else SINGLE
    short, long = (opening + unit * (length // len(unit)) for length in (size // 4, size))
    return any(
        seconds(reply_format, long, thinking, whole) <= 9 * seconds(reply_format, short, thinking, whole) + 0.002
        for _ in range(8)
    )


@pytest.mark.parametrize("whole", [False, True], ids=["characters", "whole"])
@pytest.mark.parametrize("name", FORMATS)
def test_time_grows_with_the_text_and_no_faster(name: str, whole: bool) -> None:
    slow = [
        opening + unit
        for opening in ("", OPENINGS[name])
        for unit in HOSTILE
        if not grows_linearly(FORMATS[name], opening, unit, None, whole)
    ]
    assert slow == []


@pytest.mark.parametrize("unit", [" ", "\n", "<", "</think", "</thin\n", "x "])
def test_reasoning_without_an_end_is_read_once(unit: str) -> None:
    assert grows_linearly(HERMES, "", unit, True, whole=False)
