"""B15: grammars that were made to hang, on the real engine, while others stream."""

import json
import threading
from typing import Any

import httpx
import pytest

from tests.battery.answers import Door, error_of
from tests.battery.conftest import Battery
from tests.e2e.server import wait_until

CHAT = "/v1/chat/completions"
# So long a grammar may be compiled on a machine that has nothing else to do.
COMPILE_S = 2.0


def wide(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema] * 10}
    return schema


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def tool(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters, "strict": True}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def held(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


DEEP_TEXT = '{"anyOf":[' * 10_000 + "{}" + "]}" * 10_000
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
MULTIPLES = {"type": "integer", "allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]}
HOSTILE: dict[str, dict[str, Any]] = {
    "regex (a+)+$": {"guided_regex": "(a+)+$"},
    "regex 100,000 times": {"guided_regex": "[a-z]{1,100000}"},
    "regex squared": {"guided_regex": "(a{1,1000}){1,1000}"},
    "regex deep": {"guided_regex": "(" * 50_000 + "a" + ")" * 50_000},
    "regex long": {"guided_regex": "x" * 200_000},
    "regex bad": {"guided_regex": "(a"},
    "ref to itself": held({"$ref": "#"}),
    "ref loop": held(LOOP),
    "ref to a file": held({"$ref": "file:///etc/passwd"}),
    "anyOf 10^3": held(wide(3)),
    "anyOf 10^4": held(wide(4)),
    "deep": held(deep(25)),
    "10,000 deep": {"guided_json": DEEP_TEXT},
    "enum": held({"enum": [f"v{i}" for i in range(20_000)]}),
    "enum too large": held({"enum": [f"v{i}" for i in range(100_000)]}),
    "bad pattern": held({"type": "string", "pattern": "(a"}),
    "pattern no string": held({"type": "string", "pattern": 7}),
    "bad type": held({"type": "strin"}),
    "type no name": held({"type": {"a": 1}}),
    "type number": held({"type": 7}),
    "properties": held({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5_000)}}),
    "a megabyte": held({"description": "x" * 2**20}),
    "multipleOf": held({"type": "integer", "multipleOf": 99_999_999}),
    "multiples": held(MULTIPLES),
    "items": held({"type": "array", "minItems": 2**31, "items": {"type": "string"}}),
    "lark loop": {"guided_grammar": "start: start"},
    "lark deep": {"guided_grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "lark multipleOf": {"guided_grammar": 'start: %json {"type":"integer","multipleOf":99999999}'},
    "tool pattern": tool({"type": "object", "properties": {"a": {"type": "string", "pattern": "(a"}}}),
    "tool type": tool({"type": "strin"}),
    "tool ref loop": tool(LOOP),
    "tool multipleOf": tool({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 99_999_999}}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_b15_a_hostile_grammar_is_refused_or_obeyed_and_stalls_nobody(straight: Door, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, **HOSTILE[name]}
    answer = straight.post(CHAT, body)
    assert answer.status_code in (200, 400), answer.text[:500]
    if answer.status_code == 400:
        error = error_of(answer.content)
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 600
    if "tools" not in body:
        # The next one does not wait behind it for ever.
        quick = {"messages": "x", "max_tokens": 4, "guided_regex": "ab"}
        harmless = straight.post(CHAT, quick)
        assert harmless.json()["choices"][0]["message"]["content"] == "ab"
        # What hangs takes minutes; what is merely slow, on a slow machine, a few times as long as it may.
        assert answer.elapsed.total_seconds() < 10 * (COMPILE_S + harmless.elapsed.total_seconds())


def send_schemas(port: int, numbers: range, problems: list[Any]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        for number in numbers:
            schema = {
                "type": "object",
                "properties": {f"name_{number}": {"type": "string", "maxLength": 1 + number % 50}},
                "required": [f"name_{number}"],
                "additionalProperties": False,
            }
            body = {"messages": "x", "max_tokens": 1, "temperature": 0, **held(schema)}
            answer = client.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
            if answer.status_code != 200:
                problems.append((number, answer.status_code, answer.text[:300]))


@pytest.mark.parametrize("count", [64, pytest.param(1_000, marks=pytest.mark.nightly)])
def test_b15_many_different_schemas_leave_nothing_behind(straight: Door, unharmed: Battery, count: int) -> None:
    """The cache of compiled grammars holds 128: behind that, memory stays where it is."""
    problems: list[Any] = []

    def run(numbers: range) -> None:
        quarter = len(numbers) // 4
        parts = [range(numbers.start + i * quarter, numbers.start + (i + 1) * quarter) for i in range(4)]
        threads = [threading.Thread(target=send_schemas, args=(straight.port, part, problems)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(range(10_000, 10_000 + 136))
    before = int(unharmed.server.worker()["memory_bytes"])
    run(range(20_000, 20_000 + count))
    wait_until(lambda: unharmed.server.worker()["running"] <= 1, "the schemas to end", 60)
    grown = int(unharmed.server.worker()["memory_bytes"]) - before
    assert not problems, problems[:3]
    assert grown < 128 * 2**20, f"{grown / 2**20:.0f} MiB"
