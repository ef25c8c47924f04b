"""LangChain (`langchain-openai`): invoke, stream, structured output, tools, embeddings.

$ pip install langchain-openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python langchain_client.py
"""

import os
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://localhost:19327/v1")
MODEL = "llama-3-chinese"
QUESTION = "What is the capital of France?"

chat = ChatOpenAI(model=MODEL, base_url=BASE_URL, temperature=0, max_tokens=24)  # reads OPENAI_API_KEY

answer = chat.invoke(QUESTION)
print("invoke:", answer.content)
print("usage:", answer.usage_metadata["output_tokens"], answer.response_metadata["finish_reason"])

pieces = list(chat.stream(QUESTION))
assert len(pieces) > 2, "the answer did not come in pieces"
whole = pieces[0]
for piece in pieces[1:]:
    whole += piece
print("stream:", whole.content)
assert whole.content == answer.content, "a stream and a whole answer differ"

print("batch:", [each.content for each in chat.batch([QUESTION, QUESTION])])


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)  # bounds keep a small model from going on without end
    climate: Literal["cold", "mild", "hot"]
    inhabitants: int = Field(ge=0, le=50_000_000)


longer = ChatOpenAI(model=MODEL, base_url=BASE_URL, temperature=0, max_tokens=600)
city = longer.with_structured_output(City).invoke("Describe Paris.")
assert isinstance(city, City), city
print("structured:", city.model_dump_json())


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Tells the weather of a city."""
    return f"It rains in {city}."


# tool_choice="any": the model must call a tool, and the arguments are held to the tool's schema. One call is enough
# here; a small model does not know when to end.
asked = [HumanMessage("How is the weather in Rome?")]
reply = longer.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(asked)
assert reply.tool_calls, f"no call: {reply}"
asked.append(reply)
for call in reply.tool_calls:
    print("call:", call["name"], call["args"])
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    asked.append(result)
print("answer:", repr(chat.bind_tools([get_weather], tool_choice="none").invoke(asked).content))

by_call = longer.with_structured_output(City, method="function_calling").invoke("Describe Rome.")
assert isinstance(by_call, City), by_call
print("structured by a call:", by_call.model_dump_json())

# Without this switch LangChain counts with OpenAI's own tokens, which are no tokens of this model.
embeddings = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, check_embedding_ctx_length=False)
vectors = embeddings.embed_documents(["今天天气真不错", "hello"])
query = embeddings.embed_query("hello")
print("embeddings:", [len(vector) for vector in vectors])
assert max(abs(a - b) for a, b in zip(query, vectors[1], strict=True)) < 1e-4
