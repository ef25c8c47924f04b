"""Calls in answers: all formats over HTTP, streamed and not; a stream joined is the answer that is not streamed."""

import contextlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from tests.app.conftest import application, runtime_directory
from tests.app.scripted_pool import ScriptedPool, generate_job, scored, tokens
from tests.app.test_request_checks import check_error
from tests.app.tiny import IM_END, ids_of, write_card
from tests.app.tool_models import (
    ALWAYS_THINKING,
    ASK,
    CHAT,
    CLOCK,
    TEMPLATES,
    THINKING,
    WEATHER,
    join,
    saying,
    serving_template,
    without_ids,
)
from tests.sse import data_events
from workers.messages import Event, Failed, GenerateJob, Job

PARIS = '{"city": "Paris"}'
SAID = {
    "hermes": f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "without": f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "llama3": f'{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "clock", "parameters": {{}}}}',
    "mistral": f'Let me see.[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}, '
    '{"name": "clock", "arguments": {}}]',
}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}


def ask(client: FlaskClient, stream: bool, **more: Any) -> list[dict[str, Any]]:
    """The choices of the answer, whichever way it comes."""
    response = client.post(CHAT, json={**ASK, **more, "stream": stream})
    assert response.status_code == 200, response.text
    return join(response.text) if stream else response.get_json()["choices"]


