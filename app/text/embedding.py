"""Embeddings: each text or token sequence becomes one job, and its answer a vector."""

import base64
import math
import operator
import sys
from array import array
from collections.abc import Sequence

from app.text.deadline import Deadline
from app.text.generation import EventStream
from app.text.jobs import run_jobs
from workers.messages import Embedded, EmbedJob, Event


def embed(
    stream: EventStream, request_id: str, prompts: Sequence[list[int]], deadline: Deadline, salt: str
) -> list[bytes]:
    """Return a vector for each prompt, in order: little-endian float32, of length 1. Raises what `run_jobs` raises."""
    jobs = (
        EmbedJob(id=f"{request_id}/{place}", prompt=prompt, salt=salt, start_within_s=deadline.start_within_s)
        for place, prompt in enumerate(prompts)
    )
    return run_jobs(stream, jobs, len(prompts), deadline, _vector)


def _vector(event: Event) -> tuple[str, bytes] | None:
    return (event.id, event.vector) if isinstance(event, Embedded) else None


def shorten(vector: bytes, dimensions: int | None) -> "array[float]":
    """Return the first ``dimensions`` numbers, normalised again to length 1 (all of them as they are for None)."""
    numbers = array("f")
    numbers.frombytes(vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    if dimensions is None or dimensions >= len(numbers):
        return numbers
    del numbers[dimensions:]
    length = math.sqrt(math.fsum(number * number for number in numbers))
    return array("f", (number / length for number in numbers)) if length > 0 else numbers


def cosine(one: "array[float]", other: "array[float]") -> float:
    """Return the cosine of two vectors of length 1."""
    return max(-1.0, min(1.0, math.fsum(map(operator.mul, one, other))))


def to_base64(numbers: "array[float]") -> str:
    """Return the numbers as OpenAI's base64 form: little-endian float32."""
    if sys.byteorder == "big":
        numbers = array("f", numbers)
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
