"""What is asked of a server, and what is made of its answers: one function for each kind of load."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.answers import Answer, read_answer
from benchmarks.load import Address, Generator, Stream, closed_loop, open_loop, post
from benchmarks.prompts import TokenCounter, long_prefix, question, short_prompts
from benchmarks.results import Disturbance, Load, Prompts, spread

_STREAMS = 4


@dataclass(frozen=True)
class Sizes:
    """How much of everything; tokens and seconds. The limits bound what a slow server may take."""

    output_tokens: int = 96
    long_prompt_tokens: int = 1600
    long_prompts: int = 3
    concurrency: tuple[int, ...] | None = None
    requests_per_s: float = 1.0
    rate_requests: int = 20
    alone_s: float = 4.0
    disturbing_prompts: int = 4
    load_limit_s: float = 90.0
    prompt_limit_s: float = 60.0
    disturbance_limit_s: float = 60.0


QUICK = Sizes(
    output_tokens=16, long_prompts=1, concurrency=(1, 4), requests_per_s=2.0, rate_requests=4, alone_s=1.0,
    disturbing_prompts=1,
)  # fmt: skip


@dataclass
class Target:
    """A server that is up. Prompts come from ``prompts``, so that none is sent twice to the same start of it."""

    address: Address
    model: str
    fields: dict[str, Any]
    count: TokenCounter
    seed: int
    prompts: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = short_prompts(self.seed)

    def chat(self, prompt: str, max_tokens: int, **more: Any) -> bytes:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        return post(self.address, "/v1/chat/completions", json.dumps(body | self.fields | more).encode("utf-8"))

    def one(self, prompt: str, max_tokens: int, limit_s: float) -> Answer:
        """Send one request and return its answer, with an error if it took longer than the limit."""
        with Generator(self.address) as generator:
            stream = generator.send(self.chat(prompt, max_tokens))
            generator.run(time.perf_counter() + limit_s)
        return read_answer(stream)


def throughput(target: Target, clients: int, sizes: Sizes) -> Load:
    """``clients`` at work all the time, two requests each (four at least), prompts all different."""
    number = max(2 * clients, 4)
    requests = [target.chat(next(target.prompts), sizes.output_tokens) for _ in range(number)]
    return _load(target, sizes, clients, number, lambda generator: closed_loop(generator, requests, clients))


def fixed_rate(target: Target, sizes: Sizes) -> Load:
    """Requests as they come from many independent users: Poisson arrivals, the same for every server."""
    number = sizes.rate_requests
    requests = [target.chat(next(target.prompts), sizes.output_tokens) for _ in range(number)]
    return _load(
        target, sizes, 0, number, lambda generator: open_loop(generator, requests, sizes.requests_per_s, seed=1)
    )


def _load(target: Target, sizes: Sizes, clients: int, number: int, start: Callable[[Generator], list[Stream]]) -> Load:
    cpu, began = time.process_time(), time.perf_counter()
    with Generator(target.address) as generator:
        streams = start(generator)
        whole = generator.run(began + sizes.load_limit_s)
        cpu = time.process_time() - cpu
    answers = [read_answer(stream) for stream in streams]
    good = [answer for answer in answers if answer.error is None]
    # Cut off by the limit: what had come by then still says how fast it came.
    counted = good if whole else [answer for answer in answers if answer.texts]
    tokens = [target.count(answer.text) for answer in counted]
    last = max((answer.texts[-1][0] for answer in counted if answer.texts), default=began)
    return Load(
        clients=clients,
        requests=number,
        tokens=sum(tokens),
        seconds=last - began,
        # Counted from the text, an answer may come out a few tokens off what the model was asked for.
        short=sum(
            answer.error is None and n < 0.9 * sizes.output_tokens for answer, n in zip(counted, tokens, strict=True)
        ),
        failed=len(answers) - len(good) if whole else 0,
        cut=not whole,
        first_token=spread([s for answer in counted if (s := answer.first_text_s) is not None]),
        gaps=spread([gap for answer in counted for gap in answer.gaps()]),
        client_cpu_s=cpu,
        error=_first_error(answers) if whole else None,
    )


def cold_and_repeated_prompts(target: Target, sizes: Sizes) -> Prompts:
    """Time to first token of long prompts, one at a time: new ones, then each prefix again with another question."""
    seeds = [1000 * target.seed + number for number in range(sizes.long_prompts)]
    prefixes = [long_prefix(target.count, sizes.long_prompt_tokens, seed) for seed in seeds]
    cold: list[float] = []
    again: list[float] = []
    for number, times in enumerate((cold, again)):
        for prefix in prefixes:
            answer = target.one(question(prefix, number), 8, sizes.prompt_limit_s)
            if answer.error or answer.first_text_s is None:
                return Prompts(sizes.long_prompt_tokens, cold, again, answer.error or "no text")
            times.append(answer.first_text_s)
    return Prompts(sizes.long_prompt_tokens, cold, again)


def disturbed_streams(target: Target, sizes: Sizes) -> Disturbance:
    """Gaps between the tokens of four running streams: alone, then while one long prompt after the other arrives."""
    seeds = [1000 * target.seed + 500 + number for number in range(sizes.disturbing_prompts)]
    prompts = [question(long_prefix(target.count, sizes.long_prompt_tokens, seed), 0) for seed in seeds]
    # A token that shows no text would look like a gap twice as long.
    shown_only = {str(token): -100 for token in target.count.without_text()}
    # A stream that ends makes room for the next: its own start is no gap.
    endless = (target.chat(next(target.prompts), 512, logit_bias=shown_only) for _ in range(1000))
    with Generator(target.address) as generator:
        deadline = time.perf_counter() + sizes.disturbance_limit_s
        streams = closed_loop(generator, endless, _STREAMS)
        generator.run(deadline, lambda: all(len(stream.pieces) > 2 for stream in streams))
        began = time.perf_counter()
        generator.run(min(deadline, began + sizes.alone_s))
        disturbed = time.perf_counter()
        long_ones = closed_loop(generator, [target.chat(prompt, 8) for prompt in prompts], 1)
        generator.run(
            deadline,
            lambda: len(long_ones) == len(prompts) and all(stream.ended_at is not None for stream in long_ones),
        )
        over = time.perf_counter()
    answers, of_prompts = [read_answer(stream) for stream in streams], [read_answer(stream) for stream in long_ones]
    return Disturbance(
        streams=_STREAMS,
        alone=spread([gap for answer in answers for gap in answer.gaps(began, disturbed)]),
        with_prompts=spread([gap for answer in answers for gap in _gaps_to(answer, disturbed, over)]),
        prompts=sum(answer.error is None for answer in of_prompts),
        prompt_first_token=spread([s for answer in of_prompts if (s := answer.first_text_s) is not None]),
        error=_first_error([answer for answer in [*answers, *of_prompts] if answer.error != "not ended"]),
    )


def _gaps_to(answer: Answer, since: float, over: float) -> list[float]:
    """The gaps after ``since``, and the one still open at the end: a stream that stands still has no next token."""
    gaps = answer.gaps(since, over)
    if answer.texts and answer.finish_reason is None:
        gaps.append(over - answer.texts[-1][0])
    return gaps


def _first_error(answers: Sequence[Answer]) -> str | None:
    return next((answer.error for answer in answers if answer.error), None)
