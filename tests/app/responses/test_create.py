"""POST /v1/responses, answered at once and as a stream: objects, events, order."""

import threading
from typing import Any

import orjson
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import TypeAdapter

from app.api.responses.schemas import _HARMLESS, _REFUSED, ResponseRequest, Sampling
from app.api.schemas import ChatRequest
from tests.app.responses.conftest import client_of
from tests.app.scripted_pool import refusal, scored, tokens
from tests.app.tiny import IM_END, ids_of, tokenizer
from tests.sse import named_events
from workers.messages import Failed, Output, Started

REPLY = "中国的首都是北京。😀"
_EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream: the numbers have no gap."""
    found = named_events(text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [{**item, "id": ""} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}


def create(http, **body: Any):
    return http.post("/v1/responses", json={"input": "Hello", **body})


def prompt_of(pool, place: int = 0) -> str:
    """What the model was given."""
    return tokenizer().decode(pool.jobs[place].prompt, skip_special_tokens=False)


def test_a_response_is_the_object_that_the_client_knows(http, pool):
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    answer = create(http, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=50, user="u", seed=7)
    assert answer.status_code == 200
    response = Response.model_validate(answer.json, strict=True)
    assert response.output_text == REPLY
    assert response.id.startswith("resp_")
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert message.id.startswith("msg_")
    assert (response.instructions, response.metadata, response.max_output_tokens) == ("Be brief.", {"a": "b"}, 50)
    assert (response.temperature, response.top_p) == (0.2, 0.9)
    assert response.usage.input_tokens == len(pool.jobs[0].prompt)
    assert response.usage.output_tokens == len(ids_of(REPLY)) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert prompt_of(pool).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>")
    assert pool.jobs[0].max_tokens == 50
    assert pool.jobs[0].sampling.seed == 7


def test_a_response_that_ran_out_of_tokens_is_incomplete(http, pool):
    pool.reply = tokens(ids_of(REPLY), reason="length")
    body = create(http).json
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert body["completed_at"] is None
    last = events_of(create(http, stream=True).text)[-1]
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]) == without_ids(body)


def test_an_empty_answer_is_one_empty_message(http, pool):
    pool.reply = tokens([], stop=IM_END)
    (message,) = create(http).json["output"]
    assert message["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


def test_a_stream_tells_every_step_and_ends_with_the_same_response(http, pool):
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    whole = create(http).json
    answer = create(http, stream=True)
    assert answer.content_type == "text/event-stream; charset=utf-8"
    events = events_of(answer.text)
    for event in events:
        _EVENTS.validate_python(event)
    kinds = [event["type"] for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 3
    assert "".join(event["delta"] for event in deltas) == REPLY
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    done = {event["type"]: event for event in events}
    assert done["response.output_text.done"]["text"] == REPLY
    assert done["response.output_item.done"]["item"] == events[-1]["response"]["output"][0]
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    assert http.get(f"/v1/responses/{events[-1]['response']['id']}").json == events[-1]["response"]


def test_the_openai_client_reads_stream_and_answer(app, pool):
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    client = client_of(app)
    assert client.responses.create(model="tiny", input="Hello").output_text == REPLY
    with client.responses.stream(model="tiny", input="Hello") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == REPLY
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert client.responses.retrieve(final.id).output_text == REPLY


def test_log_probabilities_come_with_their_text(http, pool):
    pool.reply = scored(ids_of(REPLY), stop=IM_END)
    body = create(http, include=["message.output_text.logprobs"], top_logprobs=2).json
    Response.model_validate(body, strict=True)
    entries = body["output"][0]["content"][0]["logprobs"]
    assert len(entries) == len(ids_of(REPLY))
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == REPLY
    assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
    events = events_of(create(http, include=["message.output_text.logprobs"], top_logprobs=2, stream=True).text)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries
    assert create(http).json["output"][0]["content"][0]["logprobs"] == []


def test_items_become_the_conversation(http, pool):
    pool.reply = tokens([5], stop=IM_END)
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "A"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "B", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "C"}, {"type": "input_text", "text": "c"}]},
    ]  # fmt: skip
    assert create(http, input=items).status_code == 200
    assert prompt_of(pool) == (
        "<|im_start|>system\nD<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nC\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_schema_holds_the_text(http, pool):
    pool.reply = tokens(ids_of("{}"), stop=IM_END)
    schema = {"type": "object", "properties": {}}
    wanted = {"format": {"type": "json_schema", "name": "empty", "schema": schema, "strict": True}}
    body = create(http, text=wanted).json
    assert orjson.loads(pool.jobs[0].grammar.source) == schema
    assert body["text"] == {**wanted, "verbosity": "medium"}
    Response.model_validate(body, strict=True)
    create(http, text={"format": {"type": "json_object"}})
    assert pool.jobs[1].grammar is not None
    create(http, text={"format": {"type": "text"}})
    assert pool.jobs[2].grammar is None


def test_truncation_drops_the_oldest_messages_and_keeps_the_instructions(http, pool):
    pool.reply = tokens([5], stop=IM_END)
    items = []
    for number in range(40):
        items.append({"role": "user", "content": f"question {number} " + "x y z " * 30})
        items.append({"role": "assistant", "content": f"answer {number}"})
    items.append({"role": "user", "content": "the last one"})
    refused = create(http, input=items, instructions="Stay.", max_output_tokens=10)
    assert (refused.status_code, refused.json["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json["error"]["param"] == "input"
    assert create(http, input=items, instructions="Stay.", max_output_tokens=10, truncation="auto").status_code == 200
    prompt = prompt_of(pool)
    assert prompt.startswith("<|im_start|>system\nStay.<|im_end|>\n<|im_start|>user\nquestion ")
    assert "question 39 " in prompt
    assert "question 0 " not in prompt
    assert len(pool.jobs[0].prompt) > 1500
    alone = create(http, input="x y z " * 2000, truncation="auto")
    assert (alone.status_code, alone.json["error"]["code"]) == (400, "context_length_exceeded")


REFUSALS = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    (
        {"input": [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "input_image"}]}]},
        "input[1].content[0].type",
    ),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input[0].id"),
    ({"input": [{"id": "msg_none"}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
        "tool_choice.tools[0].type",
    ),
    ({"tool_choice": {"type": "allowed_tools", "mode": "x", "tools": []}}, "tool_choice.mode"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"reasoning": {"effort": "lots"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"include": ["message.output_text.logprobs", "x"]}, "include[1]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"temperature": 2.1}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
    ({"truncation": "some"}, "truncation"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: "x"}}, "metadata"),
    ({"metadata": {"k": "x" * 513}}, "metadata"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"background_options": {"completion_window": "8h"}}, "background_options"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
    ({"stream_options": {}}, "stream_options"),
    ({"background": True, "store": False}, "background"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"n": 2}, "n"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages"),
    ({"model": "nobody"}, "model"),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "param"), REFUSALS, ids=[f"{param}-{place}" for place, (_, param) in enumerate(REFUSALS)]
)
def test_what_cannot_be_honoured_is_refused_by_the_clients_own_name(http, pool, given, param):
    for stream in (False,) if param == "stream_options" else (False, True):
        answer = create(http, **{"stream": stream, **given})
        error = answer.json["error"]
        assert answer.status_code in (400, 404), error
        assert error["param"] == param, error
        assert pool.jobs == []


def test_values_that_ask_for_nothing_are_accepted(http, pool):
    pool.reply = tokens([5], stop=IM_END)
    neutral = dict.fromkeys(_REFUSED) | {"n": 1, "context_management": [], "text": {"verbosity": "medium"}}
    neutral |= dict.fromkeys(_HARMLESS, "x") | {"service_tier": "auto", "prompt_cache_options": {"mode": "implicit"}}
    neutral |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {}, "max_tool_calls": 3}
    answer = create(http, **neutral)
    assert answer.status_code == 200, answer.json
    assert "warnings" not in answer.json


def test_unknown_fields_are_warnings(http, pool):
    pool.reply = tokens([5], stop=IM_END)
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x", "colour": 1}], "mood": "fine"}]
    body = create(http, input=items, nonsense=1, text={"font": "x"}).json
    named = {warning.rpartition(" ")[2] for warning in body["warnings"]}
    assert named == {"nonsense", "text.font", "input[0].mood", "input[0].content[0].colour"}
    assert "warnings" not in http.get(f"/v1/responses/{body['id']}").json


def test_every_field_of_the_clients_request_is_known():
    theirs = set(ResponseCreateParamsBase.__annotations__) | {"stream"}
    ours = set(ResponseRequest.model_fields) | set(_REFUSED) | _HARMLESS
    assert theirs - ours == set()


def test_the_extensions_are_those_of_chat():
    ours, chat = (schema.model_json_schema()["properties"] for schema in (ResponseRequest, ChatRequest))
    for name in Sampling.model_fields:
        told = [{key: value for key, value in each[name].items() if key != "description"} for each in (ours, chat)]
        assert told[0] == told[1], name


@pytest.mark.parametrize(
    ("kind", "status"), [("overloaded", 429), ("unavailable", 503), ("internal", 500), ("invalid", 400)]
)
def test_a_refusal_of_the_pool_is_a_status_and_nothing_is_kept(http, pool, kind, status):
    pool.reply = refusal(kind)
    for body in ({}, {"stream": True}, {"background": True}):
        assert create(http, **body).status_code == status


def test_a_grammar_that_cannot_be_used_names_the_clients_field(http, pool):
    pool.reply = refusal("invalid", "the grammar is bad", cause="grammar")
    wanted = {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nonsense"}}}
    assert create(http, text=wanted).json["error"]["param"] == "text.format"


def test_a_fault_in_the_middle_of_a_stream_is_told_and_kept(http, pool):
    begun = threading.Event()

    def breaks(job):
        yield Started(id=job.id)
        yield Output(id=job.id, choice=0, ids=ids_of("Paris"))
        begun.wait(60)
        yield Failed(id=job.id, kind="unavailable", message="gone")

    pool.reply = breaks
    answer = http.post("/v1/responses", json={"input": "Hello", "stream": True})
    assert answer.status_code == 200
    parts = answer.iter_encoded()
    text = next(parts).decode()
    begun.set()
    text += b"".join(parts).decode()
    *_, error, failed = events_of(text)
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert error["message"] == "gone"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert failed["response"]["output"][0]["content"][0]["text"] == "Paris"
    for event in (error, failed):
        _EVENTS.validate_python(event)
    url = f"/v1/responses/{failed['response']['id']}"
    pool.wait(lambda: http.get(url).json["status"] == "failed")
    assert http.get(url).json == failed["response"]


def test_every_extension_reaches_the_model_as_in_chat(http, pool):
    pool.reply = tokens(ids_of("ok"), stop=IM_END)
    fields: dict[str, Any] = {
        "top_k": 5, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "logit_bias": {"5": -100, "6": 2.5}, "seed": 7, "stop": ["x", "y"],
        "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 1, "do_sample": True, "num_beams": 1,
        "guided_regex": "o+k", "chat_template_kwargs": {}, "timeout": 50,
        "guided_json": None, "guided_choice": None, "guided_grammar": None, "length_penalty": None,
        "early_stopping": None,
    }  # fmt: skip
    assert set(fields) == set(Sampling.model_fields)
    assert create(http, **fields).status_code == 200
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}], **fields})
    assert chat.status_code == 200
    ours, theirs = pool.jobs
    assert ours.sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert (ours.sampling, ours.grammar, ours.prompt) == (theirs.sampling, theirs.grammar, theirs.prompt)


@pytest.mark.parametrize("tools", [5, True, "x", {}, None, [], [5]])
def test_allowed_tools_that_are_no_list_are_refused(http, pool, tools):
    pool.reply = refusal("overloaded")
    asked = {"type": "allowed_tools", "mode": "auto", "tools": tools}
    answer = create(http, tool_choice=asked)
    assert answer.status_code == 400
    assert answer.json["error"]["param"].startswith("tool_choice")
