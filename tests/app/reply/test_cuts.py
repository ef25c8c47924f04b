"""However a text is cut, whatever it is: the same reply, and no character of it lost."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.text.reply.parts import Content, Part, Reasoning, Reply, fold
from tests.app.reply.samples import FORMATS, in_pieces, parser

FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    '{"name": "clock", "arguments": {}}',
    '{"name": "get_weather", "parameters": {"city": "Rome"}}',
    '{"name": "other", "arguments": {}}',
    '{"arguments": {"a": [1, "}"]}, "name": "clock"}',
    "<function=clock>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "<|call|>clock",
    "{a: 1, b: <q>x<q>}",
    "<|end|>",
    '{"name"',
    '"clock"',
    '"arguments": ',
    '"\\u0063lock"',
    "clock",
    "get_weather",
    "null",
    "\\",
    '"',
    *"{}[]:,;< \n",
    "text",
    "北京 😀",
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=14).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(cut=cut_texts())
def test_cuts_change_nothing(name: str, thinking: bool | None, cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    whole = fold(in_pieces(parser(FORMATS[name], thinking), [text]))
    assert fold(in_pieces(parser(FORMATS[name], thinking), pieces)) == whole
    assert fold(in_pieces(parser(FORMATS[name], thinking), list(text))) == whole


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_nothing_is_lost_or_invented(name: str, thinking: bool | None, text: str) -> None:
    reply = fold(in_pieces(parser(FORMATS[name], thinking), [text]))
    if thinking is not True and not reply.calls and not reply.reasoning and "think>" not in text:
        assert reply.content == text
    # What is neither a mark nor an envelope is there, each character as often as it was written.
    seen = "".join((reply.reasoning, reply.content, *(json.dumps(c.name) + c.arguments for c in reply.calls)))
    for word, count in Counter(re.findall("text|北京|😀", text)).items():
        assert seen.count(word) >= count - text.count('"id"')
    assert all(call.name in ("clock", "get_weather") for call in reply.calls)
    assert [call.id for call in reply.calls] == [f"c{place}" for place in range(len(reply.calls))]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(cut=cut_texts())
def test_parts_come_in_order(name: str, cut: tuple[str, list[str]]) -> None:
    parts: list[Part] = in_pieces(parser(FORMATS[name], None), cut[1])
    assert all(part.text for part in parts if isinstance(part, Content | Reasoning))
    kinds = [type(part) for part in parts]
    if Reasoning in kinds:
        assert set(kinds[: len(kinds) - kinds[::-1].index(Reasoning)]) == {Reasoning}


@settings(max_examples=200, deadline=None)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_any_json_comes_back_as_it_was_written(value: object) -> None:
    arguments = json.dumps({"value": value, "<tool_call>": "</tool_call>"}, ensure_ascii=False)
    written = {
        "hermes": f'<tool_call>\n{{"name": "clock", "arguments": {arguments}}}\n</tool_call>',
        "mistral": f'[TOOL_CALLS][{{"name": "clock", "arguments": {arguments}}}]',
        "mistral-named": f"[TOOL_CALLS]clock[ARGS]{arguments}",
        "llama3": f'{{"name": "clock", "parameters": {arguments}}}',
    }
    for name, text in written.items():
        reply: Reply = fold(in_pieces(parser(FORMATS[name], False), [text]))
        assert ([call.arguments for call in reply.calls], reply.content) == ([arguments], "")
