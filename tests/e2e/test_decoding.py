"""Every way of decoding through the real server and the real model, beside one another, against transformers."""

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.e2e.reference import Reference
from tests.e2e.server import Server

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
QUESTION = "What is the capital of France?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Spain"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


def chat(server: Server, text: str = QUESTION, **options: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, **GREEDY, **options}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert "warnings" not in answer
    return answer


def complete(server: Server, **options: Any) -> dict[str, Any]:
    body = {"template": "raw", "max_tokens": 8, **GREEDY, **options}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert "warnings" not in answer
    return answer


def log_probs(reference: Reference, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(reference.model(torch.tensor([ids])).logits[0], dim=-1)


def test_chat_logprobs_are_the_models(server: Server, reference: Reference) -> None:
    choice = chat(server, logprobs=True, top_logprobs=3)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(e["token"] for e in entries) == choice["message"]["content"]
    prompt = reference.prompt(QUESTION)
    ids = reference.tokenizer(choice["message"]["content"]).input_ids
    table = log_probs(reference, prompt + ids)[len(prompt) - 1 :]
    for entry, row, token in zip(entries, table, ids, strict=False):
        assert entry["logprob"] == pytest.approx(float(row[token]), abs=2e-3)
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(float(row.max()), abs=2e-3)
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_echo_with_logprobs_scores_the_prompt(server: Server, reference: Reference) -> None:
    text = "The capital of France is"
    choice = complete(server, prompt=text, echo=True, logprobs=2, max_tokens=0)["choices"][0]
    assert choice["text"] == text
    scores = choice["logprobs"]
    ids = reference.tokenizer(text).input_ids
    table = log_probs(reference, ids)
    assert scores["token_logprobs"][0] is None
    for step, value in enumerate(scores["token_logprobs"][1:]):
        assert value == pytest.approx(float(table[step, ids[step + 1]]), abs=2e-3)
    assert "".join(scores["tokens"]) == text
    lengths = [len(token) for token in scores["tokens"]]
    assert scores["text_offset"] == [0, *itertools.accumulate(lengths)][:-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept_even_when_sampled_hot(client: openai.OpenAI, stream: bool) -> None:
    for seed in range(3):
        options: dict[str, Any] = {
            "model": "llama-3-chinese",
            "messages": [{"role": "user", "content": "Where is the Eiffel tower? Answer in JSON."}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "place", "strict": True, "schema": SCHEMA},
            },
            "temperature": 1.5,
            "seed": seed,
            "max_tokens": 200,
        }
        if stream:
            parts = [c for c in client.chat.completions.create(stream=True, **options) if c.choices]
            text = "".join(c.choices[0].delta.content or "" for c in parts)
        else:
            text = client.chat.completions.create(**options).choices[0].message.content or ""
        place = json.loads(text)
        assert set(place) == {"city", "country"}
        assert place["country"] in {"France", "Spain"}


def test_guided_choice_regex_and_grammar_hold(server: Server) -> None:
    asked: dict[str, dict[str, Any]] = {
        "Paris|Madrid": {"guided_choice": ["Paris", "Madrid"]},
        "[A-Z][a-z]{2,6}": {"guided_regex": "[A-Z][a-z]{2,6}"},
        "yes|no": {"guided_grammar": 'start: "yes" | "no"'},
    }
    for pattern, options in asked.items():
        choice = chat(server, temperature=1.2, do_sample=True, **options)["choices"][0]
        assert re.fullmatch(pattern, choice["message"]["content"]), choice
        assert choice["finish_reason"] == "stop"


def test_a_bad_grammar_is_a_400_that_names_the_field(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "guided_regex": "(unclosed"}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "guided_regex"


def test_beams_stream_what_they_would_answer(server: Server, client: openai.OpenAI, reference: Reference) -> None:
    expected = reference.answer(reference.prompt(QUESTION), 24, num_beams=4, length_penalty=2.0)
    extra = {"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.0}
    stream = client.chat.completions.create(
        model="llama-3-chinese",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        stream=True,
        extra_body=extra,
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == expected


def test_the_same_seed_gives_the_same_choices_alone_and_in_company(server: Server) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "seed": 42, "n": 3}
    alone = [c["message"]["content"] for c in chat(server, "Tell me a story.", **options)["choices"]]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(16) as threads:
        others = [threads.submit(chat, server, f"Count to {i}.", temperature=0.8, do_sample=True) for i in range(12)]
        again = chat(server, "Tell me a story.", **options)
        assert all(other.result()["choices"] for other in others)
    assert [c["message"]["content"] for c in again["choices"]] == alone


def test_best_of_returns_the_likeliest(server: Server) -> None:
    options: dict[str, Any] = {"prompt": "Once upon a time", "do_sample": True, "temperature": 1.2, "seed": 7}

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return float(sum(values) / len(values))

    every = complete(server, n=4, logprobs=0, **options)["choices"]
    best = complete(server, n=1, best_of=4, logprobs=0, **options)["choices"]
    assert [mean(c) for c in best] == [pytest.approx(max(mean(c) for c in every), abs=1e-3)]


def test_a_prompt_that_was_read_before_comes_from_the_cache(server: Server) -> None:
    text = "Summarise: " + "the river flows to the sea and the sea is wide. " * 12
    first = chat(server, text, max_tokens=4)["usage"]
    second = chat(server, text, max_tokens=4)["usage"]
    assert second["prompt_tokens"] == first["prompt_tokens"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert second["prompt_tokens"] - 16 <= cached < second["prompt_tokens"]


def test_presence_frequency_and_bias_change_what_is_said(server: Server) -> None:
    plain = chat(server, "Say one word.")["choices"][0]["message"]["content"]
    assert chat(server, "Say one word.", logit_bias={"2": 100})["choices"][0]["message"]["content"] == ""
    pushed = chat(server, "Say one word.", presence_penalty=2, frequency_penalty=2)["choices"][0]["message"]["content"]
    assert pushed != plain or len(set(plain.split())) == len(plain.split())


def test_min_tokens_and_ignore_eos_keep_going(server: Server) -> None:
    assert chat(server, max_tokens=20)["usage"]["completion_tokens"] < 20
    assert chat(server, max_tokens=20, min_tokens=15)["usage"]["completion_tokens"] >= 15
    answer = chat(server, max_tokens=20, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["finish_reason"] == "length"
