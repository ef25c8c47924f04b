"""The `anthropic` package on /v1/messages: whole, streamed, tools, counting, error classes.

$ pip install anthropic
$ ANTHROPIC_BASE_URL=http://localhost:19327 ANTHROPIC_API_KEY=none python anthropic_client.py
"""

import anthropic
from anthropic import Anthropic

MODEL = "llama-3-chinese"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}

client = Anthropic(max_retries=0)  # reads ANTHROPIC_BASE_URL (without /v1) and ANTHROPIC_API_KEY
# `extra_body` carries what this package does not know (any more).
options = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0}}

message = client.messages.create(messages=QUESTION, system="You are brief.", **options)
print("message:", message.content[0].text)
print("stop:", message.stop_reason, message.usage.output_tokens)

with client.messages.stream(messages=QUESTION, system="You are brief.", **options) as stream:
    pieces = list(stream.text_stream)
    final = stream.get_final_message()
print("stream:", "".join(pieces))
assert len(pieces) > 1, "the answer did not come in pieces"
assert final.content[0].text == message.content[0].text, "a stream and a whole answer differ"
assert final.usage.output_tokens == message.usage.output_tokens

counted = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="You are brief.")
used = message.usage
print("counted:", counted.input_tokens)
assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens

# A tool must be called; its input is held to the schema. Then its result goes back.
conversation: list = [{"role": "user", "content": "How is the weather in Rome?"}]
call_options = {"model": MODEL, "max_tokens": 100, "extra_body": {"temperature": 0}, "tools": [WEATHER]}
answer = client.messages.create(
    messages=conversation, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **call_options
)
calls = [block for block in answer.content if block.type == "tool_use"]
assert calls, f"no call: {answer}"
print("call:", calls[0].name, calls[0].input)
results = [
    {"type": "tool_result", "tool_use_id": call.id, "content": f"It rains in {call.input['city']}."} for call in calls
]
conversation += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
told = client.messages.create(messages=conversation, tool_choice={"type": "none"}, **call_options | {"max_tokens": 24})
print("answer:", [block.type for block in told.content], told.stop_reason)

with client.messages.stream(
    messages=conversation[:1], tool_choice={"type": "tool", "name": "get_weather"}, **call_options
) as stream:
    for _ in stream:
        pass
    streamed = [block for block in stream.get_final_message().content if block.type == "tool_use"]
print("streamed call:", streamed[0].name, streamed[0].input)

try:
    client.messages.create(model=MODEL, max_tokens=4, messages=[])
    raise SystemExit("a conversation without messages was accepted")
except anthropic.BadRequestError as error:
    print("BadRequestError:", error.status_code, error.body["error"]["type"])
try:
    client.messages.create(model="no-such-model", max_tokens=4, messages=QUESTION)
    raise SystemExit("an unknown model was accepted")
except anthropic.NotFoundError as error:
    print("NotFoundError:", error.status_code, error.body["error"]["type"])
try:
    client.with_options(api_key="sk-wrong").messages.create(model=MODEL, max_tokens=4, messages=QUESTION)
    print("this server asks for no key")
except anthropic.AuthenticationError as error:
    print("AuthenticationError:", error.status_code, error.body["error"]["type"])
