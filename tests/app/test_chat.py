"""Chat completions through the application in this process, with a scripted pool behind it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, generate_job, refusal, tokens
from tests.app.tiny import IM_END, ids_of, tokenizer, write_card
from tests.sse import data_events
from workers.messages import Event, Job, Output, Started

URL = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
REPLY = "你好，world 😀!"


def test_answers_in_the_shape_of_openai(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)

    response = client.post(URL, json=HELLO)

    assert response.status_code == 200, response.text
    answer = response.get_json()
    job = generate_job(pool)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": len(ids_of(REPLY)) + 1,
        "total_tokens": len(job.prompt) + len(ids_of(REPLY)) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_prompt_is_the_conversation_in_the_models_template(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "如何"}, {"type": "text", "text": "制作"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "?"},
    ]
    assert client.post(URL, json={"messages": messages}).status_code == 200
    assert tokenizer().decode(generate_job(pool).prompt, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n如何\n制作<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_may_be_a_string(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    assert client.post(URL, json={"messages": "Hello"}).status_code == 200
    assert client.post(URL, json=HELLO).status_code == 200
    first, second = pool.jobs
    assert first.prompt == second.prompt


def test_a_stream_is_the_same_answer_in_pieces(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(REPLY), stop=IM_END)

    response = client.post(URL, json={**HELLO, "stream": True})

    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    chunks = data_events(response.text)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(delta.get("content", "") for delta in deltas) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert deltas[-1] == {}
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_tells_its_usage_when_asked(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of(REPLY), reason="length")
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    chunks = data_events(client.post(URL, json=body).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(ids_of(REPLY))
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_have_their_own_text(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    def reply(job: Job) -> list[Event]:
        ends = [
            Output(id=job.id, choice=choice, ids=ids_of(f"choice {choice}"), finish_reason="length")
            for choice in (2, 0, 1)
        ]
        return [Started(id=job.id, cached_tokens=3), *ends]

    pool.reply = reply
    response = client.post(URL, json={**HELLO, "n": 3, "stream": stream})
    if stream:
        texts = ["", "", ""]
        for chunk in data_events(response.text):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        answer = response.get_json()
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert texts == ["choice 0", "choice 1", "choice 2"]
    assert generate_job(pool).n == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_choice_and_frees_its_place(
    client: FlaskClient, pool: ScriptedPool, stream: bool
) -> None:
    pool.reply = lambda job: [Output(id=job.id, ids=[token]) for token in ids_of("one two STOP three")]
    body = {**HELLO, "stop": ["zzz", " STOP"], "stream": stream, "stream_options": None}

    response = client.post(URL, json=body)

    if stream:
        chunks = data_events(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        answer = response.get_json()
        text, reason = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
        needed = 0
        while " STOP" not in tokenizer().decode(ids_of("one two STOP three")[:needed]):
            needed += 1
        assert answer["usage"]["completion_tokens"] == needed
    assert (text, reason) == ("one two", "stop")
    pool.wait(lambda: pool.is_cancelled(pool.jobs[0].id))


def test_a_stop_string_of_one_choice_does_not_end_the_others(client: FlaskClient, pool: ScriptedPool) -> None:
    def reply(job: Job) -> Iterator[Event]:
        yield Output(id=job.id, choice=0, ids=ids_of("go STOP no"))
        yield Output(id=job.id, choice=0, ids=ids_of("more"))
        while not pool.cancels:
            time.sleep(0.001)
        yield Output(id=job.id, choice=1, ids=ids_of("goes on"), finish_reason="length")

    pool.reply = reply
    answer = client.post(URL, json={**HELLO, "stop": "STOP", "n": 2}).get_json()
    assert [(choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]] == [
        ("go ", "stop"),
        ("goes on", "length"),
    ]
    assert [(cancel.id, cancel.choice) for cancel in pool.cancels] == [(answer["id"], 0)]


def test_a_held_back_beginning_of_a_stop_string_comes_out_at_the_end(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of("almost ST"), reason="length")
    answer = client.post(URL, json={**HELLO, "stop": "STOP"}).get_json()
    assert answer["choices"][0]["message"]["content"] == "almost ST"


def test_the_demos_transcript_comes_as_choices_on_request(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of("好"), stop=IM_END)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = client.post(URL, json={"messages": messages, "transcript_choices": True}).get_json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    reply = {"role": "assistant", "content": "好", "refusal": None}
    assert [choice["message"] for choice in answer["choices"]] == [*messages, reply]


def test_the_servers_settings_change_the_answer(runtime: Path, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    with application(
        runtime, transcript_choices=True, system_prompt="Speak.", strict=True, sampling_defaults="openai"
    ) as app:
        client = app.test_client()
        assert len(client.post(URL, json=HELLO).get_json()["choices"]) == 2
        job = generate_job(pool)
        assert tokenizer().decode(job.prompt, skip_special_tokens=False).startswith("<|im_start|>system\nSpeak.")
        assert job.sampling.temperature == 1.0
        assert job.max_tokens == 2048 - len(job.prompt)
        refused = client.post(URL, json={**HELLO, "flavour": 1})
        assert refused.status_code == 400
        assert refused.get_json()["error"]["param"] == "flavour"


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_accepted_and_reported(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {"messages": [{"role": "user", "content": "x", "mood": 1}], "fl\r\navour": 2, "user": "u", "stream": stream}
    response = client.post(URL, json=body)
    warnings = data_events(response.text)[0]["warnings"] if stream else response.get_json()["warnings"]
    assert warnings == ["Unknown field, ignored: fl\r\navour", "Unknown field, ignored: messages[0].mood"]
    header = response.headers["X-Tailrace-Warnings"]
    assert "messages[0].mood" in header
    assert header.isprintable()


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [
        ("invalid", 400, "invalid_request_error"),
        ("overloaded", 429, "rate_limit_error"),
        ("unavailable", 503, "service_unavailable_error"),
        ("internal", 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_pool_is_a_real_status(
    client: FlaskClient, pool: ScriptedPool, kind: str, status: int, error_type: str, stream: bool
) -> None:
    pool.reply = refusal(kind, "Because.", retry_after=2.5)
    response = client.post(URL, json={**HELLO, "stream": stream})
    assert response.status_code == status
    assert response.get_json() == {"error": {"message": "Because.", "type": error_type, "param": None, "code": None}}
    assert response.headers.get("Retry-After") == ("3" if status in (429, 503) else None)
    assert response.headers.get("X-Should-Retry") == ("false" if status == 500 else None)


def test_a_model_without_a_template_cannot_chat(runtime: Path) -> None:
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, chat_template=None)).start()
    with application(runtime) as app:
        response = app.test_client().post(URL, json=HELLO)
    pool.stop()
    assert response.status_code == 400
    assert "chat template" in response.get_json()["error"]["message"]


def test_a_final_message_can_be_continued(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Once upon"}]
    assert client.post(URL, json={"messages": messages, "continue_final_message": True}).status_code == 200
    assert tokenizer().decode(generate_job(pool).prompt, skip_special_tokens=False).endswith("assistant\nOnce upon")
    refused = client.post(URL, json={**HELLO, "continue_final_message": True})
    assert refused.get_json()["error"]["param"] == "continue_final_message"


@pytest.mark.parametrize("name", ["messages", "bos_token", "tokenize", "__class__"])
def test_the_template_keeps_its_own_variables(client: FlaskClient, name: str) -> None:
    response = client.post(URL, json={**HELLO, "chat_template_kwargs": {name: 1}})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_a_transcript_is_not_streamed(client: FlaskClient) -> None:
    response = client.post(URL, json={**HELLO, "transcript_choices": True, "stream": True})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "transcript_choices"
