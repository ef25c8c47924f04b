"""The one road from tokens to an answer: events of the pool in, pieces of text out, choice by choice.

A streamed answer sends the pieces as they come, any other answer joins them, so both are the same text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from app.text.card import Model
from app.text.detokenizer import Detokenizer
from app.text.errors import DeadlineExceeded, JobFailed
from app.text.stop import StopMatcher, StopStrings
from workers.messages import Event, Failed, GenerateJob, Job, Output, Started

FinishReason = Literal["stop", "length"]


class EventStream(Protocol):
    """What the pool client offers for one request."""

    def submit(self, job: Job) -> None: ...
    def get(self, timeout: float | None = None) -> list[Event]: ...
    def unget(self, events: list[Event]) -> None: ...
    def end_choice(self, job_id: str, choice: int) -> None: ...
    def abort(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice of the answer; ``finish_reason`` is set on the choice's last piece."""

    choice: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Tokens used so far; ``completion_tokens`` includes the token that ended a choice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete."""

    text: str
    finish_reason: FinishReason


class ChoiceText:
    """The growing text of one choice: detokenizer, stop strings, count of tokens."""

    __slots__ = ("_detokenizer", "_matcher", "_min_tokens", "finish_reason", "tokens")

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._matcher: StopMatcher | None = stops.matcher() if stops else None
        self._min_tokens = min_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, output: Output) -> str:
        """Return the text that can go out; sets ``finish_reason`` when a stop string or the engine ended the choice."""
        ids = output.ids
        # The stop token is the last of the ids and no part of the text.
        visible = ids[:-1] if output.stop_token_id is not None and ids else ids
        if self._matcher is None:
            self.tokens += len(ids)
            text = self._detokenizer.push(visible) if visible else ""
        else:
            text = self._push_one_by_one(self._matcher, visible)
            if self.finish_reason is not None:
                return text
            self.tokens += len(ids) - len(visible)
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            text += self._flush()
        return text

    def _push_one_by_one(self, matcher: StopMatcher, ids: Sequence[int]) -> str:
        """The usage ends at the very token that completed the stop string, so each is looked at alone."""
        text = ""
        for token_id in ids:
            self.tokens += 1
            new = self._detokenizer.push((token_id,))
            if self.tokens < self._min_tokens:
                text += new
                continue
            text += matcher.push(new)
            if matcher.matched is not None:
                self.finish_reason = "stop"
                break
        return text

    def _flush(self) -> str:
        rest = self._detokenizer.flush()
        matcher = self._matcher
        if matcher is None:
            return rest
        text = matcher.push(rest)
        if matcher.matched is not None:
            self.finish_reason = "stop"
            return text
        return text + matcher.flush()


class Generation:
    """One request being answered. Use it as a context manager: leaving it cancels whatever is unfinished.

    The choices of the answer are numbered through all prompts: choice c of prompt p is p * n + c.
    """

    def __init__(
        self,
        stream: EventStream,
        model: Model,
        jobs: Sequence[GenerateJob],
        stop: Sequence[str] = (),
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._jobs = list(jobs)
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        stops = StopStrings(stop)
        self._first_choice: dict[str, int] = {}
        self._choices: list[ChoiceText] = []
        for job in self._jobs:
            self._first_choice[job.id] = len(self._choices)
            self._choices += [ChoiceText(model.detokenizers.start(), stops, job.min_tokens) for _ in range(job.n)]
        self._unfinished = len(self._choices)
        self._prompt_tokens = sum(len(job.prompt) for job in self._jobs)
        self._cached_tokens = 0
        self.started = False

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def choices(self) -> int:
        """How many choices the answer has."""
        return len(self._choices)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished == 0

    @property
    def usage(self) -> Usage:
        """The tokens used up to now."""
        return Usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices), self._cached_tokens)

    def submit(self, patience_s: float) -> None:
        """Hand the jobs to the pool and give it ``patience_s`` seconds to refuse them.

        The pool refuses at once or not at all, so a client gets a real status code for "busy". Raises
        `PoolUnavailable` or `JobFailed`.
        """
        for job in self._jobs:
            self._stream.submit(job)
        events = self._stream.get(patience_s)
        for event in events:
            if isinstance(event, Failed):
                raise JobFailed(event)
        self._stream.unget(events)

    def pieces(self, tick_s: float | None = None) -> Iterator[list[Piece]]:
        """Yield the pieces of text of each turn, until every choice has ended; [] after ``tick_s`` seconds of silence.

        Raises `JobFailed`, `DeadlineExceeded`, or what `abort` was given.
        """
        while self._unfinished:
            events = self._stream.get(self._patience(tick_s))
            if not events:
                if self._deadline is not None and self._clock() >= self._deadline:
                    raise DeadlineExceeded(self.started)
                yield []
                continue
            pieces, failure = self._take(events)
            if pieces:
                yield pieces
            if failure is not None:
                raise JobFailed(failure)
            if self._deadline is not None and self._unfinished and self._clock() >= self._deadline:
                raise DeadlineExceeded(self.started)

    def answers(self) -> list[Answer]:
        """Return the complete choices. Raises what `pieces` raises."""
        texts: list[list[str]] = [[] for _ in self._choices]
        for pieces in self.pieces():
            for piece in pieces:
                texts[piece.choice].append(piece.text)
        return [
            Answer("".join(parts), choice.finish_reason or "stop")
            for parts, choice in zip(texts, self._choices, strict=True)
        ]

    def abort(self, error: BaseException) -> None:
        """Cancel everything; whoever waits for pieces gets ``error``."""
        self._stream.abort(error)

    def close(self) -> None:
        """Cancel what is unfinished."""
        self._stream.close()

    def _patience(self, tick_s: float | None) -> float | None:
        if self._deadline is None:
            return tick_s
        left = max(0.0, self._deadline - self._clock())
        return left if tick_s is None else min(left, tick_s)

    def _take(self, events: Sequence[Event]) -> tuple[list[Piece], Failed | None]:
        pieces: list[Piece] = []
        for event in events:
            if isinstance(event, Output):
                self._take_output(event, pieces)
            elif isinstance(event, Started):
                self.started = True
                self._cached_tokens += event.cached_tokens
            elif isinstance(event, Failed):
                return pieces, event
        return pieces, None

    def _take_output(self, output: Output, pieces: list[Piece]) -> None:
        self.started = True
        index = self._first_choice[output.id] + output.choice
        choice = self._choices[index]
        if choice.finish_reason is not None:
            # Tokens that were on their way when a stop string ended the choice.
            return
        text = choice.push(output)
        if choice.finish_reason is not None:
            self._unfinished -= 1
            if output.finish_reason is None:
                self._stream.end_choice(output.id, output.choice)
        if text or choice.finish_reason is not None:
            pieces.append(Piece(index, text, choice.finish_reason))
