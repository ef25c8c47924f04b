"""What is wrong with a request is found before anything is asked of the pool, and named."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.app.scripted_pool import ScriptedPool, scored, tokens
from tests.app.tiny import IM_END

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
LEAKS = ("Traceback", 'File "', "/home/", "site-packages", ".py", "0x")


def check_error(response: Any, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    error = json.loads(response.data)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert not any(leak in response.text for leak in LEAKS), response.text
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"7",
        b'{"messages": "x", "temperature": NaN}',
        b'{"messages": "x", "temperature": Infinity}',
        b'{"messages": "x", "temperature": 1e999}',
        b'{"messages": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": "\\ud800"}',
        b'{"messages": "\xff"}',
        b'{"messages": "\xc0\xaf"}',
        '{"messages": "x"}'.encode("utf-16"),
        '{"messages": "x"}'.encode("utf-8-sig"),
        b'{"messages": "x", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"messages": "x", "metadata": ' + b"[" * 64 + b"]" * 64 + b"}",
    ],
)
@pytest.mark.parametrize("url", [CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize"])
def test_what_is_not_one_harmless_json_object_is_refused(client: FlaskClient, url: str, body: bytes) -> None:
    error = check_error(client.post(url, data=body, content_type="application/json"))
    assert error["type"] == "invalid_request_error"


INTEGERS = ("max_tokens", "n", "seed", "top_k", "num_beams", "min_tokens", "max_completion_tokens")
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "length_penalty")


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [True, 1.0, "1", [1], {}, 2**63, -(2**63) - 1, 10**30])
def test_only_an_integer_in_range_is_an_integer(client: FlaskClient, field: str, value: Any) -> None:
    body = json.dumps({**HELLO, field: value})
    assert check_error(client.post(CHAT, data=body, content_type="application/json"))["param"] == field


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [True, "0.5", [0.5], {}, -1e308, 1e308])
def test_only_a_number_in_range_is_a_number(client: FlaskClient, field: str, value: Any) -> None:
    assert check_error(client.post(CHAT, json={**HELLO, field: value}))["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", "x" * 1025),
        ("stop", 1),
        ("stop", [1]),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"420": 1}),
        ("logit_bias", {str(2**31): 1}),
        ("logit_bias", {"abc": 1}),
        ("logit_bias", {"1": 100.1}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {str(key): 1 for key in range(1025)}),
        ("logit_bias", []),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [420]),
        ("stop_token_ids", ["1"]),
        ("stream", "true"),
        ("stream", 1),
        ("do_sample", 0),
        ("early_stopping", "sometimes"),
        ("model", 7),
        ("timeout", 0),
        ("best_of", 21),
        ("best_of", 2),
        ("stream_options", {"include_usage": True}),
        ("min_tokens", 513),
        ("logprobs", 0),
        ("top_logprobs", 3),
        ("top_logprobs", 21),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("echo", True),
        ("suffix", "x"),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "b" * 270_000}}}),
        ("guided_json", "{"),
        ("guided_json", "[]"),
        ("guided_json", 7),
        ("guided_choice", []),
        ("guided_choice", [1]),
        ("guided_regex", ""),
        ("guided_regex", "x" * 270_000),
        ("guided_grammar", 7),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("priority", 1),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("store", 1),
        ("reasoning_effort", "low"),
        ("chat_template", "x"),
        ("prompt_embeds", "x"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_named(
    client: FlaskClient, pool: ScriptedPool, field: str, value: Any
) -> None:
    assert check_error(client.post(CHAT, json={**HELLO, field: value}))["param"].partition(".")[0] in (
        field,
        f"{field}[0]",
    )
    assert pool.jobs == []


def test_neutral_values_and_metadata_are_accepted_without_a_word(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    body = {
        **HELLO,
        "logprobs": False,
        "top_logprobs": None,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "n": 1,
        "best_of": 1,
        "stop": None,
        "stream": False,
        "logit_bias": None,
        "max_tokens": None,
        "modalities": ["text"],
    }
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "warnings" not in response.get_json()
    assert "X-Tailrace-Warnings" not in response.headers


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        (7, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "king", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([*HELLO["messages"], {"role": "user", "content": 7}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "user", "content": "x"}] * 4097, "messages"),
    ],
)
def test_a_bad_message_is_named(client: FlaskClient, messages: Any, param: str) -> None:
    assert check_error(client.post(CHAT, json={"messages": messages}))["param"] == param


def test_a_missing_field_is_named(client: FlaskClient) -> None:
    assert check_error(client.post(CHAT, json={}))["param"] == "messages"
    assert check_error(client.post(COMPLETIONS, json={}))["param"] == "prompt"
    assert check_error(client.post("/v1/embeddings", json={}))["param"] == "input"


@pytest.mark.parametrize(
    "prompt", [[], [[]], [1, "a"], [[1], [2.0]], [True], [-1], [420], [[1], [420]], {}, 1, None, ["a"] * 129]
)
def test_a_bad_prompt_is_named(client: FlaskClient, prompt: Any) -> None:
    assert check_error(client.post(COMPLETIONS, json={"prompt": prompt}))["param"].startswith("prompt")


def test_an_empty_prompt_without_any_token_is_refused(client: FlaskClient) -> None:
    assert check_error(client.post(COMPLETIONS, json={"prompt": "", "template": "raw"}))["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_beams": 2, "do_sample": True}, "do_sample"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": ["a"] * 100, "num_beams": 2}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 3, "num_beams": 3}, "best_of"),
        ({"prompt": ["a"] * 50, "best_of": 3}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"echo": True, "suffix": "x"}, "suffix"),
        ({"echo": True, "template": "chat"}, "template"),
        ({"suffix": "x"}, "suffix"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_values_that_contradict_each_other_are_named(client: FlaskClient, body: dict[str, Any], param: str) -> None:
    assert check_error(client.post(COMPLETIONS, json={"prompt": "a", **body}))["param"] == param


def test_more_than_the_context_holds_is_refused_with_its_own_code(client: FlaskClient, pool: ScriptedPool) -> None:
    too_much = check_error(client.post(CHAT, json={**HELLO, "max_tokens": 2048}))
    assert (too_much["code"], too_much["param"]) == ("context_length_exceeded", "max_tokens")
    too_long = check_error(client.post(COMPLETIONS, json={"prompt": [7] * 2048}))
    assert (too_long["code"], too_long["param"]) == ("context_length_exceeded", "prompt")
    absurd = check_error(client.post(CHAT, json={"messages": "x" * 5_000_000}))
    assert absurd["code"] == "context_length_exceeded"
    assert pool.jobs == []


def test_without_max_tokens_the_answer_takes_what_room_is_left(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    assert client.post(COMPLETIONS, json={"prompt": [7] * 2000}).status_code == 200
    assert pool.jobs[0].max_tokens == 48  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gpt-4", "../../etc/passwd", "/etc/passwd", "%2e%2e", "x" * 1000, "a\r\nb", "Tiny"])
def test_an_unknown_model_is_not_found(client: FlaskClient, name: str) -> None:
    error = check_error(client.post(CHAT, json={**HELLO, "model": name}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("name", ["tiny", "tiny-alias", "llama-3-chinese", None, ""])
def test_a_known_model_answers_under_its_name(client: FlaskClient, pool: ScriptedPool, name: str | None) -> None:
    pool.reply = tokens([], stop=IM_END)
    assert client.post(CHAT, json={**HELLO, "model": name}).get_json()["model"] == (name or "tiny")


def test_bodies_of_another_kind_are_415(client: FlaskClient) -> None:
    text = json.dumps(HELLO)
    check_error(client.post(CHAT, data=text, content_type="text/plain"), 415)
    check_error(client.post(CHAT, data={"a": "b"}), 415)
    check_error(client.post(CHAT, data=text, content_type="application/json; charset=utf-16"), 415)
    check_error(
        client.post(CHAT, data=text, content_type="application/json", headers={"Content-Encoding": "gzip"}), 415
    )


def test_a_body_over_the_limit_is_413(client: FlaskClient) -> None:
    body = b'{"messages": "' + b"x" * (8 * 1024 * 1024) + b'"}'
    check_error(client.post(CHAT, data=body, content_type="application/json"), 413)


def test_a_nul_is_a_character_like_others(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens([], stop=IM_END)
    assert client.post(CHAT, json={"messages": "a\x00b"}).status_code == 200


def test_flasks_own_errors_have_the_same_shape(client: FlaskClient) -> None:
    check_error(client.get("/nowhere"), 404)
    check_error(client.get("//v1/models"), 404)
    response = client.get("/v1/completions")
    check_error(response, 405)
    assert "POST" in response.headers["Allow"]


def test_an_unexpected_fault_says_nothing_about_itself(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret in /home/x.py")

    monkeypatch.setattr("app.api.turn.read_chat", broken)
    error = check_error(client.post(CHAT, json=HELLO), 500)
    assert error["type"] == "server_error"


def test_a_well_formed_request_id_comes_back(client: FlaskClient) -> None:
    assert client.get("/livez", headers={"X-Request-Id": "abc-123_X"}).headers["X-Request-Id"] == "abc-123_X"
    for bad in ("x" * 129, "a b", "ä", ""):
        assert client.get("/livez", headers={"X-Request-Id": bad}).headers["X-Request-Id"].startswith("req_")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [*INTEGERS, *NUMBERS, "messages", "model", "stop", "logit_bias", "stream", "stream_options", "tools", "x"]
FIELDS += ["logprobs", "top_logprobs", "prompt_logprobs", "response_format", "guided_json", "guided_choice", "best_of"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4), st.booleans())
def test_no_request_whatever_is_a_fault_of_ours(
    client: FlaskClient, pool: ScriptedPool, fields: dict[str, Any], with_messages: bool
) -> None:
    pool.reply = scored([], stop=IM_END)
    body = {**HELLO, **fields} if with_messages else fields
    response = client.post(CHAT, data=json.dumps(body), content_type="application/json")
    if response.status_code != 200:
        check_error(response, response.status_code)
    assert response.status_code in (200, 400, 404)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_length_that_has_no_room_is_named_as_it_was_asked_for(client: FlaskClient, field: str) -> None:
    error = check_error(client.post("/v1/chat/completions", json={"messages": "x", field: 100_000}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", field)
