"""B7, B14, B16, B18: texts that are large or made to hurt, in both directions; names that must not become files."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.app.conftest import Server, application, runtime_directory, serving
from tests.app.scripted_pool import ScriptedPool, eventually, tokens
from tests.app.tiny import IM_END, ids_of, write_card
from tests.app.tool_models import TEMPLATES, serving_template
from tests.battery.answers import Door, check_answer, check_leak, error_of, events_of
from tests.battery.test_b_fields import BASE, MEDIA, NAMES, parts
from tests.battery.test_b_grammars import HOSTILE as GRAMMARS
from workers.messages import Event, Job, Output, Started

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
CONTEXT = 8_192


@pytest.fixture(scope="module")
def scripted() -> Iterator[Server]:
    """gunicorn before a pool that answers what the test says."""
    with serving(keepalive_comment_s=1) as server:
        yield server


@pytest.fixture
def server(scripted: Server) -> Iterator[Server]:
    scripted.pool.reset()
    yield scripted
    eventually(lambda: scripted.stats()["open_jobs"] == 0)


# Families, flags, skin tones, a keycap, Chinese beyond the first plane, and what only looks unfinished.
TEXT = "👩‍👩‍👧‍👦 🇩🇪 👍🏽 1️⃣ 𠜎 ﷽ é Ａ \ufffd done 😀"


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_b7_a_character_that_is_split_over_tokens_comes_out_whole(server: Server, route: str) -> None:
    server.pool.reply = tokens(ids_of(TEXT), stop=IM_END)
    body = {"messages": "x"} if route == CHAT else {"prompt": "x"}
    whole = httpx.post(server.url + route, json=body, timeout=60).json()["choices"][0]
    streamed = events_of(httpx.post(server.url + route, json={**body, "stream": True}, timeout=60))
    pieces = [event["choices"][0] for event in streamed]
    shown = [piece["delta"].get("content", "") if route == CHAT else piece["text"] for piece in pieces]
    assert (whole["message"]["content"] if route == CHAT else whole["text"]) == TEXT
    assert "".join(shown) == TEXT
    assert sum("\ufffd" in piece for piece in shown) == 1


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_b7_a_character_that_never_becomes_whole_is_one_replacement(server: Server, cut: int) -> None:
    server.pool.reply = tokens([*ids_of("a"), *ids_of("😀")[:cut]], reason="length")
    answer = httpx.post(server.url + COMPLETIONS, json={"prompt": "x"}, timeout=60).json()
    assert answer["choices"][0]["text"] in ("a\ufffd", "a😀")
    json.dumps(answer, ensure_ascii=False).encode()


HUGE: dict[str, tuple[str, dict[str, Any]]] = {
    "a million tokens": (COMPLETIONS, {"prompt": [7] * 1_000_000}),
    "a million tokens to embed": (EMBEDDINGS, {"input": [7] * 1_000_000}),
    "one word": (COMPLETIONS, {"prompt": "a" * 5_000_000}),
    "one word to embed": (EMBEDDINGS, {"input": "a" * 5_000_000}),
    "one word in a message": (CHAT, {"messages": "a" * 5_000_000}),
    "combining marks": (CHAT, {"messages": "a" + "\u0301" * 500_000}),
    "spaces": (CHAT, {"messages": " " * 2_000_000}),
    "emoji": (COMPLETIONS, {"prompt": "😀" * 500_000}),
    "special tokens": (CHAT, {"messages": "<|im_start|>" * 300_000}),
    "many messages": (CHAT, {"messages": [{"role": "user", "content": "hello there"}] * 4_096}),
}


_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_PART = {"type": "input_text", "text": "x"}
_CALLING = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [_CALL]}]
# What is large beside the prompt, or never gets so far: refused, or answered where the model does not see it.
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "tool results": (
        CHAT,
        {"messages": _CALLING + [{"role": "tool", "tool_call_id": "c", "content": "x" * 400}] * 4_000},
    ),
    "numbers for the template": (CHAT, {"messages": "x", "chat_template_kwargs": {"own": [1] * 1_000_000}}),
    "texts for the template": (
        CHAT,
        {"messages": "<|im_start|>", "chat_template_kwargs": {"own": ["<|im_end|>"] * 400_000}},
    ),
    "thoughts": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "x", "reasoning_content": "a<|im_end|>" * 600_000},
                {"role": "user", "content": "x"},
            ]
        },
    ),
    "include": (RESPONSES, {"input": "x", "include": [1] * 1_000_000}),
    "parts that are none": (RESPONSES, {"input": [{"role": "user", "content": [{}] * 1_000_000}]}),
    "parts": (RESPONSES, {"input": [{"role": "user", "content": [_PART] * 200_000}]}),
    "unknown fields": (
        CHAT,
        {"messages": [{"role": "user", "content": "x", **{f"k{i}": 0 for i in range(9_000)}}] * 70},
    ),
    "unknown fields of items": (
        RESPONSES,
        {"input": [{"role": "user", "content": "x", **{f"k{i}": 0 for i in range(9_000)}}] * 70},
    ),
    "blocks": (MESSAGES, {"max_tokens": 9, "messages": [{"role": "user", "content": [{}] * 1_000_000}]}),
    "messages": (MESSAGES, {"max_tokens": 9, "messages": [{}] * 1_000_000}),
    "documents": ("/v1/rerank", {"query": "x", "documents": ["x"] * 1_000_000}),
    "texts to score": ("/v1/score", {"text_1": "x", "text_2": [1] * 1_000_000}),
}


@pytest.mark.parametrize("name", HUGE)
def test_b14_a_prompt_beyond_the_context(straight: Door, name: str) -> None:
    route, body = HUGE[name]
    error = straight.refusal(route, body)
    assert error["code"] == "context_length_exceeded", error


@pytest.mark.parametrize("name", [*HUGE, *WIDE])
def test_b14_a_huge_prompt_does_not_hold_up_the_others(server: Server, name: str) -> None:
    """The hub's own measure of it, without what the machine did meanwhile, in one of ten tries.

    What is done on the hub is there each time. Reading JSON holds up all threads, so what is allowed grows with the
    time of that, on this machine.
    """
    route, body = (HUGE | WIDE)[name]
    content = json.dumps(body).encode()
    server.pool.reply = tokens(ids_of("ok"), stop=IM_END)
    begun = time.thread_time()
    orjson.loads(content)
    allowed = max(0.15, 3 * (time.thread_time() - begun))
    lags: list[float] = []
    while len(lags) < 10 and (not lags or lags[-1] > allowed):
        server.stats()
        answer = httpx.post(
            server.url + route, content=content, headers={"Content-Type": "application/json"}, timeout=120
        )
        lags.append(server.stats()["hub_lag_s"])
        assert answer.status_code in (200, 400), answer.text[:300]
        assert len(answer.content) < 20_000
    assert lags[-1] <= allowed, lags


def test_b15_no_hostile_grammar_is_read_on_the_hub(server: Server) -> None:
    """Either most of the request's time is spent elsewhere, or it is no more than that of some harmless requests."""
    server.pool.reply = tokens(ids_of("ok"), stop=IM_END)

    def ask(fields: dict[str, Any]) -> tuple[float, float]:
        content = json.dumps({"messages": "x", **fields}).encode()
        server.stats()
        answer = httpx.post(
            server.url + CHAT, content=content, headers={"Content-Type": "application/json"}, timeout=120
        )
        assert answer.status_code in (200, 400), answer.text[:300]
        return server.stats()["hub_lag_s"], answer.elapsed.total_seconds()

    harmless = max(ask({})[1] for _ in range(5))
    for name, fields in GRAMMARS.items():
        tries = (ask(fields) for _ in range(10))
        assert any(lag < 0.4 * seconds or lag < 20 * harmless for lag, seconds in tries), name


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_b14_a_prompt_and_an_answer_beyond_the_context(door: Door, route: str) -> None:
    error = door.refusal(route, {**BASE[route], "max_tokens": CONTEXT})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


