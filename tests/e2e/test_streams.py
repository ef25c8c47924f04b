"""Streams: whole characters, progress side by side, and an end to the work when the client leaves."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.server import Server, wait_until

ENDLESS = {"ignore_eos": True, "do_sample": False, "repetition_penalty": 1.0}


def pieces(server: Server, path: str = "/v1/chat/completions", **body: Any) -> Iterator[str]:
    """Yield each piece of text of a stream as it arrives."""
    with server.http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    text = choice["text"] if "text" in choice else choice["delta"].get("content")
                    if text:
                        yield text


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "prompt",
    [
        "中国的首都是北京。法国的首都是巴黎。中国的首都是北京。法国的首都是巴黎。中国的首都是",
        "😀🎉🚀👍🏽 😀🎉🚀👍🏽 😀🎉🚀👍🏽 😀🎉🚀👍🏽 😀🎉",
        "你好😀世界🎉 你好😀世界🎉 你好😀世界🎉 你好",
    ],
)
def test_chinese_and_emoji_arrive_whole_and_as_in_the_unstreamed_answer(server, prompt):
    body = {"prompt": prompt, "template": "raw", "max_tokens": 30, **ENDLESS}
    whole = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    streamed = list(pieces(server, "/v1/completions", **body))
    assert "".join(streamed) == whole
    assert any(ord(character) > 0x2E80 for character in whole)
    # Only the token limit may cut a character, at the very end.
    assert "\ufffd" not in "".join(streamed[:-1])
    # Each piece is valid text by itself: no half of a surrogate pair.
    assert "".join(piece.encode("utf-8").decode("utf-8") for piece in streamed) == whole


def test_a_sampled_answer_is_the_same_streamed_and_not(server):
    body = {"messages": message("Tell me about 杭州 😀"), "temperature": 1.8, "top_p": 1.0, "top_k": 0, "seed": 3,
            "max_tokens": 40}  # fmt: skip
    whole = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert "".join(pieces(server, **body)) == whole


def test_a_stop_string_never_shows_in_a_stream(server):
    body = {"messages": message("Count from one to ten in digits, separated by commas."), "max_tokens": 40, **ENDLESS}
    whole = "".join(pieces(server, **body))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    assert "".join(pieces(server, stop=stop, **body)) == whole[: whole.index(stop)]


def test_sixteen_streams_progress_together(server):
    """All have begun before the first one ends: nobody waits for another to finish."""
    begun, ended = [], []

    def read(number: int) -> None:
        for count, _ in enumerate(pieces(server, messages=message(f"Write about the number {number}."),
                                         max_tokens=96, **ENDLESS)):  # fmt: skip
            if count == 0:
                begun.append((time.monotonic(), number))
        ended.append(time.monotonic())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    assert max(begun)[0] < min(ended)


def test_a_long_prompt_does_not_stop_running_streams(server):
    arrivals: list[float] = []
    started = threading.Event()

    def read() -> None:
        for _ in pieces(server, messages=message("Tell me a long story."), max_tokens=300, **ENDLESS):
            arrivals.append(time.monotonic())
            if len(arrivals) == 3:
                started.set()

    # No part of an earlier prompt, or the prefix cache would have it: 1,600 tokens that are really read.
    long = {"prompt": [1000 + number for number in range(1600)], "max_tokens": 1, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        assert started.wait(60)
        sent = time.monotonic()
        response = server.http.post("/v1/completions", json=long)
        answered = time.monotonic()
        assert response.json()["usage"]["prompt_tokens"] == 1600
        meanwhile = [moment for moment in arrivals if sent <= moment <= answered]
        # 1,600 tokens are 13 chunks; the stream advances by about a token between two of them.
        assert len(meanwhile) >= 6
        gaps = [b - a for a, b in zip([sent, *meanwhile], [*meanwhile, answered], strict=True)]
        assert max(gaps) < (answered - sent) / 2
        reader.result()


# --- the client leaves


def send(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and return the socket, with nothing read yet."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + data)
    return connection


def busy(server: Server) -> bool:
    health = server.http.get("/health").json()
    return bool(health["queued"] or health["running"] or health["workers"][0]["running"])


def assert_soon_idle(server: Server) -> None:
    # A second on any machine but a very slow or busy one; what was asked for takes several times as long there too.
    wait_until(lambda: not busy(server), "the work to be cancelled", 15)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_tokens_come_ends_its_work(server, stream):
    wait_until(lambda: not busy(server), "an idle server", 30)
    body = {"messages": message("Tell me a story."), "max_tokens": 2000, "stream": stream, **ENDLESS}
    with send(server, "/v1/chat/completions", body):
        before = server.worker()["steps"]
        wait_until(lambda: server.worker()["running"] and server.worker()["steps"] > before + 5, "tokens", 30)
    assert_soon_idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read_ends_its_work(server, stream):
    wait_until(lambda: not busy(server), "an idle server", 30)
    # Ids that no other test sends.
    prompt = [2000 + int(stream) * 7000 + number for number in range(6000)]
    with send(server, "/v1/completions", {"prompt": prompt, "max_tokens": 100, "stream": stream, **ENDLESS}):
        wait_until(lambda: busy(server), "the prompt to be taken up", 30)
    assert_soon_idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue_ends_its_work(server, stream):
    wait_until(lambda: not busy(server), "an idle server", 30)
    body = {"messages": message("Tell me a story."), "max_tokens": 2000, "stream": stream, **ENDLESS}
    waiting = [send(server, "/v1/chat/completions", body) for _ in range(40)]
    try:
        wait_until(lambda: server.http.get("/health").json()["queued"] > 0, "a queue", 30)
    finally:
        for connection in waiting:
            connection.close()
    assert_soon_idle(server)
