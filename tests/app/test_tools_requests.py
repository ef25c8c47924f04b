"""Tools, tool choices and tool messages: what is wrong with them is named before anything is asked of the pool."""

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, tokens
from tests.app.test_request_checks import check_error
from tests.app.test_tools_prompts import prompt_text
from tests.app.tiny import IM_END
from tests.app.tool_models import ASK, CHAT, CLOCK, TEMPLATES, THINKING, WEATHER, serving_template

FORMAT = {"response_format": {"type": "json_object"}}
QUESTION = {"role": "user", "content": "x"}


def function(**changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **changes}}


def called(arguments: Any = "{}", call_id: str = "c1", **changes: Any) -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}, **changes}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(name="a" * 65)]}, "tools[0].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="a\u0000")]}, "tools[0].function.name"),
        ({"tools": [function(name="f\n")]}, "tools[0].function.name"),
        ({"tools": [function(description=7)]}, "tools[0].function.description"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
        ({"tools": [function(parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
        ({"tools": [function(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [function(), function()]}, "tools[1].function.name"),
        ({"tools": [function(name=f"f{place}") for place in range(129)]}, "tools"),
        ({"tools": [function(parameters={"description": "x" * 300_000})]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function", "name": "clock"}}, "tool_choice.function"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "clock"}}, "tools": None},
            "tool_choice.function.name",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [CLOCK]}}},
            "tool_choice.allowed_tools.mode",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function()]}}},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"parallel_tool_calls": 0}, "parallel_tool_calls"),
        ({"tool_choice": "required", **FORMAT}, "response_format"),
        ({"tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"verbosity": "low"}, "verbosity"),
        ({"verbosity": "loud"}, "verbosity"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "very"}, "reasoning_effort"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(each): "" for each in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"user": 7}, "user"),
        ({"service_tier": []}, "service_tier"),
        ({"moderation": {"model": "x"}}, "moderation"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_tool_or_choice_is_named(
    client: FlaskClient, pool: ScriptedPool, changes: dict[str, Any], param: str, stream: bool
) -> None:
    assert check_error(client.post(CHAT, json={**ASK, **changes, "stream": stream}))["param"] == param
    assert pool.jobs == []


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x"}], "[0].tool_call_id"),
        ([QUESTION, called(), {"role": "tool", "content": "x", "tool_call_id": "c2"}], "[2].tool_call_id"),
        ([QUESTION, {"role": "tool", "content": "x", "tool_call_id": "c1"}, called()], "[1].tool_call_id"),
        ([QUESTION, called(), {"role": "tool", "tool_call_id": "c1"}], "[2].content"),
        ([{**QUESTION, "tool_call_id": "c1"}], "[0].tool_call_id"),
        ([{**QUESTION, "tool_calls": called()["tool_calls"]}], "[0].tool_calls"),
        ([{**QUESTION, "reasoning_content": "hm"}], "[0].reasoning_content"),
        ([{"role": "function", "name": "f", "content": "x"}], "[0].name"),
        ([called({})], "[0].tool_calls[0].function.arguments"),
        ([called(DEEP)], "[0].tool_calls[0].function.arguments"),
        ([called(call_id="")], "[0].tool_calls[0].id"),
        ([called(call_id="a\u0000")], "[0].tool_calls[0].id"),
        ([called(type="custom")], "[0].tool_calls[0].type"),
        ([{"role": "assistant"}], "[0].content"),
        ([{**QUESTION, "name": "a\nb"}], "[0].name"),
        ([{**QUESTION, "content": [{"type": "refusal", "refusal": "no"}]}], "[0].content[0].type"),
        ([{**QUESTION, "content": [{"type": "text", "text": "a"}, 7]}], "[0].content[1]"),
        ([{**QUESTION, "content": [{"type": "text", "text": 7}]}], "[0].content[0].text"),
        ([{**QUESTION, "content": [{"type": "input_audio", "input_audio": {}}]}], "[0].content[0].type"),
        ([{**QUESTION, "content": [{"type": "file", "file": {"file_id": "x"}}]}], "[0].content[0].type"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "x"}}], "[0].audio"),
    ],
)
def test_a_bad_message_of_a_tools_loop_is_named(client: FlaskClient, messages: Any, param: str) -> None:
    assert check_error(client.post(CHAT, json={"messages": messages}))["param"] == f"messages{param}"


