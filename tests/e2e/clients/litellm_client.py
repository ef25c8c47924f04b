"""LiteLLM: completion, stream, asynchronous, tools, embedding, error classes.

$ pip install 'litellm[mcp]'    # its tool calls import the package mcp
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python litellm_client.py
"""

import asyncio
import json
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a table of prices when it is imported

import litellm

litellm.disable_hf_tokenizer_download = True  # else it fetches Llama's tokenizer when a model's name begins like this

SERVER = {
    "model": "openai/llama-3-chinese",  # "openai/": what comes behind is a name of an OpenAI-compatible server
    "api_base": os.environ.get("OPENAI_BASE_URL", "http://localhost:19327/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "none"),
}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}

answer = litellm.completion(**SERVER, **GREEDY)
print("completion:", answer.choices[0].message.content)
print("usage:", answer.usage.completion_tokens, answer.choices[0].finish_reason)

pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**SERVER, **GREEDY, stream=True)]
print("stream:", "".join(pieces))
assert len(pieces) > 2, "the answer did not come in pieces"


async def streamed() -> str:
    stream = await litellm.acompletion(**SERVER, **GREEDY, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


print("async:", asyncio.run(streamed()))

# What OpenAI's API does not have goes through `extra_body`.
choice = litellm.completion(
    **SERVER, messages=[{"role": "user", "content": "Is the sky blue?"}], extra_body={"guided_choice": ["yes", "no"]}
)
print("choice:", choice.choices[0].message.content)

called = litellm.completion(
    **SERVER,
    messages=[{"role": "user", "content": "How warm is it in Rome?"}],
    tools=[
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
    ],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    max_tokens=100,
)
for call in called.choices[0].message.tool_calls:
    print("call:", call.function.name, json.loads(call.function.arguments))

vectors = litellm.embedding(**SERVER, input=["今天天气真不错", "hello"], encoding_format="float")
print("embedding:", [len(item["embedding"]) for item in vectors.data])

try:
    litellm.completion(**SERVER | {"model": "openai/no-such-model"}, messages=MESSAGES)
    raise SystemExit("an unknown model was accepted")
except litellm.NotFoundError as error:
    print("NotFoundError:", error.status_code)
try:
    litellm.completion(**SERVER, messages=MESSAGES, temperature=3)
    raise SystemExit("temperature 3 was accepted")
except litellm.BadRequestError as error:
    print("BadRequestError:", error.status_code)
