"""Each client's script against one real server with API keys; what it prints is compared with what the server says.

The scripts are what the README links: they run here as they stand, in processes of their own, in an environment of
their own (`make clients`), with nothing in their environment but the server's URL and a key.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from config.sources import ROOT
from tests.e2e.server import Server

HERE = Path(__file__).parent
ENVIRONMENT = ROOT / ".venv-clients"
# The `openai` package is the one that all tests take; the frameworks bring an older one along.
TESTS = Path(sys.executable)
CLIENTS = ENVIRONMENT / "bin" / "python"

KEY = "sk-clients-0123456789abcdef"
KEY_OF_ONE_REQUEST = "sk-limited-0123456789abcdef"
MODEL = "llama-3-chinese"
CALLS = ("get_weather {'city': 'Paris'}", "get_weather {'city': 'Rome'}")
QUESTION = "What is the capital of France?"


class Said:
    """What a script printed: lines of `name: value`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines = [line.split(": ", 1) for line in text.splitlines() if ": " in line]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._lines if key == name]

    def one(self, name: str) -> str:
        values = self.all(name)
        assert len(values) == 1, f"{len(values)} lines `{name}:` in\n{self.text}"
        return values[0]

    def json(self, name: str) -> Any:
        return json.loads(self.one(name))


