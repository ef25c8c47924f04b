"""What becomes of a request is counted once, under the right name."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from flask import Flask
from flask.testing import FlaskClient

from app.metrics import definitions as of
from app.metrics.tally import BUCKET
from app.text.errors import ClientGone, ReaderTooSlow, ShuttingDown
from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, eventually, refusal, silent, tokens, vectors
from tests.app.tiny import IM_END, ids_of
from workers.messages import Failed, Output, Started

CHAT = "/v1/chat/completions"
ASK = {"messages": "Hello"}


@pytest.fixture
def app(runtime: Path, pool: ScriptedPool) -> Iterator[Flask]:
    with application(runtime) as made:
        yield made


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def counted(app: Flask, *key: str) -> float:
    """The number of one metric with these labels."""
    return app.extensions["tailrace"].meter.snapshot().get(key, 0.0)


def measured(app: Flask, definition: of.Definition) -> float:
    """How many times were measured."""
    numbers = app.extensions["tailrace"].meter.snapshot()
    return sum(number for key, number in numbers.items() if key[:2] == (definition.name, BUCKET))


def test_an_answer_counts_its_choices_its_times_and_its_route(app: Flask, client: FlaskClient, pool: ScriptedPool):
    pool.reply = tokens(ids_of("one two three"), stop=IM_END)
    assert client.post(CHAT, json={**ASK, "n": 2}).status_code == 200
    assert counted(app, "request_success", "stop") == 2
    assert counted(app, "http_requests", CHAT, "POST", "200") == 1
    assert measured(app, of.FIRST_TOKEN) == measured(app, of.QUEUE_TIME) == measured(app, of.LATENCY) == 1
    # One gap for each frame behind the first one that brought tokens: the scripted pool sends each event in its own.
    job = pool.jobs[-1]
    assert measured(app, of.GAP) == 2 * (len(ids_of("one two three")) + 1) - 1, job


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_is_a_stop_and_counted_as_what_it_is(
    app: Flask, client: FlaskClient, pool: ScriptedPool, streamed: bool
):
    pool.reply = tokens(ids_of("one two three four"), reason="length")
    with client.post(CHAT, json={**ASK, "stop": ["two"], "stream": streamed}) as answer:
        assert b"finish_reason" in answer.data
    assert counted(app, "request_success", "stop") == 1
    assert counted(app, "stop_strings") == 1


def test_embeddings_count_as_such(app: Flask, client: FlaskClient, pool: ScriptedPool):
    pool.reply = vectors(lambda job: bytes(32))
    assert client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
    assert counted(app, "embedding_requests") == 1
    assert measured(app, of.FIRST_TOKEN) == 0


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ({"kind": "overloaded"}, "queue_full"),
        ({"kind": "overloaded", "cause": "queue_time"}, "queue_time"),
        ({"kind": "internal", "cause": "poison"}, "poison"),
        ({"kind": "unavailable"}, "unavailable"),
        ({"kind": "unavailable", "cause": "memory"}, "memory"),
        ({"kind": "invalid"}, "invalid"),
        ({"kind": "invalid", "cause": "grammar", "line": 1}, "invalid"),
    ],
)
def test_what_the_pool_refuses_is_a_refusal_by_cause(
    app: Flask, client: FlaskClient, pool: ScriptedPool, failure: dict[str, Any], cause: str
):
    pool.reply = refusal(**failure)
    assert client.post(CHAT, json=ASK).status_code >= 400
    assert counted(app, "requests_refused", cause) == 1
    assert not [key for key in app.extensions["tailrace"].meter.snapshot() if key[0] == "requests_failed"]


def test_a_request_that_is_not_valid_is_refused_before_anybody_else_sees_it(app: Flask, client: FlaskClient):
    assert client.post(CHAT, json={"messages": 3}).status_code == 400
    assert counted(app, "requests_refused", "invalid") == 1
    assert counted(app, "http_requests", CHAT, "POST", "400") == 1


def test_a_failure_in_the_middle_is_one_and_no_refusal(app: Flask, client: FlaskClient, pool: ScriptedPool):
    def breaks(job: Any) -> list[Any]:
        start = [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
        return [*start, Failed(id=job.id, kind="internal", message="no")]

    pool.reply = breaks
    with client.post(CHAT, json={**ASK, "stream": True}) as answer:
        assert b"server_error" in answer.data
    assert counted(app, "requests_failed", "internal") == 1
    assert not [key for key in app.extensions["tailrace"].meter.snapshot() if key[0] == "requests_refused"]


def test_the_end_of_the_pool_in_the_middle_is_a_failure(app: Flask, client: FlaskClient, pool: ScriptedPool):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
    answer = client.post(CHAT, json={**ASK, "stream": True}, buffered=False)
    parts = iter(answer.response)
    eventually(lambda: b"one" in next(parts))
    pool.stop()
    assert "error" in b"".join(parts).decode()
    answer.close()
    assert counted(app, "requests_failed", "unavailable") == 1


@pytest.mark.parametrize(
    ("error", "cause"),
    [(ClientGone(), "client_gone"), (ReaderTooSlow(), "slow_reader"), (ShuttingDown(), "shutdown")],
)
def test_what_ends_a_stream_from_outside_is_a_cancel_by_cause(
    app: Flask, client: FlaskClient, pool: ScriptedPool, error: Exception, cause: str
):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
    answer = client.post(CHAT, json={**ASK, "stream": True}, buffered=False)
    parts = iter(answer.response)
    eventually(lambda: b"one" in next(parts))
    (stream,) = app.extensions["tailrace"]._streams
    stream.abort(error)
    list(parts)
    answer.close()
    assert counted(app, "requests_cancelled", cause) == 1
    assert measured(app, of.LATENCY) == 0


def test_a_stream_that_is_closed_before_its_end_was_left_by_its_client(
    app: Flask, client: FlaskClient, pool: ScriptedPool
):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
    answer = client.post(CHAT, json={**ASK, "stream": True}, buffered=False)
    eventually(lambda: b"one" in next(iter(answer.response)))
    answer.close()
    assert counted(app, "requests_cancelled", "client_gone") == 1


def test_a_deadline_is_one_also_though_the_client_gets_a_whole_answer(
    app: Flask, client: FlaskClient, pool: ScriptedPool
):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
    assert client.post(CHAT, json={**ASK, "timeout": 0.2}).status_code == 200
    assert counted(app, "requests_cancelled", "deadline") == 1
    assert counted(app, "request_success", "length") == 0


ENDS = ("request_success", "requests_refused", "requests_cancelled", "requests_failed")


def ends(app: Flask) -> dict[tuple[str, ...], float]:
    """All that requests have come to."""
    return {key: value for key, value in app.extensions["tailrace"].meter.snapshot().items() if key[0] in ENDS}


@pytest.mark.parametrize("route", [CHAT, "/v1/responses"])
@pytest.mark.parametrize("streamed", [False, True])
def test_who_waited_in_vain_is_counted_once(
    app: Flask, client: FlaskClient, pool: ScriptedPool, route: str, streamed: bool
):
    pool.reply = silent
    asked = {"messages": "Hello"} if route == CHAT else {"input": "Hello"}
    with client.post(route, json={**asked, "stream": streamed, "timeout": 0.1}) as answer:
        assert b"too long" in answer.data
    assert ends(app) == {("requests_refused", "queue_time"): 1}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        ({"kind": "overloaded", "cause": "queue_time"}, "queue_time"),
        ({"kind": "internal", "cause": "poison"}, "poison"),
        ({"kind": "unavailable"}, "unavailable"),
    ],
)
def test_what_fails_later_is_counted_once(
    app: Flask,
    client: FlaskClient,
    pool: ScriptedPool,
    failure: dict[str, Any],
    cause: str,
    begun: bool,
    streamed: bool,
):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))] if begun else []

    def fail() -> None:
        job = pool.next_job()
        gevent.sleep(0.4)
        pool.send(Failed(id=job.id, message="no", **failure))

    failing = gevent.spawn(fail)
    with client.post(CHAT, json={**ASK, "stream": streamed}) as answer:
        assert b"error" in answer.data
    failing.join()
    assert ends(app) == {("requests_failed" if begun else "requests_refused", cause): 1}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_fault_of_ours_is_a_failure(
    app: Flask, client: FlaskClient, pool: ScriptedPool, monkeypatch: pytest.MonkeyPatch, streamed: bool
):
    pool.reply = tokens(ids_of("one two three"), stop=IM_END)
    monkeypatch.setattr("app.text.choice.ChoiceText.push", lambda *_: 1 // 0)
    with client.post(CHAT, json={**ASK, "stream": streamed}) as answer:
        assert b"server_error" in answer.data
    assert ends(app) == {("requests_failed", "internal"): 1}


def test_a_stop_of_the_service_is_counted_once(app: Flask, client: FlaskClient, pool: ScriptedPool):
    pool.reply = lambda job: [Started(id=job.id), Output(id=job.id, ids=ids_of("one"))]
    stop = gevent.spawn_later(0.4, app.end_streams)  # type: ignore[attr-defined]
    assert client.post(CHAT, json=ASK).status_code == 503
    stop.join()
    assert ends(app) == {("requests_cancelled", "shutdown"): 1}


def test_open_requests_are_told_while_they_are_open(app: Flask, client: FlaskClient, pool: ScriptedPool):
    pool.reply = silent
    answer = client.post(CHAT, json={**ASK, "stream": True}, buffered=False)
    assert counted(app, "open_requests") == 1
    answer.close()
    assert counted(app, "open_requests") == 0


def test_who_has_no_key_is_counted_at_the_door(runtime: Path, pool: ScriptedPool):
    with application(runtime, api_key=["alice=sk-alice"]) as app:
        assert app.test_client().get("/v1/models").status_code == 401
        assert counted(app, "requests_refused", "key") == 1
        assert counted(app, "http_requests", "none", "GET", "401") == 1


def test_the_lag_of_the_hub_is_measured(app: Flask):
    eventually(lambda: measured(app, of.LAG) > 0)
    # This test holds the hub of its process for as long as it likes.
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        pass
    eventually(lambda: counted(app, "hub_lag_recent_max_seconds") > 0.02)


def test_methods_nobody_knows_are_one(app: Flask, client: FlaskClient):
    for method in ("BREW", "WHEN"):
        client.open("/v1/models", method=method)
    assert counted(app, "http_requests", "none", "other", "405") == 2


def test_every_label_of_the_help_has_a_place_from_the_start():
    for definition in of.DEFINITIONS:
        if definition.labels == ("cause",):
            words = set(re.findall(r"\w+", definition.help))
            assert set(definition.values) <= words, definition.name
