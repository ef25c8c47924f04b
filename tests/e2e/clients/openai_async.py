"""The asynchronous client of the `openai` package: several streams at a time.

$ pip install openai
$ OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none python openai_async.py
"""

import asyncio

from openai import AsyncOpenAI

MODEL = "llama-3-chinese"
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Count to five."]


async def whole(client: AsyncOpenAI, question: str) -> str:
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24
    )
    return answer.choices[0].message.content


async def streamed(client: AsyncOpenAI, question: str) -> str:
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def left_early(client: AsyncOpenAI) -> str:
    """Leave a stream after its first words; the server stops its work when the connection ends."""
    async with await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Tell a long story."}], max_tokens=4000, stream=True
    ) as stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                return chunk.choices[0].delta.content
    raise SystemExit("the stream ended without a word")


async def main() -> None:
    async with AsyncOpenAI() as client:  # reads OPENAI_BASE_URL and OPENAI_API_KEY
        wholes = await asyncio.gather(*(whole(client, question) for question in QUESTIONS))
        streams = await asyncio.gather(*(streamed(client, question) for question in QUESTIONS))
        for answer in streams:
            print("stream:", repr(answer))
        assert streams == wholes, "a stream and a whole answer differ"
        print("left after:", repr(await left_early(client)))
        vectors = await client.embeddings.create(model=MODEL, input=QUESTIONS)
        print("embeddings:", [len(item.embedding) for item in vectors.data])


asyncio.run(main())
