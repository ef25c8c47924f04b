"""The unmodified openai client, on every endpoint."""

import asyncio
import math
import struct

import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0, "max_tokens": 16}


def test_chat(client):
    answer = client.chat.completions.create(model="llama-3-chinese", messages=QUESTION, **GREEDY)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 16


def test_streamed_chat_is_the_same_text_with_usage_when_asked(client):
    whole = client.chat.completions.create(model="llama-3-chinese", messages=QUESTION, **GREEDY)
    stream = client.chat.completions.create(
        model="llama-3-chinese", messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [whole.usage.completion_tokens]


def test_completion_and_its_stream(client):
    options = {"model": "llama-3-chinese", "prompt": "What is the capital of France?", **GREEDY}
    whole = client.completions.create(**options)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True) if chunk.choices]
    assert "Paris" in whole.choices[0].text
    assert "".join(pieces) == whole.choices[0].text


def test_several_choices(client):
    answer = client.chat.completions.create(
        model="llama-3-chinese", messages=QUESTION, n=3, seed=5, temperature=1.5, max_tokens=8
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_seed_repeats_an_answer(client):
    def ask(seed: int) -> str:
        options = {"temperature": 1.5, "max_tokens": 12, "seed": seed}
        answer = client.chat.completions.create(model="llama-3-chinese", messages=QUESTION, **options)
        return str(answer.choices[0].message.content)

    assert ask(7) == ask(7)
    assert len({ask(7), ask(8), ask(9)}) > 1


def test_stop_ends_and_is_no_part_of_the_answer(client):
    answer = client.chat.completions.create(model="llama-3-chinese", messages=QUESTION, stop="Paris", **GREEDY)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "The capital of France is "


def test_embeddings_of_one_and_of_many(client):
    # The client asks for base64 by itself and decodes it.
    one = client.embeddings.create(model="llama-3-chinese", input="今天天气真不错").data[0].embedding
    many = client.embeddings.create(model="llama-3-chinese", input=["今天天气真不错", "hello"]).data
    plain = client.embeddings.create(model="llama-3-chinese", input="hello", encoding_format="float").data[0].embedding
    assert [item.index for item in many] == [0, 1]
    assert math.dist(one, many[0].embedding) < 1e-3
    assert math.dist(plain, many[1].embedding) < 1e-3
    assert struct.unpack("<f", struct.pack("<f", one[0]))[0] == pytest.approx(one[0])


def test_models(client):
    ids = [model.id for model in client.models.list()]
    assert "llama-3-chinese" in ids
    assert client.models.retrieve(ids[0]).id == ids[0]


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="llama-3-chinese", messages=QUESTION, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="llama-3-chinese", prompt="word " * 9000)
    assert long.value.code == "context_length_exceeded"


def test_the_async_client_does_the_same(server):
    async def ask() -> tuple[str, str, str, int]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = "llama-3-chinese"
            whole = await client.chat.completions.create(model=model, messages=QUESTION, **GREEDY)
            stream = await client.chat.completions.create(model=model, messages=QUESTION, stream=True, **GREEDY)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            completion = await client.completions.create(model=model, prompt="What is the capital of France?", **GREEDY)
            embedding = await client.embeddings.create(model=model, input="hello")
            content = str(whole.choices[0].message.content)
            return content, "".join(pieces), completion.choices[0].text, len(embedding.data[0].embedding)

    whole, streamed, completion, length = asyncio.run(ask())
    assert "Paris" in whole
    assert whole == streamed == completion
    assert length == 576
