"""B1, B3, B5 to B9: bodies that are no harmless JSON, on every route that takes one, through both doors."""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.battery.answers import Door, check_answer
from tests.battery.conftest import Battery

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
ROUTES += ("/v1/score", "/v1/rerank", "/tokenize", "/detokenize")
CAP = 8 * 1024 * 1024

NO_OBJECT = {
    "empty": b"",
    "half": b"{",
    "comma": b'{"messages": "x",}',
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"7",
}
NO_NUMBER = {
    "NaN": b'{"messages": "x", "temperature": NaN}',
    "Infinity": b'{"messages": "x", "temperature": Infinity}',
    "-Infinity": b'{"messages": "x", "logit_bias": {"1": -Infinity}}',
    "1e999": b'{"messages": "x", "metadata": {"a": [1e999]}}',
}
NO_UTF8 = {
    "invalid": b'{"messages": "\xff"}',
    "overlong": b'{"messages": "\xc0\xaf"}',
    "surrogate": b'{"messages": "\xed\xa0\x80"}',
    "utf-16": '{"messages": "x"}'.encode("utf-16"),
    "utf-32": '{"messages": "x"}'.encode("utf-32"),
    "mark": '{"messages": "x"}'.encode("utf-8-sig"),
}
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LISTS = b"[" * 100_000 + b"]" * 100_000
TOO_DEEP = {
    "body": DEEP,
    "metadata": b'{"messages": "x", "metadata": ' + DEEP + b"}",
    "tool schema": b'{"messages": "x", "tools": [{"type": "function", "function": {"name": "f", "parameters": '
    + DEEP
    + b"}}]}",
    "unknown": b'{"messages": "x", "y": ' + LISTS + b"}",
    "65": b'{"messages": "x", "metadata": ' + b"[" * 64 + b"]" * 64 + b"}",
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NO_OBJECT)
def test_b1_what_is_no_json_object(door: Door, route: str, name: str) -> None:
    # Anthropic's errors have none.
    assert door.refusal(route, NO_OBJECT[name]).get("param") is None


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NO_NUMBER)
def test_b3_what_json_has_no_number_for(door: Door, route: str, name: str) -> None:
    door.refusal(route, NO_NUMBER[name])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", TOO_DEEP)
def test_b5_a_body_that_is_nested_too_deeply(door: Door, route: str, name: str) -> None:
    door.refusal(route, TOO_DEEP[name])


def test_b5_arguments_of_a_call_that_are_nested_too_deeply(door: Door) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": DEEP.decode()}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    param = door.refusal(CHAT, {"messages": messages})["param"]
    assert param is not None
    assert param.startswith("messages[1].tool_calls")


def test_b5_depth_is_refused_as_quickly_as_it_is_read(straight: Door) -> None:
    """Beside a flat body of the same size, so that the machine does not matter."""
    flat = b'{"messages": 7, "x": "' + b"x" * len(DEEP) + b'"}'
    times: dict[str, float] = {}
    for name, body in {"deep": TOO_DEEP["metadata"], "flat": flat}.items():
        tries = []
        for _ in range(10):
            begun = time.monotonic()
            straight.refusal(CHAT, body)
            tries.append(time.monotonic() - begun)
        times[name] = min(tries)
    assert times["deep"] < 10 * times["flat"] + 0.1, times


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NO_UTF8)
def test_b6_what_is_no_utf8(door: Door, route: str, name: str) -> None:
    door.refusal(route, NO_UTF8[name])


LONE = "\\ud83d"


@pytest.mark.parametrize(
    "body",
    [
        f'{{"messages": "{LONE}"}}',
        f'{{"messages": [{{"role": "user", "content": "a{LONE}b"}}]}}',
        f'{{"messages": "x", "stop": ["{LONE}"]}}',
        f'{{"messages": "x", "model": "{LONE}"}}',
        f'{{"messages": "x", "user": "{LONE}"}}',
        f'{{"messages": "x", "{LONE}": 1}}',
        f'{{"messages": "x", "guided_json": {{"const": "{LONE}"}}}}',
        '{"messages": "x", "guided_json": "{\\"const\\": \\"\\\\ud83d\\"}"}',
    ],
    ids=["text", "content", "stop", "model", "user", "key", "schema", "schema as text"],
)
def test_b7_half_a_character(door: Door, body: str) -> None:
    door.refusal(CHAT, body.encode())


