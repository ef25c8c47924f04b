"""Requests made from the description, right and wrong ones, are answered as the description says (schemathesis).

A few examples of each operation are always the same ones, and are enough to notice a change. Many more: `make spec`.
"""

import json
import os
import re
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks

from tests.spec.conftest import description, validator, validator_of

EXAMPLES = int(os.environ.get("SPEC_EXAMPLES", "12"))
CHECKS: list[CheckFunction] = [
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
]
LEAKS = re.compile(r"Traceback|File \"|/home/|site-packages|\.py\b|0x[0-9a-f]{6}")

# What no shape can tell: fields that contradict each other, the model, or what is stored.
MEANINGS = [
    re.compile(each)
    for each in (
        r"cannot be combined|is not combined|is only (allowed|for)|belongs to|needs |With beam search|neither takes",
        r"context length|must be at least 0 and below \d+|at most \d+ sequences|min_tokens|embeddings have"
        r" \d+ dimensions|is not text, and",
        r"An empty text has no tokens|[Gg]ive either|must have as many texts|best_of must not be less",
        r"is not JSON|must be a JSON schema|the JSON text of an object|The arguments of a function are an object",
        r"The last message|may be empty|cannot have \w+ blocks|No tool_use block before|content: is required",
        r"only messages of|id of a call before|name of a function that was called|No function call before it",
        r"Two tools have|no tools? to call|There is no tool|must be less than max_tokens|Only a final message",
        r"variable of the template|no tokens for it|takes only|is not stored|does not know|has no chat template",
        r"cannot be told a",
    )
]

schema = schemathesis.openapi.from_dict(description())
# One URL of each view; what comes with a GET by itself is tested with the rules of the application.
OPERATIONS = [
    each
    for each in (each.ok() for each in schema.get_all_operations())
    if each.method.upper() not in ("HEAD", "OPTIONS") and each.path not in ("/score", "/rerank", "/v2/rerank")
]


def named(operation: Any) -> str:
    return f"{operation.method.upper()} {operation.path}"


@cache
def request_validator(path: str, method: str) -> Any:
    """The validator of an operation's body; None if it has none."""
    operation = description()["paths"][path][method]
    if "requestBody" not in operation:
        return None
    return validator_of(operation["requestBody"]["content"]["application/json"]["schema"])


@cache
def event_validator(path: str, method: str) -> Any:
    """The validator of the data of an operation's events."""
    content = description()["paths"][path][method]["responses"]["200"]["content"]
    return validator_of(content["text/event-stream"]["x-event"])


def body_is_valid(case: Case) -> bool | None:
    """Whether the body is what the description asks for; None if it asks for none."""
    validate = request_validator(case.operation.path, case.operation.method.lower())
    if validate is None:
        return None
    try:
        body = json.loads(json.dumps(case.body))
    except (TypeError, ValueError):
        return False
    return bool(validate.is_valid(body))


def check_events(case: Case, text: str) -> None:
    """Every event of a stream is what the description says, and the last one is the end."""
    datas = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    lines = {line.partition(":")[0] for line in text.split("\n")}
    assert lines <= {"", "data", "event", "id"}, lines
    assert datas, text
    validate = event_validator(case.operation.path, case.operation.method.lower())
    for data in datas:
        if data != "[DONE]":
            error = next(validate.iter_errors(json.loads(data)), None)
            assert error is None, f"{data}: {error}"
    last = datas[-1]
    assert last == "[DONE]" or "error" in last or json.loads(last)["type"].startswith(("message_stop", "response.")), (
        last
    )


def check_error(case: Case, response: Any) -> None:
    """An error is one of the shape that its clients know, and tells nothing of the inside."""
    family = "Anthropic" if case.operation.path.startswith("/v1/messages") else ""
    body = json.loads(response.text)
    error = next(validator(f"#/components/schemas/{family}ErrorResponse").iter_errors(body), None)
    assert error is None, error
    assert LEAKS.search(response.text) is None, response.text
    assert response.headers.get("content-type", response.headers.get("Content-Type")) in (
        "application/json",
        ["application/json"],
    )


def was_too_slow(case: Case, response: Any) -> bool:
    """Whether the request ran out of the little time that it gave itself."""
    asked = case.body.get("timeout") if isinstance(case.body, dict) else None
    limits = [asked]
    with suppress(ValueError):
        limits.append(float((case.headers or {}).get("X-Request-Timeout", "")))
    return response.status_code in (429, 503) and any(isinstance(each, int | float) and each < 10 for each in limits)


def blames_a_header(case: Case, text: str) -> bool:
    """Whether the request was refused for one of its headers, which says nothing of its body."""
    message: str = json.loads(text)["error"]["message"]
    return message.startswith(tuple(f"{name} must be" for name in case.headers or {}))


@pytest.mark.parametrize("operation", OPERATIONS, ids=named)
def test_requests_as_described_are_answered_as_described(world: Flask, operation: Any) -> None:
    examine(world, operation, GenerationMode.POSITIVE)


@pytest.mark.parametrize("operation", [each for each in OPERATIONS if len(each.body)], ids=named)
def test_requests_that_break_the_description_are_refused(world: Flask, operation: Any) -> None:
    examine(world, operation, GenerationMode.NEGATIVE)


def examine(world: Flask, operation: Any, mode: GenerationMode) -> None:
    """Send generated requests and judge the answers."""
    operation.app = world

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="SPEC_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        judge(case)

    send()


def plain(value: Any) -> Any:
    """1.0 is an integer for JSON Schema, but not here, which no schema can tell: the description says it in words."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def judge(case: Case) -> None:
    case.body = plain(case.body)
    response = case.call()
    text = response.content.decode()
    status = response.status_code
    if was_too_slow(case, response):
        return
    assert status < 500, text
    if status >= 400:
        check_error(case, response)
    elif response.headers["content-type"][0].startswith("text/event-stream"):
        check_events(case, text)
        return
    case.validate_response(response, checks=CHECKS)
    valid = body_is_valid(case)
    if valid is False:
        assert 400 <= status < 500, f"taken though it is wrong: {case.body!r}"
    elif valid and status == 400 and not blames_a_header(case, text):
        assert any(each.search(text) for each in MEANINGS), f"refused though it is right: {case.body!r}: {text}"
