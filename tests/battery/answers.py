"""Every answer of the battery goes through here: what no body may show, and what every error must look like."""

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx

# What would tell of the program's inside: I5 of the battery.
LEAK = re.compile(r"Traceback|File \"|0x[0-9a-f]{6,}|/home/|site-packages|\.py\"")
_KINDS = {
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
    "service_unavailable_error",
    # Anthropic's names, on /v1/messages.
    "not_found_error",
    "request_too_large",
    "api_error",
    "overloaded_error",
}


def check_leak(text: str) -> None:
    """Fail if an answer shows something of the program's inside."""
    found = LEAK.search(text)
    assert found is None, f"a body shows {found[0]!r}: {text[:500]}"


def error_of(content: bytes) -> dict[str, Any]:
    """Return the error object of a body; fails if it is no valid ErrorResponse."""
    body = json.loads(content)
    assert isinstance(body, dict), body
    error = body["error"]
    if body.get("type") == "error":
        assert set(error) >= {"message", "type"}, body
    else:
        assert set(body) == {"error"}, body
        assert set(error) == {"message", "type", "param", "code"}, body
        assert error["param"] is None or isinstance(error["param"], str), body
        assert error["code"] is None or isinstance(error["code"], str), body
    assert isinstance(error["message"], str), body
    assert error["message"], body
    assert error["type"] in _KINDS, body
    return dict(error)


def check_answer(status: int, headers: Mapping[str, str], content: bytes, method: str = "POST") -> dict[str, Any]:
    """Check an answer of whatever kind; return its error object, {} if it is none."""
    check_leak(content.decode("utf-8", "replace"))
    assert not any(LEAK.search(value) for value in headers.values()), headers
    if status < 400 or method == "HEAD":
        return {}
    assert headers.get("content-type", "").split(";")[0] == "application/json", (status, headers, content[:500])
    return error_of(content)


class Door:
    """One way to the service: straight to gunicorn, or through nginx."""

    def __init__(self, name: str, port: int) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the answer to a request, checked."""
        answer = self.http.request(method, path, **options)
        check_answer(answer.status_code, answer.headers, answer.content, method)
        return answer

    def post(self, path: str, body: Any) -> httpx.Response:
        """Return the answer to JSON; ``body`` is an object, or the bytes of it."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, content=content, headers={"Content-Type": "application/json"})

    def refusal(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """Return the error that ``body`` gets; fails if it is answered or has another status."""
        answer = self.post(path, body)
        assert answer.status_code == status, (answer.status_code, answer.text[:500])
        error = error_of(answer.content)
        if status == 400:
            assert error["type"] == "invalid_request_error", error
        return error

    def close(self) -> None:
        self.http.close()


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the JSON events of a complete event stream."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
