"""LlamaIndex (`llama-index-llms-openai-like`): complete, chat, streams, asynchronous, structured output, tools.

$ pip install llama-index-llms-openai-like
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python llama_index_client.py
"""

import asyncio
import os
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

QUESTION = "What is the capital of France?"

llm = OpenAILike(
    model="llama-3-chinese",
    api_base=os.environ.get("OPENAI_BASE_URL", "http://localhost:19327/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=8192,
    temperature=0,
    max_tokens=24,
)
messages = [ChatMessage(role="user", content=QUESTION)]

answer = llm.chat(messages)
print("chat:", answer.message.content)
print("complete:", llm.complete(QUESTION).text)

pieces = [piece.delta or "" for piece in llm.stream_chat(messages)]
print("stream:", "".join(pieces))
assert len(pieces) > 2, "the answer did not come in pieces"
print("stream of complete:", "".join(piece.delta or "" for piece in llm.stream_complete(QUESTION)))
print("async:", asyncio.run(llm.achat(messages)).message.content)

# Not a chat model: the prompt goes to /v1/completions.
plain = llm.model_copy(update={"is_chat_model": False})
print("plain complete:", plain.complete(QUESTION).text)
print("plain stream:", "".join(piece.delta or "" for piece in plain.stream_complete(QUESTION)))


def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


weather = FunctionTool.from_defaults(get_weather)
longer = llm.model_copy(update={"max_tokens": 100})
called = longer.chat_with_tools(
    [weather], user_msg="How is the weather in Rome?", tool_required=True, allow_parallel_tool_calls=False
)
for call in longer.get_tool_calls_from_response(called):
    print("call:", call.tool_name, call.tool_kwargs)
    print("result:", weather(**call.tool_kwargs).content)