@pytest.mark.parametrize("name", list(SAID))
@pytest.mark.parametrize("stream", [False, True])
def test_calls_come_in_openais_shape(runtime: Path, name: str, stream: bool) -> None:
    with serving_template(runtime, TEMPLATES[name]) as (client, pool):
        pool.reply = tokens(ids_of(SAID[name]), stop=IM_END)
        (choice,) = ask(client, stream)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["role"] == "assistant"
    assert (message["content"] or "").strip() == ("" if name == "llama3" else "Let me see.")
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": PARIS}},
        {"type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ]
    assert len(set(ids)) == 2
    assert all(len(each) == 9 and each.isalnum() if name == "mistral" else each.startswith("call_") for each in ids)


def test_the_first_delta_of_a_call_names_it_and_the_others_are_its_arguments(
    client: FlaskClient, pool: ScriptedPool
) -> None:
    pool.reply = tokens(ids_of(SAID["hermes"]), stop=IM_END)
    chunks = data_events(client.post(CHAT, json={**ASK, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    assert deltas[-1] == {}
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert all(
        len(delta["tool_calls"]) == 1 and set(delta) == {"tool_calls"} for delta in deltas if "tool_calls" in delta
    )
    begins = [call for call in calls if "id" in call]
    assert [call["index"] for call in begins] == [0, 1]
    assert [call["function"] for call in begins] == [
        {"name": "get_weather", "arguments": ""},
        {"name": "clock", "arguments": ""},
    ]
    assert all(first["index"] <= second["index"] for first, second in pairwise(calls))
    assert sum(call["index"] == 0 for call in calls) > 3, "arguments do not go out as they are written"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_nothing_but_calls_has_no_content(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens(ids_of('<tool_call>{"name": "clock", "arguments": {}}</tool_call>'), stop=IM_END)
    (choice,) = ask(client, stream)
    assert choice["message"]["content"] is None


BROKEN = [
    '<tool_call>{"name": "clock", "arguments": [}</tool_call>',
    '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
    "<tool_call>",
    '{"name": "clock", "parameters": {}}',
    "</tool_call> <tool_cal",
    "no call at all",
]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_call_is_content(client: FlaskClient, pool: ScriptedPool, text: str, stream: bool) -> None:
    pool.reply = tokens(ids_of(text), stop=IM_END)
    (choice,) = ask(client, stream)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("more", [{"tools": None}, {"tool_choice": "none"}, {"tools": []}])
@pytest.mark.parametrize("stream", [False, True])
def test_without_tools_markup_is_content(
    client: FlaskClient, pool: ScriptedPool, more: dict[str, Any], stream: bool
) -> None:
    pool.reply = tokens(ids_of(SAID["hermes"]), stop=IM_END)
    (choice,) = ask(client, stream, **more)
    assert choice["message"] == {"role": "assistant", "content": SAID["hermes"], "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_only_allowed_tools_are_called(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens(ids_of('<tool_call>{"name": "get_weather", "arguments": {}}</tool_call>'), stop=IM_END)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CLOCK]}}
    (choice,) = ask(client, stream, tool_choice=allowed)
    assert "tool_calls" not in choice["message"]
    assert "get_weather" in choice["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_ends_with_length(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens(ids_of('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa'), reason="length")
    (choice,) = ask(client, stream)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Pa'}


@pytest.mark.parametrize("name", list(SAID))
@pytest.mark.parametrize(
    ("more", "held"),
    [
        ({}, False),
        ({"tool_choice": "none"}, False),
        ({"tool_choice": "required"}, True),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, True),
        ({"parallel_tool_calls": False}, True),
        ({"tools": [STRICT]}, True),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_asked_of_calls_reaches_the_engine_as_a_grammar(
    runtime: Path, name: str, more: dict[str, Any], held: bool, stream: bool
) -> None:
    with serving_template(runtime, TEMPLATES[name]) as (client, pool):
        pool.reply = tokens(ids_of("x"), stop=IM_END)
        ask(client, stream, **more)
        grammar = generate_job(pool).grammar
    assert (grammar is not None) == held
    if grammar is not None:
        assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar.source)) == ""


def test_a_named_tool_is_called_once(client: FlaskClient, pool: ScriptedPool) -> None:
    def grammar(**more: Any) -> Any:
        pool.reply = tokens(ids_of("x"), stop=IM_END)
        ask(client, False, **more)
        return generate_job(pool).grammar

    name = {"type": "function", "function": {"name": "clock"}}
    only_clock = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [name]}}
    once = grammar(tool_choice=only_clock, parallel_tool_calls=False)
    assert grammar(tool_choice=name) == grammar(tool_choice=name, parallel_tool_calls=True) == once
    assert grammar(tool_choice=only_clock) != once


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_the_engine_refuses_is_named(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    def refuse(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        assert job.grammar is not None
        lines = job.grammar.source.split("\n")
        (line,) = [place for place, text in enumerate(lines, 1) if '"bad"' in text]
        return [Failed(id=job.id, kind="invalid", message="no such thing", cause="grammar", line=line)]

    pool.reply = refuse
    bad = {"type": "function", "function": {"name": "b", "parameters": {"properties": {"x": {"pattern": "bad"}}}}}
    body = {**ASK, "tools": [WEATHER, bad], "tool_choice": "required", "stream": stream}
    assert check_error(client.post(CHAT, json=body))["param"] == "tools[1].function.parameters"


def test_a_chat_without_tools_and_reasoning_is_not_looked_at(
    client: FlaskClient, pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.chat.ReplyDeltas", None)
    pool.reply = tokens(ids_of("Hello"), stop=IM_END)
    (choice,) = ask(client, True, tools=None)
    assert choice["message"]["content"] == "Hello"


# --- scores


@pytest.mark.parametrize("name", list(SAID))
@pytest.mark.parametrize("per_event", [1, 3])
def test_each_token_has_its_score_once(runtime: Path, name: str, per_event: int) -> None:
    ids = ids_of(SAID[name])
    with serving_template(runtime, TEMPLATES[name]) as (client, pool):
        pool.reply = scored(ids, stop=IM_END, per_event=per_event)
        body = {"logprobs": True, "top_logprobs": 2}
        (whole,), (joined,) = without_ids(ask(client, False, **body)), without_ids(ask(client, True, **body))
    assert joined == whole
    assert [-entry["logprob"] - 1 for entry in whole["logprobs"]["content"]] == list(range(len(ids)))
    assert len(whole["message"]["tool_calls"]) == 2


# --- any cut

FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "clock", "arguments": {}}',
    '{"name": "get_weather", "arguments": {"city": "\\"😀"}}',
    '{"name": "get_weather", "parameters": {"city": "x"}}',
    "[TOOL_CALLS][",
    "]",
    "\n",
    "好 text ",
    '{"name":',
    "; ",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> list[list[int]]:
    """A text in groups of tokens."""
    text = draw(TEXTS)
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[first:last] for first, last in pairwise([0, *places, len(text)])]
    return [ids_of(piece) for piece in pieces if piece]


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "thinking", "always"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stream_joined_is_the_whole_answer(name: str, data: st.DataObject) -> None:
    template = {**TEMPLATES, "thinking": THINKING, "always": ALWAYS_THINKING}[name]
    client, pool = _models(template)
    choices = [data.draw(cut_texts()) for _ in range(data.draw(st.integers(1, 3)))]
    reason = data.draw(st.sampled_from(["stop", "length"]))
    pool.reply = saying(*choices, reason=reason)
    more = {"n": len(choices), "stop": data.draw(st.sampled_from([[], ["text"], ["</tool"]]))}
    whole = without_ids(ask(client, False, **more))
    assert without_ids(ask(client, True, **more)) == whole
    for choice in whole:
        made = "tool_calls" in choice["message"]
        assert made or choice["message"]["content"] is None or choice["finish_reason"] in ("stop", "length")
        assert (choice["finish_reason"] == "tool_calls") <= made


_RUNNING: dict[str, tuple[FlaskClient, ScriptedPool]] = {}


def _models(template: str) -> tuple[FlaskClient, ScriptedPool]:
    return _RUNNING[template]


@pytest.fixture(scope="module", autouse=True)
def running_models() -> Any:
    """One application for each template, for all examples."""
    with contextlib.ExitStack() as stack:
        for template in (*TEMPLATES.values(), THINKING, ALWAYS_THINKING):
            folder = stack.enter_context(runtime_directory())
            pool = ScriptedPool(folder / "pool.sock", write_card(folder, chat_template=template)).start()
            stack.callback(pool.stop)
            _RUNNING[template] = stack.enter_context(application(folder)).test_client(), pool
        yield
    _RUNNING.clear()


def test_ids_of_a_stream_are_those_of_what_is_kept(runtime: Path, tmp_path: Path) -> None:
    with serving_template(runtime, TEMPLATES["hermes"], state_dir=tmp_path) as (client, pool):
        pool.reply = tokens(ids_of(SAID["hermes"]), stop=IM_END)
        chunks = client.post(CHAT, json={**ASK, "stream": True, "store": True})
        (streamed,) = join(chunks.text)
        (kept,) = client.get(f"{CHAT}/{data_events(chunks.text)[0]['id']}").get_json()["choices"]
    assert kept["message"]["tool_calls"] == streamed["message"]["tool_calls"]
    assert json.loads(kept["message"]["tool_calls"][0]["function"]["arguments"]) == json.loads(PARIS)
