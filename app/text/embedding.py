"""Embeddings: each text or token sequence becomes one job; a bounded number of them is under way at a time."""

import base64
import math
import sys
import time
from array import array
from collections.abc import Sequence

from app.text.errors import DeadlineExceeded, JobFailed
from app.text.generation import EventStream
from workers.messages import Embedded, EmbedJob, Failed, Started

# A long list must not fill the pool's queue for everybody else.
JOBS_AT_A_TIME = 32


def embed(stream: EventStream, request_id: str, prompts: Sequence[list[int]], timeout_s: float) -> list[bytes]:
    """Return a vector for each prompt, in order: little-endian float32.

    Raises `JobFailed`, `PoolUnavailable`, `DeadlineExceeded`, or what the stream was aborted with.
    """
    deadline = time.monotonic() + timeout_s
    vectors: dict[str, bytes] = {}
    ids = [f"{request_id}/{place}" for place in range(len(prompts))]
    submitted = 0
    started = False
    while len(vectors) < len(prompts):
        while submitted < len(prompts) and submitted - len(vectors) < JOBS_AT_A_TIME:
            stream.submit(EmbedJob(id=ids[submitted], prompt=prompts[submitted]))
            submitted += 1
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(started)
        for event in stream.get(left):
            if isinstance(event, Embedded):
                vectors[event.id] = event.vector
            elif isinstance(event, Failed):
                raise JobFailed(event)
            elif isinstance(event, Started):
                started = True
    return [vectors[each] for each in ids]


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


def to_base64(numbers: "array[float]") -> str:
    """Return the numbers as OpenAI's base64 form: little-endian float32."""
    if sys.byteorder == "big":
        numbers = array("f", numbers)
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")
