"""POST /v1/messages through the application in this process, with a scripted pool behind it."""

import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from app.api.messages import routes
from app.api.messages.request import CountTokensRequest
from app.api.schemas import ChatRequest
from tests.app.conftest import Server, application
from tests.app.messages.anthropic_events import events, joined
from tests.app.raw_http import RawClient
from tests.app.scripted_pool import ScriptedPool, generate_job, prompt_text, refusal, tokens
from tests.app.tiny import IM_END, ids_of
from workers.messages import Event, Failed, Job, Output, Started

URL = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HELLO: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello"}]}
REPLY = "你好，world 😀!"


def without_id(message: dict[str, Any]) -> dict[str, Any]:
    assert message.pop("id").startswith("msg_")
    return message


def test_answers_in_the_shape_of_anthropic(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)

    response = client.post(URL, json={**HELLO, "model": "tiny"}, headers={"anthropic-version": "2023-06-01"})

    assert response.status_code == 200, response.text
    assert response.headers["request-id"] == response.headers["X-Request-Id"]
    job = generate_job(pool)
    assert job.max_tokens == 100
    assert without_id(response.get_json()) == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": REPLY}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(job.prompt),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": len(ids_of(REPLY)) + 1,
        },
    }


def test_input_tokens_are_those_that_the_cache_did_not_have(client: FlaskClient, pool: ScriptedPool) -> None:
    def reply(job: Job) -> list[Event]:
        return [Started(id=job.id, cached_tokens=3), Output(id=job.id, choice=0, finish_reason="length")]

    pool.reply = reply
    usage = client.post(URL, json=HELLO).get_json()["usage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] == len(generate_job(pool).prompt) - 3


def test_a_stream_is_the_same_message_in_events(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    whole = without_id(client.post(URL, json=HELLO).get_json())

    response = client.post(URL, json={**HELLO, "stream": True})

    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["request-id"] == response.headers["X-Request-Id"]
    stream = events(response.text)
    assert sum(name == "content_block_delta" for name, _ in stream) > 3
    assert stream[0][1]["message"]["usage"]["input_tokens"] == len(generate_job(pool).prompt)
    assert without_id(joined(stream)) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_text_has_no_blocks(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens([], stop=IM_END)
    response = client.post(URL, json={**HELLO, "stream": stream})
    message = joined(events(response.text)) if stream else response.get_json()
    assert message["content"] == []
    assert message["stop_reason"] == "end_turn"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "extra", "reason", "sequence", "text"),
    [
        (tokens(ids_of("one two"), reason="length"), {}, "max_tokens", None, "one two"),
        (tokens(ids_of("one two 3"), stop=IM_END), {"stop_sequences": ["zzz", "two"]}, "stop_sequence", "two", "one "),
        (tokens(ids_of("one two"), stop=IM_END), {"stop_sequences": ["zzz"]}, "end_turn", None, "one two"),
    ],
)
def test_why_it_ended(
    client: FlaskClient,
    pool: ScriptedPool,
    reply: Any,
    extra: dict[str, Any],
    reason: str,
    sequence: str | None,
    text: str,
    stream: bool,
) -> None:
    pool.reply = reply
    response = client.post(URL, json={**HELLO, **extra, "stream": stream})
    message = joined(events(response.text)) if stream else response.get_json()
    assert message["stop_reason"] == reason
    assert message["stop_sequence"] == sequence
    assert message["content"] == [{"type": "text", "text": text}]


def test_the_prompt_is_the_conversation_in_the_models_template(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "如何"}, {"type": "text", "text": "制作"}]},
            {"role": "user", "content": "网站？"},
            {"role": "assistant", "content": [{"type": "text", "text": "First, "}, {"type": "text", "text": "buy"}]},
            {"role": "user", "content": "?"},
        ],
    }
    response = client.post(URL, json=body)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.get_json()
    assert prompt_text(pool) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n如何\n制作\n网站？<|im_end|>\n"
        "<|im_start|>assistant\nFirst, buy<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_answer_goes_on_with_a_final_message_of_the_assistant(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(" Paris."), stop=IM_END)
    messages = [{"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "The capital is"}]
    message = client.post(URL, json={"max_tokens": 9, "messages": messages}).get_json()
    assert prompt_text(pool).endswith("<|im_start|>assistant\nThe capital is")
    assert message["content"] == [{"type": "text", "text": " Paris."}]


def test_sampling_fields_reach_the_engine(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {**HELLO, "temperature": 0.75, "top_p": 0.5, "top_k": 7, "seed": 11, "min_p": 0.25}
    body["repetition_penalty"] = 1.5
    assert client.post(URL, json=body).status_code == 200
    sampling = generate_job(pool).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.75, 0.5, 7, 11)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_form_of_the_answer_is_a_grammar(client: FlaskClient, pool: ScriptedPool, field: str) -> None:
    pool.reply = tokens(ids_of("{}"), stop=IM_END)
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    given = {"output_config": {"format": form}} if field == "output_config" else {"output_format": form}
    assert client.post(URL, json={**HELLO, **given}).status_code == 200
    grammar = generate_job(pool).grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    assert '"integer"' in grammar.source


def test_a_schema_that_the_engine_refuses_is_named_as_the_client_wrote_it(
    client: FlaskClient, pool: ScriptedPool
) -> None:
    pool.reply = lambda job: [Failed(id=job.id, kind="invalid", message="the grammar cannot be used", cause="grammar")]
    form = {"type": "json_schema", "schema": {"type": "object"}}
    response = client.post(URL, json={**HELLO, "output_config": {"format": form}})
    assert response.status_code == 400
    assert response.get_json()["error"]["message"].startswith("output_config.format.schema: ")


def test_harmless_fields_are_taken_without_a_warning(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {
        **HELLO,
        "metadata": {"user_id": "7"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "container": None,
        "context_management": {"edits": []},
        "mcp_servers": [],
        "speed": "standard",
    }
    response = client.post(URL, json=body)
    assert response.status_code == 200
    assert "warnings" not in response.get_json()


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_and_budgets_are_warned_of(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {
        **HELLO,
        "max_tokens": 1100,
        "stream": stream,
        "frobnicate": 1,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "colour": "red"}]}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    response = client.post(URL, json=body)
    message = events(response.text)[0][1]["message"] if stream else response.get_json()
    assert message["warnings"] == [
        "Unknown field, ignored: frobnicate",
        "Unknown field, ignored: messages[0].content[0].colour",
        "thinking.budget_tokens is no limit here; max_tokens is.",
        "thinking has no effect: this model has no thoughts.",
    ]
    assert "budget_tokens" in response.headers["X-Tailrace-Warnings"]


def test_strict_makes_an_unknown_field_an_error(runtime: Path, pool: ScriptedPool) -> None:
    with application(runtime, strict=True) as app:
        response = app.test_client().post(URL, json={**HELLO, "frobnicate": 1})
    assert response.status_code == 400
    assert response.get_json()["error"]["message"] == "Unknown field: frobnicate."


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
TOOL = {"name": "a", "input_schema": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a"}
PREFILLED = [{"role": "assistant", "content": "x"}]
FORM = {"type": "json_schema", "schema": {}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (user("text"), "messages[0].content[0]"),
        (user({"text": "x"}), "messages[0].content[0].type"),
        (user({"type": "text"}), "messages[0].content[0].text"),
        (user({"type": "text", "text": "x"}, IMAGE), "messages[0].content[1].type: this server does not read"),
        (user({"type": "document", "source": {}}), "messages[0].content[0].type"),
        (user({"type": "text", "text": "x", "citations": [{}]}), "messages[0].content[0].citations"),
        (user({"type": "tool_use", "id": "a", "name": "b", "input": {}}), "messages[0].content[0].type"),
        (user(RESULT), "messages[0].content[0].tool_use_id"),
        (user(RESULT | {"content": [IMAGE]}), "messages[0].content[0].content[0].type"),
        (user({"type": "redacted_thinking", "data": "x"}), "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4096}] * 5}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["很" * 1025]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0].type: this server has no tools of its"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "a", "input_schema": {}}] * 2}, "tools[1].name"),
        ({"tools": [{"name": "a", "input_schema": {}, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "b"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"context_management": {"edits": [{}]}}, "context_management"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"speed": "fast"}, "speed"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": FORM}, "output_format": FORM}, "output_format"),
        ({"output_config": {"format": FORM}, "messages": PREFILLED}, "output_config.format"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"max_tokens": 5000}, "max_tokens"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(client: FlaskClient, pool: ScriptedPool, change: dict[str, Any], named: str) -> None:
    body = {name: value for name, value in {**HELLO, **change}.items() if value is not None}
    response = client.post(URL, json=body)
    assert response.status_code == 400, response.text
    answer = response.get_json()
    assert set(answer) == {"type", "error", "request_id"}
    assert answer["type"] == "error"
    assert answer["request_id"] == response.headers["request-id"] == response.headers["X-Request-Id"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert re.search(rf"(^|[ .]){re.escape(named)}([ .:]|$)", answer["error"]["message"]), answer
    assert pool.jobs == []


def test_errors_have_anthropics_types(client: FlaskClient, pool: ScriptedPool) -> None:
    def kind(status: int, response: Any) -> str:
        assert response.status_code == status, response.text
        assert response.headers["request-id"]
        assert response.get_json()["type"] == "error"
        return str(response.get_json()["error"]["type"])

    assert kind(404, client.post(URL, json={**HELLO, "model": "nobody"})) == "not_found_error"
    assert kind(404, client.post("/v1/messages/batches", json={})) == "not_found_error"
    wrong_method = client.get(URL)
    assert kind(405, wrong_method) == "invalid_request_error"
    assert "POST" in wrong_method.headers["Allow"]
    assert kind(400, client.post(URL, data=b"{", content_type="application/json")) == "invalid_request_error"
    assert kind(415, client.post(URL, data=b"{}", content_type="text/plain")) == "invalid_request_error"
    too_large = client.post(URL, data=b" " * (9 * 2**20), content_type="application/json")
    assert kind(413, too_large) == "request_too_large"
    pool.reply = refusal("overloaded", retry_after=3)
    busy = client.post(URL, json=HELLO)
    assert kind(429, busy) == "rate_limit_error"
    assert busy.headers["Retry-After"] == "3"
    pool.reply = refusal("unavailable")
    assert kind(503, client.post(URL, json={**HELLO, "stream": True})) == "overloaded_error"
    pool.reply = refusal("internal", "secret")
    response = client.post(URL, json=HELLO)
    assert kind(500, response) == "api_error"
    assert client.get("/v1/messagesque").get_json()["error"]["param"] is None


def test_a_fault_in_a_stream_is_an_error_event_and_the_end(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, choice=0, ids=ids_of("Hello"))]
    response = client.post(URL, json={**HELLO, "stream": True})
    parts = response.iter_encoded()
    text = next(parts).decode() + next(parts).decode()
    pool.send(Failed(id=pool.jobs[0].id, kind="unavailable", message="its worker died"))
    # The connection is cut behind it, which this client has none of.
    text += next(parts).decode()
    response.close()

    stream = events(text)
    assert [name for name, _ in stream] == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert stream[-1][1]["error"] == {"type": "overloaded_error", "message": "its worker died"}
    assert stream[-1][1]["request_id"] == response.headers["request-id"]


def test_a_wrong_key_and_a_limit_have_anthropics_shape_too(runtime: Path, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    key = "k" * 32
    with application(runtime, api_key=[f"alice={key}"], key_requests_per_minute=1) as app:
        client = app.test_client()
        for headers in ({}, {"x-api-key": "wrong"}, {"Authorization": "Bearer wrong"}):
            refused = client.post(URL, json=HELLO, headers=headers)
            assert refused.status_code == 401
            assert refused.get_json()["error"]["type"] == "authentication_error"
            assert refused.get_json()["request_id"] == refused.headers["request-id"] == refused.headers["X-Request-Id"]
            assert refused.headers["WWW-Authenticate"]
        assert client.post(URL, json=HELLO, headers={"x-api-key": key}).status_code == 200
        limited = client.post(URL, json=HELLO, headers={"x-api-key": key})
        assert limited.status_code == 429
        assert limited.get_json()["error"]["type"] == "rate_limit_error"
        assert int(limited.headers["Retry-After"]) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_message(server: Server, stream: bool) -> None:
    client = RawClient(server.port)
    client.post(URL, {**HELLO, "stream": stream})
    job = server.pool.next_job()
    client.leave()
    server.pool.wait(lambda: server.pool.is_cancelled(job.id))


def test_comments_keep_a_silent_stream_alive(server: Server) -> None:
    client = RawClient(server.port)
    client.post(URL, {**HELLO, "stream": True})
    client.read_until(b"event: message_start")
    client.read_until(b": keep-alive")
    client.leave()


def test_counts_the_tokens_that_the_model_would_read(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    conversation = {"system": "Be brief.", "messages": HELLO["messages"]}
    client.post(URL, json={"max_tokens": 5, **conversation})
    response = client.post(COUNT, json={"model": "tiny", **conversation})
    assert response.status_code == 200
    assert response.get_json() == {"input_tokens": len(generate_job(pool).prompt)}
    assert len(pool.jobs) == 1
    assert client.post(COUNT, json={"messages": []}).get_json()["type"] == "error"


def test_a_long_body_without_a_length_is_translated_off_the_hub(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    original = routes.chat_request

    def noted(body: CountTokensRequest) -> ChatRequest:
        threads.append(threading.get_ident())
        return original(body)

    monkeypatch.setattr(routes, "chat_request", noted)
    content = json.dumps({"messages": [{"role": "user", "content": "x"}] * 300}).encode()
    response = client.post(
        COUNT,
        input_stream=io.BytesIO(content),
        content_type="application/json",
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert response.status_code in (200, 400), response.text
    assert threads
    assert threading.get_ident() not in threads
