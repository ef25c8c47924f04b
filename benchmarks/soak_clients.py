"""The clients of the soak: good ones, wrong ones, impatient ones, and those that are gone in the middle."""

import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
_SUBJECTS = ("the sea", "a library", "good soup", "an old clock", "trains at night", "the number seven")
_PATIENCE_S = 120.0


@dataclass
class Tally:
    """What came of the requests. ``outcomes``: by kind and outcome; ``surprises``: moment and text of what should not
    be, a 5xx or an answer without its end, to be held against the times when workers were killed.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    surprises: list[tuple[float, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, outcome: str, surprise: str = "") -> None:
        """Count one request."""
        with self._lock:
            self.outcomes[kind, outcome] += 1
            if surprise:
                self.surprises.append((time.monotonic(), f"{kind}: {surprise}"))


class Client(threading.Thread):
    """Asks one thing after the other until ``over``; ``seed`` says which."""

    def __init__(self, port: int, tally: Tally, over: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._tally = tally
        self._over = over
        self._random = random.Random(seed)

        self._kinds: list[tuple[Callable[[], None], int]] = [
            (self._stream, 30),
            (self._whole, 20),
            (self._embedding, 8),
            (self._other_apis, 8),
            (self._wrong, 16),
            (self._impatient, 10),
            (self._gone, 16),
            (self._looking, 4),
        ]

    def warm_up(self) -> None:
        """Ask a few times for everything."""
        for ask, _ in self._kinds * 8:
            ask()

    def run(self) -> None:
        """Go on until told to stop."""
        asks, weights = zip(*self._kinds, strict=True)
        while not self._over.is_set():
            (ask,) = self._random.choices(asks, weights)
            try:
                ask()
            except (OSError, http.client.HTTPException, ValueError) as error:
                # The server never closes a connection that it has not answered.
                self._tally.note(ask.__name__.strip("_"), "connection failed", f"{type(error).__name__}: {error}")
            self._over.wait(self._random.expovariate(4.0))

    # --- kinds of clients

    def _stream(self) -> None:
        body = self._chat(max_tokens=self._random.randint(4, 48), stream=True)
        if self._random.random() < 0.3:
            body |= {"n": 2, "stop": [" and"], "logprobs": True}
        self._post("stream", CHAT, body)

    def _whole(self) -> None:
        body = self._chat(max_tokens=self._random.randint(4, 32))
        if self._random.random() < 0.3:
            body |= {"response_format": {"type": "json_object"}}
        self._post("whole", CHAT, body)

    def _embedding(self) -> None:
        texts = [self._text() for _ in range(self._random.randint(1, 6))]
        self._post("embedding", "/v1/embeddings", {"input": texts})

    def _other_apis(self) -> None:
        path, body = self._random.choice(
            [
                ("/v1/completions", {"prompt": [self._text(), self._text()], "max_tokens": 12, "echo": True}),
                ("/v1/responses", {"input": self._text(), "max_output_tokens": 16}),
                ("/v1/responses", {"input": self._text(), "max_output_tokens": 16, "store": False, "stream": True}),
                ("/v1/messages", {"messages": [{"role": "user", "content": self._text()}], "max_tokens": 16}),
                ("/v1/rerank", {"query": self._text(), "documents": [self._text(), self._text()]}),
            ]
        )
        self._post("other APIs", path, body)

    def _wrong(self) -> None:
        body: Any = self._random.choice(
            [
                b"{",
                b"\xff\xfe",
                b"[" * 5000,
                {"messages": []},
                {"messages": "x", "temperature": 99},
                {"messages": "x", "n": 10**9},
                {"messages": "x", "model": "no-such-model"},
                {"messages": "word " * 20_000},
                {"messages": "x", "guided_regex": "("},
                {"messages": "x", "logit_bias": {"999999": 1}},
            ]
        )
        self._post("wrong", CHAT, body, expected=range(400, 500))

    def _impatient(self) -> None:
        body = self._chat(max_tokens=400, ignore_eos=True, stream=self._random.random() < 0.5)
        self._post("timed out", CHAT, body | {"timeout": self._random.uniform(0.05, 1.5)})

    def _gone(self) -> None:
        """Leave before, at, or after the first bytes of the answer, politely or not."""
        body = json.dumps(self._chat(max_tokens=400, ignore_eos=True, stream=self._random.random() < 0.6)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        stage = self._random.choice(["in the body", "waiting", "in the stream"])
        with socket.create_connection(("127.0.0.1", self._port), 10) as connection:
            connection.settimeout(self._random.uniform(0.05, 2.0))
            connection.sendall(whole[: len(whole) // 2] if stage == "in the body" else whole)
            try:
                for _ in range(0 if stage == "in the body" else 1 if stage == "waiting" else 12):
                    if not connection.recv(4096):
                        break
            except TimeoutError:
                pass
            if self._random.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._tally.note("gone", stage)

    def _looking(self) -> None:
        self._request("looking", "GET", self._random.choice(["/v1/models", "/livez", "/openapi.json", "/nothing"]), b"")

    # --- asking

    def _text(self) -> str:
        return f"Tell me about {self._random.choice(_SUBJECTS)} and the number {self._random.randint(1, 10_000)}."

    def _chat(self, **fields: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self._text()}], **fields}

    def _post(self, kind: str, path: str, body: Any, expected: range = range(200, 300)) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._request(kind, "POST", path, data, expected)

    def _request(self, kind: str, method: str, path: str, data: bytes, expected: range = range(200, 500)) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_PATIENCE_S)
        try:
            connection.request(method, path, data or None, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            try:
                text = response.read()
            except http.client.IncompleteRead as error:
                # A stream that ends with an error is cut behind it.
                text = error.partial
        finally:
            connection.close()
        status = response.status
        streamed = (response.getheader("Content-Type") or "").startswith("text/event-stream")
        outcome, surprise = str(status), ""
        if streamed:
            outcome, surprise = _end_of_stream(text)
        elif status not in expected and status != 429:
            surprise = f"{status} {text[:200].decode(errors='replace')}"
        self._tally.note(kind, outcome, surprise)


def _end_of_stream(text: bytes) -> tuple[str, str]:
    """Return how a stream ended, and what is wrong with that."""
    if text.endswith(b"data: [DONE]\n\n") or b"event: response." in text[-20_000:] or b"message_stop" in text[-200:]:
        return "200", ""
    last = text[text.rfind(b"data: ") :].decode(errors="replace")
    if '"rate_limit_error"' in last:
        return "429 in the stream", ""
    return ("error event" if '"error"' in last else "cut"), last[:200]
