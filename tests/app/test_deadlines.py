"""Time limits: what has not begun in time is refused, what has begun ends with the text so far; and waiting is told."""

import json
import time
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flask.testing import FlaskClient

from tests.app.conftest import Server, application
from tests.app.raw_http import RawClient
from tests.app.scripted_pool import ScriptedPool, eventually, generate_job, refusal, score
from tests.app.test_streams import CHAT, PLAIN, STREAM, error_at_the_end
from tests.app.tiny import IM_END, ids_of
from workers.messages import Event, Failed, GenerateJob, Job, Output, PromptLogprobs, Queued, Started

COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
NOTICE = "The request's time was over: "
# Long enough for the scripted tokens to arrive on a slow machine, and short enough to wait for.
SHORT = 2.0


def begun(text: str, *, choices: Iterable[int] = (0,)) -> Any:
    """An answer that gets so far and never ends."""

    def reply(job: Job) -> list[Event]:
        return [
            Started(id=job.id, cached_tokens=2),
            *(Output(id=job.id, choice=choice, ids=[token]) for choice in choices for token in ids_of(text)),
        ]

    return reply


def events(body: bytes) -> list[dict[str, Any]]:
    """The data of a whole stream, whatever else its lines say."""
    datas = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
    return [json.loads(data) for data in datas if data != b"[DONE]"]


def all_cancelled(pool: ScriptedPool) -> bool:
    return all(pool.is_cancelled(job.id) for job in pool.jobs)


