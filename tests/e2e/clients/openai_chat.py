"""The `openai` package: chat, streams, log-probabilities, the legacy completions, embeddings, models.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_chat.py
"""

from openai import OpenAI

MODEL = "llama-3-chinese"  # this name always works; client.models.list() has the others
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY

for model in client.models.list():
    print("model:", model.id)
assert client.models.retrieve(MODEL).id == MODEL

answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
print("chat:", answer.choices[0].message.content)
print("tokens:", answer.usage.completion_tokens, answer.choices[0].finish_reason)

# The usage comes in a chunk of its own, without choices, if it is asked for.
pieces, usage = [], None
for chunk in client.chat.completions.create(
    model=MODEL,
    messages=QUESTION,
    temperature=0,
    max_tokens=24,
    stream=True,
    stream_options={"include_usage": True},
):
    pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    usage = chunk.usage or usage
print("stream:", "".join(pieces))
assert len(pieces) > 1, "the answer did not come in pieces"
assert usage.completion_tokens == answer.usage.completion_tokens

# The client's own helper puts the pieces together.
with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24) as stream:
    kinds = [event.type for event in stream]
    print("helper:", stream.get_final_completion().choices[0].message.content)
assert kinds[-1] == "content.done", kinds

# Sampled with a seed: the same answer each time. `extra_body` carries what OpenAI's API does not have.
options = {"temperature": 1.5, "seed": 7, "max_tokens": 12, "extra_body": {"top_k": 50, "min_tokens": 4}}
first, second = (client.chat.completions.create(model=MODEL, messages=QUESTION, **options) for _ in range(2))
print("seed:", repr(first.choices[0].message.content))
assert first.choices[0].message.content == second.choices[0].message.content

scored = client.chat.completions.create(
    model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
)
for token in scored.choices[0].logprobs.content:
    print("logprob:", repr(token.token), f"{token.logprob:.2f}", [other.token for other in token.top_logprobs])

completion = client.completions.create(
    model=MODEL, prompt="What is the capital of France?", temperature=0, max_tokens=24
)
print("completion:", completion.choices[0].text)

# The client asks for base64 by itself and decodes it.
vectors = client.embeddings.create(model=MODEL, input=["今天天气真不错", "hello"])
plain = client.embeddings.create(model=MODEL, input="hello", encoding_format="float")
print("embeddings:", [len(item.embedding) for item in vectors.data])
assert all(abs(a - b) < 1e-4 for a, b in zip(vectors.data[1].embedding, plain.data[0].embedding, strict=True))