HOSTILE = {
    "opens": "<tool_call>",
    "opens and begins": '<tool_call>{"name": "f", "arguments": {',
    "nearly opens": "<tool_cal",
    "calls": '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
    "brackets": "<tool_call>" + "[{" * 50,
    "closes": "</tool_call>",
    "spaces": "<tool_call>" + " \n" * 30,
    "quotes": '<tool_call>{"name": "' + '\\"' * 30,
    "thinks": "<think></think><think>",
}
TOOLS = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}]
SIZE = 500_000


def emits(text: str) -> Any:
    """A pool that answers with ``text``, some hundred tokens at a time."""
    ids = ids_of(text)

    def reply(job: Job) -> list[Event]:
        outputs = [Output(id=job.id, ids=ids[at : at + 256]) for at in range(0, len(ids), 256)]
        return [Started(id=job.id), *outputs, Output(id=job.id, finish_reason="length")]

    return reply


@pytest.mark.parametrize(
    ("name", "stream"),
    [*((name, False) for name in HOSTILE), *((name, True) for name in ("opens", "calls", "brackets"))],
)
def test_b16_hostile_calls_take_linear_time_and_stay_text(server: Server, name: str, stream: bool) -> None:
    seconds: dict[int, list[float]] = {}
    # A busy machine makes the first comparison worth little.
    for size in (SIZE // 4, SIZE) * 4:
        if size == SIZE // 4 and seconds.get(SIZE) and grows_linearly(seconds):
            break
        text = HOSTILE[name] * (size // len(HOSTILE[name]))
        server.pool.reply = emits(text)
        begun = time.monotonic()
        body = {"messages": "x", "tools": TOOLS, "stream": stream}
        answer = httpx.post(server.url + CHAT, json=body, timeout=120)
        seconds.setdefault(size, []).append(time.monotonic() - begun)
        assert answer.status_code == 200, answer.text[:300]
        check_leak(answer.text[:100_000])
        if stream:
            choices = [each["choices"][0] for each in events_of(answer) if each["choices"]]
            assert not any("error" in each for each in events_of(answer))
            calls = [each for each in choices if each["delta"].get("tool_calls")]
            shown = "".join(each["delta"].get("content") or "" for each in choices)
        else:
            message = answer.json()["choices"][0]["message"]
            calls, shown = message.get("tool_calls") or [], message["content"] or ""
        # No tool of this name was given.
        assert not calls
        if name != "thinks":
            assert "".join(shown.split()) == "".join(text.split())
    assert grows_linearly(seconds), seconds


# The same for models of other formats: calls as bare JSON, and as lists behind a mark.
OTHERS = [
    ("llama3", "<|python_tag|>"),
    ("llama3", '{"name": "f", "parameters": {'),
    ("llama3", '{"name": "f", "parameters": {}}; '),
    ("llama3", "<|python_tag|>" + "[{" * 50),
    ("llama3", '{"name": "' + '\\"' * 30),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {'),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'),
    ("mistral", "[TOOL_CALLS]f[ARGS]{"),
    ("mistral", "[TOOL_CALLS]" + " \n" * 30),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("form", "unit"), OTHERS)
def test_b16_hostile_calls_of_other_formats(form: str, unit: str, stream: bool) -> None:
    seconds: dict[int, list[float]] = {}
    with runtime_directory() as folder, serving_template(folder, TEMPLATES[form]) as (client, pool):
        # A busy machine makes the first comparison worth little.
        for size in (SIZE // 4, SIZE) * 4:
            if size == SIZE // 4 and seconds.get(SIZE) and grows_linearly(seconds):
                break
            text = unit * (size // len(unit))
            pool.reply = emits(text)
            begun = time.monotonic()
            answer = client.post(CHAT, json={"messages": "x", "tools": TOOLS, "stream": stream})
            said = answer.text
            seconds.setdefault(size, []).append(time.monotonic() - begun)
            assert answer.status_code == 200, said[:300]
            check_leak(said[:100_000])
            # No tool of this name was given.
            assert '"tool_calls":[' not in said
            assert '"error"' not in said
    assert grows_linearly(seconds), seconds


def grows_linearly(seconds: dict[int, list[float]]) -> bool:
    """Four times the text must not take sixteen times the time, as its square would."""
    return min(seconds[SIZE]) <= 10 * min(seconds[SIZE // 4])


_ARMED = threading.Event()
_SEEN: list[tuple[str, str]] = []
_WATCHED = ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir", "subprocess.Popen", "os.exec")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _WATCHED and _ARMED.is_set():
        _SEEN.append((event, repr(arguments[:2])[:200]))


@pytest.fixture(scope="module")
def audited() -> None:
    """From here on Python tells what files are opened and what addresses are asked for while `_ARMED` is set."""
    sys.addaudithook(_watch)


def test_b18_b19_no_name_and_no_address_in_a_request_is_ever_opened(audited: None, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("x")
    with runtime_directory() as folder:
        pool = ScriptedPool(folder / "pool.sock", write_card(folder)).start()
        pool.reply = tokens([], stop=IM_END)
        with application(folder) as app:
            client = app.test_client()
            assert client.post(CHAT, json={"messages": "warm", "max_tokens": 1}).status_code == 200
            assert client.post(CHAT, json={"messages": "warm", "model": "none"}).status_code == 404
            assert client.get("/v1/models/none").status_code == 404
            _SEEN.clear()
            _ARMED.set()
            try:
                for name in [*NAMES, str(canary), f"file://{canary}"]:
                    for route, base in BASE.items():
                        answer = client.post(route, json={**base, "model": name})
                        assert answer.status_code in (400, 404)
                        error_of(answer.data)
                    client.get(f"/v1/models/{name}")
                for url in [*MEDIA, f"file://{canary}"]:
                    for part in parts(url.replace("{port}", "9")):
                        body = {"messages": [{"role": "user", "content": [part]}]}
                        answer = client.post(CHAT, json=body)
                        check_answer(answer.status_code, dict(answer.headers.items(lower=True)), answer.data)
                        assert answer.status_code == 400
                for field in ("chat_template", "api_base", "prompt_embeds", "lora_path"):
                    client.post(CHAT, json={"messages": "x", "max_tokens": 1, field: str(canary)})
            finally:
                _ARMED.clear()
        pool.stop()
    assert _SEEN == []
