"""Tools, results and thoughts through /v1/messages, with a scripted pool behind the application."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from flask.testing import FlaskClient

from app.api.messages.answer import parsed_arguments
from tests.app.conftest import application
from tests.app.messages.anthropic_events import events, joined
from tests.app.scripted_pool import ScriptedPool, generate_job, prompt_text, tokens
from tests.app.tiny import IM_END, ids_of, write_card

URL = "/v1/messages"
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}
ASKED: dict[str, Any] = {
    "max_tokens": 500,
    "tools": [WEATHER, CLOCK],
    "messages": [{"role": "user", "content": "Weather in Paris?"}],
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

# Writes tools, calls and results as they are given, and thoughts between marks.
TEMPLATE = """\
{%- for tool in tools or [] %}TOOL {{ tool | tojson }}
{% endfor %}
{%- for message in messages %}[{{ message.role }}]
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{% endfor %}
{%- if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- endif %}{% endif %}"""


@pytest.fixture
def thinker(runtime: Path) -> Iterator[tuple[FlaskClient, ScriptedPool]]:
    """A model with tools and reasoning."""
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, chat_template=TEMPLATE)).start()
    with application(runtime) as app:
        yield app.test_client(), pool
    pool.stop()


def answers(client: FlaskClient, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, after having seen that a stream is the same but for the ids."""
    found = []
    for stream in (False, True):
        response = client.post(URL, json={**body, "stream": stream})
        assert response.status_code == 200, response.text
        found.append(joined(events(response.text)) if stream else response.get_json())
    for message in found:
        del message["id"]
        for block in message["content"]:
            if "id" in block:
                assert len(block.pop("id")) > 8
    whole, streamed = found
    assert streamed == whole
    return dict(whole)


def test_calls_are_blocks_with_their_input(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(
        ids_of(f"Let me look.\n{CALL}\n" + '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'), stop=IM_END
    )
    message = answers(client, ASKED)
    assert message["stop_reason"] == "tool_use"
    look, weather, clock = message["content"]
    assert look["type"] == "text"
    assert look["text"].strip() == "Let me look."
    assert weather == {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    assert clock == {"type": "tool_use", "name": "clock", "input": {}}


def test_a_call_that_was_cut_off_has_the_input_up_to_there(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(
        ids_of('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days'), reason="length"
    )
    response = client.post(URL, json=ASKED)
    message = response.get_json()
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"city": "Paris"}


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ('{"a": NaN}', {"unparsed": '{"a": NaN}'}),
        ('{"a": "\\ud800"}', {"unparsed": '{"a": "\\ud800"}'}),
        ('{"a": ' * 300 + "1" + "}" * 300, {"unparsed": '{"a": ' * 300 + "1" + "}" * 300}),
    ],
)
def test_arguments_that_an_encoder_would_stumble_over(arguments: str, parsed: Any) -> None:
    made = orjson.dumps({"input": parsed_arguments(arguments)})
    assert json.loads(made)["input"] == parsed


def test_results_go_back_to_the_model(thinker: tuple[FlaskClient, ScriptedPool]) -> None:
    client, pool = thinker
    pool.reply = tokens(ids_of("Sunny."), stop=IM_END)
    call = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "北京"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "5 °C"}]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no clock", "is_error": True}
    body = {
        **ASKED,
        "messages": [
            *ASKED["messages"],
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "text", "text": "I look."},
                    call,
                    {"type": "tool_use", "id": "toolu_2", "name": "clock", "input": {}},
                ],
            },
            {"role": "user", "content": [result, failed, {"type": "text", "text": "And?"}]},
        ],
    }
    assert client.post(URL, json=body).status_code == 200
    text = prompt_text(pool)
    assert '"name": "get_weather"' in text.partition("[user]")[0]
    assert "<think>Hm.</think>I look." in text
    assert '"city": "北京"' in text
    assert text.endswith("[tool]5 °C[tool]Error: no clock[user]And?[assistant]")


@pytest.mark.parametrize("kind", ["any", "tool"])
def test_a_call_that_must_be_made_is_held_to_a_grammar(client: FlaskClient, pool: ScriptedPool, kind: str) -> None:
    pool.reply = tokens(ids_of(CALL), stop=IM_END)
    choice = {"type": kind, "name": "get_weather"} if kind == "tool" else {"type": kind}
    answers(client, {**ASKED, "tool_choice": choice})
    grammar = generate_job(pool).grammar
    assert grammar is not None
    assert "get_weather" in grammar.source
    assert ("clock" in grammar.source) == (kind == "any")


