"""Tools with the real model and the real client: calls that must be made always parse, whatever runs beside them."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.app.tool_models import join, without_ids
from tests.e2e.server import Server

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather in a city.", "parameters": PARAMETERS},
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "Tells the time."}}
STRICT: dict[str, Any] = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Weather(BaseModel):
    """What `PARAMETERS` allow."""

    model_config = ConfigDict(strict=True, extra="forbid")
    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)
    unit: Literal["C", "F"]


class Clock(BaseModel):
    """No arguments at all."""

    model_config = ConfigDict(extra="forbid")


MODELS: dict[str, type[BaseModel]] = {"get_weather": Weather, "clock": Clock}
QUESTION = [{"role": "user", "content": "What will the weather be in Paris in the next 3 days?"}]
BODY: dict[str, Any] = {"messages": QUESTION, "tools": [WEATHER, CLOCK], "max_tokens": 120, "temperature": 0.8}


def ask(server: Server, **more: Any) -> list[dict[str, Any]]:
    """The choices of the answer, streamed or not; calls without their ids."""
    body = {**BODY, **more}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return without_ids(join(response.text) if body.get("stream") else response.json()["choices"])


def check_calls(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a choice, which are complete and hold to their schemas."""
    assert choice["finish_reason"] == "tool_calls", choice
    calls: list[dict[str, Any]] = choice["message"]["tool_calls"]
    for call in calls:
        function = call["function"]
        MODELS[function["name"]].model_validate_json(function["arguments"])
    return calls


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_that_must_be_made_parse(server: Server, choice: Any, stream: bool) -> None:
    answers = ask(server, tool_choice=choice, n=3, seed=1, stream=stream, parallel_tool_calls=False)
    assert len(answers) == 3
    for answer in answers:
        (call,) = check_calls(answer)
        assert answer["message"]["content"] is None
        assert choice == "required" or call["function"]["name"] == "get_weather"


def test_several_calls_may_be_made_at_once(server: Server) -> None:
    (answer,) = ask(server, tool_choice="required", seed=2, max_tokens=200)
    if answer["finish_reason"] == "tool_calls":
        check_calls(answer)
    else:
        # The last one was cut off.
        assert answer["finish_reason"] == "length"
        assert len(answer["message"]["tool_calls"]) > 1


def earlier(cities: list[str]) -> list[dict[str, Any]]:
    """Turns in which the model called a tool, and will again."""
    turns: list[dict[str, Any]] = []
    for city in cities:
        arguments = json.dumps({"city": city, "days": 2, "unit": "C"})
        call = {"id": city, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        turns += [
            {"role": "user", "content": f"What will the weather be in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": city, "content": "sun"},
            {"role": "assistant", "content": "It will be sunny."},
        ]
    return turns


@pytest.mark.parametrize("tool", [WEATHER, STRICT])
def test_a_call_that_the_model_chooses_to_make_is_found(server: Server, tool: dict[str, Any]) -> None:
    question = {"role": "user", "content": "What will the weather be in Paris?"}
    greedy = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 64}
    body = {"messages": [*earlier(["Rome", "Oslo", "Kyiv"]), question], "tools": [tool], **greedy}
    (answer,) = ask(server, **body)
    (call,) = check_calls(answer)
    assert json.loads(call["function"]["arguments"])["city"] == "Paris"
    assert ask(server, **body, stream=True) == [answer]


def test_a_stream_joined_is_the_answer_that_is_not_streamed(server: Server) -> None:
    for more in ({}, {"logprobs": True, "top_logprobs": 1, "tool_choice": NAMED}):
        body = {"n": 2, "seed": 4, "max_tokens": 64, **more}
        assert ask(server, stream=True, **body) == ask(server, stream=False, **body)


def test_calls_beside_other_requests_are_those_of_each_alone(server: Server) -> None:
    plain: dict[str, Any] = {"tools": None, "max_tokens": 24}
    bodies: list[dict[str, Any]] = [
        {"tool_choice": "required", "seed": 5, "n": 2, "parallel_tool_calls": False},
        {"tool_choice": NAMED, "seed": 6, "stream": True, "parallel_tool_calls": False},
        {"tools": [STRICT], "seed": 7, "max_tokens": 24},
        {**plain, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}},
        {**plain, "guided_regex": "[a-z ]{10,30}", "seed": 8},
        {**plain, "seed": 9, "stream": True},
        {**plain, "temperature": 0},
    ]
    for body in bodies:
        body.setdefault("seed", 0)
    alone = [ask(server, **body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: ask(server, **body), bodies))
    assert together == alone


def test_a_schema_that_cannot_be_used_is_named(server: Server) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "vegetable"}}}}}
    for stream in (False, True):
        body = {**BODY, "tools": [CLOCK, bad], "tool_choice": "required", "stream": stream}
        response = server.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == "tools[1].function.parameters"


# --- the client


def get_weather(city: str, days: int, unit: str) -> str:
    return f"In {city}: sun for {days} days, 20 {unit}."


def test_a_loop_of_calls_and_results_comes_to_an_answer(client: openai.OpenAI) -> None:
    functions: dict[str, Callable[..., str]] = {"get_weather": get_weather}
    messages: list[Any] = list(QUESTION)
    tools: list[Any] = [WEATHER]
    choice: Any = NAMED
    for _ in range(2):
        answer = client.chat.completions.create(
            model="llama-3-chinese", messages=messages, tools=tools, tool_choice=choice, seed=1, max_tokens=120
        )
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = functions[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "none"
    assert [each["role"] if isinstance(each, dict) else each.role for each in messages[:3]] == [
        "user",
        "assistant",
        "tool",
    ]
    assert isinstance(messages[-1].content, str)
    assert not messages[-1].tool_calls


class Trip(BaseModel):
    """Plans a trip."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def test_tools_of_pydantic_models_come_back_parsed(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Trip, name="plan_trip")
    completion = client.chat.completions.parse(
        model="llama-3-chinese", messages=QUESTION, tools=[tool], tool_choice="required",
        parallel_tool_calls=False, seed=2, max_tokens=80,
    )  # type: ignore[type-var]  # fmt: skip
    (call,) = completion.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Trip)


def test_the_clients_own_stream_puts_calls_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="llama-3-chinese", messages=QUESTION, tools=[openai.pydantic_function_tool(Trip)],
        tool_choice="required", parallel_tool_calls=False, seed=3, max_tokens=80, n=2,
    ) as stream:  # type: ignore[type-var]  # fmt: skip
        kinds = {event.type for event in stream}
        completion = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    for choice in completion.choices:
        (call,) = choice.message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Trip)
        assert choice.finish_reason == "tool_calls"
