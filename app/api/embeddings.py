"""POST /v1/embeddings"""

from collections.abc import Iterator
from typing import Any

import orjson
from flask import Blueprint, Response, g

from app.api.disconnect import WatchedBody
from app.api.reference.answers.completions import Embeddings
from app.api.reference.describe import describes
from app.api.schemas import EmbeddingRequest
from app.api.service import deadline_of, guarded_stream, parse, resolve_model, service, tenant_salt
from app.errors import invalid
from app.ids import new_id
from app.text.card import Model
from app.text.embedding import embed, shorten, to_base64
from app.text.errors import ContextLengthExceeded
from app.text.offload import give_way
from app.text.prompts import completion_prompt

blueprint = Blueprint("embeddings", __name__)

# After so many inputs or rows other requests get their turn.
ROWS_AT_ONCE = 8


@blueprint.post("/v1/embeddings")
@describes(tag="embeddings", request=EmbeddingRequest, answer=Embeddings, example={"input": "a text"})
def create_embeddings() -> Response:
    """Turn texts into vectors: the mean of the model's last hidden states, normalised."""
    body = parse(EmbeddingRequest)
    model, name, adapter = resolve_model(body.model)
    if adapter:
        raise invalid("Embeddings are those of the base model; an adapter makes none.", "model")
    if body.dimensions is not None and body.dimensions > model.card.hidden_size:
        raise invalid(f"This model's embeddings have {model.card.hidden_size} dimensions.", "dimensions")
    stream = guarded_stream()
    prompts = embedding_prompts(model, body.input)
    tokens = sum(map(len, prompts))
    service().reserve_prompts(stream, tokens)
    g.job = new_id("embd-")
    vectors = embed(stream, g.job, prompts, deadline_of(body.timeout), tenant_salt())
    tail = {"model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    if g.warnings:
        tail["warnings"] = g.warnings
    parts = answer_parts(vectors, body.dimensions, body.encoding_format == "base64", tail)
    if len(vectors) <= ROWS_AT_ONCE:
        return Response(b"".join(parts), mimetype="application/json")
    # Thousands of long vectors are hundreds of megabytes: they go out as they are encoded.
    return Response(WatchedBody(parts, g.pop("guard")), mimetype="application/json", direct_passthrough=True)


def embedding_prompts(model: Model, inputs: list[str | list[int]]) -> list[list[int]]:
    """Return the tokens of each input. Raises `RequestError` that names the first bad one."""
    prompts = []
    for place, text in enumerate(inputs):
        prompts.append(embedding_prompt(model, text, "input" if len(inputs) == 1 else f"input[{place}]"))
        if place % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
            give_way()
    return prompts


def embedding_prompt(model: Model, text: str | list[int], param: str) -> list[int]:
    """Return the tokens of one input. Raises `RequestError` if there are none, or more than the model can read."""
    prompt = completion_prompt(model, text, wrap=False, param=param)
    if len(prompt) > model.card.max_model_len:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {model.card.max_model_len} tokens, "
            f"but the input has {len(prompt)} tokens.",
            param,
        )
    return prompt


def answer_parts(
    vectors: list[bytes], dimensions: int | None, as_base64: bool, tail: dict[str, Any]
) -> Iterator[bytes]:
    """Yield the JSON of the answer, a few rows at a time; other requests get their turn in between."""
    opening = b'{"object":"list","data":['
    for first in range(0, len(vectors), ROWS_AT_ONCE):
        rows = []
        for index, vector in enumerate(vectors[first : first + ROWS_AT_ONCE], first):
            numbers = shorten(vector, dimensions)
            value = to_base64(numbers) if as_base64 else numbers.tolist()
            rows.append(orjson.dumps({"object": "embedding", "index": index, "embedding": value}))
        yield opening + b",".join(rows)
        opening = b","
        give_way()
    yield b"]," + orjson.dumps(tail)[1:]