def test_b8_a_nul_is_text(door: Door) -> None:
    body = {"messages": [{"role": "user", "content": "a\x00b"}], "max_tokens": 1}
    assert door.post(CHAT, body).status_code == 200
    assert door.post("/v1/embeddings", {"input": "a\x00b"}).status_code == 200
    counted = door.post("/tokenize", {"prompt": "a\x00b"})
    assert counted.status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("model", "a\x00b", 404),
        ("messages", [{"role": "user", "content": "x", "name": "a\x00b"}], 400),
        ("tools", [{"type": "function", "function": {"name": "a\x00b"}}], 400),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a\x00b", "schema": {}}}, 400),
        ("user", "a\x00b", 400),
    ],
)
def test_b8_a_nul_in_a_name_is_refused(door: Door, field: str, value: Any, status: int) -> None:
    param = door.refusal(CHAT, {"messages": "x", field: value}, status)["param"]
    assert param is not None
    assert param.startswith(field)


JSON_TYPE = {"Content-Type": "application/json"}
BIG = b'{"messages": "' + b"x" * CAP + b'"}'


def chunks() -> Iterator[bytes]:
    for start in range(0, len(BIG), 65536):
        yield BIG[start : start + 65536]


def test_b9_a_body_over_the_limit(door: Door) -> None:
    assert door.send("POST", CHAT, content=BIG, headers=JSON_TYPE).status_code == 413


def test_b9_a_body_over_the_limit_in_chunks(door: Door) -> None:
    assert door.send("POST", CHAT, content=chunks(), headers=JSON_TYPE).status_code == 413


@pytest.mark.parametrize("name", ["gzip", "x-gzip", "deflate", "br", "identity, gzip"])
def test_b9_a_compressed_body(door: Door, name: str) -> None:
    bomb = gzip.compress(b'{"messages": "' + b"x" * 50_000_000 + b'"}')
    headers = JSON_TYPE | {"Content-Encoding": name}
    assert door.send("POST", CHAT, content=bomb, headers=headers).status_code == 415


def test_b9_a_form(door: Door) -> None:
    files = {f"f{i}": (f"f{i}", b"x") for i in range(500)}
    assert door.send("POST", CHAT, files=files).status_code == 415
    assert door.send("POST", CHAT, data={"messages": "x"}).status_code == 415


def test_b9_a_long_header(door: Door) -> None:
    assert door.send("GET", "/livez", headers={"X-Long": "x" * 9_000}).status_code == 431


def test_b9_many_headers(door: Door, straight: Door) -> None:
    many = {f"X-{i}": "x" for i in range(120)}
    assert door.send("GET", "/livez", headers=many).status_code == 431
    assert straight.send("GET", "/livez").status_code == 200


def test_b9_a_long_url(door: Door) -> None:
    assert door.send("GET", "/" + "x" * 5_000).status_code == 414


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.nightly)])
def test_b9_many_bodies_at_the_limit_take_bounded_memory(straight: Door, unharmed: Battery, count: int) -> None:
    """Each body is read, then refused for what is in it: what it took is given back, and never more than twice its size
    for all that are there at a time.
    """
    body = b'{"messages": 7, "x": "' + b"x" * (CAP - 100) + b'"}'
    workers = unharmed.http_workers()
    straight.refusal(CHAT, body)
    before = sum(worker.memory_info().rss for worker in workers)
    problems: list[str] = []
    rounds = iter(range(count))
    lock = threading.Lock()

    def send() -> None:
        with httpx.Client(base_url=straight.url, timeout=120) as client:
            while True:
                with lock:
                    if next(rounds, None) is None:
                        return
                answer = client.post(CHAT, content=body, headers=JSON_TYPE)
                check_answer(answer.status_code, answer.headers, answer.content)
                if answer.status_code != 400:
                    problems.append(answer.text[:200])

    senders = [threading.Thread(target=send) for _ in range(count)]
    most = before
    for sender in senders:
        sender.start()
    while any(sender.is_alive() for sender in senders):
        most = max(most, sum(worker.memory_info().rss for worker in workers))
        time.sleep(0.02)
    assert not problems, problems[:3]
    # With few of them what each worker needs for the one that it checks counts as well.
    assert most - before < 2 * (count + 4) * CAP, f"{(most - before) / 2**20:.0f} MiB"


def test_b9_a_body_cannot_have_more_keys_or_values_than_the_gate_counts(door: Door) -> None:
    many_keys = {"messages": "x", "metadata": {f"k{i}": "v" for i in range(10_001)}}
    door.refusal(CHAT, many_keys)
    values = b'{"messages": "x", "y": [' + b"0," * 1_100_000 + b"0]}"
    door.refusal(CHAT, values)


def test_b9_a_message_of_the_gate_is_short_and_quotes_nothing(door: Door) -> None:
    secret = json.dumps({"messages": "s3cret-word"})[:-1].encode()
    message = door.refusal(CHAT, secret)["message"]
    assert len(message) < 300
    assert not re.search("s3cret", message)
