"""The server's answers are those of ``transformers`` on the same weights, in float32, to the token."""

import base64
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.e2e.reference import Reference
from tests.e2e.server import Server

PROMPTS = [
    "What is the capital of France?",
    "请你介绍一下中国的首都",
    "如何制作个人网站?",
    "Write a haiku about the sea.",
    "List three fruits.",
    "Repeat after me: 😀🎉🚀 你好，世界",
    "def fibonacci(n):",
    "Why is the sky blue? Answer in one sentence.",
    "Translate to German: The cat sleeps on the sofa.",
    "1, 2, 3, 4, 5, 6,",
]
TOKENS = 24
GREEDY = {"do_sample": False, "max_tokens": TOKENS, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def greedy(reference: Reference) -> dict[str, str]:
    """The reference's greedy answer to each prompt."""
    return {text: reference.answer(reference.prompt(text), TOKENS) for text in PROMPTS}


def ask(server: Server, text: str, **options: Any) -> str:
    body = {"messages": [{"role": "user", "content": text}], **GREEDY, **options}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("text", PROMPTS)
def test_a_greedy_answer_is_that_of_transformers(server, greedy, text):
    assert ask(server, text) == greedy[text]


def test_sixteen_requests_in_flight_answer_as_each_one_alone(server, greedy):
    questions = [*PROMPTS, *PROMPTS[:6]]
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda text: ask(server, text), questions))
    assert answers == [greedy[text] for text in questions]


def test_the_demos_repetition_penalty_is_that_of_transformers(server, reference):
    text = PROMPTS[0]
    expected = reference.answer(reference.prompt(text), TOKENS, repetition_penalty=1.1)
    assert ask(server, text, repetition_penalty=1.1) == expected


@pytest.mark.parametrize("text", PROMPTS[:4])
def test_beam_search_is_that_of_transformers(server, reference, text):
    expected = reference.answer(reference.prompt(text), 12, num_beams=4)
    assert ask(server, text, num_beams=4, max_tokens=12) == expected


def test_beam_search_beside_other_requests_is_the_same(server, reference, greedy):
    expected = reference.answer(reference.prompt(PROMPTS[4]), 12, num_beams=4)
    with ThreadPoolExecutor(5) as pool:
        beams = pool.submit(ask, server, PROMPTS[4], num_beams=4, max_tokens=12)
        others = list(pool.map(lambda text: ask(server, text), PROMPTS[:4]))
        assert beams.result() == expected
    assert others == [greedy[text] for text in PROMPTS[:4]]


def test_a_prompt_of_token_ids_is_taken_as_it_is(server, reference):
    ids = reference.tokenizer("The three primary colours are").input_ids
    body = {"prompt": ids, **GREEDY, "max_tokens": 12}
    answer = server.http.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == reference.answer(ids, 12)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_a_raw_completion_has_no_template(server, reference):
    ids = reference.tokenizer("The three primary colours are").input_ids
    body = {"prompt": "The three primary colours are", "template": "raw", **GREEDY, "max_tokens": 12}
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == reference.answer(ids, 12)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_the_mean_of_the_last_hidden_states(server, reference, encoding):
    texts = ["今天天气真不错", "hello world", "a longer sentence with more than a handful of tokens in it 😀"]
    body = {"input": texts, "encoding_format": encoding}
    items = server.http.post("/v1/embeddings", json=body).json()["data"]
    for text, item in zip(texts, items, strict=True):
        vector = item["embedding"]
        if encoding == "base64":
            raw = base64.b64decode(vector)
            vector = struct.unpack(f"<{len(raw) // 4}f", raw)
        cosine = torch.cosine_similarity(torch.tensor(vector), reference.embedding(text), dim=0)
        assert cosine.item() > 1 - 1e-4
