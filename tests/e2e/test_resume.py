"""Kept requests on the real server: what dies or leaves, and that every event comes once all the same."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import Server, wait_until
from tests.e2e.test_streams import ENDLESS, message

CHAT = "/v1/chat/completions"
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
WINDOW_S = 12

# All of these go on for some seconds: who disturbs them may be held up, and must not come too late.
STORY = {"messages": message("Tell me a long story."), "max_tokens": 300, **ENDLESS}
TOOL = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "minLength": 600, "maxLength": 700}},
            "required": ["text"],
            "additionalProperties": False,
        },
    },
}
BODIES: dict[str, dict[str, Any]] = {
    "plain": STORY,
    "two seeded choices": {**STORY, "n": 2, "do_sample": True, "temperature": 1.3, "seed": 5, "max_tokens": 200},
    "scores": {**STORY, "logprobs": True, "top_logprobs": 2, "max_tokens": 200},
    "tools": {
        "messages": message("Note something long."),
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
        "max_tokens": 300,
    },
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two owners of keys; its model computes in float32, so that texts can be compared."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(mode=0o600)
    keys.write_text(f"alice: {ALICE}\nbob: {BOB}\n", encoding="utf-8")
    server = Server("--dtype", "float32", "--api_key_file", str(keys), "--resume_window_s", str(WINDOW_S))
    server.http.close()
    # Each request by a connection of its own: one that is kept open may be to a worker that has been killed.
    server.http = httpx.Client(
        base_url=server.url,
        headers={"Authorization": f"Bearer {ALICE}"},
        timeout=120,
        limits=httpx.Limits(max_keepalive_connections=0),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@dataclass
class Reading:
    """What a client has of a stream, over all of its connections: ids and data of the events."""

    ids: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    # A response can be iterated over once.
    _answer: httpx.Response | None = None
    _lines: Iterator[str] = field(default_factory=lambda: iter(()))

    @property
    def done(self) -> bool:
        return self.data[-1:] == ["[DONE]"]

    def read(self, answer: httpx.Response, events: int = 1_000_000) -> "Reading":
        """Take ``events`` more events, or what there is."""
        assert answer.status_code == 200, answer.read()
        if answer is not self._answer:
            self._answer, self._lines = answer, answer.iter_lines()
        for line in self._lines:
            name, _, value = line.partition(": ")
            if name == "id":
                self.ids.append(value)
            elif name == "data":
                assert '"error"' not in value[:9], value
                self.data.append(value)
                events -= 1
                if not events:
                    break
        return self

    def check(self) -> None:
        """No event is missing, and none came twice."""
        assert self.done
        name = self.ids[0].rpartition(":")[0]
        assert self.ids == [f"{name}:{number}" for number in range(1, len(self.data) + 1)]

    def choices(self) -> list[dict[str, Any]]:
        """The answer that the events make up."""
        found: dict[int, dict[str, Any]] = {}
        for data in self.data[:-1]:
            for each in json.loads(data)["choices"]:
                own = found.setdefault(each["index"], {"text": "", "arguments": "", "tokens": [], "reason": None})
                own["text"] += each["delta"].get("content") or ""
                for call in each["delta"].get("tool_calls", ()):
                    own["arguments"] += call["function"].get("arguments", "")
                own["tokens"] += (each["logprobs"] or {}).get("content", ())
                own["reason"] = each["finish_reason"] or own["reason"]
        return [found[index] for index in sorted(found)]


def undisturbed(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same answer, as nobody has disturbed it."""
    answer = server.http.post(CHAT, json=body).json()
    return [
        {
            "text": choice["message"]["content"] or "",
            "arguments": "".join(call["function"]["arguments"] for call in choice["message"].get("tool_calls", ())),
            "tokens": (choice["logprobs"] or {}).get("content", []),
            "reason": choice["finish_reason"],
        }
        for choice in answer["choices"]
    ]


def serving(server: Server, answer: httpx.Response) -> int:
    """The process id of the HTTP worker that answers."""
    address = answer.extensions["network_stream"].get_extra_info("client_addr")
    for pid in server.http_workers():
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.raddr and tuple(connection.raddr) == tuple(address):
                return pid
    raise AssertionError("nobody serves it")


def streaming(server: Server, body: dict[str, Any], **headers: str) -> Any:
    return httpx.stream(
        "POST",
        server.url + CHAT,
        json={**body, "stream": True},
        headers={**server.http.headers, **headers},
        timeout=60,
    )


def resume(server: Server, reading: Reading) -> None:
    """Read the rest."""
    with streaming(server, {}, **{"Last-Event-ID": reading.ids[-1]}) as answer:
        reading.read(answer)


