"""The `openai` package on /v1/responses: create, stream, go on from an earlier answer, parse, tools, fetch, delete.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_responses.py
"""

import json
import time
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

MODEL = "llama-3-chinese"

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
options = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}

first = client.responses.create(input="What is the capital of France?", **options)
print("id:", first.id, first.status)
print("text:", first.output_text)

# The server keeps the conversation; the next question needs the id only.
second = client.responses.create(input="And of Italy?", previous_response_id=first.id, **options)
print("next:", second.output_text)
assert second.previous_response_id == first.id
assert second.usage.input_tokens > first.usage.input_tokens, "the first turn is not part of the second"

pieces, kinds = [], []
for event in client.responses.create(input="What is the capital of France?", stream=True, **options):
    kinds.append(event.type)
    if event.type == "response.output_text.delta":
        pieces.append(event.delta)
print("stream:", "".join(pieces))
print("events:", " ".join(dict.fromkeys(kinds)))
assert "".join(pieces) == first.output_text, "a stream and a whole answer differ"

# The client's own helper puts the events together.
with client.responses.stream(input="What is the capital of France?", **options) as stream:
    for _ in stream:
        pass
    assert stream.get_final_response().output_text == first.output_text


class Verdict(BaseModel):
    answer: Literal["yes", "no"]


parsed = client.responses.parse(
    model=MODEL, input="Is Paris in France?", text_format=Verdict, temperature=0, max_output_tokens=60
)
print("parsed:", parsed.output_parsed.model_dump_json())

called = client.responses.create(
    model=MODEL,
    input="Is Paris in France? Look it up.",
    tools=[
        {
            "type": "function",
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "enum": ["Paris", "France"]}},
                "required": ["word"],
                "additionalProperties": False,
            },
            "strict": True,
        }
    ],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    max_output_tokens=100,
)
call = next(item for item in called.output if item.type == "function_call")
print("call:", call.name, json.loads(call.arguments))
told = client.responses.create(
    input=[{"type": "function_call_output", "call_id": call.call_id, "output": "a city in France"}],
    previous_response_id=called.id,
    **options,
)
print("told:", repr(told.output_text))

# In the background: the answer is made without anybody waiting, and fetched later.
job = client.responses.create(input="Name three colours.", background=True, **options)
print("background:", job.status)
while job.status in ("queued", "in_progress"):
    time.sleep(0.1)
    job = client.responses.retrieve(job.id)
print("background:", job.status, repr(job.output_text))
waited_for = client.responses.create(input="Name three colours.", **options)
assert job.output_text == waited_for.output_text, "the background makes another answer"

client.responses.delete(job.id)
try:
    client.responses.retrieve(job.id)
    raise SystemExit("a deleted response is still there")
except openai.NotFoundError:
    print("deleted:", job.id)
