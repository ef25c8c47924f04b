"""The `openai` package: each way of failing is an exception class of its own.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_errors.py [KEY_OF_FEW_REQUESTS]
"""

import sys
from typing import Any

import openai
from openai import OpenAI

MODEL = "llama-3-chinese"
QUESTION = [{"role": "user", "content": "Count to a thousand."}]

client = OpenAI(max_retries=0)  # reads OPENAI_BASE_URL and OPENAI_API_KEY

try:
    client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    raise SystemExit("temperature 3 was accepted")
except openai.BadRequestError as error:
    print("BadRequestError:", error.status_code, error.param, error.code)

try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    raise SystemExit("a prompt longer than the context was accepted")
except openai.BadRequestError as error:
    print("BadRequestError:", error.status_code, error.param, error.code)

try:
    client.chat.completions.create(model="no-such-model", messages=QUESTION)
    raise SystemExit("an unknown model was accepted")
except openai.NotFoundError as error:
    print("NotFoundError:", error.status_code, error.param, error.code)

try:
    client.with_options(api_key="sk-wrong").models.list()
    print("this server asks for no key")
except openai.AuthenticationError as error:
    print("AuthenticationError:", error.status_code, error.code)

# A key with a limit (`requests_per_minute=1` in the server's key file) is told when to come again. The client waits
# and tries again by itself, twice, if it is not made with max_retries=0.
for key in sys.argv[1:]:
    try:
        for _ in range(100):
            client.with_options(api_key=key).chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1)
        raise SystemExit("the key has no limit")
    except openai.RateLimitError as error:
        headers = error.response.headers
        print("RateLimitError:", error.status_code, error.type, "retry-after", headers["retry-after"])

# A stream whose time runs out ends as one that has reached its length, and says why.
chunks: list[Any] = list(
    client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=8000,
        stream=True,
        extra_body={"ignore_eos": True, "timeout": 1},
    )
)
words = sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
print("cut short:", chunks[-1].choices[0].finish_reason, words, chunks[-1].model_extra["warnings"][0])