def kill_under(server: Server, body: dict[str, Any], events: int) -> Reading:
    """Begin a stream and kill the HTTP worker that serves it; what the client has then."""
    reading = Reading()
    with streaming(server, body) as answer:
        pid = serving(server, answer)
        reading.read(answer, events)
        os.kill(pid, signal.SIGKILL)
        # Its end is seen as what it is, and never as the end of the answer. What was on its way still counts.
        with pytest.raises(httpx.TransportError):
            reading.read(answer)
    assert not reading.done
    return reading


@pytest.mark.parametrize("kind", BODIES)
def test_a_killed_http_worker_costs_no_event(kept: Server, kind: str) -> None:
    expected = undisturbed(kept, BODIES[kind])
    reading = kill_under(kept, {**BODIES[kind], "resumable": True}, 8)
    resume(kept, reading)
    reading.check()
    assert reading.choices() == expected
    name = reading.ids[0].rpartition(":")[0]
    whole = Reading().read(kept.http.get(f"/v1/streams/{name}"))
    assert (whole.ids, whole.data) == (reading.ids, reading.data)


def test_a_killed_http_worker_ends_what_is_not_kept(kept: Server) -> None:
    kill_under(kept, {**STORY, "max_tokens": 2000}, 3)
    wait_until(lambda: kept.http.get("/health").json()["running"] == 0, "its job's end", 10)


def test_a_stop_string_is_found_on_the_other_side_of_a_cut(kept: Server) -> None:
    text = undisturbed(kept, STORY)[0]["text"]
    # Well behind the cut; a text that repeats itself may have the string earlier.
    stop = next(
        text[place : place + 12]
        for place in range(len(text) * 2 // 3, 0, -1)
        if text.index(text[place : place + 12]) == place
    )
    reading = kill_under(kept, {**STORY, "stop": stop, "resumable": True}, 5)
    resume(kept, reading)
    reading.check()
    assert reading.choices()[0]["text"] == text[: text.index(stop)]
    assert reading.choices()[0]["reason"] == "stop"


def test_new_http_workers_go_on_after_a_reload(kept: Server) -> None:
    expected = undisturbed(kept, STORY)
    before = kept.http_workers()
    reading = Reading()
    with streaming(kept, {**STORY, "resumable": True}) as answer:
        reading.read(answer, 5)
        kept.signal(signal.SIGHUP)
        wait_until(lambda: len(kept.http_workers() - before) == 2, "new HTTP workers", 30)
    # The client has left. For a moment an old worker may still take its next connection.
    deadline = time.monotonic() + 30
    while not reading.done:
        assert time.monotonic() < deadline, "no new HTTP worker has taken over"
        with streaming(kept, {}, **{"Last-Event-ID": reading.ids[-1]}) as answer:
            if serving(kept, answer) not in before:
                reading.read(answer)
    reading.check()
    assert reading.choices() == expected
    wait_until(lambda: not kept.http_workers() & before, "the old HTTP workers' end", 40)


def test_a_killed_model_worker_is_a_pause_for_all_readers(kept: Server) -> None:
    expected = undisturbed(kept, STORY)
    first, second = Reading(), Reading()
    with streaming(kept, {**STORY, "resumable": True}) as answer:
        first.read(answer, 5)
        name = first.ids[0].rpartition(":")[0]
        with httpx.stream("GET", f"{kept.url}/v1/streams/{name}", headers=kept.http.headers, timeout=60) as other:
            second.read(other, 2)
            os.kill(kept.worker()["pid"], signal.SIGKILL)
            first.read(answer)
            second.read(other)
    first.check()
    second.check()
    assert first.data == second.data
    assert first.choices() == expected


def test_a_key_joins_the_running_request_and_then_gets_the_finished_one(kept: Server) -> None:
    key = {"Idempotency-Key": "one story, please"}
    reading = Reading()
    with streaming(kept, STORY, **key) as answer:
        reading.read(answer, 3)
        joined = kept.http.post(CHAT, json=STORY, headers=key)
        reading.read(answer)
    reading.check()
    again = kept.http.post(CHAT, json=STORY, headers=key)
    assert joined.headers["Idempotent-Replayed"] == again.headers["Idempotent-Replayed"] == "true"
    assert joined.json() == again.json()
    assert joined.json()["id"] == reading.ids[0].rpartition(":")[0]
    assert joined.json()["choices"][0]["message"]["content"] == reading.choices()[0]["text"]
    refused = kept.http.post(CHAT, json={**STORY, "max_tokens": 9}, headers=key)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "Idempotency-Key")


def test_nobody_else_reads_it_and_in_the_end_it_is_forgotten(kept: Server) -> None:
    name = kept.http.post(CHAT, json={**STORY, "max_tokens": 3, "resumable": True}).json()["id"]
    path = f"/v1/streams/{name}"
    assert kept.http.get(path, headers={"Authorization": f"Bearer {BOB}"}).status_code == 404
    assert kept.http.get(path).status_code == 200
    wait_until(lambda: kept.http.get(path).status_code == 404, "the end of the window", WINDOW_S + 30)
    assert kept.http.get(path).json()["error"]["code"] == "stream_not_found"
