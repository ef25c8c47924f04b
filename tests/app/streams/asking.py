"""Requests that are kept, and their streams read again."""

import re
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.app.tiny import ids_of
from tests.app.tool_models import CLOCK, WEATHER
from tests.sse import numbered_events
from workers.messages import Event, GenerateJob, Job, Output, PromptLogprobs, Started, TokenLogprobs

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"

TEXT = "Let me see. 中国的首都是北京。😀 Hello, world!"
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

# Route, body, what the model says.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "chat": (CHAT, {"messages": "Hello"}, TEXT),
    "usage": (CHAT, {"messages": "Hello", "stream_options": {"include_usage": True}}, TEXT),
    "n": (CHAT, {"messages": "Hello", "n": 3}, TEXT),
    "stop": (CHAT, {"messages": "Hello", "n": 2, "stop": ["京。😀 H", "xyz"]}, TEXT),
    "tools": (CHAT, {"messages": "Hello", "tools": [WEATHER, CLOCK]}, CALL),
    "logprobs": (CHAT, {"messages": "Hello", "logprobs": True, "top_logprobs": 2, "stop": "world"}, TEXT),
    "unknown field": (CHAT, {"messages": "Hello", "surprise": 1}, TEXT),
    "completion": (COMPLETIONS, {"prompt": "Hello", "template": "raw"}, TEXT),
    "prompts": (COMPLETIONS, {"prompt": ["Hello", "world"], "n": 2, "template": "raw", "echo": True}, TEXT),
    "echo scored": (COMPLETIONS, {"prompt": ["Hello", "w"], "template": "raw", "echo": True, "logprobs": 1}, TEXT),
    "completion with a warning": (COMPLETIONS, {"prompt": "Hello", "template": "raw", "surprise": 1}, TEXT),
    "messages": (MESSAGES, {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200}, TEXT),
    "messages stop": (
        MESSAGES,
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "stop_sequences": ["北京"]},
        TEXT,
    ),
}


def script(job: Job, said: str) -> list[Event]:
    """All that the pool says to a job, a token at a time, the choices in turns."""
    assert isinstance(job, GenerateJob)
    events: list[Event] = [Started(id=job.id, cached_tokens=2)]
    if job.prompt_logprobs is not None:
        events.append(PromptLogprobs(id=job.id, logprobs=[TokenLogprobs(-1.0, [(5, -0.5)])] * (len(job.prompt) - 1)))
    for token in ids_of(said):
        logprobs = [] if job.logprobs is None else [TokenLogprobs(-0.5, [(token, -0.5), (7, -2.0)])]
        events += [Output(id=job.id, choice=choice, ids=[token], logprobs=logprobs) for choice in range(job.n)]
    return events + [Output(id=job.id, choice=choice, finish_reason="length") for choice in range(job.n)]


def events_of(stream: str) -> list[str]:
    """The events of a stream, as they were written; comments left out."""
    return [block for block in re.sub(r"(?m)^:.*\n", "", stream).split("\n\n") if block]


def ask(client: FlaskClient, kind: str, **headers: str) -> TestResponse:
    """Ask for a resumable stream."""
    route, body, _ = KINDS[kind]
    return client.post(route, json={**body, "stream": True, "resumable": True}, headers=headers)


def stream_id(stream: str) -> str:
    """The id that the events of a stream have in common."""
    assert numbered_events(stream)
    found = re.match(r"id: (\S+):1\n", events_of(stream)[0])
    assert found
    return found[1]
