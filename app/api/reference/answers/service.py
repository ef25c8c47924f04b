"""The answers about the service, its models and their tokens."""

from typing import Literal

from pydantic import Field

from app.api.reference.answers.base import Answer, WithWarnings


class Alive(Answer):
    """This process answers."""

    status: Literal["ok"]


class Readiness(Answer):
    """Whether a request would be answered now."""

    status: Literal["ready", "not ready"]
    reason: str = Field(default="", description="why not; left out when it is ready")


class Worker(Answer):
    """One model worker."""

    index: int
    device: str
    pid: int | None
    state: Literal["starting", "loading", "ready", "hung", "dead", "failed"]
    progress: float = Field(ge=0, le=1, description="of loading")
    stage: str = Field(description="what it is doing while it loads")
    restarts: int = Field(ge=0)
    cause: str = Field(description="how its last life ended; empty in its first")
    jobs: int = Field(ge=0, description="requests that it works on")
    steps: int = Field(ge=0, description="that its loop has made")
    running: int = Field(ge=0, description="sequences that take part in each step")
    waiting: int = Field(ge=0, description="sequences that wait for room")
    blocks_used: int = Field(ge=0, description="of the KV cache")
    blocks_total: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    prompt_tokens: int = Field(ge=0, description="read since it started")
    cached_tokens: int = Field(ge=0, description="of those, found in the prefix cache")
    output_tokens: int = Field(ge=0)
    preemptions: int = Field(ge=0, description="sequences that gave way for want of cache")
    out_of_memory: int = Field(ge=0, description="steps that the device had not enough memory for")
    idle_s: float = Field(ge=0, description="seconds since the last progress")


class Health(Readiness):
    """The same, with each model worker."""

    queued: int = 0
    running: int = 0
    draining: bool = False
    workers: list[Worker] = Field(default_factory=list)


class Version(Answer):
    """This server's version."""

    version: str


class ModelEntry(Answer):
    """A name of the model, or an adapter."""

    id: str
    object: Literal["model"]
    created: int = Field(description="seconds since 1970")
    owned_by: str
    root: str = Field(description="the model's own name")
    parent: str | None = Field(description="of an adapter: the model that it belongs to")
    max_model_len: int = Field(description="tokens of prompt and answer together")


class ModelList(Answer):
    """Every name that a request may use."""

    object: Literal["list"]
    data: list[ModelEntry]


class AnthropicModelEntry(Answer):
    """A name of the model, or an adapter, for Anthropic's clients."""

    id: str
    type: Literal["model"]
    display_name: str
    created_at: str = Field(description="as RFC 3339 writes it")


class AnthropicModelList(Answer):
    """Every name that a request may use, for Anthropic's clients."""

    data: list[AnthropicModelEntry]
    has_more: Literal[False]
    first_id: str
    last_id: str


class Tokens(WithWarnings):
    """The tokens of a text."""

    tokens: list[int]
    count: int = Field(ge=0)
    max_model_len: int
    token_strs: list[str | None] = Field(default_factory=list, description="with return_token_strs")


class Detokenized(WithWarnings):
    """The text of tokens."""

    prompt: str
