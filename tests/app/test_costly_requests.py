"""What a few bytes of a request could make the server do is bounded before it is begun."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from app.api.messages.request import CountTokensRequest, MessagesRequest
from app.api.responses.schemas import ResponseRequest
from app.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    validation,
)
from app.api.schemas.messages import MAX_PARTS
from app.api.scoring import RerankRequest, ScoreRequest
from app.api.service import MAX_UNKNOWN_TOLD
from app.api.stored import UpdateRequest
from app.api.values import ApiRequest
from app.errors import ApiError
from app.text import offload
from tests.app.scripted_pool import ScriptedPool, refusal, tokens
from tests.app.test_request_checks import check_error
from tests.app.tiny import IM_END
from tests.app.tool_models import CHAT

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def conversation(messages: int, calls: int = 0, parts: int = 0) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": "x"}] * parts or "x"
    own = {"tool_calls": [CALL] * calls} if calls else {}
    return [{"role": "user", "content": "x"}, *[{"role": "assistant", "content": content, **own}] * messages]


@pytest.mark.parametrize("kind", ["calls", "parts"])
def test_parts_and_calls_of_all_messages_together_have_a_limit(client: FlaskClient, kind: str) -> None:
    just_so = client.post(CHAT, json={"messages": conversation(MAX_PARTS // 128, **{kind: 128})})
    assert "together" not in check_error(just_so)["message"]  # it is too long for the model
    error = check_error(client.post(CHAT, json={"messages": conversation(MAX_PARTS // 128 + 1, **{kind: 128})}))
    assert (error["param"], "together" in error["message"]) == ("messages", True)


def test_arguments_of_many_calls_are_not_read_on_the_hub(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    original = offload.off_hub

    def noted(function: Any, *args: Any) -> Any:
        moved.append(function.__name__)
        return original(function, *args)

    monkeypatch.setattr(offload, "off_hub", noted)
    client.post("/tokenize", json={"messages": conversation(1, calls=64)})
    assert "_conversation" in moved
    moved.clear()
    assert client.post("/tokenize", json={"messages": conversation(1)}).status_code == 200
    assert "_conversation" not in moved


MANY = 200_000
MINIMAL: dict[type[ApiRequest], dict[str, Any]] = {
    ChatRequest: {"messages": "x"},
    CompletionRequest: {"prompt": "x"},
    EmbeddingRequest: {"input": "x"},
    TokenizeRequest: {"messages": "x"},
    DetokenizeRequest: {"tokens": [1]},
    ResponseRequest: {"input": "x"},
    MessagesRequest: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    CountTokensRequest: {"messages": [{"role": "user", "content": "x"}]},
    ScoreRequest: {"text_1": "x", "text_2": "y"},
    RerankRequest: {"query": "x", "documents": ["y"]},
    UpdateRequest: {"metadata": {}},
}
# Lists that are not fields themselves.
BELOW: list[tuple[type[ApiRequest], Any]] = [
    (ChatRequest, lambda many: {"messages": [{"role": "user", "content": many}]}),
    (ChatRequest, lambda many: {"messages": [{"role": "assistant", "content": None, "tool_calls": many}]}),
    (
        ChatRequest,
        lambda many: {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": many}}},
    ),
    (ResponseRequest, lambda many: {"input": [{"role": "user", "content": many}]}),
    (ResponseRequest, lambda many: {"input": [{"type": "reasoning", "summary": many}]}),
    (ResponseRequest, lambda many: {"input": [{"type": "reasoning", "content": many, "summary": []}]}),
    (ResponseRequest, lambda many: {"input": [{"type": "function_call_output", "call_id": "c", "output": many}]}),
    (ResponseRequest, lambda many: {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": many}}),
    (MessagesRequest, lambda many: {"messages": [{"role": "user", "content": many}]}),
    (
        MessagesRequest,
        lambda many: {
            "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": many}]}]
        },
    ),
]
FIELDS: list[tuple[type[ApiRequest], Any]] = [
    (schema, lambda many, field=field: {field: many}) for schema in MINIMAL for field in sorted(schema.model_fields)
]


@pytest.mark.parametrize(
    ("schema", "fields"),
    [*FIELDS, *BELOW],
    ids=[f"{schema.__name__}-{number}" for number, (schema, _) in enumerate([*FIELDS, *BELOW])],
)
def test_no_list_is_read_far_beyond_its_limit(
    monkeypatch: pytest.MonkeyPatch, schema: type[ApiRequest], fields: Any
) -> None:
    """pydantic makes an error of some hundred bytes for each item that is wrong, and holds everybody up meanwhile."""
    made = [0]
    original = validation._as_api_error

    def noted(error: Any) -> Any:
        made.append(error.error_count())
        return original(error)

    monkeypatch.setattr(validation, "_as_api_error", noted)
    for wrong in ({}, 1, None, {"type": "function"}):
        with pytest.raises(ApiError):
            validation.validate(schema, {**MINIMAL[schema], **fields([wrong] * MANY), "n": "refused at last"}, True)
        assert max(made) < 3_000, wrong


PART = {"type": "input_text", "text": "x"}


@pytest.mark.parametrize(
    "items",
    [
        [{"role": "user", "content": [PART] * (MAX_PARTS + 1)}],
        [{"role": "user", "content": [PART] * 128}] * (MAX_PARTS // 128 + 1),
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}] * (MAX_PARTS + 1)}],
        [{"type": "function_call_output", "call_id": "c", "output": [PART] * (MAX_PARTS + 1)}],
    ],
    ids=["one", "many", "summary", "output"],
)
def test_parts_of_a_responses_input_have_a_limit_before_they_are_read(
    client: FlaskClient, pool: ScriptedPool, items: list[dict[str, Any]]
) -> None:
    pool.reply = refusal("overloaded")
    error = check_error(client.post("/v1/responses", json={"input": items}))
    assert (error["param"], "parts together" in error["message"]) == ("input", True)


def test_include_has_a_limit(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = refusal("overloaded")
    error = check_error(client.post("/v1/responses", json={"input": "x", "include": ["x"] * 65}))
    assert error["param"].startswith("include")


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_unknown_fields_are_told_of_so_far_and_no_further(client: FlaskClient, pool: ScriptedPool, path: str) -> None:
    pool.reply = tokens([], stop=IM_END)
    message = {"role": "user", "content": "x", "a" * 10_000: 1, **{f"k{place}": 1 for place in range(9_000)}}
    field = "messages" if path == CHAT else "input"
    answer = client.post(path, json={field: [message] * 3})
    assert answer.status_code == 200
    warnings = answer.get_json()["warnings"]
    assert len(warnings) == MAX_UNKNOWN_TOLD + 1
    assert warnings[1] == f"Unknown field, ignored: {field}[0].k0"
    assert warnings[-1] == f"{3 * 9_001 - MAX_UNKNOWN_TOLD} more unknown fields, ignored"
    assert len(answer.data) < 8_000
