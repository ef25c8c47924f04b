"""The `openai` package: the loop of tool calls.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_tools.py
"""

import json

import openai
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "llama-3-chinese"
CITIES = {"Paris": 19, "Rome": 27}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the temperature of a city in degrees Celsius.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": list(CITIES)}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def get_weather(city: str) -> str:
    return json.dumps({"city": city, "celsius": CITIES[city]})


client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
messages = [{"role": "user", "content": "How warm is it in Rome?"}]
options = {"model": MODEL, "tools": TOOLS, "temperature": 0, "max_tokens": 100}

# "required": the model must call a tool, and the arguments are held to the tool's schema. One call is enough here; a
# small model does not know when to end.
answer = client.chat.completions.create(messages=messages, tool_choice="required", parallel_tool_calls=False, **options)
message = answer.choices[0].message
assert message.tool_calls, f"no call: {answer}"
print("finish:", answer.choices[0].finish_reason)

messages.append(message)
for call in message.tool_calls:
    print("call:", call.function.name, json.loads(call.function.arguments))
    result = get_weather(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

# The next turn reads the result. "none" asks for words.
final = client.chat.completions.create(messages=messages, tool_choice="none", **options | {"max_tokens": 24})
assert not final.choices[0].message.tool_calls
print("answer:", repr(final.choices[0].message.content))

# A stream brings the name and the id first, then the arguments in pieces.
name, arguments, ids = "", "", set()
for chunk in client.chat.completions.create(
    messages=messages[:1],
    tool_choice={"type": "function", "function": {"name": "get_weather"}},
    stream=True,
    **options,
):
    for part in chunk.choices[0].delta.tool_calls or []:
        if part.index == 0:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
            ids |= {part.id} - {None}
print("streamed:", name, json.loads(arguments))
assert len(ids) == 1, ids
get_weather(**json.loads(arguments))


class Book(BaseModel):
    """Books a table."""

    city: str = Field(max_length=20)
    seats: int = Field(ge=1, le=20)


# With a pydantic model the arguments come parsed.
parsed = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": "A table for four in Rome, please."}],
    tools=[openai.pydantic_function_tool(Book, name="book")],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    max_tokens=400,
)
(call,) = parsed.choices[0].message.tool_calls
assert isinstance(call.function.parsed_arguments, Book), call
print("parsed:", call.function.name, call.function.parsed_arguments.model_dump_json())
