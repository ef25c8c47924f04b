"""POST /v1/embeddings"""

from collections.abc import Iterator

import gevent
import orjson
from flask import Blueprint, Response, g

from app.api.errors import invalid
from app.api.schemas import EmbeddingRequest
from app.api.service import guarded_stream, new_id, parse, resolve_model, time_limit
from app.text.card import Model
from app.text.embedding import embed, shorten, to_base64
from app.text.errors import ContextLengthExceeded
from app.text.prompts import completion_prompt

blueprint = Blueprint("embeddings", __name__)


@blueprint.post("/v1/embeddings")
def create_embeddings() -> Response:
    """Turn texts into vectors: the mean of the model's last hidden states, normalised."""
    body = parse(EmbeddingRequest)
    model, name, _ = resolve_model(body.model)
    if body.dimensions is not None and body.dimensions > model.card.hidden_size:
        raise invalid(f"This model's embeddings have {model.card.hidden_size} dimensions.", "dimensions")
    stream = guarded_stream()
    single = len(body.input) == 1
    prompts = [
        embedding_prompt(model, text, "input" if single else f"input[{place}]") for place, text in enumerate(body.input)
    ]
    vectors = embed(stream, new_id("embd-"), prompts, time_limit(body.timeout))
    tokens = sum(map(len, prompts))
    tail = {"model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    if g.warnings:
        tail["warnings"] = g.warnings
    rows = encoded_rows(vectors, body.dimensions, body.encoding_format == "base64")
    answer = b'{"object":"list","data":[' + b",".join(rows) + b"]," + orjson.dumps(tail)[1:]
    return Response(answer, mimetype="application/json")


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


def encoded_rows(vectors: list[bytes], dimensions: int | None, as_base64: bool) -> Iterator[bytes]:
    """Yield each vector as the JSON of its row; other requests get their turn between rows, there may be thousands."""
    for index, vector in enumerate(vectors):
        numbers = shorten(vector, dimensions)
        value = to_base64(numbers) if as_base64 else numbers.tolist()
        yield orjson.dumps({"object": "embedding", "index": index, "embedding": value})
        if index % 16 == 15:
            gevent.sleep(0)
