"""The one road from tokens to an answer: events of the pool in, pieces of text out, choice by choice.

A streamed answer sends the pieces as they come, any other answer joins them, so both are the same text.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import msgspec

from app.text.card import Model
from app.text.choice import ChoiceText, FinishReason
from app.text.deadline import Deadline
from app.text.errors import DeadlineExceeded, JobFailed
from app.text.prompts import Echo
from app.text.scores import ScoredToken, TokenTrail
from app.text.stop import StopStrings
from workers.messages import Event, Failed, GenerateJob, Job, Output, PromptLogprobs, Queued, Started


class EventStream(Protocol):
    """What the pool client offers for one request."""

    def submit(self, job: Job) -> None: ...
    def get(self, timeout: float | None = None) -> list[Event]: ...
    def unget(self, events: list[Event]) -> None: ...
    def end_choice(self, job_id: str, choice: int) -> None: ...


class Piece(msgspec.Struct, frozen=True, gc=False):
    """New text of one choice of the answer; ``finish_reason`` is set on the choice's last piece.

    ``tokens``, of a job with logprobs, are those whose text became certain with this piece. ``prompt``, of a job with
    prompt_logprobs, comes once for each choice: the tokens of its prompt.
    """

    choice: int
    text: str
    finish_reason: FinishReason | None = None
    tokens: Sequence[ScoredToken] = ()
    prompt: Sequence[ScoredToken] = ()


@dataclass(slots=True)
class Usage:
    """Tokens used so far; ``completion_tokens`` includes the token that ended a choice."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete.

    ``mean_logprob`` is that of all its tokens (with the one that ended it), for a job with logprobs. ``stop_string`` is
    the one that ended it, if one did.
    """

    text: str
    finish_reason: FinishReason
    tokens: Sequence[ScoredToken] = ()
    prompt: Sequence[ScoredToken] = ()
    mean_logprob: float = 0.0
    stop_string: str | None = None


@dataclass(slots=True)
class _Parts:
    """A choice being put together."""

    texts: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    prompt: Sequence[ScoredToken] = ()

    def add(self, piece: Piece) -> None:
        self.texts.append(piece.text)
        self.tokens += piece.tokens
        self.prompt = self.prompt or piece.prompt


class Generation:
    """One request being answered; closing its stream cancels whatever is unfinished.

    The choices of the answer are numbered through all prompts: choice c of prompt p is p * n + c. ``echoes``, if given,
    are the prompts to show before their answers; with logprobs they come with theirs. ``grammar_param`` names the
    request's field that the grammar is made of, ``grammar_lines`` the fields that single lines of it are made of.
    ``visible_tokens`` are the special tokens that stand in the text as they are written.
    """

    def __init__(
        self,
        stream: EventStream,
        model: Model,
        jobs: Sequence[GenerateJob],
        stop: Sequence[str] = (),
        deadline: Deadline | None = None,
        *,
        echoes: Sequence[Echo] = (),
        grammar_param: str | None = None,
        grammar_lines: Mapping[int, str] = MappingProxyType({}),
        visible_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._stream = stream
        self._jobs = list(jobs)
        self._echoes = dict(zip((job.id for job in self._jobs), echoes, strict=False))
        self._prompts = {job.id: job for job in self._jobs if job.prompt_logprobs is not None}
        self._grammar_param = grammar_param
        self._grammar_lines = grammar_lines
        self._visible_tokens = visible_tokens
        self._deadline = deadline or Deadline(None)
        # Where in the pool's queue each job is, and whether that has changed since it was last told.
        self._positions: dict[str, int] = {}
        self._moved = False
        stops = StopStrings(stop)
        self._first_choice: dict[str, int] = {}
        self._choices: list[ChoiceText] = []
        for job in self._jobs:
            self._first_choice[job.id] = len(self._choices)
            self._choices += [self._choice_text(model, job, stops) for _ in range(job.n)]
        self._unfinished = len(self._choices)
        self._prompt_tokens = sum(len(job.prompt) for job in self._jobs)
        self._cached_tokens = 0
        self.started = False
        # Whether the time was over before every choice had ended.
        self.cut = False

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

    @property
    def warnings(self) -> list[str]:
        """What the client should know of how the answer ended."""
        if not self.cut:
            return []
        return [f"The request's time was over: the answer ends where it was after {self._deadline.seconds:g} seconds."]

    @property
    def queue_position(self) -> int | None:
        """The place in the pool's queue, 1 for the next; None when a job has left it, or nothing is known of it."""
        return min(self._positions.values()) + 1 if self._positions and not self.started else None

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each choice has ended, if it has."""
        return [choice.finish_reason for choice in self._choices]

    def stop_string(self, choice: int) -> str | None:
        """Return the stop string that ended this choice of the answer, if one did."""
        return self._choices[choice].stop_string

    def submit(self, patience_s: float) -> None:
        """Hand the jobs to the pool and give it ``patience_s`` seconds to refuse them.

        The pool answers at once: it refuses a job, says where in the queue it is, or lets a model worker begin. So a
        client gets a real status code for "busy", and nobody waits for longer than that takes. A grammar may be refused
        by the model worker, behind the queue. Raises `PoolUnavailable` or `JobFailed`.
        """
        for job in self._jobs:
            self._stream.submit(job)
        unheard = {job.id for job in self._jobs}
        has_grammar = self._jobs[0].grammar is not None
        until = time.monotonic() + min(patience_s, self._deadline.left(started=False) or patience_s)
        seen: list[Event] = []
        while unheard and (left := until - time.monotonic()) > 0:
            events = self._stream.get(left)
            for event in events:
                if isinstance(event, Failed):
                    raise self._failed(event)
                if not (has_grammar and isinstance(event, Queued)):
                    unheard.discard(event.id)
            seen += events
        self._stream.unget(seen)

    def pieces(self, tick_s: float | None = None) -> Iterator[list[Piece]]:
        """Yield the pieces of text of each turn, until every choice has ended.

        [] after ``tick_s`` seconds of silence, and when the place in the queue has changed. If the time is over, the
        answer is what there is (`warnings` says so). Raises `JobFailed`, `DeadlineExceeded` if nothing had begun by
        then, or what the stream was ended with.
        """
        shown = [piece for job in self._jobs if not self._scores_echo(job) for piece in self._echo_pieces(job)]
        if shown:
            yield shown
        while self._unfinished:
            events = self._stream.get(self._patience(tick_s))
            pieces, failure = self._take(events)
            over = self._unfinished and self._deadline.is_over(self.started)
            if over and (failure is None or (failure.cause == "queue_time" and self.started)):
                pieces += self._cut_off()
            elif failure is not None:
                if pieces:
                    yield pieces
                raise self._failed(failure)
            if pieces or not events or self._moved:
                self._moved = False
                yield pieces

    def answers(self) -> list[Answer]:
        """Return the complete choices. Raises what `pieces` raises."""
        parts = [_Parts() for _ in self._choices]
        for pieces in self.pieces():
            for piece in pieces:
                parts[piece.choice].add(piece)
        return [
            Answer(
                "".join(own.texts),
                choice.finish_reason or "stop",
                own.tokens,
                own.prompt,
                choice.mean_logprob,
                choice.stop_string,
            )
            for own, choice in zip(parts, self._choices, strict=True)
        ]

    def _patience(self, tick_s: float | None) -> float | None:
        left = self._deadline.left(self.started)
        return tick_s if left is None else left if tick_s is None else min(left, tick_s)

    def _cut_off(self) -> list[Piece]:
        """The time is over: cancel what is unfinished, and end it where it is. Raises `DeadlineExceeded`."""
        if not self.started:
            raise DeadlineExceeded(False)
        self.cut = True
        pieces: list[Piece] = []
        for job in self._jobs:
            if self._scores_echo(job):
                pieces += self._echo_pieces(job)
            first = self._first_choice[job.id]
            for index in range(first, first + job.n):
                choice = self._choices[index]
                if choice.finish_reason is None:
                    text = choice.cut()
                    self._unfinished -= 1
                    self._stream.end_choice(job.id, index - first)
                    pieces.append(Piece(index, text, choice.finish_reason, choice.scored))
        return pieces

    def _take(self, events: Sequence[Event]) -> tuple[list[Piece], Failed | None]:
        pieces: list[Piece] = []
        for event in events:
            if type(event) is Output:
                self._take_output(event, pieces)
            elif isinstance(event, Started):
                self.started = True
                self._cached_tokens += event.cached_tokens
            elif isinstance(event, PromptLogprobs):
                self._take_prompt(event, pieces)
            elif isinstance(event, Queued):
                self._positions[event.id] = event.position
                self._moved = True
            elif isinstance(event, Failed) and self._unfinished:
                # Behind the end (a stop string's, say) it means nothing, whether it comes with that or later.
                return pieces, event
        return pieces, None

    def _failed(self, failure: Failed) -> JobFailed:
        if failure.cause != "grammar":
            return JobFailed(failure)
        param = self._grammar_lines.get(failure.line)
        if param is None and failure.line:
            failure = msgspec.structs.replace(failure, message=f"{failure.message} (line {failure.line})")
        return JobFailed(failure, param or self._grammar_param)

    # --- what of the prompt is shown

    def _choice_text(self, model: Model, job: GenerateJob, stops: StopStrings) -> ChoiceText:
        echo = self._echoes.get(job.id)
        trail = None if job.logprobs is None else TokenTrail(len(echo.text) if echo else 0)
        detokenizer = model.detokenizers.start(job.prompt if echo else (), self._visible_tokens)
        return ChoiceText(detokenizer, stops, job.min_tokens, trail)

    def _scores_echo(self, job: GenerateJob) -> bool:
        """Whether the prompt is shown with its scores: not before they are known."""
        return job.logprobs is not None and job.id in self._prompts

    def _echo_pieces(self, job: GenerateJob) -> list[Piece]:
        echo = self._echoes.get(job.id)
        first = self._first_choice[job.id]
        return [Piece(first + choice, echo.text) for choice in range(job.n)] if echo and echo.text else []

    def _take_prompt(self, event: PromptLogprobs, pieces: list[Piece]) -> None:
        # A job that is replayed tells them again.
        job = self._prompts.pop(event.id, None)
        if job is None:
            return
        echo = self._echoes.get(job.id)
        offsets = echo.offsets if echo else [0] * len(job.prompt)
        scores = [None, *event.logprobs]
        tokens = [ScoredToken(*each) for each in zip(job.prompt, scores, offsets, strict=True)]
        shown = echo if job.logprobs is not None else None
        first = self._first_choice[job.id]
        pieces += [
            Piece(first + choice, shown.text if shown else "", None, tokens if shown else (), tokens)
            for choice in range(job.n)
        ]

    def _take_output(self, output: Output, pieces: list[Piece]) -> None:
        self.started = True
        index = self._first_choice[output.id] + output.choice
        choice = self._choices[index]
        if choice.finish_reason is not None:
            # Tokens that were on their way when a stop string ended the choice.
            return
        # Whoever has a reason of its own for the end has found it before.
        self.cut = self.cut or output.cut
        text = choice.push(output)
        if choice.finish_reason is not None:
            self._unfinished -= 1
            if output.finish_reason is None:
                self._stream.end_choice(output.id, output.choice)
        if text or choice.scored or choice.finish_reason is not None:
            pieces.append(Piece(index, text, choice.finish_reason, choice.scored))
