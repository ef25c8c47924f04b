"""Reasoning: told apart from the answer, counted, turned on and off, and kept out of grammars."""

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from llguidance import LLMatcher

from tests.app.scripted_pool import generate_job, tokens
from tests.app.test_request_checks import check_error
from tests.app.test_tools_prompts import prompt_text
from tests.app.tiny import IM_END, ids_of
from tests.app.tool_models import ALWAYS_THINKING, ASK, CHAT, TEMPLATES, THINKING, join, serving_template
from tests.sse import data_events

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "1 + 1?"}]}
CALL = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


def ask(client: FlaskClient, stream: bool, **more: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={**QUESTION, **more, "stream": stream})
    assert response.status_code == 200, response.text
    (choice,) = join(response.text) if stream else response.get_json()["choices"]
    return choice  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("template", "text", "reasoning", "content"),
    [
        (THINKING, "<think>\nI count: 好.\n</think>\n\nTwo 😀", "I count: 好.", "Two 😀"),
        (THINKING, "Two", None, "Two"),
        (THINKING, "<think>without end", "without end", None),
        (THINKING, "Two <think>x</think>", None, "Two <think>x</think>"),
        (ALWAYS_THINKING, "I count.\n</think>\n\nTwo", "I count.", "Two"),
        (ALWAYS_THINKING, "I count", "I count", None),
        (TEMPLATES["without"], "<think>x</think>y", None, "<think>x</think>y"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(
    runtime: Path, template: str, text: str, reasoning: str | None, content: str | None, stream: bool
) -> None:
    with serving_template(runtime, template) as (client, pool):
        pool.reply = tokens(ids_of(text), stop=IM_END)
        message = ask(client, stream)["message"]
    assert message.get("reasoning_content") == reasoning
    assert message["content"] == content


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_comes_behind_the_reasoning(runtime: Path, stream: bool) -> None:
    with serving_template(runtime, THINKING) as (client, pool):
        pool.reply = tokens(ids_of(f"<think>{CALL}</think>{CALL}"), stop=IM_END)
        choice = ask(client, stream, tools=ASK["tools"])
    assert choice["message"]["reasoning_content"] == CALL
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


def test_reasoning_that_is_turned_off_is_not_looked_for(runtime: Path) -> None:
    text = "<think>x</think>y"
    with serving_template(runtime, THINKING) as (client, pool):
        pool.reply = tokens(ids_of(text), stop=IM_END)
        for more in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            assert ask(client, False, **more)["message"] == {"role": "assistant", "content": text, "refusal": None}
            assert prompt_text(pool).endswith("</think>\n\n")
        # What the client says of the template itself goes before.
        more = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
        assert ask(client, False, **more)["message"]["content"] == "y"


def test_reasoning_that_cannot_be_turned_off_is_not_promised_to_be(runtime: Path) -> None:
    with serving_template(runtime, ALWAYS_THINKING) as (client, _):
        response = client.post(CHAT, json={**QUESTION, "reasoning_effort": "none"})
    assert check_error(response)["param"] == "reasoning_effort"


@pytest.mark.parametrize("stream", [False, True])
def test_the_usage_counts_what_was_reasoning(runtime: Path, stream: bool) -> None:
    with serving_template(runtime, THINKING) as (client, pool):
        pool.reply = tokens(ids_of("<think>I count to two.</think>Two"), stop=IM_END)
        body = {**QUESTION, "n": 2, "stream": stream, "stream_options": {"include_usage": True} if stream else None}
        response = client.post(CHAT, json=body)
        usage = data_events(response.text)[-1]["usage"] if stream else response.get_json()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * len(ids_of("I count to two."))}
    assert usage["completion_tokens"] > usage["completion_tokens_details"]["reasoning_tokens"]


@pytest.mark.parametrize(
    "more",
    [
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "[a-z]+"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'start: "yes"'},
    ],
)
@pytest.mark.parametrize("template", [THINKING, ALWAYS_THINKING])
def test_a_form_is_that_of_the_answer_behind_the_reasoning(runtime: Path, template: str, more: dict[str, Any]) -> None:
    with serving_template(runtime, template) as (client, pool):
        pool.reply = tokens(ids_of("x"), stop=IM_END)
        ask(client, False, **more)
        grammar = generate_job(pool).grammar
        assert grammar is not None
        assert grammar.kind == "lark"
        assert "think" in grammar.source
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar.source)) == ""
        if template == THINKING:
            ask(client, False, reasoning_effort="none", **more)
            closed = generate_job(pool).grammar
            assert closed is not None
            assert "think" not in closed.source


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_that_goes_on_is_no_reasoning(runtime: Path, stream: bool) -> None:
    messages = [*QUESTION["messages"], {"role": "assistant", "content": "It is"}]
    with serving_template(runtime, THINKING) as (client, pool):
        pool.reply = tokens(ids_of(" two <think>"), stop=IM_END)
        choice = ask(client, stream, messages=messages, continue_final_message=True)
    assert choice["message"]["content"] == " two <think>"
