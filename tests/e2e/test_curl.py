"""The demo's documentation, command for command."""

import json
import math
import subprocess
from typing import Any

import pytest

from tests.e2e.server import Server
from tests.sse import data_events

JSON = ("-H", "Content-Type: application/json")


def curl(server: Server, path: str, body: str | None = None, *options: str) -> str:
    data = [*JSON, "-d", body] if body is not None else []
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "120", *options, server.url + path, *data],
        capture_output=True, text=True, timeout=130, check=True,
    )  # fmt: skip
    return done.stdout


def chat(server: Server, body: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(curl(server, "/v1/chat/completions", body))
    return answer


def test_completion(server):
    answer = json.loads(curl(server, "/v1/completions", '{"prompt": "请你介绍一下中国的首都", "max_tokens": 24}'))
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice["text"].strip()
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_completion_with_the_demos_defaults_ends_by_itself_or_at_512_tokens(server):
    answer = json.loads(curl(server, "/v1/completions", '{"prompt": "Say hello.", "seed": 1}'))
    assert answer["choices"][0]["finish_reason"] == (
        "length" if answer["usage"]["completion_tokens"] == 512 else "stop"
    )


def test_chat(server):
    body = (
        '{"messages": [{"role": "user","content": "如何制作个人网站?"}], "repetition_penalty": 1.0, "max_tokens": 24}'
    )
    answer = chat(server, body)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip()


def test_chat_of_three_turns(server):
    body = """{"messages": [
        {"role": "user","content": "给我讲一些有关杭州的故事吧"},
        {"role": "assistant","content": "您好！我可以为您提供有关杭州的故事。杭州位于中国东部，有着悠久历史。"},
        {"role": "user","content": "还有其他的吗？"}
        ], "repetition_penalty": 1.1, "max_tokens": 16}"""
    answer = chat(server, body)
    assert answer["choices"][0]["message"]["content"].strip()


def test_chat_with_messages_as_text(server):
    assert chat(server, '{"messages": "Say hello.", "max_tokens": 4}')["choices"][0]["message"]["content"]


def test_embedding(server):
    answer = json.loads(curl(server, "/v1/embeddings", '{"input": "今天天气真不错"}'))
    assert answer["object"] == "list"
    (item,) = answer["data"]
    assert (item["object"], item["index"], len(item["embedding"])) == ("embedding", 0, 576)
    assert math.hypot(*item["embedding"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_are_server_sent_events(server, path):
    question = '"messages": "Count to five."' if "chat" in path else '"prompt": "Count to five."'
    shown = curl(server, path, f'{{{question}, "stream": true, "max_tokens": 6}}', "-N", "-i")
    head, _, body = shown.partition("\n\n") if "\r" not in shown else shown.partition("\r\n\r\n")
    assert "text/event-stream; charset=utf-8" in head
    assert "X-Accel-Buffering: no" in head
    chunks = data_events(body.replace("\r\n", "\n"))
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_models_and_health(server):
    models = json.loads(curl(server, "/v1/models"))["data"]
    assert "llama-3-chinese" in [model["id"] for model in models]
    assert all(model["max_model_len"] == 8192 for model in models)
    for path in ("/livez", "/readyz", "/health"):
        assert curl(server, path, None, "-o", "/dev/null", "-w", "%{http_code}") == "200"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", '{"messages": "x", "temperature": 2.1}', 400, "temperature"),
        ("/v1/chat/completions", '{"messages": "x", "num_beams": 2, "do_sample": true}', 400, "do_sample"),
        ("/v1/chat/completions", '{"messages": "x", "model": "nope"}', 404, "model"),
        ("/v1/completions", "{", 400, None),
        ("/v1/completions", '{"prompt": "x", "max_tokens": 9000}', 400, "max_tokens"),
        ("/nowhere", "{}", 404, None),
    ],
)
def test_errors_have_openais_shape(server, path, body, status, param):
    shown = curl(server, path, body, "-w", "\n%{http_code}")
    text, _, code = shown.rpartition("\n")
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (int(code), error["param"]) == (status, param)
