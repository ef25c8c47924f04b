"""Answers held to a form, fill in the middle, adapters: what the engine is told, and what a refusal says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer

from app.api.guided import one_of
from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, generate_job, refusal, tokens
from tests.app.test_chat import HELLO
from tests.app.tiny import IM_END, ids_of, tokenizer, write_card
from workers.messages import Grammar

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SCHEMA = {"type": "object", "properties": {"名": {"type": "string"}}, "required": ["名"]}
NASTY = ["yes", 'a"b', "a\\b", "x|y", "(", "[a-z]+", "a b", "<|im_end|>", "\n\t/", "也许", ".*", "$^{2}", "a-b#~&"]


def json_schema(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, **more}}


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        ({"response_format": json_schema()}, "json_schema", SCHEMA),
        ({"response_format": json_schema(strict=True, description="d")}, "json_schema", SCHEMA),
        ({"response_format": json_schema(strict=False)}, "json_schema", SCHEMA),
        ({"response_format": json_schema(schema=None)}, "json_schema", {}),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_regex": "[a-z]+", "response_format": {"type": "text"}}, "regex", "[a-z]+"),
        ({"guided_choice": ["yes", "no"]}, "regex", "(?:yes|no)"),
        ({"guided_grammar": 'start: "a" | "b"'}, "lark", 'start: "a" | "b"'),
        ({"response_format": {"type": "text"}}, None, None),
        ({"response_format": None, "guided_json": None, "guided_choice": None}, None, None),
    ],
)
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_the_grammar_reaches_the_engine(
    client: FlaskClient, pool: ScriptedPool, url: str, stream: bool, body: dict[str, Any], kind: str | None, source: Any
) -> None:
    pool.reply = tokens(ids_of("yes"), stop=IM_END)
    question = HELLO if url == CHAT else {"prompt": "Hello"}
    response = client.post(url, json={**question, **body, "stream": stream})
    assert response.status_code == 200, response.text
    assert "X-Tailrace-Warnings" not in response.headers
    grammar = generate_job(pool).grammar
    if kind is None:
        assert grammar is None
        return
    assert isinstance(grammar, Grammar)
    assert grammar.kind == kind
    assert (json.loads(grammar.source) if kind == "json_schema" else grammar.source) == source
    read: dict[str, Callable[[str], str]] = {
        "json_schema": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    made = read[grammar.kind](grammar.source)
    assert LLMatcher.validate_grammar(made) == ""


def test_choices_are_texts_whatever_characters_they_have() -> None:
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(one_of([*NASTY, ""]))) == ""
    # Python writes \x{2c} as \x2c, and means the same.
    pattern = re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\x{int(m[1], 16):02x}", one_of(NASTY)))
    assert all(pattern.fullmatch(text) for text in NASTY)
    assert not any(pattern.fullmatch(text) for text in ("x", "aaa", "z", "y", "b", ""))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", json_schema()),
        ("guided_json", SCHEMA),
        ("guided_regex", "("),
        ("guided_choice", ["a"]),
        ("guided_grammar", "start: nothing"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_the_engine_refuses_is_a_400_that_names_the_field(
    client: FlaskClient, pool: ScriptedPool, field: str, value: Any, stream: bool
) -> None:
    pool.reply = refusal("invalid", "the grammar cannot be used: because", cause="grammar")
    response = client.post(CHAT, json={**HELLO, field: value, "stream": stream})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == field
    pool.reply = refusal("invalid", "there is no room")
    response = client.post(CHAT, json={**HELLO, field: value, "stream": stream})
    assert (response.status_code, response.get_json()["error"]["param"]) == (400, None)


def test_the_line_of_a_grammar_that_is_refused_is_told(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = refusal("invalid", "the grammar cannot be used: because", cause="grammar", line=7)
    error = client.post(CHAT, json={**HELLO, "guided_grammar": "start: x"}).get_json()["error"]
    assert (error["param"], error["message"]) == ("guided_grammar", "the grammar cannot be used: because (line 7)")


def test_unknown_fields_of_a_format_are_reported(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    answer = client.post(CHAT, json={**HELLO, "response_format": json_schema(mood=1)}).get_json()
    assert answer["warnings"] == ["Unknown field, ignored: response_format.json_schema.mood"]


FAMILIES = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ["<PRE>", "<SUF>", "<MID>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
]


@pytest.mark.parametrize("marks", FAMILIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_suffix_makes_the_model_fill_in_the_middle(runtime: Path, marks: list[str], stream: bool) -> None:
    own = Tokenizer.from_str(tokenizer().to_str())
    own.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, vocab_size=own.get_vocab_size())).start()
    own.save(str(runtime / "tokenizer.json"))
    pool.reply = tokens(ids_of("return 1"), stop=IM_END)
    with application(runtime) as app:
        client = app.test_client()
        body = {"prompt": "def one():", "suffix": "\n# end", "stream": stream}
        assert client.post(COMPLETIONS, json=body).status_code == 200
    pool.stop()
    before, after, middle = (own.token_to_id(mark) for mark in marks)
    job = generate_job(pool)
    assert job.prompt == [before, *ids_of("def one():"), after, *ids_of("\n# end"), middle]
    assert {before, after, middle, IM_END} <= set(job.stop_token_ids)


def test_an_adapter_is_a_model_of_its_own(runtime: Path) -> None:
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, adapters=["poet"])).start()
    pool.reply = tokens(ids_of("ok"), stop=IM_END)
    with application(runtime) as app:
        client = app.test_client()
        listed = {each["id"]: each["parent"] for each in client.get("/v1/models").get_json()["data"]}
        assert listed == {"tiny": None, "tiny-alias": None, "llama-3-chinese": None, "poet": "tiny"}
        assert client.get("/v1/models/poet").get_json()["parent"] == "tiny"
        for name, adapter in (("poet", "poet"), ("tiny", ""), (None, "")):
            answer = client.post(CHAT, json={**HELLO, "model": name}).get_json()
            assert answer["model"] == (name or "tiny")
            assert generate_job(pool).adapter == adapter
        refused = client.post("/v1/embeddings", json={"input": "x", "model": "poet"})
    pool.stop()
    assert refused.status_code == 400
    assert refused.get_json()["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_every_parameter_of_decoding_reaches_the_engine(
    client: FlaskClient, pool: ScriptedPool, url: str, stream: bool
) -> None:
    pool.reply = tokens(ids_of("ok"), reason="length")
    question = HELLO if url == CHAT else {"prompt": "Hello"}
    body = {
        "max_tokens": 9,
        "min_tokens": 3,
        "n": 2,
        "seed": -(2**63),
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.05,
        "typical_p": 0.9,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -100, "6": 2.5},
        "stop_token_ids": [9, 8],
        "stream": stream,
    }
    assert client.post(url, json={**question, **body}).status_code == 200
    job = generate_job(pool)
    for name in ("seed", "temperature", "top_p", "top_k", "min_p", "typical_p"):
        assert getattr(job.sampling, name) == body[name]
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(job.sampling, name) == body[name]
    assert job.sampling.logit_bias == {5: -100.0, 6: 2.5}
    assert (job.max_tokens, job.min_tokens, job.n, job.salt) == (9, 3, 2, "")
    assert job.stop_token_ids == sorted({8, 9, IM_END})
    assert client.post(url, json={**question, **body, "ignore_eos": True, "seed": 2**63 - 1}).status_code == 200
    assert generate_job(pool).stop_token_ids == [8, 9]
    assert generate_job(pool).sampling.seed == 2**63 - 1
    beams = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never", "n": 2, "stream": stream}
    assert client.post(url, json={**question, **beams}).status_code == 200
    found = generate_job(pool).beams
    assert found is not None
    assert (found.num_beams, found.length_penalty, found.early_stopping) == (3, 0.5, "never")


@pytest.mark.parametrize("depth", [65, 960, 1_000, 100_000])
def test_a_schema_in_a_text_is_no_deeper_than_a_body(client, pool, depth):
    pool.reply = refusal("overloaded")
    text = '{"not":' * depth + "{}" + "}" * depth
    response = client.post("/v1/chat/completions", json={"messages": "x", "guided_json": text})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "guided_json"
