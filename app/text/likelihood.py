"""How likely a text is behind another one, by the model's own distribution."""

import math
from collections.abc import Callable, Iterator, Sequence

from app.text.deadline import Deadline
from app.text.generation import EventStream
from app.text.jobs import run_jobs
from workers.messages import Event, GenerateJob, Output, PromptLogprobs

# As the log-probabilities of answers, for the sake of JSON.
LEAST = -9999.0


def mean_logprobs(
    stream: EventStream,
    request_id: str,
    pairs: Sequence[tuple[list[int], list[int]]],
    deadline: Deadline,
    *,
    adapter: str = "",
    salt: str = "",
) -> list[float]:
    """Return, for each pair of token sequences, the mean log-probability of a token of the second behind the first.

    Both have tokens. Raises what `run_jobs` raises.
    """
    lengths = {f"{request_id}/{place}": len(text) for place, (_, text) in enumerate(pairs)}

    def jobs() -> Iterator[GenerateJob]:
        # One after the other: a text that stands before all others is not kept in memory once for each.
        for job_id, (before, text) in zip(lengths, pairs, strict=True):
            yield GenerateJob(
                id=job_id,
                prompt=before + text,
                max_tokens=0,
                prompt_logprobs=0,
                adapter=adapter,
                salt=salt,
                start_within_s=deadline.start_within_s,
            )

    return run_jobs(stream, jobs(), len(pairs), deadline, _reader(lengths))


def _reader(lengths: dict[str, int]) -> Callable[[Event], tuple[str, float] | None]:
    means: dict[str, float] = {}

    def read(event: Event) -> tuple[str, float] | None:
        if isinstance(event, PromptLogprobs):
            known = event.logprobs[-lengths[event.id] :]
            means[event.id] = math.fsum(max(token.logprob, LEAST) for token in known) / len(known)
        elif isinstance(event, Output) and event.finish_reason is not None:
            return event.id, means[event.id]
        return None

    return read