@pytest.mark.parametrize(
    ("choice", "held", "told"),
    [
        ({"type": "auto"}, False, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True, True),
        ({"type": "none"}, False, False),
    ],
)
def test_tools_may_be_called_or_not(
    client: FlaskClient, pool: ScriptedPool, choice: dict[str, Any], held: bool, told: bool
) -> None:
    pool.reply = tokens(ids_of("No."), stop=IM_END)
    assert answers(client, {**ASKED, "tool_choice": choice})["stop_reason"] == "end_turn"
    assert (generate_job(pool).grammar is not None) == held
    assert ("get_weather" in prompt_text(pool)) == told


def test_tools_count_as_tokens(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    client.post(URL, json=ASKED)
    body = {name: value for name, value in ASKED.items() if name != "max_tokens"}
    counted = client.post(f"{URL}/count_tokens", json=body).get_json()["input_tokens"]
    assert counted == len(generate_job(pool).prompt)
    assert client.post(f"{URL}/count_tokens", json={**body, "tools": []}).get_json()["input_tokens"] < counted


def test_thoughts_are_a_block_before_the_answer(thinker: tuple[FlaskClient, ScriptedPool]) -> None:
    client, pool = thinker
    pool.reply = tokens(ids_of(f"<think>\nI should look.\n</think>\n\n{CALL}"), stop=IM_END)
    message = answers(client, ASKED)
    thinking, call = message["content"]
    assert thinking["type"] == "thinking"
    assert thinking["thinking"].strip() == "I should look."
    assert thinking["signature"] == ""
    assert call["input"] == {"city": "Paris"}
    assert 0 < message["usage"]["output_tokens_details"]["thinking_tokens"] < message["usage"]["output_tokens"]


def test_thoughts_can_be_omitted(thinker: tuple[FlaskClient, ScriptedPool]) -> None:
    client, pool = thinker
    pool.reply = tokens(ids_of("<think>Secret.</think>Yes."), stop=IM_END)
    message = answers(client, {**ASKED, "thinking": {"type": "adaptive", "display": "omitted"}})
    assert message["content"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]
    assert "Secret" not in json.dumps(message)


@pytest.mark.parametrize(
    ("thinking", "ending"),
    [
        ({"type": "disabled"}, "[assistant]<think></think>"),
        ({"type": "enabled", "budget_tokens": 1024}, "[assistant]"),
        ({"type": "adaptive"}, "[assistant]"),
    ],
)
def test_thinking_is_up_to_the_template(
    thinker: tuple[FlaskClient, ScriptedPool], thinking: dict[str, Any], ending: str
) -> None:
    client, pool = thinker
    pool.reply = tokens(ids_of("Yes."), stop=IM_END)
    response = client.post(URL, json={**ASKED, "max_tokens": 1025, "thinking": thinking})
    assert response.status_code == 200, response.text
    assert prompt_text(pool).endswith(ending)
    assert "no effect" not in response.headers.get("X-Tailrace-Warnings", "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tools": [{**WEATHER, "input_schema": {"type": 5}, "strict": True}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "x" * 129}]}, "tools[0].name"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"messages": [*ASKED["messages"], {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
         "messages[1].content[0].tool_use_id"),
    ],
)  # fmt: skip
def test_what_the_road_behind_refuses_is_named_as_the_client_wrote_it(
    client: FlaskClient, pool: ScriptedPool, change: dict[str, Any], named: str
) -> None:
    response = client.post(URL, json={**ASKED, **change})
    assert response.status_code == 400, response.text
    assert named in response.get_json()["error"]["message"]
    assert pool.jobs == []


def test_names_of_tools_may_have_128_characters(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    for length, status in ((128, 200), (129, 400)):
        name = "x" * length
        body = {
            "max_tokens": 9,
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": name, "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "y"}]},
            ],
            "tools": [{"name": name, "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": name},
        }
        assert client.post("/v1/messages", json=body).status_code == status, length
    tool = {"type": "function", "function": {"name": "x" * 65}}
    assert client.post("/v1/chat/completions", json={"messages": "x", "tools": [tool]}).status_code == 400
