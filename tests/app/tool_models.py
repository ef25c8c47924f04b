"""Tiny models that differ in how their templates write tools and reasoning."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool
from tests.app.tiny import SMOLLM2_TEMPLATE, write_card
from tests.sse import data_events
from workers.messages import Event, GenerateJob, Job, Output, Started

CHAT = "/v1/chat/completions"

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}OPEN{{ c.function | tojson }}CLOSE{% endfor %}"
    "{% if m.role == 'tool' %} of {{ m.name }} {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
)
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _template(opening: str, closing: str, hint: str = "") -> str:
    tools = "{% for t in tools or [] %}" + hint + "{{ t | tojson }}\n{% endfor %}"
    return tools + _TURNS.replace("OPEN", opening).replace("CLOSE", closing) + _ASKS


TEMPLATES = {
    "hermes": _template("<tool_call>", "</tool_call>"),
    "llama3": _template("", "", "{# ipython: <|python_tag|> #}{{ '<|python_tag|>' if 0 }}"),
    "mistral": _template("[TOOL_CALLS][", "]"),
    "without": SMOLLM2_TEMPLATE,
}
# As Qwen3 has it: reasoning may be turned off, and the prompt then closes it.
THINKING = TEMPLATES["hermes"] + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
# As DeepSeek-R1 has it: the prompt opens the reasoning.
ALWAYS_THINKING = TEMPLATES["hermes"] + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, CLOCK]}


@contextlib.contextmanager
def serving_template(runtime: Path, template: str, **settings: object) -> Iterator[tuple[FlaskClient, ScriptedPool]]:
    """The application in this process, with a model of this template behind it."""
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, chat_template=template)).start()
    try:
        with application(runtime, **settings) as app:
            yield app.test_client(), pool
    finally:
        pool.stop()


def saying(*choices: Sequence[Sequence[int]], reason: str = "stop") -> Any:
    """A reply of the pool: each choice's groups of tokens, one event each, the choices taking turns."""

    def reply(job: Job) -> list[Event]:
        assert isinstance(job, GenerateJob)
        events: list[Event] = [Started(id=job.id)]
        for turn in range(max(map(len, choices))):
            for choice, groups in enumerate(choices):
                if turn < len(groups):
                    events.append(Output(id=job.id, choice=choice, ids=list(groups[turn])))
        ends = [Output(id=job.id, choice=each, finish_reason=reason) for each in range(job.n)]  # type: ignore[arg-type]
        return events + ends

    return reply


def join(text: str) -> list[dict[str, Any]]:
    """The choices that a stream makes, as an answer that is not streamed has them."""
    made: dict[int, dict[str, Any]] = {}
    for chunk in data_events(text):
        for choice in chunk["choices"]:
            own = made.setdefault(
                choice["index"],
                {"index": choice["index"], "message": {}, "logprobs": None, "finish_reason": None},
            )
            assert own["finish_reason"] is None, "something came behind the end"
            own["finish_reason"] = choice["finish_reason"]
            if choice["logprobs"] is not None:
                known = own["logprobs"] or {"content": [], "refusal": None}
                own["logprobs"] = {**known, "content": known["content"] + choice["logprobs"]["content"]}
            _add(own["message"], choice["delta"])
    return [made[index] for index in sorted(made)]


def _add(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "role":
            assert name not in message
            message[name] = value
        elif name == "tool_calls":
            calls = message.setdefault(name, [])
            for piece in value:
                if "id" in piece:
                    assert piece["index"] == len(calls)
                    assert piece["function"]["arguments"] == ""
                    assert set(piece) == {"index", "id", "type", "function"}
                    calls.append({**{key: piece[key] for key in ("id", "type")}, "function": dict(piece["function"])})
                else:
                    assert set(piece) == {"index", "function"}
                    calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        elif value is None:
            message.setdefault(name, None)
        else:
            message[name] = (message.get(name) or "") + value


def without_ids(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices with the ids of calls taken out: they are each answer's own."""
    for choice in choices:
        for call in choice["message"].get("tool_calls", ()):
            del call["id"]
    return choices
