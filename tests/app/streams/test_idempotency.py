"""Idempotency-Key: a request that is sent again is done once, and answered to whoever asks."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application, runtime_directory
from tests.app.scripted_pool import ScriptedPool, eventually
from tests.app.streams.asking import CHAT, COMPLETIONS, KINDS, MESSAGES, events_of, script, stream_id
from tests.app.tiny import ids_of, write_card
from tests.sse import data_events
from workers.messages import Failed, Output, Started

KEY = {"Idempotency-Key": "order 66"}
ASK: dict[str, Any] = {"messages": "Hello"}
STREAM = {**ASK, "stream": True}
REPLAYED = "Idempotent-Replayed"

Workers = tuple[FlaskClient, FlaskClient, ScriptedPool]


def workers_with(**settings: object) -> Iterator[Workers]:
    with runtime_directory() as folder:
        pool = ScriptedPool(folder / "pool.sock", write_card(folder)).start()
        try:
            with application(folder, **settings) as one, application(folder, **settings) as other:
                yield one.test_client(), other.test_client(), pool
        finally:
            pool.stop()


@pytest.fixture
def workers() -> Iterator[Workers]:
    yield from workers_with()


@pytest.mark.parametrize("kind", ["chat", "n", "stop", "completion", "prompts", "messages"])
@pytest.mark.parametrize("streams", [(False, False), (True, True), (True, False), (False, True)])
def test_sent_again_it_is_the_same_answer_and_no_more_work(
    workers: Workers, kind: str, streams: tuple[bool, bool]
) -> None:
    one, other, pool = workers
    route, body, said = KINDS[kind]
    pool.reply = lambda job: script(job, said)
    answers = [
        client.post(route, json={**body, "stream": stream}, headers=KEY)
        for client, stream in zip((one, other), streams, strict=True)
    ]
    jobs = len(pool.jobs)
    reference = one.post(route, json={**body}, headers=KEY).get_json()
    assert REPLAYED not in answers[0].headers
    assert answers[1].headers[REPLAYED] == "true"
    assert answers[0].headers["X-Tailrace-Stream"] == answers[1].headers["X-Tailrace-Stream"] == reference["id"]
    for answer, stream in zip(answers, streams, strict=True):
        assert answer.status_code == 200
        if not stream:
            assert answer.get_json() == reference
        else:
            assert stream_id(answer.text) == reference["id"]
    if streams == (True, True):
        assert events_of(answers[0].text) == events_of(answers[1].text)
    if route != MESSAGES and streams[1]:
        chunks = data_events(answers[1].text)
        assert {chunk["created"] for chunk in chunks} == {reference["created"]}
        for choice in reference["choices"]:
            own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
            if route == COMPLETIONS:
                assert "".join(each["text"] for each in own) == choice["text"]
            else:
                text = "".join(each["delta"].get("content") or "" for each in own)
                assert text == choice["message"]["content"]
            assert own[-1]["finish_reason"] == choice["finish_reason"]
    assert len(pool.jobs) == jobs


def test_while_it_runs_the_second_joins_the_first(workers: Workers) -> None:
    one, other, pool = workers
    first = one.post(CHAT, json=STREAM, headers=KEY)
    job = pool.next_job()
    pool.send(Started(id=job.id), Output(id=job.id, ids=ids_of("Hello")))
    second = other.post(CHAT, json=STREAM, headers=KEY)
    assert second.headers[REPLAYED] == "true"
    parts = second.iter_encoded()
    seen = ""
    while "Hel" not in seen:
        seen += next(parts).decode()
    pool.send(Output(id=job.id, ids=ids_of(" world")), Output(id=job.id, finish_reason="length"))
    seen += b"".join(parts).decode()
    assert events_of(seen) == events_of(first.text)
    assert len(pool.jobs) == 1


def test_who_left_and_asks_again_gets_the_answer(workers: Workers) -> None:
    one, other, pool = workers
    first = one.post(CHAT, json=STREAM, headers=KEY)
    job = pool.next_job()
    next(first.iter_encoded())
    first.close()
    pool.send(*script(job, "Hello"))
    answer = other.post(CHAT, json=ASK, headers=KEY).get_json()
    assert answer["id"] == job.id
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert not pool.is_cancelled(job.id)


@pytest.mark.parametrize(
    "more",
    [
        {"messages": "Goodbye"},
        {"temperature": 0.5},
        {"surprise": 1},
    ],
)
def test_a_key_of_another_request_is_422(workers: Workers, more: dict[str, Any]) -> None:
    one, other, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    assert one.post(CHAT, json=ASK, headers=KEY).status_code == 200
    answer = other.post(CHAT, json={**ASK, **more}, headers=KEY)
    assert answer.status_code == 422
    error = answer.get_json()["error"]
    assert error["param"] == "Idempotency-Key"
    assert error["code"] == "idempotency_key_reused"
    assert len(pool.jobs) == 1


def test_the_same_body_on_another_route_is_another_request(workers: Workers) -> None:
    one, _, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
    assert one.post(CHAT, json=body, headers=KEY).status_code == 200
    answer = one.post(MESSAGES, json=body, headers=KEY)
    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.get_json()["error"]["message"]


def test_the_order_of_fields_and_how_it_is_sent_make_no_other_request(workers: Workers) -> None:
    one, _, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    first = one.post(CHAT, data=json.dumps({"messages": "x", "seed": 1}), headers=KEY, content_type="application/json")
    body = {"resumable": True, "stream": True, "seed": 1, "stream_options": {"include_usage": True}, "messages": "x"}
    again = one.post(CHAT, data=json.dumps(body), headers=KEY, content_type="application/json")
    assert stream_id(again.text) == first.get_json()["id"]
    assert data_events(again.text)[-1]["usage"] == first.get_json()["usage"]


@pytest.mark.parametrize("key", ["", "x" * 256, "schlüssel", "tab\tbed"])
def test_a_key_that_is_none_is_400(workers: Workers, key: str) -> None:
    answer = workers[0].post(CHAT, json=ASK, environ_overrides={"HTTP_IDEMPOTENCY_KEY": key})
    assert answer.status_code == 400
    assert answer.get_json()["error"]["param"] == "Idempotency-Key"


@pytest.mark.parametrize("said", ["", "Hello"])
def test_what_failed_is_done_anew(workers: Workers, said: str) -> None:
    one, other, pool = workers
    pool.reply = lambda job: [
        *([Output(id=job.id, ids=ids_of(said))] if said else []),
        Failed(id=job.id, kind="unavailable", message="no", retry_after=1),
    ]
    assert one.post(CHAT, json=ASK, headers=KEY).status_code == 503
    pool.reply = lambda job: script(job, "Hello")
    answer = other.post(CHAT, json=ASK, headers=KEY)
    assert answer.status_code == 200
    assert REPLAYED not in answer.headers


def test_a_bad_request_leaves_its_key_free(workers: Workers) -> None:
    one, _, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    assert one.post(CHAT, json={**ASK, "max_tokens": 10**9}, headers=KEY).status_code == 400
    assert one.post(CHAT, json=ASK, headers=KEY).status_code == 200


def test_after_the_pools_death_it_is_done_anew(workers: Workers) -> None:
    one, other, pool = workers
    pool.reply = lambda job: script(job, "Hello")
    first = one.post(CHAT, json=ASK, headers=KEY).get_json()["id"]
    pool.stop()
    pool.start()
    eventually(lambda: other.get("/readyz").status_code == 200)
    answer = other.post(CHAT, json=ASK, headers=KEY)
    assert REPLAYED not in answer.headers
    assert answer.get_json()["id"] != first


def test_a_route_that_keeps_nothing_says_so(workers: Workers) -> None:
    answer = workers[0].post("/tokenize", json={"prompt": "Hello"}, headers=KEY)
    assert answer.status_code == 200
    assert "Idempotency-Key" in answer.headers["X-Tailrace-Warnings"]


ALICE, BOB = ({"Authorization": f"Bearer {name}-0123456789"} for name in ("alice", "bob"))
KEYS = ["alice=alice-0123456789", "bob=bob-0123456789"]


@pytest.fixture
def keyed() -> Iterator[Workers]:
    yield from workers_with(api_key=KEYS, key_tokens_per_minute=1000, key_max_concurrent=2)


def left(client: FlaskClient) -> int:
    return int(client.get("/v1/models", headers=ALICE).headers["x-ratelimit-remaining-tokens"])


@pytest.fixture
def unlimited() -> Iterator[Workers]:
    yield from workers_with(api_key=KEYS)


def test_nobody_else_finds_what_is_kept(unlimited: Workers) -> None:
    one, other, pool = unlimited
    pool.reply = lambda job: script(job, "Hello")
    mine = one.post(CHAT, json={**ASK, "max_tokens": 50}, headers={**ALICE, **KEY}).get_json()["id"]
    assert other.get(f"/v1/streams/{mine}", headers=BOB).status_code == 404
    resumed = other.post(CHAT, json=ASK, headers={**BOB, "Last-Event-ID": f"{mine}:1"})
    assert resumed.status_code == 404
    assert other.get(f"/v1/streams/{mine}", headers=ALICE).status_code == 200
    theirs = other.post(CHAT, json={**ASK, "max_tokens": 50}, headers={**BOB, **KEY})
    assert REPLAYED not in theirs.headers
    assert theirs.get_json()["id"] != mine


def test_tokens_are_charged_once_and_readers_are_open_requests(keyed: Workers) -> None:
    one, other, pool = keyed
    body = {**STREAM, "max_tokens": 300}
    first = one.post(CHAT, json=body, headers={**ALICE, **KEY})
    second = other.post(CHAT, json=body, headers={**ALICE, **KEY})
    job = pool.next_job()
    assert other.post(CHAT, json=body, headers={**ALICE, **KEY}).status_code == 429
    pool.send(*script(job, "Hello"))
    assert first.text
    assert second.text
    first.close()
    second.close()
    used = len(job.prompt) + len(ids_of("Hello"))
    assert 1000 - used - 2 <= left(one) <= 1000
    again = other.post(CHAT, json=body, headers={**ALICE, **KEY})
    assert again.text
    again.close()
    assert 1000 - used - 2 <= left(one) <= 1000


def test_what_goes_on_without_its_client_is_charged_in_full(keyed: Workers) -> None:
    one, _, pool = keyed
    answer = one.post(CHAT, json={**STREAM, "max_tokens": 300}, headers={**ALICE, **KEY})
    pool.next_job()
    next(answer.iter_encoded())
    answer.close()
    assert left(one) < 1000 - 290


def test_no_more_of_a_key_go_on_without_a_client_than_it_may_have_open(keyed: Workers) -> None:
    one, _, pool = keyed
    for number in range(3):
        answer = one.post(CHAT, json={**STREAM, "max_tokens": 9, "resumable": True}, headers=ALICE)
        pool.next_job(number + 1)
        next(answer.iter_encoded())
        assert ("X-Tailrace-Stream" in answer.headers) == (number < 2)
        answer.close()
