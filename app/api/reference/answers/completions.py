"""The answers of /v1/completions and /v1/embeddings."""

from typing import Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, ErrorResponse, PromptLogprobs, Usage, WithWarnings


class CompletionLogprobs(Answer):
    """The scores of a choice's tokens, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class Completion(WithWarnings):
    """The answer to prompts; choice c of prompt p is p * n + c."""

    id: str = Field(pattern="^cmpl-")
    object: Literal["text_completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunkChoice(Answer):
    """What is new in one choice."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs = Field(default_factory=list)


class CompletionChunk(WithWarnings):
    """One event of a streamed answer."""

    id: str = Field(pattern="^cmpl-")
    object: Literal["text_completion"]
    created: int = Field(description="seconds since 1970, the same in all chunks")
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = Field(default=None, description="in the last chunk, with stream_options.include_usage")


CompletionEvent = CompletionChunk | ErrorResponse


class EmbeddingUsage(Answer):
    """The tokens of a request without an answer in text."""

    prompt_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class Embedding(Answer):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int = Field(ge=0)
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class Embeddings(WithWarnings):
    """The vectors of all inputs, in their order."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