@pytest.mark.parametrize(
    "changes",
    [
        {"tool_choice": "none", **FORMAT},
        {"tool_choice": None, "parallel_tool_calls": True, "metadata": {"a" * 64: "b" * 512}},
        {"reasoning_effort": "none", "verbosity": "medium", "store": False},
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": None}]},
        {"messages": [{"role": "assistant", "content": None, "refusal": "no", "annotations": []}]},
        {"messages": [QUESTION, called(""), {"role": "tool", "content": [], "tool_call_id": "c1"}]},
    ],
)
def test_what_is_right_is_taken_without_a_warning(
    client: FlaskClient, pool: ScriptedPool, changes: dict[str, Any]
) -> None:
    pool.reply = tokens([], stop=IM_END)
    response = client.post(CHAT, json={**ASK, **changes})
    assert response.status_code == 200, response.text
    assert "X-Tailrace-Warnings" not in response.headers


def test_unknown_fields_of_tools_are_reported(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    tool = {**function(mood=1), "colour": 2}
    choice = {"type": "function", "function": {"name": "f", "x": 1}}
    messages = [{**called(), "why": 1}, {"role": "tool", "tool_call_id": "c1", "content": "x"}]
    answer = client.post(CHAT, json={"messages": messages, "tools": [tool], "tool_choice": choice}).get_json()
    assert {warning.rpartition(" ")[2] for warning in answer["warnings"]} == {
        "tools[0].colour",
        "tools[0].function.mood",
        "tool_choice.function.x",
        "messages[0].why",
    }


@pytest.mark.parametrize("choice", [None, "auto"])
def test_tools_that_may_be_called_and_a_format_are_not_combined(client: FlaskClient, choice: str | None) -> None:
    error = check_error(client.post(CHAT, json={**ASK, **FORMAT, "tool_choice": choice}))
    assert error["param"] == "response_format"


def test_a_reasoning_effort_is_told_in_the_templates_own_words(runtime: Path) -> None:
    knows = TEMPLATES["hermes"] + "{{ reasoning_effort or '' }} {{ verbosity or '' }}"
    for template, effort, end in (
        (THINKING, "none", "<think>\n\n</think>\n\n"),
        (THINKING, "low", "assistant\n"),
        (knows, "low", "assistant\nlow high"),
    ):
        with serving_template(runtime, template) as (client, pool):
            pool.reply = tokens([], stop=IM_END)
            more = {"verbosity": "high"} if template == knows else {}
            response = client.post(CHAT, json={**ASK, "reasoning_effort": effort, **more})
            assert response.status_code == 200, response.text
            assert prompt_text(pool).endswith(end)


def test_a_tool_of_the_limits_is_taken(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    name = "aZ09_-" + "x" * 58
    tool = function(name=name, strict=None, description=None, parameters=None)
    assert client.post(CHAT, json={**ASK, "tools": [WEATHER, tool]}).status_code == 200


def test_an_answer_that_openais_client_has_parsed_is_history_without_news(runtime: Path, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    function = {"name": "clock", "arguments": "{}", "parsed_arguments": {}}
    calls = [{"id": "a", "index": 0, "type": "function", "function": function}]
    answer = {"role": "assistant", "content": None, "refusal": None, "parsed": None, "tool_calls": calls}
    parts = [{"type": "text", "text": "noon", "prompt_cache_breakpoint": {"mode": "explicit"}}]
    messages = [*ASK["messages"], answer, {"role": "tool", "tool_call_id": "a", "content": parts}]
    with application(runtime, strict=True) as app:
        response = app.test_client().post(CHAT, json={"messages": messages, "max_tokens": 1})
    assert response.status_code == 200, response.get_json()


def test_unknown_fields_of_parts_and_allowed_tools_are_named(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "mood": 1}]}]
    allowed = [{"type": "function", "function": {"name": "clock", "tone": 1}, "shade": 1}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    answer = client.post(CHAT, json={**ASK, "messages": messages, "tool_choice": choice}).get_json()
    assert {warning.rpartition(" ")[2] for warning in answer["warnings"]} == {
        "messages[0].content[1].mood",
        "tool_choice.allowed_tools.tools[0].shade",
        "tool_choice.allowed_tools.tools[0].function.tone",
    }
