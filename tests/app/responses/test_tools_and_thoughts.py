"""Function calls and thoughts in responses: items, events, and the conversation that goes on with them."""

import orjson
import pytest
from openai.types.responses import Response

from tests.app.conftest import application
from tests.app.responses.conftest import client_of
from tests.app.responses.test_create import _EVENTS, create, events_of, prompt_of
from tests.app.scripted_pool import ScriptedPool, scored, tokens
from tests.app.tiny import IM_END, SMOLLM2_TEMPLATE, ids_of, write_card

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"type": "function", "name": "clock"}
DEEP = '{"a":' * 65 + "1" + "}" * 65
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture
def thinking(runtime):
    """An application of a model that thinks, and its pool."""
    card = write_card(runtime, chat_template=SMOLLM2_TEMPLATE + "{# <think> </think> #}")
    pool = ScriptedPool(runtime / "pool.sock", card).start()
    with application(runtime) as app:
        yield app.test_client(), pool
        app.close()
    pool.stop()


def kinds(items) -> list[str]:
    return [item["type"] for item in items]


def test_calls_are_items_of_their_own(http, pool):
    pool.reply = tokens(ids_of(f"Let me see. {CALL}\n{CLOCK_CALL}"), stop=IM_END)
    body = create(http, tools=[TOOL, CLOCK]).json
    response = Response.model_validate(body, strict=True)
    assert body["status"] == "completed"
    assert kinds(body["output"]) == ["message", "function_call", "function_call"]
    assert response.output_text.strip() == "Let me see."
    first, second = body["output"][1:]
    assert (first["name"], orjson.loads(first["arguments"]), first["status"]) == (
        "get_weather", {"city": "Paris"}, "completed",
    )  # fmt: skip
    assert (second["name"], second["arguments"]) == ("clock", "{}")
    assert first["id"].startswith("fc_")
    assert first["call_id"] != second["call_id"]
    assert [tool["name"] for tool in body["tools"]] == ["get_weather", "clock"]
    assert "get_weather" in prompt_of(pool)


def test_a_streamed_call_comes_in_deltas_and_adds_up(http, pool):
    pool.reply = tokens(ids_of(CALL), stop=IM_END)
    events = events_of(create(http, tools=[TOOL], stream=True).text)
    for event in events:
        _EVENTS.validate_python(event)
    assert kinds(events)[2:] == [
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * (len(events) - 6),
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    added, *deltas, done, item, last = events[2:]
    assert (added["item"]["name"], added["item"]["arguments"]) == ("get_weather", "")
    assert "".join(delta["delta"] for delta in deltas) == done["arguments"]
    assert orjson.loads(done["arguments"]) == {"city": "Paris"}
    assert item["item"] == last["response"]["output"][0]
    assert added["item"]["call_id"] == item["item"]["call_id"]


def test_a_call_that_is_cut_off_is_incomplete_and_no_part_of_the_conversation(http, pool):
    pool.reply = tokens(ids_of(CALL[:50]), reason="length")
    body = create(http, tools=[TOOL]).json
    assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
    pool.reply = tokens([5], stop=IM_END)
    assert create(http, previous_response_id=body["id"]).status_code == 200


def test_the_output_of_a_call_continues_the_conversation(app, http, pool):
    client = client_of(app)
    pool.reply = tokens(ids_of(CALL), stop=IM_END)
    first = client.responses.create(model="tiny", input="Weather?", tools=[TOOL])
    (call,) = first.output
    pool.reply = tokens(ids_of("It rains."), stop=IM_END)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = client.responses.create(model="tiny", input=[output], previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "It rains."
    by_chain = prompt_of(pool, 1)
    by_hand = [{"role": "user", "content": "Weather?"}, call.model_dump(), output]
    assert "warnings" not in client.responses.create(model="tiny", input=by_hand, tools=[TOOL]).model_extra
    assert prompt_of(pool, 2) == by_chain
    assert '"city": "Paris"' in by_chain
    assert "rain" in by_chain
    listed = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert listed == ["message", "function_call", "function_call_output"]


def test_several_calls_and_words_of_one_turn_are_one_message(http, pool):
    pool.reply = tokens([5], stop=IM_END)
    items = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "W"},
        {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "X"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    assert create(http, input=items, tools=[TOOL, CLOCK]).status_code == 200
    assert prompt_of(pool).count("<|im_start|>assistant\n") == 2


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
def test_a_required_call_is_held_to_its_grammar(http, pool, choice):
    pool.reply = tokens(ids_of(CALL), stop=IM_END)
    body = create(http, tools=[TOOL], tool_choice=choice).json
    assert pool.jobs[0].grammar is not None
    assert body["tool_choice"] == choice
    Response.model_validate(body, strict=True)


def test_without_calls_wanted_a_call_is_text(http, pool):
    pool.reply = tokens(ids_of(CALL), stop=IM_END)
    body = create(http, tools=[TOOL], tool_choice="none").json
    assert kinds(body["output"]) == ["message"]
    assert body["output"][0]["content"][0]["text"] == CALL


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**TOOL, "parameters": 5}]}, "tools[0].parameters"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": DEEP}]},
            "input[0].arguments",
        ),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ],
)
def test_errors_name_the_clients_own_field(http, pool, given, param):
    error = create(http, **given).json["error"]
    assert error["param"] == param, error
    assert "function.name" not in error["message"]
    assert "messages[" not in error["message"]


def test_thoughts_are_an_item_before_the_words(thinking):
    http, pool = thinking
    pool.reply = tokens(ids_of("<think>Paris, clearly.</think>Paris."), stop=IM_END)
    body = create(http).json
    response = Response.model_validate(body, strict=True)
    assert kinds(body["output"]) == ["reasoning", "message"]
    thoughts = body["output"][0]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Paris, clearly."}]
    assert (thoughts["summary"], thoughts["status"]) == ([], "completed")
    assert response.output_text == "Paris."
    counted = response.usage.output_tokens_details.reasoning_tokens
    assert counted == len(ids_of("Paris, clearly."))


def test_streamed_thoughts_come_in_deltas(thinking):
    http, pool = thinking
    pool.reply = scored(ids_of("<think>Paris, clearly.</think>Paris."), stop=IM_END)
    events = events_of(create(http, stream=True, include=["message.output_text.logprobs"]).text)
    for event in events:
        _EVENTS.validate_python(event)
    order = list(dict.fromkeys(f"{event.get('output_index')}:{event['type']}" for event in events))
    assert order[2:] == [
        "0:response.output_item.added",
        "0:response.content_part.added",
        "0:response.reasoning_text.delta",
        "0:response.reasoning_text.done",
        "0:response.content_part.done",
        "0:response.output_item.done",
        "1:response.output_item.added",
        "1:response.content_part.added",
        "1:response.output_text.delta",
        "1:response.output_text.done",
        "1:response.content_part.done",
        "1:response.output_item.done",
        "None:response.completed",
    ]
    said = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in said) == "Paris."
    final = events[-1]["response"]
    assert final["output"][1]["content"][0]["logprobs"] == [entry for event in said for entry in event["logprobs"]]


def test_thoughts_that_a_client_sends_back_are_accepted(thinking):
    http, pool = thinking
    pool.reply = tokens(ids_of("<think>Hm.</think>Paris."), stop=IM_END)
    first = create(http).json
    assert create(http, previous_response_id=first["id"]).status_code == 200
    items = [{"role": "user", "content": "Hello"}, *first["output"], {"role": "user", "content": "Hello"}]
    assert create(http, input=items).status_code == 200
    assert pool.jobs[1].prompt == pool.jobs[2].prompt
