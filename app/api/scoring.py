"""POST /v1/score and /v1/rerank: how well texts go together, by the model's own embeddings or log-probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from flask import Blueprint, Response, g
from pydantic import BeforeValidator, Field

from app.api.embeddings import ROWS_AT_ONCE, embedding_prompt
from app.api.fields import WORD, asks_for_nothing
from app.api.reference.answers.scoring import Ranking, Scores
from app.api.reference.describe import describes
from app.api.service import (
    deadline_of,
    guarded_stream,
    json_answer,
    now,
    parse,
    resolve_model,
    service,
    tenant_salt,
)
from app.api.values import ApiRequest
from app.errors import invalid
from app.ids import new_id
from app.text.card import Model
from app.text.embedding import cosine, embed, shorten
from app.text.errors import ContextLengthExceeded, RequestError
from app.text.likelihood import mean_logprobs
from app.text.offload import give_way, off_hub

blueprint = Blueprint("scoring", __name__)

MAX_TEXTS = 2048

Method = Literal["embedding", "log_likelihood"]

# Field -> values that ask for nothing; null always is one.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (),
    "rank_fields": (["text"],),
    "truncate_prompt_tokens": (),
    "truncation": (False,),
}


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[
    list[str],
    Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True),
    BeforeValidator(
        _one_or_many, json_schema_input_type=str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    ),
]


class Scored(ApiRequest):
    """What both have in common."""

    # For the reference: fields that are refused but for these values, and harmless ones.
    KNOWN: ClassVar = ({**_REFUSED, "priority": (0,)}, {"user": WORD})

    model: Annotated[str, Field(max_length=1024)] | None = Field(None, description="one of the names in `/v1/models`")
    method: Method | None = Field(
        None,
        description="embedding (the default): cosine of the embeddings, of the base model only; log_likelihood: mean "
        "log-probability of a token of the second text behind the first",
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds that the request may take, at most the server's"
    )

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = []
        for name in super().unknown_fields(prefix):
            if name not in _REFUSED:
                unknown.append(name)
                continue
            value = (self.model_extra or {})[name]
            if not asks_for_nothing(value, _REFUSED[name]):
                raise invalid(f"This server does not support {name}.", name)
        return unknown


class ScoreRequest(Scored):
    """POST /v1/score"""

    text_1: Texts = Field(description="a text, or a list of up to 2048")
    text_2: Texts = Field(description="the same; as many as `text_1` has, or any number if that is one")

    def check(self) -> None:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise invalid("text_2 must have as many texts as text_1, or text_1 only one.", "text_2")
        if len(self.text_1) + len(self.text_2) > MAX_TEXTS:
            raise invalid(f"text_1 and text_2 can have at most {MAX_TEXTS} texts together.", "text_2")


class Document(ApiRequest):
    """A document with fields, of which only its text is read."""

    text: str = Field(description="the document")


def _as_documents(value: Any) -> Any:
    # Too many are refused as they are.
    if not isinstance(value, list) or len(value) > MAX_TEXTS:
        return value
    return [{"text": each} if isinstance(each, str) else each for each in value]


class RerankRequest(Scored):
    """POST /v1/rerank"""

    query: str = Field(description="what is looked for")
    documents: Annotated[
        list[Document],
        Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True),
        BeforeValidator(
            _as_documents,
            json_schema_input_type=Annotated[list[str | Document], Field(min_length=1, max_length=MAX_TEXTS)],
        ),
    ] = Field(description="up to 2048 documents: strings, or objects with `text`")
    top_n: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="answer with so many of the best")
    return_documents: bool | None = Field(None, description="false: the answer tells indices and scores only")


Pair = tuple[str, str]


@blueprint.post("/v1/score")
@blueprint.post("/score")
@describes(tag="embeddings", request=ScoreRequest, answer=Scores, example={"text_1": "a text", "text_2": "another"})
def score() -> Response:
    """Score pairs of texts."""
    body = parse(ScoreRequest)
    single = len(body.text_1) == 1
    pairs = [(body.text_1[0 if single else place], text) for place, text in enumerate(body.text_2)]
    names = [
        ("text_1" if single else f"text_1[{place}]", "text_2" if len(pairs) == 1 else f"text_2[{place}]")
        for place in range(len(pairs))
    ]
    request_id = g.job = new_id("score-")
    name, scores, tokens = scores_of(body, request_id, pairs, names)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    head = {"id": request_id, "object": "list", "created": now(), "model": name}
    return json_answer({**head, "data": data, "usage": usage(tokens)})


@blueprint.post("/v1/rerank")
@blueprint.post("/v2/rerank")
@blueprint.post("/rerank")
@describes(
    tag="embeddings", request=RerankRequest, answer=Ranking, example={"query": "a question", "documents": ["a text"]}
)
def rerank() -> Response:
    """Sort documents by how well they go with a query, the best first."""
    body = parse(RerankRequest)
    texts = [document.text for document in body.documents]
    names = [("query", f"documents[{place}]") for place in range(len(texts))]
    pairs = [(body.query, text) for text in texts]
    if body.method == "log_likelihood":
        # How likely somebody who has the document before them asks this: a document's own likelihood says little.
        pairs = [(f"{text}\n\n", query) for query, text in pairs]
        names = [(document, query) for query, document in names]
    request_id = g.job = new_id("rerank-")
    name, scores, tokens = scores_of(body, request_id, pairs, names)
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    results = []
    for index in order[: body.top_n]:
        shown = {} if body.return_documents is False else {"document": {"text": texts[index]}}
        results.append({"index": index, "relevance_score": scores[index], **shown})
    return json_answer({"id": request_id, "model": name, "results": results, "usage": usage(tokens)})


def scores_of(
    body: Scored, request_id: str, pairs: Sequence[Pair], names: Sequence[Pair]
) -> tuple[str, list[float], int]:
    """Return the model's name, the score of each pair of texts, and the number of tokens that were read.

    ``names`` are the fields that the texts come from. Raises `RequestError` and `ApiError` that name one of them.
    """
    model, name, adapter = resolve_model(body.model)
    if body.method != "log_likelihood":
        if adapter:
            raise invalid("Embeddings are those of the base model; an adapter makes none.", "model")
        return name, *_cosines(body, request_id, model, pairs, names)
    stream = guarded_stream()
    tokenized = list(_tokenized(model, pairs, names))
    tokens = sum(len(before) + len(text) for before, text in tokenized)
    service().reserve_prompts(stream, tokens)
    deadline = deadline_of(body.timeout)
    return name, mean_logprobs(stream, request_id, tokenized, deadline, adapter=adapter, salt=tenant_salt()), tokens


def _cosines(
    body: Scored, request_id: str, model: Model, pairs: Sequence[Pair], names: Sequence[Pair]
) -> tuple[list[float], int]:
    stream = guarded_stream()
    prompts: dict[str, list[int]] = {}
    for pair, fields in zip(pairs, names, strict=True):
        for text, field in zip(pair, fields, strict=True):
            if text not in prompts:
                prompts[text] = embedding_prompt(model, text, field)
                _give_way_now_and_then(len(prompts))
    tokens = sum(map(len, prompts.values()))
    service().reserve_prompts(stream, tokens)
    vectors = embed(stream, request_id, list(prompts.values()), deadline_of(body.timeout), tenant_salt())

    def compare() -> list[float]:
        numbers = {text: shorten(vector, None) for text, vector in zip(prompts, vectors, strict=True)}
        return [cosine(numbers[one], numbers[other]) for one, other in pairs]

    return off_hub(compare), tokens


def _tokenized(model: Model, pairs: Sequence[Pair], names: Sequence[Pair]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of each pair; a text that comes again is not tokenized again."""
    known: dict[str, list[int]] = {}
    for place, ((before, text), fields) in enumerate(zip(pairs, names, strict=True)):
        if before not in known:
            known[before] = model.encode(before, add_bos=True, param=fields[0])
        first = known[before]
        # A word begins where the first text ends, whatever the tokenizer would make of both together.
        second = model.encode(text, add_bos=False, param=fields[1])
        if not first or not second:
            field = fields[0] if not first else fields[1]
            raise RequestError("An empty text has no tokens to tell the probability of.", field)
        if len(first) + len(second) > model.card.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {model.card.max_model_len} tokens, "
                f"but the two texts have {len(first) + len(second)}.",
                fields[1],
            )
        yield first, second
        _give_way_now_and_then(place)


def _give_way_now_and_then(place: int) -> None:
    if place % ROWS_AT_ONCE == ROWS_AT_ONCE - 1:
        give_way()


def usage(tokens: int) -> dict[str, int]:
    """The usage object of an answer."""
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
