"""Reasoning is taken from the beginning of a reply; nothing else is."""

import pytest

from app.text.reply.parts import Content, Reasoning, Reply
from tests.app.reply.samples import HERMES, LLAMA3, parser, read

CALL = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (None, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", "Hm.\n\nSo.", "Yes."),
        (None, "\n<think>a</think>b", "a", "b"),
        (None, "<think></think>b", "", "b"),
        (None, "<think>\n\n</think>\n\nb", "", "b"),
        (None, "No <think>x</think>.", "", "No <think>x</think>."),
        (None, " no thought ", "", " no thought "),
        (None, "<think>never ends\n", "never ends\n", ""),
        (None, "<thin", "", "<thin"),
        (None, "<think>a</thi", "a</thi", ""),
        (None, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        (True, "\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (True, "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        (True, "no end", "no end", ""),
        (True, "</think>Yes.", "", "Yes."),
        (False, "<think>a</think>b", "", "<think>a</think>b"),
        (True, f"{CALL}</think>x", CALL, "x"),
    ],
)
def test_reasoning_is_taken_apart(thinking: bool | None, text: str, reasoning: str, content: str) -> None:
    assert read(HERMES, text, thinking) == Reply(reasoning, content, [])


def test_a_call_behind_the_reasoning_is_found() -> None:
    reply = read(HERMES, f"<think>The clock.</think>\n\n{CALL}")
    assert (reply.reasoning, reply.content, [call.name for call in reply.calls]) == ("The clock.", "", ["clock"])


def test_reasoning_goes_out_as_it_comes() -> None:
    reader = parser(HERMES, True)
    assert reader.push("\nHm") == [Reasoning("Hm")]
    assert reader.push(". So\n</th") == [Reasoning(". So")]
    assert reader.push("ink>\n\nYes") == [Content("Yes")]
    assert reader.push(".") == [Content(".")]


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("<|im_start|>assistant\n", None),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", None),
    ],
)
def test_the_prompt_tells_where_the_text_begins(tail: str, expected: bool | None) -> None:
    assert HERMES.thinking_after(tail) is expected
    assert LLAMA3.thinking_after(tail) is False
