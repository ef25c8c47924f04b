"""Calls as models write them are found; what is none stays content, to the letter."""

import pytest

from app.text.reply.formats import ReplyFormat
from app.text.reply.parts import CallArguments, CallBegin, Content, PlainParser, Reply
from tests.app.reply.samples import CLOCK, HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED, calls, parser, read

PARIS = '{"city": "Paris"}'
ROME = '{"city":"Rome","days":2}'

CALLED = [
    (HERMES, f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', "", [PARIS]),
    (
        HERMES,
        f'Let me see.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>',
        "Let me see.",
        [PARIS, ROME],
    ),
    (HERMES, f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', "", [PARIS]),
    (HERMES, f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}]</tool_call>', "", [PARIS]),
    (HERMES, f'<tool_call>{{"name": "get_weather", "parameters": {PARIS}}} </tool_call> Done.', "Done.", [PARIS]),
    # One bracket is missing, the closing mark is missing, the arguments are JSON in a string.
    (HERMES, f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}</tool_call>', "", [PARIS]),
    (HERMES, f'<tool_call>{{"name": "get_weather", "arguments": {PARIS}}}', "", [PARIS]),
    (HERMES, '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [PARIS]),
    (HERMES, '<tool_call>{"name": "get_weather", "arguments": null}</tool_call>', "", ["{}"]),
    (HERMES, '<tool_call>{"name": "get_weather"}</tool_call>', "", ["{}"]),
    (
        HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call> \\"}{"}}</tool_call>',
        "",
        ['{"city": "</tool_call> \\"}{"}'],
    ),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', "", [PARIS]),
    (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}, "id": "a1b2c3d4e"}}, '
        f'{{"name": "get_weather", "arguments": {ROME}}}]',
        "",
        [PARIS, ROME],
    ),
    (MISTRAL_NAMED, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", "", [PARIS]),
    (
        MISTRAL_NAMED,
        f"Both:[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{ROME}",
        "Both:",
        [PARIS, ROME],
    ),
    (MISTRAL_NAMED, f"[TOOL_CALLS]get_weather{PARIS}", "", [PARIS]),
    (LLAMA3, f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [PARIS]),
    (LLAMA3, f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}', "", [PARIS]),
    (
        LLAMA3,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "get_weather", "parameters": {ROME}}}',
        "",
        [PARIS, ROME],
    ),
    (LLAMA3, f'Well.<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', "Well.", [PARIS]),
]


@pytest.mark.parametrize(("reply_format", "text", "content", "arguments"), CALLED)
def test_calls_are_found(reply_format: ReplyFormat, text: str, content: str, arguments: list[str]) -> None:
    reply = read(reply_format, text)
    assert reply.content == content
    assert calls(reply) == [("get_weather", each) for each in arguments]
    assert [call.id for call in reply.calls] == [f"c{place}" for place in range(len(arguments))]


CONTENT = [
    (HERMES, "Hello, world!"),
    (HERMES, "  two spaces, and at the end a line\n"),
    (HERMES, '<tool_call>{"name": "launch_missiles", "arguments": {}}</tool_call>'),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call></tool_call>"),
    (HERMES, '<tool_call>{"name": "get_weather", "arguments": 7}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get_weather", "argu'),
    (HERMES, '<tool_call>{"name": "get_weather"'),
    (HERMES, '<tool_call>{"arguments": {"city": "Paris"}, "na'),
    (HERMES, '<tool_call>{"arguments": {"city": "Paris"}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "get_weather", "secret": 1, "arguments": {}}</tool_call>'),
    (HERMES, "<tool_call>get_weather(city='Paris')</tool_call>"),
    (HERMES, "a < b and <tool_cal"),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "other", "arguments": {}}]'),
    (MISTRAL_NAMED, "[TOOL_CALLS]get_weather_now[ARGS]{}"),
    (MISTRAL_NAMED, "[TOOL_CALLS]get_weather[ARGS]7"),
    (LLAMA3, '{"answer": 42, "list": [1, {"name": "get_weather"}]}'),
    (LLAMA3, '{"name": "get_weather"}'),
    (LLAMA3, '{"name": "get_weather", "parameters": "none"}'),
    (LLAMA3, 'See {"name": "get_weather", "parameters": {}}'),
    (LLAMA3, '<|python_tag|>brave_search.call(query="weather")'),
    (LLAMA3, "\n  {"),
]


@pytest.mark.parametrize(("reply_format", "text"), CONTENT)
def test_what_is_no_call_is_content_to_the_letter(reply_format: ReplyFormat, text: str) -> None:
    assert read(reply_format, text) == Reply("", text, [])


def test_a_call_behind_a_broken_one_is_found() -> None:
    good = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    reply = read(HERMES, f"<tool_call>{good} and <tool_call>none</tool_call>{good}")
    assert calls(reply) == [("clock", "{}")] * 2
    assert reply.content == "<tool_call>and <tool_call>none</tool_call>"


def test_what_follows_a_call_in_its_own_envelope_is_not_lost() -> None:
    reply = read(HERMES, '<tool_call>{"name": "clock", "arguments": {}, "odd": 1}</tool_call>')
    assert calls(reply) == [("clock", "{}")]
    assert reply.content == ', "odd": 1}</tool_call>'


def test_a_call_that_is_cut_off_has_the_arguments_up_to_there() -> None:
    reply = read(HERMES, '<tool_call>{"name": "get_weather", "arguments": {"city": "Par')
    assert calls(reply) == [("get_weather", '{"city": "Par')]
    assert reply.content == ""


@pytest.mark.parametrize("cut", ["<", "</tool", "</tool_call"])
def test_a_closing_mark_that_is_cut_off_is_no_content(cut: str) -> None:
    reply = read(HERMES, f'<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n{cut}')
    assert (calls(reply), reply.content) == ([("clock", "{}")], "")


def test_arguments_go_out_while_they_are_written() -> None:
    reader = parser(HERMES)
    assert reader.push('So:\n<tool_call>\n{"name": "get_weather", "argu') == [Content("So:")]
    assert reader.push('ments": {"ci') == [CallBegin(0, "c0", "get_weather"), CallArguments(0, '{"ci')]
    assert reader.push('ty": "Rome"') == [CallArguments(0, 'ty": "Rome"')]
    assert reader.push("}}\n</tool_call>") == [CallArguments(0, "}")]
    assert reader.finish() == []


def test_content_goes_out_at_once_unless_it_may_be_a_mark() -> None:
    reader = parser(HERMES)
    reader.push("x")
    assert reader.push("a b") == [Content("a b")]
    assert reader.push(" ") == []
    assert reader.push("c <too") == [Content(" c")]
    assert reader.push("th") == [Content(" <tooth")]


def test_without_tools_and_reasoning_nothing_is_looked_at() -> None:
    assert isinstance(LLAMA3.parser(), PlainParser)
    assert isinstance(HERMES.parser(thinking=False), PlainParser)
    assert read(LLAMA3, "") == Reply("", "", [])


def test_ids_are_what_clients_and_templates_expect() -> None:
    assert HERMES.call_ids.new().startswith("call_")
    identifier = MISTRAL.call_ids.new()
    assert len(identifier) == 9
    assert identifier.isalnum()
    made = MISTRAL.parser([CLOCK]).push('[TOOL_CALLS][{"name": "clock", "arguments": {}}]')
    assert isinstance(made[0], CallBegin)
    assert len(made[0].id) == 9
