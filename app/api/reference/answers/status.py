"""The answer of /status/data."""

from typing import Literal

from pydantic import Field

from app.api.reference.answers.base import Answer


class HttpSide(Answer):
    """The HTTP workers, together."""

    workers: int = Field(ge=0)
    open_requests: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    hub_lag_s: float = Field(
        ge=0, description="the longest time of the last seconds in which one of them served nobody"
    )


class Queue(Answer):
    """What waits for a model worker, and what may."""

    jobs: int = Field(ge=0)
    tokens: int = Field(ge=0)
    running: int = Field(ge=0, description="jobs that model workers work on")
    kept: int = Field(ge=0, description="requests that outlive their clients")
    tokens_per_second: float = Field(ge=0, description="how fast the queue has been draining")
    max_jobs: int = Field(ge=0)
    max_tokens: int = Field(ge=0)


class ModelWorker(Answer):
    """One model worker."""

    index: int
    device: str
    state: Literal["starting", "loading", "ready", "hung", "dead", "failed"]
    progress: float = Field(ge=0, le=1)
    stage: str
    restarts: int = Field(ge=0)
    cause: str = Field(description="how its last life ended; empty in its first")
    jobs: int = Field(ge=0)
    idle_s: float = Field(ge=0, description="seconds since its last progress")
    running: int = Field(ge=0, description="sequences")
    waiting: int = Field(ge=0, description="sequences")
    blocks_used: int = Field(ge=0, description="of the KV cache")
    blocks_total: int = Field(ge=0)
    memory_bytes: int = Field(ge=0)


class TokenCounts(Answer):
    """Tokens since the model workers started."""

    prompt: int = Field(ge=0)
    cached: int = Field(ge=0, description="of the prompts', found in the prefix cache")
    generated: int = Field(ge=0)


class Faults(Answer):
    """What the pool has been through since it started."""

    worker_deaths: int = Field(ge=0)
    hangs: int = Field(ge=0)
    replayed: int = Field(ge=0)
    quarantined: int = Field(ge=0)
    poisoned: int = Field(ge=0)
    out_of_memory: int = Field(ge=0)
    preemptions: int = Field(ge=0)


class Histogram(Answer):
    """Measured times in seconds: how many were at most so long as each bound, and longer than the one before."""

    bounds: list[float]
    counts: list[float] = Field(description="one more than bounds: the last has no end")


class Histograms(Answer):
    """Of all requests since the start."""

    first_token: Histogram
    gap: Histogram
    queue: Histogram
    latency: Histogram


class Status(Answer):
    """How the service is."""

    time: float = Field(description="seconds since 1970")
    version: str
    model: str
    state: Literal["ready", "loading", "not ready", "draining", "down"]
    reason: str = Field(description="why it is not ready; empty if it is")
    http: HttpSide
    queue: Queue
    workers: list[ModelWorker]
    tokens: TokenCounts
    ended: dict[str, int] = Field(description="choices of answers, by finish reason")
    cancelled: dict[str, int] = Field(description="requests, by cause")
    refused: dict[str, int] = Field(description="requests, by cause")
    failed: dict[str, int] = Field(description="requests, by cause")
    faults: Faults
    histograms: Histograms
