"""docs/api.md has every field of every request, and every field that OpenAI's client can send is done or has a name."""

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from app.api import fields
from app.api.reference.__main__ import main
from app.api.reference.known import known_fields
from app.api.reference.tables import names_in, tables
from app.api.responses.schemas import ResponseRequest
from app.api.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from app.api.values import ApiRequest
from tests.app.scripted_pool import ScriptedPool
from tests.spec.conftest import answer_at_once

DOCUMENT = Path(__file__).parents[3] / "docs" / "api.md"
README = Path(__file__).parents[3] / "README.md"

RESOURCES: dict[str, tuple[type[ApiRequest], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": "Hello"}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hello"}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "Hello"}),
    "/v1/responses": (ResponseRequest, {"input": "Hello"}),
}
TYPES: dict[str, list[Any]] = {
    "/v1/chat/completions": [
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ],
    "/v1/completions": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "/v1/embeddings": [embedding_create_params.EmbeddingCreateParams],
    "/v1/responses": [
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
# A request with a meaningful value for each field; what else it needs is in it. Everything else: what it must be.
VALUES: dict[str, dict[str, Any]] = {
    "background": {"background": False},
    "best_of": {"best_of": 1},
    "dimensions": {"dimensions": 4},
    "echo": {"echo": True},
    "encoding_format": {"encoding_format": "base64"},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "include": {"include": ["message.output_text.logprobs"]},
    "input": {},
    "instructions": {"instructions": "Be brief."},
    "logit_bias": {"logit_bias": {"5": 1.5}},
    "max_completion_tokens": {"max_completion_tokens": 7},
    "max_output_tokens": {"max_output_tokens": 7},
    "max_tokens": {"max_tokens": 7},
    "max_tool_calls": {"max_tool_calls": 2},
    "messages": {},
    "metadata": {"metadata": {"a": "b"}},
    "model": {"model": "tiny"},
    "n": {"n": 2},
    "parallel_tool_calls": {"parallel_tool_calls": True},
    "presence_penalty": {"presence_penalty": -0.5},
    "prompt": {},
    "prompt_cache_key": {"prompt_cache_key": "k"},
    "prompt_cache_options": {"prompt_cache_options": {"mode": "explicit"}},
    "prompt_cache_retention": {"prompt_cache_retention": "24h"},
    "reasoning": {"reasoning": {"summary": "auto"}},
    "reasoning_effort": {"reasoning_effort": "none"},
    "response_format": {"response_format": {"type": "json_object"}},
    "safety_identifier": {"safety_identifier": "x"},
    "seed": {"seed": 7},
    "service_tier": {"service_tier": "auto"},
    "stop": {"stop": ["END"]},
    "store": {"store": False},
    "stream": {"stream": True},
    "temperature": {"temperature": 0.5},
    "text": {"text": {"format": {"type": "json_object"}}},
    "tool_choice": {"tool_choice": "none"},
    "tools": {"tools": []},
    "top_p": {"top_p": 0.5},
    "truncation": {"truncation": "auto"},
    "user": {"user": "u"},
    "verbosity": {"verbosity": "medium"},
}
OWN_VALUES: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/chat/completions", "logprobs"): {"logprobs": True},
    ("/v1/completions", "logprobs"): {"logprobs": 2},
    ("/v1/chat/completions", "top_logprobs"): {"logprobs": True, "top_logprobs": 2},
    ("/v1/responses", "top_logprobs"): {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ("/v1/chat/completions", "stream_options"): {"stream": True, "stream_options": {"include_usage": True}},
    ("/v1/completions", "stream_options"): {"stream": True, "stream_options": {"include_usage": True}},
    ("/v1/responses", "stream_options"): {"stream": True, "stream_options": {"include_obfuscation": False}},
    # It must be one that is stored: tests/app/responses.
    ("/v1/responses", "previous_response_id"): {"previous_response_id": None},
    # This model's tokenizer has no tokens for it: tests/app/test_completions.py.
    ("/v1/completions", "suffix"): {"suffix": ""},
}


def official(url: str) -> set[str]:
    """The fields that the installed client can send."""
    return set().union(*(kind.__annotations__ for kind in TYPES[url]))


EVERY = [(url, name) for url in RESOURCES for name in sorted(official(url))]


@pytest.mark.parametrize(("url", "name"), EVERY)
def test_every_field_of_the_official_client_is_known(url: str, name: str) -> None:
    model = RESOURCES[url][0]
    known = known_fields(model)
    assert name in model.model_fields or name in known.refused or name in known.harmless


@pytest.mark.parametrize(("url", "name"), EVERY)
def test_a_field_of_the_official_client_does_what_the_table_says(
    client: FlaskClient, pool: ScriptedPool, url: str, name: str
) -> None:
    pool.reply = answer_at_once
    model, least = RESOURCES[url]
    if name in known_fields(model).refused:
        response = client.post(url, json={**least, name: {"meaningful": 1}})
        assert (response.status_code, response.get_json()["error"]["param"]) == (400, name)
        return
    value = OWN_VALUES.get((url, name)) or VALUES[name]
    response = client.post(url, json={**least, **value})
    assert response.status_code == 200, response.text
    assert "warnings" not in response.text


@pytest.mark.parametrize("url", RESOURCES)
def test_what_asks_for_nothing_is_no_reason_to_refuse(client: FlaskClient, pool: ScriptedPool, url: str) -> None:
    pool.reply = answer_at_once
    model, least = RESOURCES[url]
    for name, values in known_fields(model).refused.items():
        for value in (None, *values):
            response = client.post(url, json={**least, name: value})
            assert response.status_code == 200, (name, value, response.text)


def test_the_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", str(DOCUMENT), str(README)]) == 0, capsys.readouterr().err


def test_every_table_has_a_place() -> None:
    assert names_in(DOCUMENT.read_text(encoding="utf-8")) == set(tables())


def test_a_table_that_is_out_of_date_is_noticed_and_written_anew(tmp_path: Path) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    other = tmp_path / "api.md"
    other.write_text(document.replace("| `top_k` | done | 40 |", "| `top_k` | done | 41 |", 1))
    assert main(["--check", str(other)]) == 1
    assert main([str(other)]) == 0
    assert other.read_text() == document


def test_refused_and_harmless_fields_are_different_ones() -> None:
    assert not set(fields.NEUTRAL) & set(fields.HARMLESS)


@pytest.mark.parametrize("url", RESOURCES)
def test_every_field_says_what_it_does(url: str) -> None:
    assert all(field.description for field in RESOURCES[url][0].model_fields.values())
