"""Instructor: pydantic objects out of text, at the first try (retries are off).

$ pip install instructor
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python instructor_client.py
"""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

MODEL = "llama-3-chinese"


class Person(BaseModel):
    """A person who is named in the text."""

    name: str = Field(max_length=40)  # bounds keep a small model from going on without end
    age: int = Field(ge=0, le=150)
    job: Literal["doctor", "teacher", "pilot"]


# JSON_SCHEMA: the answer is held to the schema. TOOLS: the model must call a tool whose arguments are held to it.
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(OpenAI(), mode=mode)  # reads OPENAI_BASE_URL and OPENAI_API_KEY
    person = client.chat.completions.create(
        model=MODEL,
        response_model=Person,
        messages=[{"role": "user", "content": "Anna is 34 years old and flies for an airline."}],
        temperature=0,
        max_tokens=600,
        max_retries=0,
    )
    assert isinstance(person, Person), person
    print(f"{mode.name}:", person.model_dump_json())
