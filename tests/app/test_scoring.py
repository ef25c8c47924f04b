"""POST /v1/score and /v1/rerank through the application in this process, with a scripted pool behind it."""

import math
import struct
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import Server
from tests.app.raw_http import RawClient
from tests.app.scripted_pool import ScriptedPool, refusal, scored, vectors
from tests.app.tiny import ids_of, tokenizer
from workers.messages import EmbedJob, GenerateJob

DIRECTIONS = {"north": 0.0, "east": math.pi / 2, "south": math.pi, "northeast": math.pi / 4}


def compass(job: EmbedJob) -> bytes:
    """Each word is a direction in the plane."""
    angle = DIRECTIONS[tokenizer().decode(job.prompt)]
    return struct.pack("<8f", math.cos(angle), math.sin(angle), *[0.0] * 6)


def scores(answer: dict[str, Any]) -> list[float]:
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert {entry["object"] for entry in answer["data"]} == {"score"}
    return [entry["score"] for entry in answer["data"]]


@pytest.mark.parametrize("url", ["/v1/score", "/score"])
def test_scores_are_the_cosines_of_embeddings(client: FlaskClient, pool: ScriptedPool, url: str) -> None:
    pool.reply = vectors(compass)
    response = client.post(url, json={"text_1": "north", "text_2": ["north", "east", "south", "northeast"]})
    assert response.status_code == 200, response.text
    answer = response.get_json()
    assert scores(answer) == pytest.approx([1, 0, -1, math.sqrt(0.5)], abs=1e-6)
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["id"].startswith("score-")
    # No text is embedded twice.
    assert len(pool.jobs) == 4
    read = sum(len(ids_of(word)) for word in DIRECTIONS)
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}


@pytest.mark.parametrize(
    ("text_1", "text_2", "expected"),
    [("north", "east", [0]), (["north"], ["south"], [-1]), (["north", "east"], ["north", "south"], [1, 0])],
)
def test_texts_are_paired(client: FlaskClient, pool: ScriptedPool, text_1: Any, text_2: Any, expected: Any) -> None:
    pool.reply = vectors(compass)
    answer = client.post("/v1/score", json={"text_1": text_1, "text_2": text_2}).get_json()
    assert scores(answer) == pytest.approx(expected, abs=1e-6)


def test_log_likelihood_is_the_mean_of_the_second_texts_tokens(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored([])
    body = {"text_1": "Hello, ", "text_2": ["world!", "the capital"], "method": "log_likelihood"}
    response = client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    first = len(ids_of("Hello, "))
    for job, text, score in zip(pool.jobs, body["text_2"], scores(response.get_json()), strict=True):
        assert isinstance(job, GenerateJob)
        assert job.prompt == ids_of("Hello, ") + ids_of(text)
        assert (job.max_tokens, job.prompt_logprobs) == (0, 0)
        # The scripted pool gives the token at place p -(p + 1).
        places = range(first, len(job.prompt))
        assert score == pytest.approx(-sum(place + 1 for place in places) / len(places))


def test_more_pairs_than_are_under_way_at_a_time(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored([])
    words = ["Hello" * (1 + place % 3) for place in range(100)]
    answer = client.post("/v1/score", json={"text_1": "A", "text_2": words, "method": "log_likelihood"}).get_json()
    found = scores(answer)
    assert len(found) == 100
    assert found[:3] == found[3:6]
    assert len(set(found)) == 3


@pytest.mark.parametrize("url", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_rerank_sorts_documents_the_best_first(client: FlaskClient, pool: ScriptedPool, url: str) -> None:
    pool.reply = vectors(compass)
    documents = ["south", {"text": "northeast", "title": "mine"}, "east", "north", "north"]
    response = client.post(url, json={"query": "north", "documents": documents})
    assert response.status_code == 200, response.text
    results = response.get_json()["results"]
    assert [result["index"] for result in results] == [3, 4, 1, 2, 0]
    assert [result["relevance_score"] for result in results] == pytest.approx([1, 1, math.sqrt(0.5), 0, -1], abs=1e-6)
    assert results[2]["document"] == {"text": "northeast"}
    assert "warnings" not in response.get_json()
    few = client.post(url, json={"query": "north", "documents": documents, "top_n": 2, "return_documents": False})
    assert [set(result) for result in few.get_json()["results"]] == [{"index", "relevance_score"}] * 2


def test_rerank_by_likelihood_asks_how_likely_the_query_is(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = scored([])
    body = {"query": "Hello", "documents": ["the quick brown fox", "A"], "method": "log_likelihood"}
    results = client.post("/v1/rerank", json=body).get_json()["results"]
    prompts = [tokenizer().decode(job.prompt) for job in pool.jobs]
    assert prompts == ["the quick brown fox\n\nHello", "A\n\nHello"]
    assert [result["index"] for result in results] == [1, 0]


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": [5]}, "text_2[0]"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a"] * 1025, "text_2": ["b"] * 1025}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "method": "magic"}, "method"),
        ("/v1/score", {"text_1": "a", "text_2": ["b", ""]}, "text_2[1]"),
        ("/v1/score", {"text_1": "", "text_2": "b", "method": "log_likelihood"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": "", "method": "log_likelihood"}, "text_2"),
        ("/v1/score", {"text_1": "北 " * 600, "text_2": "京 " * 600, "method": "log_likelihood"}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "北京" * 1500}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["b", 5]}, "documents[1]"),
        ("/v1/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents[0].text"),
        ("/v1/rerank", {"query": ["a"], "documents": ["b"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 9}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": ["b", ""], "method": "embedding"}, "documents[1]"),
    ],
)
def test_a_bad_field_is_named(
    client: FlaskClient, pool: ScriptedPool, url: str, body: dict[str, Any], param: str
) -> None:
    response = client.post(url, json=body)
    assert response.status_code == 400, response.text
    assert response.get_json()["error"]["param"] == param, response.text
    assert pool.jobs == []


def test_unknown_fields_are_warned_of_and_harmless_ones_are_not(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = vectors(compass)
    body = {"text_1": "north", "text_2": "east", "user": "me", "priority": 0, "truncation": False, "colour": "red"}
    assert client.post("/v1/score", json=body).get_json()["warnings"] == ["Unknown field, ignored: colour"]


@pytest.mark.parametrize("method", ["embedding", "log_likelihood"])
def test_a_busy_pool_is_429(client: FlaskClient, pool: ScriptedPool, method: str) -> None:
    pool.reply = refusal("overloaded", retry_after=7)
    response = client.post("/v1/score", json={"text_1": "a", "text_2": "b", "method": method})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "7"


@pytest.mark.parametrize("method", ["embedding", "log_likelihood"])
def test_a_client_that_leaves_cancels_its_jobs(server: Server, method: str) -> None:
    client = RawClient(server.port)
    client.post("/v1/score", {"text_1": "a", "text_2": ["b", "c"], "method": method})
    server.pool.next_job(2)
    client.leave()
    server.pool.wait(lambda: all(server.pool.is_cancelled(job.id) for job in server.pool.jobs))
