"""Plain completions and embeddings through the application in this process."""

import base64
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.app.conftest import application
from tests.app.scripted_pool import ScriptedPool, refusal, tokens, vectors
from tests.app.tiny import IM_END, ids_of, tokenizer, write_card
from tests.sse import data_events
from workers.messages import EmbedJob, Event, GenerateJob, Job, Output

URL = "/v1/completions"


def prompt_texts(pool: ScriptedPool) -> list[str]:
    return [tokenizer().decode(job.prompt, skip_special_tokens=False) for job in pool.jobs]


WRAPPED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def test_the_demos_request_is_answered(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = tokens(ids_of("中国的首都是北京。"), stop=IM_END)
    answer = client.post(URL, json={"prompt": "请你介绍一下中国的首都"}).get_json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "中国的首都是北京。", "logprobs": None, "finish_reason": "stop"}]
    assert prompt_texts(pool) == [WRAPPED.format("请你介绍一下中国的首都")]
    job = pool.jobs[0]
    assert isinstance(job, GenerateJob)
    assert (job.sampling.temperature, job.sampling.top_p, job.sampling.top_k) == (0.2, 0.9, 40)
    assert (job.sampling.repetition_penalty, job.max_tokens) == (1.1, 512)


@pytest.mark.parametrize(
    ("setting", "asked", "wrapped"),
    [
        ("auto", None, True),
        ("auto", "raw", False),
        ("never", None, False),
        ("never", "chat", True),
        ("always", None, True),
        ("always", "raw", False),
    ],
)
def test_the_prompt_is_wrapped_as_settled(
    runtime: Path, pool: ScriptedPool, setting: str, asked: str | None, wrapped: bool
) -> None:
    pool.reply = tokens([], stop=IM_END)
    with application(runtime, completion_template=setting, system_prompt="unused") as app:
        assert app.test_client().post(URL, json={"prompt": "Hi", "template": asked}).status_code == 200
    assert prompt_texts(pool) == [WRAPPED.format("Hi") if wrapped else "Hi"]


def test_a_base_model_reads_the_prompt_as_it_is_behind_its_first_token(runtime: Path) -> None:
    pool = ScriptedPool(runtime / "pool.sock", write_card(runtime, chat_template=None, add_bos_token=True)).start()
    pool.reply = tokens([], stop=IM_END)
    with application(runtime) as app:
        client = app.test_client()
        assert client.post(URL, json={"prompt": "Hi"}).status_code == 200
        assert client.post(URL, json={"prompt": ""}).status_code == 200
        assert client.post(URL, json={"prompt": "Hi", "template": "chat"}).status_code == 400
    pool.stop()
    assert prompt_texts(pool) == ["<|im_start|>Hi", "<|im_start|>"]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_through_prompts(client: FlaskClient, pool: ScriptedPool, stream: bool) -> None:
    def reply(job: Job) -> list[Event]:
        text = tokenizer().decode(job.prompt)
        return [
            Output(id=job.id, choice=choice, ids=ids_of(f"{text}{choice}"), finish_reason="length") for choice in (1, 0)
        ]

    pool.reply = reply
    body = {"prompt": ["a", "b", "c"], "n": 2, "template": "raw", "stream": stream}
    response = client.post(URL, json=body)
    texts = [""] * 6
    found = data_events(response.text) if stream else [response.get_json()]
    for choice in (choice for each in found for choice in each["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == ["a0", "a1", "b0", "b1", "c0", "c1"]
    if not stream:
        assert found[0]["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [8]]])
def test_token_ids_are_taken_as_they_are(client: FlaskClient, pool: ScriptedPool, prompt: list[Any]) -> None:
    pool.reply = tokens([], stop=IM_END)
    assert client.post(URL, json={"prompt": prompt}).status_code == 200
    assert [job.prompt for job in pool.jobs] == ([prompt] if isinstance(prompt[0], int) else prompt)


def test_one_refused_prompt_cancels_the_others(client: FlaskClient, pool: ScriptedPool) -> None:
    def reply(job: Job) -> Any:
        return refusal("overloaded")(job) if job.id.endswith("/1") else []

    pool.reply = reply
    assert client.post(URL, json={"prompt": ["a", "b", "c"]}).status_code == 429
    pool.wait(lambda: {cancel.id[-2:] for cancel in pool.cancels} == {"/0", "/2"})


def vector_of(job: EmbedJob) -> bytes:
    return struct.pack("<8f", len(job.prompt), *([0.5] * 7))


def test_embeddings_come_in_the_order_of_the_input(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = vectors(vector_of)  # type: ignore[arg-type]
    inputs = ["今天天气真不错", *("x" * count for count in range(1, 100))]
    answer = client.post("/v1/embeddings", json={"input": inputs}).get_json()
    assert [row["index"] for row in answer["data"]] == list(range(100))
    lengths = [len(ids_of(text)) for text in inputs]
    assert [row["embedding"][0] for row in answer["data"]] == lengths
    assert answer["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"


@pytest.mark.parametrize("value", ["Hello", [3, 4, 5], [[3, 4, 5]], ["Hello"]])
def test_one_input_in_any_shape_gives_one_row(client: FlaskClient, pool: ScriptedPool, value: Any) -> None:
    pool.reply = vectors(vector_of)  # type: ignore[arg-type]
    answer = client.post("/v1/embeddings", json={"input": value}).get_json()
    assert len(answer["data"]) == 1
    assert answer["data"][0]["object"] == "embedding"
    assert len(answer["data"][0]["embedding"]) == 8


def test_base64_is_the_same_numbers(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = vectors(vector_of)  # type: ignore[arg-type]
    body = {"input": "Hello", "encoding_format": "base64"}
    row = client.post("/v1/embeddings", json=body).get_json()["data"][0]["embedding"]
    assert base64.b64decode(row) == struct.pack("<8f", len(ids_of("Hello")), *([0.5] * 7))


def test_fewer_dimensions_are_normalised_again(client: FlaskClient, pool: ScriptedPool) -> None:
    pool.reply = vectors(lambda job: struct.pack("<8f", 3, 4, *([9] * 6)))
    answer = client.post("/v1/embeddings", json={"input": "Hello", "dimensions": 2}).get_json()
    assert answer["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    assert math.hypot(*answer["data"][0]["embedding"]) == pytest.approx(1)
    refused = client.post("/v1/embeddings", json={"input": "Hello", "dimensions": 9})
    assert refused.get_json()["error"]["param"] == "dimensions"


@pytest.mark.parametrize(
    "value", ["", ["ok", ""], [], [[]], [1, "a"], [[1], "a"], None, 7, [True], [1.0], [[-1]], [420]]
)
def test_bad_inputs_are_named(client: FlaskClient, value: Any) -> None:
    response = client.post("/v1/embeddings", json={"input": value})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"].startswith("input")


def test_an_input_beyond_the_context_is_refused(client: FlaskClient) -> None:
    response = client.post("/v1/embeddings", json={"input": [[7], [7] * 2049]})
    assert response.get_json()["error"]["code"] == "context_length_exceeded"
    assert response.get_json()["error"]["param"] == "input[1]"


def test_every_chunk_but_that_of_the_usage_has_a_choice(client: FlaskClient, pool: ScriptedPool) -> None:
    """Clients look at the first choice without asking; warnings come with it."""
    pool.reply = tokens(ids_of("Hi"), stop=IM_END)
    response = client.post("/v1/completions", json={"prompt": "x", "stream": True, "flavour": 1})
    chunks = data_events(response.text)
    assert chunks[0]["warnings"] == ["Unknown field, ignored: flavour"]
    assert all(chunk["choices"] for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hi"
