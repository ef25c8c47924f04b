"""The unmodified openai client is content with all of it."""

import asyncio
import time
from collections.abc import Iterator

import openai
import pytest

from tests.app.conftest import Server
from tests.app.scripted_pool import refusal, tokens, vectors
from tests.app.test_completions import vector_of
from tests.app.tiny import IM_END, ids_of
from workers.messages import Event, Failed, Job, Output, Queued, Started

REPLY = "中国的首都是北京。😀"
MESSAGES = [{"role": "user", "content": "请你介绍一下中国的首都"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_chat(client: openai.OpenAI, server: Server) -> None:
    server.pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids_of(REPLY)) + 1
    assert answer._request_id is not None


def test_streamed_chat(client: openai.OpenAI, server: Server) -> None:
    server.pool.reply = tokens(ids_of(REPLY), stop=IM_END)
    stream = client.chat.completions.create(
        model="llama-3-chinese",
        messages=MESSAGES,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert chunks[-1].usage is not None


def test_comments_between_events_that_have_ids_are_passed_over(client: openai.OpenAI, server: Server) -> None:
    def reply(job: Job) -> Iterator[Event]:
        yield Queued(id=job.id, position=3)
        yield Started(id=job.id)
        for token in ids_of(REPLY)[:3]:
            # Longer than until the next comment.
            time.sleep(0.25)
            yield Output(id=job.id, ids=[token])
        yield Output(id=job.id, ids=[IM_END], finish_reason="stop", stop_token_id=IM_END)

    server.pool.reply = reply
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)  # type: ignore[arg-type]
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "stop"


def test_completions(client: openai.OpenAI, server: Server) -> None:
    server.pool.reply = tokens(ids_of(REPLY), reason="length")
    answer = client.completions.create(model="tiny", prompt=["a", "b"], extra_body={"top_k": 5})
    assert [choice.text for choice in answer.choices] == [REPLY, REPLY]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(model="tiny", prompt="a", stream=True)]
    assert "".join(pieces) == REPLY


def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    server.pool.reply = vectors(vector_of)  # type: ignore[arg-type]
    answer = client.embeddings.create(model="tiny", input=["今天天气真不错", "x"])
    assert [len(row.embedding) for row in answer.data] == [8, 8]
    assert answer.data[0].embedding[0] == len(ids_of("今天天气真不错"))
    floats = client.embeddings.create(model="tiny", input="x", encoding_format="float", dimensions=4)
    assert len(floats.data[0].embedding) == 4


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias", "llama-3-chinese"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_errors_have_their_class(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)  # type: ignore[arg-type]
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)  # type: ignore[arg-type]
    assert bad.value.param == "temperature"
    server.pool.reply = refusal("overloaded")
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)  # type: ignore[arg-type]


def test_an_error_in_the_middle_is_raised(client: openai.OpenAI, server: Server) -> None:
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    job = server.pool.next_job()
    server.pool.send(Output(id=job.id, ids=ids_of("Hi")))
    assert next(stream).choices[0].text == "Hi"
    server.pool.send(Failed(id=job.id, kind="internal", message="The model worker failed."))
    with pytest.raises(openai.APIError, match=r"The model worker failed\."):
        next(stream)


def test_many_at_once_asynchronously(server: Server) -> None:
    server.pool.reply = tokens(ids_of(REPLY), stop=IM_END)

    async def ask(client: openai.AsyncOpenAI, stream: bool) -> str:
        if not stream:
            answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)  # type: ignore[arg-type]
            return answer.choices[0].message.content or ""
        text = ""
        async for chunk in await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):  # type: ignore[arg-type]
            text += chunk.choices[0].delta.content or ""
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, place % 2 == 0) for place in range(16)))

    assert asyncio.run(ask_all()) == [REPLY] * 16


def test_a_stream_left_early_is_cancelled(client: openai.OpenAI, server: Server) -> None:
    stream = client.completions.create(model="tiny", prompt="a", stream=True)
    job = server.pool.next_job()
    server.pool.send(Output(id=job.id, ids=ids_of("Hi")))
    next(iter(stream))
    stream.close()
    server.pool.wait(lambda: server.pool.is_cancelled(job.id))
