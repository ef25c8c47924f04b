"""/v1/messages of the real server with the real model."""

from typing import Any

import httpx

from tests.app.messages.anthropic_events import events, joined
from tests.e2e.reference import Reference
from tests.e2e.server import Server

QUESTION = "What is the capital of France?"
ASKED: dict[str, Any] = {
    "max_tokens": 24,
    "temperature": 0,
    "repetition_penalty": 1,
    "messages": [{"role": "user", "content": QUESTION}],
}


def post(server: Server, body: dict[str, Any], path: str = "/v1/messages") -> httpx.Response:
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
    response = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    return response


def text_of(message: dict[str, Any]) -> str:
    (block,) = message["content"]
    assert block["type"] == "text"
    return str(block["text"])


def test_the_answer_is_the_references(server: Server, reference: Reference) -> None:
    message = post(server, ASKED).json()
    assert text_of(message) == reference.answer(reference.prompt(QUESTION), 24)
    usage = message["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(reference.prompt(QUESTION))


def test_a_stream_is_the_same_answer(server: Server) -> None:
    whole = post(server, ASKED).json()
    stream = events(post(server, {**ASKED, "stream": True}).text)
    assert sum(name == "content_block_delta" for name, _ in stream) > 3
    message = joined(stream)
    assert text_of(message) == text_of(whole)
    assert message["stop_reason"] == whole["stop_reason"]
    assert message["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_a_stop_sequence_is_told_and_is_no_part_of_the_answer(server: Server) -> None:
    whole = text_of(post(server, ASKED).json())
    word = whole.split()[3]
    message = post(server, {**ASKED, "stop_sequences": ["never", word]}).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", word)
    assert text_of(message) == whole.partition(word)[0]


def test_a_final_message_of_the_assistant_is_continued(server: Server, reference: Reference) -> None:
    begun = "The capital of France is the city of"
    messages = [*ASKED["messages"], {"role": "assistant", "content": begun}]
    message = post(server, {**ASKED, "messages": messages, "max_tokens": 8}).json()
    ids = reference.prompt(QUESTION) + reference.tokenizer(begun, add_special_tokens=False).input_ids
    assert text_of(message) == reference.answer(ids, 8)


def test_tokens_are_counted_as_the_model_reads_them(server: Server, reference: Reference) -> None:
    counted = post(server, {"messages": ASKED["messages"]}, "/v1/messages/count_tokens").json()
    assert counted == {"input_tokens": len(reference.prompt(QUESTION))}


def test_a_schema_is_held_to(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = post(server, {**ASKED, "output_config": form, "max_tokens": 40}).json()
    assert '"Paris"' in text_of(message) or '"Rome"' in text_of(message)
    assert message["stop_reason"] == "end_turn"


WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_a_tool_that_must_be_called_is_called_and_its_result_read(server: Server) -> None:
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    asked = {
        **ASKED,
        "max_tokens": 100,
        "tools": [WEATHER],
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    }
    whole = post(server, {**asked, "tool_choice": choice}).json()
    streamed = joined(events(post(server, {**asked, "tool_choice": choice, "stream": True}).text))
    for message in (whole, streamed):
        (call,) = message["content"]
        assert (call["type"], call["name"]) == ("tool_use", "get_weather")
        assert call["input"]["city"] in ("Paris", "Rome")
        assert message["stop_reason"] == "tool_use"
    assert streamed["content"][0]["input"] == whole["content"][0]["input"]

    result = {"type": "tool_result", "tool_use_id": whole["content"][0]["id"], "content": "Sunny, 20 degrees"}
    messages = [
        *asked["messages"],
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result]},
    ]
    answer = post(server, {**asked, "messages": messages, "tool_choice": {"type": "none"}}).json()
    assert "unny" in text_of(answer)
