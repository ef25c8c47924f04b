"""/v1/score and /v1/rerank of the real model, beside transformers with the same weights."""

from typing import Any

import httpx
import pytest
import torch

from tests.e2e.reference import Reference
from tests.e2e.server import Server

QUESTION = "What is the capital of France?"
DOCUMENTS = ["Bananas are yellow.", "Paris is the capital of France.", "法国的首都是巴黎。", "The sky is blue today."]


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json())


def scores(answer: dict[str, Any]) -> list[float]:
    return [entry["score"] for entry in answer["data"]]


def mean_logprob(reference: Reference, before: str, text: str) -> float:
    """The mean log-probability of a token of ``text`` behind ``before``."""
    first, second = (reference.tokenizer(each, add_special_tokens=False).input_ids for each in (before, text))
    ids = torch.tensor([first + second])
    with torch.inference_mode():
        logprobs = torch.log_softmax(reference.model(ids).logits[0].float(), dim=-1)
    places = torch.arange(len(first), ids.shape[1])
    return float(logprobs[places - 1, ids[0, places]].mean())


def test_cosines_are_those_of_the_references_hidden_states(server: Server, reference: Reference) -> None:
    answer = post(server, "/v1/score", {"text_1": QUESTION, "text_2": DOCUMENTS})
    question = reference.embedding(QUESTION)
    expected = [float(torch.dot(question, reference.embedding(text))) for text in DOCUMENTS]
    assert scores(answer) == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods_are_those_of_the_references_logits(server: Server, reference: Reference) -> None:
    befores = ["Question:", "The capital of France is", "法国的首都", "The sky"]
    answer = post(server, "/v1/score", {"text_1": befores, "text_2": DOCUMENTS, "method": "log_likelihood"})
    expected = [mean_logprob(reference, *pair) for pair in zip(befores, DOCUMENTS, strict=True)]
    assert scores(answer) == pytest.approx(expected, abs=1e-3)


def test_rerank_finds_what_answers_the_question(server: Server, reference: Reference) -> None:
    body = {"query": QUESTION, "documents": DOCUMENTS, "method": "log_likelihood"}
    results = post(server, "/v1/rerank", body)["results"]
    by_index = {result["index"]: result["relevance_score"] for result in results}
    expected = [mean_logprob(reference, f"{document}\n\n", QUESTION) for document in DOCUMENTS]
    assert [by_index[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-3)
    assert results[0]["document"]["text"] == "Paris is the capital of France."


def test_many_pairs_are_all_scored(server: Server) -> None:
    texts = [f"Number {place}" for place in range(70)]
    answer = post(server, "/v1/score", {"text_1": "Count.", "text_2": texts, "method": "log_likelihood"})
    found = scores(answer)
    alone = post(server, "/v1/score", {"text_1": "Count.", "text_2": texts[41], "method": "log_likelihood"})
    assert found[41] == scores(alone)[0]
    assert all(-20 < score < 0 for score in found)
