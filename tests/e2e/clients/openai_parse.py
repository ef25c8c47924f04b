"""The `openai` package with a pydantic model: an answer that always has its shape.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_parse.py
"""

from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "llama-3-chinese"


class City(BaseModel):
    name: str = Field(max_length=40)  # bounds keep a small model from going on without end
    country: str = Field(max_length=40)
    population: int = Field(ge=0, le=50_000_000)
    climate: Literal["cold", "mild", "hot"]
    rivers: list[Literal["Seine", "Thames", "Danube"]] = Field(max_length=2)


client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
messages = [{"role": "user", "content": "Describe Paris."}]

# The scores choose among the tokens that the schema allows, so what comes out always parses. `max_tokens` leaves
# room for the longest answer that there can be.
answer = client.chat.completions.parse(
    model=MODEL, messages=messages, response_format=City, temperature=0, max_tokens=800
)
city = answer.choices[0].message.parsed
assert isinstance(city, City), f"no City: {answer.choices[0]}"
print("parsed:", city.model_dump_json())

with client.chat.completions.stream(
    model=MODEL, messages=messages, response_format=City, temperature=0, max_tokens=800
) as stream:
    for event in stream:
        if event.type == "content.done":
            print("streamed:", event.parsed.model_dump_json())
            assert event.parsed == city

# The same without pydantic, and what other servers of open models call `guided_*`.
anything = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Is the sky blue?"}],
    max_tokens=10,
    extra_body={"guided_choice": ["yes", "no"]},
)
print("choice:", anything.choices[0].message.content)