@pytest.fixture(scope="module", autouse=True)
def environment() -> None:
    """The packages of the clients; without them nothing here can be said."""
    needed = [ENVIRONMENT / ".installed", ENVIRONMENT / ".node-installed"]
    missing = [path for path in needed if not path.exists()]
    if missing:
        pytest.fail(f"{missing[0]} is missing: the clients are installed by `make clients` (`make test` does it too)")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for keys. Its greedy answers are the same to the token, whatever runs beside them."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"shop: {KEY}\nguest: {KEY_OF_ONE_REQUEST} requests_per_minute=1\n", encoding="utf-8")
    server = Server("--api_key_file", str(keys))
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def run(door: Server, tmp_path: Path) -> Callable[..., Said]:
    def run(command: str | Path, script: str, *arguments: str, **changes: str) -> Said:
        settings = {
            "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "LANG": "C.UTF-8",
            "OPENAI_BASE_URL": f"{door.url}/v1",
            "OPENAI_API_KEY": KEY,
            "ANTHROPIC_BASE_URL": door.url,
            "ANTHROPIC_API_KEY": KEY,
        }
        done = subprocess.run(
            [command, HERE / script, *arguments],
            env=settings | changes, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return Said(done.stdout)

    return run


def ask(server: Server, path: str, **body: Any) -> dict[str, Any]:
    """What the server itself answers, without any client."""
    answer = httpx.post(server.url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.fixture(scope="module")
def truth(door: Server) -> str:
    """The greedy answer to the question that all scripts ask."""
    messages = [{"role": "user", "content": QUESTION}]
    answer = ask(door, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=24)
    text = answer["choices"][0]["message"]["content"]
    assert len(text.split()) > 3
    return str(text)


def test_openai_chat(run, truth):
    said = run(TESTS, "openai_chat.py")
    assert MODEL in said.all("model")
    assert [said.one(name) for name in ("chat", "stream", "helper", "completion")] == [truth] * 4
    assert said.one("seed") != "''"
    assert len(said.all("logprob")) == 4
    assert said.one("embeddings") == "[576, 576]"


def test_openai_async(run, truth):
    said = run(TESTS, "openai_async.py")
    assert said.all("stream")[0] == repr(truth)
    assert len(said.all("stream")) == 3
    assert said.one("embeddings") == "[576, 576, 576]"


def test_openai_parse(run):
    said = run(TESTS, "openai_parse.py")
    city = said.json("parsed")
    assert city == said.json("streamed")
    assert set(city) == {"name", "country", "population", "climate", "rivers"}
    assert city["climate"] in ("cold", "mild", "hot")
    assert said.one("choice") in ("yes", "no")


def test_openai_tools(run):
    said = run(TESTS, "openai_tools.py")
    assert said.one("finish") == "tool_calls"
    for call in (said.one("call"), said.one("streamed")):
        assert call in CALLS
    assert said.one("answer") != "None"
    name, _, arguments = said.one("parsed").partition(" ")
    assert name == "book"
    assert 1 <= json.loads(arguments)["seats"] <= 20


def test_openai_responses(run, truth):
    said = run(TESTS, "openai_responses.py")
    assert said.one("id").startswith("resp_")
    assert said.one("id").endswith(" completed")
    assert said.one("text") == said.one("stream") == truth
    assert said.one("next")
    assert said.one("events").split() == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert said.json("parsed")["answer"] in ("yes", "no")
    assert said.one("call").startswith("look_up {'word': ")
    assert said.all("background")[0] in ("queued", "in_progress")
    assert said.all("background")[-1].split()[0] in ("completed", "incomplete")
    assert said.one("deleted").startswith("resp_")


def test_openai_errors(run):
    said = run(TESTS, "openai_errors.py", KEY_OF_ONE_REQUEST)
    assert said.all("BadRequestError") == ["400 temperature None", "400 messages context_length_exceeded"]
    assert said.one("NotFoundError") == "404 model model_not_found"
    assert said.one("AuthenticationError") == "401 invalid_api_key"
    limited = said.one("RateLimitError").split()
    assert limited[:3] == ["429", "rate_limit_error", "retry-after"]
    assert 1 <= int(limited[3]) <= 60
    reason, words, *warning = said.one("cut short").split()
    assert reason == "length"
    assert int(words) > 0
    assert " ".join(warning).startswith("The request's time was over")


def test_anthropic(run, door):
    said = run(CLIENTS, "anthropic_client.py")
    messages = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": QUESTION}]
    answer = ask(door, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=24)
    text = answer["choices"][0]["message"]["content"]
    assert said.one("message") == said.one("stream") == text
    assert said.one("stop").split()[1] == str(answer["usage"]["completion_tokens"])
    assert said.one("counted") == str(answer["usage"]["prompt_tokens"])
    for call in (said.one("call"), said.one("streamed call")):
        assert call in CALLS
    assert said.one("answer").split()[0] in ("['text']", "[]")
    assert said.one("BadRequestError") == "400 invalid_request_error"
    assert said.one("NotFoundError") == "404 not_found_error"
    assert said.one("AuthenticationError") == "401 authentication_error"


def test_langchain(run, truth):
    said = run(CLIENTS, "langchain_client.py")
    assert said.one("invoke") == said.one("stream") == truth
    assert said.one("batch") == repr([truth, truth])
    for name in ("structured", "structured by a call"):
        assert said.json(name)["climate"] in ("cold", "mild", "hot")
    assert said.one("call") in CALLS
    assert said.one("embeddings") == "[576, 576]"


def test_litellm(run, truth):
    said = run(CLIENTS, "litellm_client.py")
    assert said.one("completion") == said.one("stream") == said.one("async") == truth
    assert said.one("choice") in ("yes", "no")
    assert said.one("call") in CALLS
    assert said.one("embedding") == "[576, 576]"
    assert (said.one("NotFoundError"), said.one("BadRequestError")) == ("404", "400")


def test_instructor(run):
    said = run(CLIENTS, "instructor_client.py")
    for mode in ("JSON_SCHEMA", "TOOLS"):
        person = said.json(mode)
        assert person["job"] in ("doctor", "teacher", "pilot")
        assert 0 <= person["age"] <= 150


def test_llama_index(run, truth):
    said = run(CLIENTS, "llama_index_client.py")
    names = ["chat", "complete", "stream", "stream of complete", "async", "plain complete", "plain stream"]
    assert [said.one(name) for name in names] == [truth] * 7
    assert said.one("call") in CALLS
    assert said.one("result").startswith("It rains in ")


def test_openai_on_node(run, truth):
    said = run("node", "openai_node.mjs")
    assert MODEL in said.one("models").split()
    assert said.one("chat") == said.one("stream") == truth
    assert said.one("response") == said.one("response stream") == truth
    assert set(said.json("parsed")) == {"name", "climate", "inhabitants"}
    for call in (said.one("call"), said.one("streamed call")):
        assert call in ("get_weather Paris", "get_weather Rome")
    assert isinstance(said.json("answer"), str)
    assert said.one("embeddings") == "576 576"
    assert said.one("errors") == "NotFoundError BadRequestError"


def test_curl(run, truth):
    shown = run("sh", "curl.sh").text
    parts = dict(part.split("\n", 1) for part in shown.split("== ")[1:])
    assert json.loads(parts["chat"])["choices"][0]["message"]["content"] == truth
    assert json.loads(parts["completion"])["choices"][0]["text"] == truth
    events = [line.removeprefix("data: ") for line in parts["stream"].splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == truth
    assert chunks[-1]["usage"]["completion_tokens"] == json.loads(parts["chat"])["usage"]["completion_tokens"]
    (item,) = json.loads(parts["embeddings"])["data"]
    assert len(item["embedding"]) == 4
    assert MODEL in [model["id"] for model in json.loads(parts["models"])["data"]]
    body, status = parts["error"].splitlines()
    assert (json.loads(body)["error"]["param"], status) == ("temperature", "400")


def test_resume(run, truth):
    said = run(TESTS, "resume.py")
    assert said.one("cut") == "cut on purpose"
    assert said.one("stream") == truth
    ids = said.json("ids")
    name = ids[0].rpartition(":")[0]
    assert ids == [f"{name}:{number}" for number in range(1, len(ids) + 1)]


def test_a_client_that_is_answered_wrongly_says_so(run):
    """The scripts' own checks: a server that refuses the key ends each of them with an error."""
    for command, script in [(CLIENTS, "openai_chat.py"), ("node", "openai_node.mjs"), ("sh", "curl.sh")]:
        with pytest.raises(AssertionError, match=r"ended with [1-9]"):
            run(command, script, OPENAI_API_KEY="sk-wrong")