# --- not started in time


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/v1/embeddings", "/v1/score", "/v1/rerank"])
def test_what_has_not_started_in_time_is_429_and_cancelled(client: FlaskClient, pool: ScriptedPool, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": "Hello"},
        COMPLETIONS: {"prompt": ["a", "b"]},
        RESPONSES: {"input": "Hello"},
        MESSAGES: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9},
        "/v1/embeddings": {"input": ["a", "b"]},
        "/v1/score": {"text_1": "a", "text_2": "b"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    response = client.post(path, json={**bodies[path], "timeout": 0.1})
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert response.get_json()["error"]["type"] == "rate_limit_error"
    pool.wait(lambda: all_cancelled(pool))


def test_a_stream_that_has_not_started_in_time_ends_with_the_error(server: Server) -> None:
    client = RawClient(server.port).post(CHAT, {**STREAM, "timeout": 0.2})
    assert error_at_the_end(client)["type"] == "rate_limit_error"
    server.pool.wait(lambda: all_cancelled(server.pool))


def test_the_pools_own_word_about_the_queue_is_passed_on(client: FlaskClient, pool: ScriptedPool, monkeypatch) -> None:
    # However late a busy machine lets it come.
    monkeypatch.setattr("app.text.deadline.POOL_GRACE_S", 30.0)

    def reply(job: Job) -> Iterable[Event]:
        time.sleep(generate_job(pool).start_within_s if pool.jobs else 0.1)
        yield Failed(id=job.id, kind="overloaded", cause="queue_time", message="Not in time.", retry_after=17)

    pool.reply = reply
    response = client.post(CHAT, json={**PLAIN, "timeout": 0.1})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "17"
    assert response.get_json()["error"]["message"] == "Not in time."


@pytest.mark.parametrize(
    ("body", "header", "settings", "start_within_s"),
    [
        ({}, None, {}, 60),
        ({"timeout": 5}, None, {}, 5),
        ({"timeout": 5}, "3.5", {}, 3.5),
        ({"timeout": 5}, "30", {}, 5),
        ({}, "7e0", {}, 7),
        ({}, "7000", {"queue_timeout_s": 0}, 600),
        ({}, None, {"request_timeout_s": 4}, 4),
        ({"timeout": 100}, "200", {"queue_timeout_s": 9}, 9),
    ],
)
def test_the_shortest_limit_is_told_to_the_pool(runtime, pool, body, header, settings, start_within_s) -> None:
    pool.reply = refusal("overloaded")
    headers = {} if header is None else {"X-Request-Timeout": header}
    with application(runtime, **settings) as app:
        client = app.test_client()
        for path, asked in ((CHAT, PLAIN), ("/v1/embeddings", {"input": "a"}), ("/v1/score", SCORE)):
            assert client.post(path, json={**asked, **body}, headers=headers).status_code == 429
            assert pool.jobs[-1].start_within_s == start_within_s


SCORE = {"text_1": "a", "text_2": "b", "method": "log_likelihood"}


@pytest.mark.parametrize("value", ["0", "-1", "soon", "", "nan", "inf", "1e999", "1_0", "5 s", "1.2.3", "٣", "0x10"])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
def test_a_header_that_is_no_time_is_refused_by_name(client, pool, path, value) -> None:
    body = {CHAT: PLAIN, "/v1/embeddings": {"input": "a"}}[path]
    response = client.post(path, json=body, headers={"X-Request-Timeout": value})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "X-Request-Timeout"
    assert pool.jobs == []


# --- running out


def test_running_out_is_the_text_so_far(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = begun("Hello wor")
    response = client.post(CHAT, json={**PLAIN, "timeout": SHORT, "stop": ["world"]})
    body = response.get_json()
    assert response.status_code == 200
    # "wor" had been held back, since the stop string might have begun.
    assert body["choices"][0]["message"]["content"] == "Hello wor"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == len(ids_of("Hello wor"))
    assert body["warnings"][0].startswith(NOTICE)
    assert NOTICE in response.headers["X-Tailrace-Warnings"]
    pool.wait(lambda: all_cancelled(pool))


def test_the_header_counts_too(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = begun("Hello")
    response = client.post(CHAT, json={**PLAIN, "timeout": 60}, headers={"X-Request-Timeout": str(SHORT)})
    assert response.get_json()["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }


def test_a_stream_that_runs_out_ends_in_order(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = begun("Hello wor")
    asked = {**STREAM, "timeout": SHORT, "stop": ["world"], "stream_options": {"include_usage": True}}
    chunks = events(client.post(CHAT, json=asked).get_data())
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"]) == "Hello wor"
    ends = [each for each in chunks if each["choices"] and each["choices"][0]["finish_reason"]]
    assert [end["choices"][0]["finish_reason"] for end in ends] == ["length"]
    assert ends[0]["warnings"][0].startswith(NOTICE)
    assert chunks[-1]["usage"]["completion_tokens"] == len(ids_of("Hello wor"))
    pool.wait(lambda: all_cancelled(pool))


def test_only_unfinished_choices_are_cut(client: FlaskClient, pool: ScriptedPool) -> None:
    def reply(job: Job) -> list[Event]:
        end = Output(id=job.id, choice=1, ids=[IM_END], finish_reason="stop", stop_token_id=IM_END)
        return [*begun("Hi", choices=(0, 1))(job), end]

    pool.reply = reply
    answers = client.post(CHAT, json={**PLAIN, "n": 3, "timeout": SHORT}).get_json()["choices"]
    assert [each["finish_reason"] for each in answers] == ["length", "stop", "length"]
    assert [each["message"]["content"] for each in answers] == ["Hi", "Hi", ""]
    pool.wait(lambda: all_cancelled(pool))


def test_half_a_character_is_told_as_at_any_other_end(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("a😀")[:-1])]
    assert client.post(CHAT, json={**PLAIN, "timeout": SHORT}).get_json()["choices"][0]["message"]["content"] == "a�"


def test_scores_come_with_all_of_the_text(client: FlaskClient, pool: ScriptedPool) -> None:
    ids = ids_of("Hello wor")
    logprobs = [score(place, 0) for place in range(len(ids))]
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids, logprobs=logprobs)]
    asked = {**PLAIN, "logprobs": True, "stop": ["world"], "timeout": SHORT}
    (choice,) = client.post(CHAT, json=asked).get_json()["choices"]
    assert "".join(each["token"] for each in choice["logprobs"]["content"]) == "Hello wor"


@pytest.mark.parametrize("stream", [False, True])
def test_completions_echo_their_prompts_even_if_no_token_came(client, pool, stream) -> None:
    def reply(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        if job.id.endswith("/0"):
            known = [score(place, 0) for place in range(1, len(job.prompt))]
            return [Started(id=job.id), PromptLogprobs(id=job.id, logprobs=known)]
        return [Queued(id=job.id, position=0)]

    pool.reply = reply
    asked = {"prompt": ["Hello", "Hi"], "echo": True, "logprobs": 0, "timeout": SHORT, "stream": stream}
    response = client.post(COMPLETIONS, json=asked)
    chunks = events(response.get_data()) if stream else [response.get_json()]
    texts = ["", ""]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == ["Hello", "Hi"]
    assert chunks[-1]["warnings"][0].startswith(NOTICE)
    assert chunks[-1]["choices"][-1]["finish_reason"] == "length"
    pool.wait(lambda: all_cancelled(pool))


def test_the_best_of_several_is_none_without_tokens(client: FlaskClient, pool: ScriptedPool) -> None:
    ids = ids_of("Hi")

    def reply(job: Job) -> list[Event]:
        return [Started(id=job.id), Output(id=job.id, choice=2, ids=ids, logprobs=[score(5, 0) for _ in ids])]

    pool.reply = reply
    body = client.post(COMPLETIONS, json={"prompt": "a", "n": 1, "best_of": 3, "timeout": SHORT}).get_json()
    assert [choice["text"] for choice in body["choices"]] == ["Hi"]


@pytest.mark.parametrize("stream", [False, True])
def test_beams_that_were_not_done_leave_an_empty_answer(client, pool, stream) -> None:
    pool.reply = lambda job: [Started(id=job.id)]
    response = client.post(CHAT, json={**PLAIN, "num_beams": 3, "n": 2, "timeout": SHORT, "stream": stream})
    chunks = events(response.get_data()) if stream else [response.get_json()]
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert [choice["finish_reason"] for choice in ends] == ["length", "length"]
    assert chunks[-1]["warnings"][0].startswith(NOTICE)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_incomplete(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = begun("Hello")
    response = client.post(RESPONSES, json={"input": "Hi", "timeout": SHORT, "stream": stream})
    made = events(response.get_data())[-1]["response"] if stream else response.get_json()
    assert made["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    assert made["output"][0]["content"][0]["text"] == "Hello"
    assert made["usage"]["output_tokens"] == len(ids_of("Hello"))
    assert made["warnings"][0].startswith(NOTICE)
    assert client.get(f"{RESPONSES}/{made['id']}").get_json()["status"] == "incomplete"
    pool.wait(lambda: all_cancelled(pool))


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_stops_at_its_length(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = begun("Hello")
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50, "timeout": SHORT, "stream": stream}
    response = client.post(MESSAGES, json=asked)
    if not stream:
        body = response.get_json()
        assert (body["stop_reason"], body["content"]) == ("max_tokens", [{"type": "text", "text": "Hello"}])
        assert body["warnings"][0].startswith(NOTICE)
        return
    (delta,) = (each for each in events(response.get_data()) if each["type"] == "message_delta")
    assert delta["delta"]["stop_reason"] == "max_tokens"
    assert delta["usage"]["output_tokens"] == len(ids_of("Hello"))
    assert delta["warnings"][0].startswith(NOTICE)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_were_cut_say_so(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    pool.reply = begun('<tool_call>\n{"name": "weather", "arguments": {"city": "Par')
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    response = client.post(CHAT, json={**PLAIN, "tools": tools, "timeout": SHORT, "stream": stream})
    chunks = events(response.get_data()) if stream else [response.get_json()]
    said = "".join(
        call["function"].get("arguments", "")
        for chunk in chunks
        for choice in chunk["choices"]
        for call in choice.get("delta", choice.get("message")).get("tool_calls", ())
    )
    with pytest.raises(json.JSONDecodeError):
        json.loads(said)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["warnings"][0].startswith(NOTICE)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/v1/rerank"])
def test_without_a_partial_answer_it_is_503(client: FlaskClient, pool: ScriptedPool, path: str) -> None:
    body: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": ["a", "b"]},
        "/v1/score": SCORE,
        "/v1/rerank": {"query": "a", "documents": ["b"]},
    }
    pool.reply = lambda job: [Started(id=job.id)]
    response = client.post(path, json={**body[path], "timeout": SHORT})
    assert response.status_code == 503
    assert response.get_json()["error"]["code"] == "timeout"
    pool.wait(lambda: all_cancelled(pool))


# --- the queue


def test_a_waiting_stream_is_told_its_place(server: Server) -> None:
    client = RawClient(server.port).post(CHAT, STREAM)
    job = server.pool.next_job()
    for position in (7, 2, 0):
        server.pool.send(Queued(id=job.id, position=position))
        client.read_until(b": queued, position %d\n" % (position + 1))
    server.pool.send(Started(id=job.id))
    client.read_until(b": keep-alive\n")
    assert b"queued" not in client.received
    server.pool.send(Output(id=job.id, ids=[IM_END], finish_reason="stop", stop_token_id=IM_END))
    client.read_until(b"data: [DONE]\n\n")
    client.leave()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_the_place_is_told_once_for_each_change_and_not_at_all_without_comments(runtime, pool, path) -> None:
    def reply(job: Job) -> Iterable[Event]:
        yield Queued(id=job.id, position=4)
        time.sleep(0.2)
        yield Queued(id=job.id, position=3)
        yield Started(id=job.id)
        yield Output(id=job.id, ids=[IM_END], finish_reason="stop", stop_token_id=IM_END)

    pool.reply = reply
    body = {
        CHAT: STREAM,
        COMPLETIONS: {"prompt": "a", "stream": True},
        RESPONSES: {"input": "Hello", "stream": True},
        MESSAGES: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "stream": True},
    }[path]
    for seconds, expected in ((30, [b": queued, position 5"]), (0, [])):
        with application(runtime, keepalive_comment_s=seconds) as app:
            said = app.test_client().post(path, json=body).get_data()
        told = [line for line in said.splitlines() if line.startswith(b": queued")]
        # The second place may be gone, with what came behind it, before it could be told.
        assert told[: len(expected)] == expected
        assert set(told) <= ({b": queued, position 5", b": queued, position 4"} if expected else set())


def test_a_refusal_is_quick_and_says_when_to_come_again(server: Server) -> None:
    server.pool.reply = refusal("overloaded", "Too many requests are waiting.", retry_after=6.2)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        http.get("/livez")
        for stream in (True, False):
            seconds = []
            for _ in range(20):
                begun_at = time.perf_counter()
                response = http.post(CHAT, json={**PLAIN, "stream": stream})
                seconds.append(time.perf_counter() - begun_at)
                assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
            # A busy machine delays most of them; the 0.2 s for which refusals are waited for would delay all.
            assert min(seconds) < 0.1
    eventually(lambda: server.stats()["open_requests"] == 0)
