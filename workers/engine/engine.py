"""The engine: jobs in, reports out, one model pass per step."""

import math
import time
from collections import Counter

import torch
from llguidance import LLMatcher

from config import logs
from workers.engine import sampler
from workers.engine.beams import BeamSearch, Continuation
from workers.engine.errors import GrammarError
from workers.engine.flat_batch import Computed, FlatBatch, Step
from workers.engine.recovery import Outcome, Recovery, is_out_of_memory, no_memory, rewound, tamed
from workers.engine.request import BeamToken, Request, certain_outputs, ending, final_outputs, invalid
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.scores import scores_of_chosen, token_logprobs
from workers.engine.sequence import Sequence, State
from workers.messages import (
    Cancel,
    Embedded,
    EmbedJob,
    Failed,
    GenerateJob,
    Order,
    Output,
    PromptLogprobs,
    Report,
    Started,
    Stats,
    TokenLogprobs,
)

log = logs.logger(__name__)

NO_PROBABILITIES = "the model computed no valid probabilities for this request"
NO_EMBEDDING = "the model computed no valid embedding for this request"


class Engine:
    """Owns the requests. Single-threaded: `submit` and `step` are called from one loop.

    A fault in one request ends that request with a `Failed` report; the others go on.
    """

    def __init__(
        self,
        model_step: Step,
        scheduler: Scheduler,
        max_model_len: int,
        vocab_size: int,
        adapters: frozenset[str] = frozenset(),
    ) -> None:
        self.model_step = model_step
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.adapters = adapters
        self.steps = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._requests: dict[str, Request] = {}
        self._recovery = Recovery(lambda: self.model_step, scheduler, self._digest, self._give_up)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self, memory_bytes: int = 0) -> Stats:
        pool = self.scheduler.pool
        return Stats(
            steps=self.steps,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=pool.used,
            blocks_total=pool.count,
            memory_bytes=memory_bytes,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=self.scheduler.preemptions,
            out_of_memory=self._recovery.out_of_memory,
        )

    # --- orders -------------------------------------------------------------------------------------------------------

    def submit(self, order: Order, matcher: LLMatcher | None = None) -> list[Report]:
        """Take a job or a cancellation; return what can be said about it at once.

        ``matcher`` stands at the beginning of the job's grammar, if it has one.
        """
        if isinstance(order, Cancel):
            self._cancel(order)
            return []
        if order.id in self._requests:
            return [Failed(id=order.id, kind="invalid", message="a job with this id is running")]
        problem = invalid(order, self.vocab_size, self.max_model_len, self.adapters) or self.scheduler.never_fits(order)
        if problem:
            return [Failed(id=order.id, kind="invalid", message=problem)]
        request = Request(order)
        self._requests[order.id] = request
        try:
            return self._take(request, matcher)
        except Exception as error:
            return [self._failed(request, tamed(error))]

    def _take(self, request: Request, matcher: LLMatcher | None) -> list[Report]:
        order = request.job
        if isinstance(order, EmbedJob):
            self._add(request, Sequence(order, 0, order.prompt, len(order.prompt)))
            return []
        emitted = [order.emitted[c] if c < len(order.emitted) else [] for c in range(order.n)]
        if order.beams:
            # A search is deterministic: it is run again, and what was sent is not sent again.
            request.sent = [len(ids) for ids in emitted]
        elif any(emitted):
            return self._resume(request, order, emitted, matcher)
        sequence = Sequence(order, 0, order.prompt, len(order.prompt) + order.max_tokens)
        sequence.matcher = matcher
        self._add(request, sequence)
        return []

    def _resume(
        self, request: Request, job: GenerateJob, emitted: list[list[int]], matcher: LLMatcher | None
    ) -> list[Report]:
        """Take a job that ran before: each choice goes on behind the tokens it has, or is finished already."""
        reports: list[Report] = []
        for choice, ids in enumerate(emitted):
            sequence = Sequence(job, choice, [*job.prompt, *ids], len(job.prompt) + job.max_tokens)
            sequence.forked = True
            sequence.prompt_scored = True
            if matcher is not None:
                sequence.matcher = matcher.deep_copy()
                for token in ids:
                    _consume(sequence, token)
            output = ending(sequence, [], []) if ids else None
            if output:
                reports.append(output)
            else:
                self._add(request, sequence)
        if not request.sequences:
            del self._requests[job.id]
        return reports

    def _add(self, request: Request, sequence: Sequence) -> None:
        request.sequences.append(sequence)
        self.scheduler.add(sequence)

    def _cancel(self, order: Cancel) -> None:
        request = self._requests.get(order.id)
        if request is None:
            return
        if order.choice is not None and isinstance(request.job, GenerateJob) and request.job.beams:
            # No beam belongs to one choice.
            return
        alone = isinstance(request.job, EmbedJob) or request.job.n == 1
        for sequence in list(request.sequences):
            if order.choice is None or (sequence.choice == order.choice and (sequence.forked or alone)):
                self._drop(request, sequence)
            elif not sequence.forked:
                request.unwanted.add(order.choice)

    def _drop(self, request: Request, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self._requests.pop(request.job.id, None)

    def _fail(self, request: Request, failed: Failed) -> Failed:
        """Forget the request, which ends with ``failed``."""
        for sequence in list(request.sequences):
            self._drop(request, sequence)
        self._requests.pop(request.job.id, None)
        return failed

    def _failed(self, request: Request, error: Exception) -> Failed:
        """End the request because of ``error``: a grammar at its limits is the client's, anything else ours."""
        job_id = request.job.id
        if is_out_of_memory(error):
            log.error("no memory for a job alone", job=job_id, reason=str(error))
            failed = no_memory(job_id)
        elif isinstance(error, GrammarError):
            log.warning("a grammar failed", job=job_id, reason=str(error))
            failed = Failed(id=job_id, kind="invalid", message=f"the grammar failed on this request: {error}")
        else:
            log.error("a job failed", job=job_id, exc_info=error)
            failed = Failed(id=job_id, kind="internal", message="the model worker failed on this request")
        return self._fail(request, failed)

    def _give_up(self, sequence: Sequence, error: Exception) -> list[Report]:
        """End the request of ``sequence``, if it has not ended yet."""
        request = self._requests.get(sequence.job.id)
        return [] if request is None else [self._failed(request, error)]

    def _fail_without_numbers(self, request: Request, message: str) -> Failed:
        """End a request whose results are no numbers; its keys and values are not, either, and blocks go round."""
        pool = self.scheduler.pool
        held = Counter(block for sequence in request.sequences for block in sequence.blocks)
        # What another request holds, too, is its own affair: if its numbers are none, it ends like this one.
        blocks = sorted(block for block, times in held.items() if pool.references(block) == times)
        for block in blocks:
            pool.forget(block)
        if blocks:
            self.model_step.cache.clear(blocks)
        return self._fail(request, Failed(id=request.job.id, kind="internal", message=message))

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Report]:
        """Run the model once, if there is anything to run; return what came of it."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        self.steps += 1
        reports: list[Report] = []
        for item in batch:
            request = self._requests[item.sequence.job.id]
            if not request.started:
                request.started = True
                cached = min(item.sequence.cached_tokens, item.sequence.prompt_length)
                self._prompt_tokens += item.sequence.prompt_length
                self._cached_tokens += cached
                reports.append(Started(id=request.job.id, cached_tokens=cached))
        begun = time.monotonic()
        outcome = self._recovery.attempt(batch)
        if outcome.failed:
            return reports + self._recovery.recover(outcome)
        self.scheduler.note_pass(batch, time.monotonic() - begun)
        return reports + outcome.reports

    def _digest(self, batch: FlatBatch, result: Computed) -> Outcome:
        """Turn the pass's hidden states and logits into embeddings, scores and tokens.

        What cannot be done is rewound, so that its last tokens can be computed once more.
        """
        outcome = Outcome()
        reports = outcome.reports
        pool = self.scheduler.pool
        for item, (start, end) in zip(batch.items, batch.spans, strict=True):
            item.sequence.advance(item.tokens, pool)
            if item.sequence.is_embedding:
                assert result.hidden is not None
                try:
                    reports += self._embed(item.sequence, result.hidden[start:end])
                except Exception as error:
                    outcome.failed.append(([rewound(item.sequence, item.tokens)], tamed(error)))
        unscored = set()
        for n, places in batch.prompt_places:
            item = batch.items[n]
            try:
                reports += self._score_prompt(item, result.logits[places])
            except Exception as error:
                unscored.add(n)
                outcome.failed.append(([rewound(item.sequence, item.tokens)], tamed(error)))

        rows: list[int] = []
        sequences: list[Sequence] = []
        searches: dict[str, list[tuple[int, Sequence]]] = {}
        for n, row in batch.next_places:
            sequence = batch.items[n].sequence
            request = self._requests.get(sequence.job.id)
            if request is None or n in unscored:
                continue
            job = sequence.job
            assert isinstance(job, GenerateJob)
            if job.max_tokens == 0:
                reports += [Output(id=job.id, choice=c, finish_reason="length") for c in range(job.n)]
                self._drop(request, sequence)
            elif job.beams:
                searches.setdefault(job.id, []).append((row, sequence))
            elif job.n == 1 or sequence.forked:
                sequence.forked = True
                rows.append(row)
                sequences.append(sequence)
            else:
                choices = self._choices(request, sequence)
                rows += [row] * len(choices)
                sequences += choices
        if rows:
            self._sample(result, rows, sequences, outcome)
        for job_id, beams in searches.items():
            self._search(self._requests[job_id], result, beams, outcome)
        return outcome

    def _score_prompt(self, item: Scheduled, logits: torch.Tensor) -> list[Report]:
        """Add the scores of the prompt tokens that follow the rows of this chunk; report them when complete."""
        sequence = item.sequence
        job = sequence.job
        assert isinstance(job, GenerateJob)
        assert job.prompt_logprobs is not None
        first = sequence.computed - item.tokens + 1
        targets = sequence.ids[first : min(sequence.computed + 1, sequence.prompt_length)].tolist()
        if targets:
            counts = [job.prompt_logprobs] * len(targets)
            sequence.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, counts)
        if sequence.computed < sequence.prompt_length:
            return []
        sequence.prompt_scored = True
        return [PromptLogprobs(id=job.id, logprobs=sequence.prompt_logprobs)]

    def _choices(self, request: Request, sequence: Sequence) -> list[Sequence]:
        """Split the sequence of a prompt that is read now into one for each choice of its job."""
        job = sequence.job
        assert isinstance(job, GenerateJob)
        sequence.forked = True
        choices = [sequence, *(sequence.fork(c, self.scheduler.pool) for c in range(1, job.n))]
        self.scheduler.replace([sequence], choices)
        request.sequences = list(choices)
        for choice in choices:
            if choice.choice in request.unwanted:
                self._drop(request, choice)
        return list(request.sequences)

    def _sample(self, result: Computed, rows: list[int], sequences: list[Sequence], outcome: Outcome) -> None:
        """Choose a token for each sequence from its row of logits."""
        try:
            tokens = sampler.next_tokens(self.model_step, result, rows, sequences)
            wanted = scores_of_chosen(result.logits, rows, sequences, tokens)
        except Exception as error:
            # Logits may have been overwritten, so the rows are computed again, too.
            outcome.failed.append(([rewound(sequence, 1) for sequence in sequences], tamed(error)))
            return
        self._output_tokens += len(tokens)
        reports = outcome.reports
        for sequence, token, logprobs in zip(sequences, tokens, wanted, strict=True):
            request = self._requests.get(sequence.job.id)
            if request is None:
                continue
            if token < 0:
                reports.append(self._fail_without_numbers(request, NO_PROBABILITIES))
                continue
            try:
                reports.append(self._accept(request, sequence, token, logprobs))
            except Exception as error:
                reports.append(self._failed(request, tamed(error)))

    def _accept(self, request: Request, sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> Output:
        """Append the token; report it, and the end of the choice if this is it."""
        sequence.append(token)
        if sequence.matcher is not None:
            _consume(sequence, token)
        output = ending(sequence, [token], logprobs)
        if output:
            self._drop(request, sequence)
            return output
        return Output(id=sequence.job.id, choice=sequence.choice, ids=[token], logprobs=logprobs)

    # --- beams and embeddings -----------------------------------------------------------------------------------------

    def _search(self, request: Request, result: Computed, beams: list[tuple[int, Sequence]], outcome: Outcome) -> None:
        """Advance a beam search by one token: (row of the logits, sequence) of each live beam, best first."""
        rows = [row for row, _ in beams]
        live = [sequence for _, sequence in beams]
        try:
            if bool((result.best[rows] < 0).any()):
                outcome.reports.append(self._fail_without_numbers(request, NO_PROBABILITIES))
                return
            own = torch.log_softmax(result.logits[rows], dim=-1)
            processed = own.clone()
            sampler.process_logits(processed, live)
        except Exception as error:
            outcome.failed.append(([rewound(sequence, 1) for sequence in live], tamed(error)))
            return
        try:
            reports = self._advance_beams(request, live, own, processed)
        except Exception as error:
            reports = [self._failed(request, tamed(error))]
        self._output_tokens += sum(len(report.ids) for report in reports if isinstance(report, Output))
        outcome.reports += reports

    def _advance_beams(
        self, request: Request, live: list[Sequence], own: torch.Tensor, processed: torch.Tensor
    ) -> list[Report]:
        """Let the search choose among ``processed`` log-probabilities; ``own`` are the model's. ``[beams, vocab]``"""
        job = request.job
        assert isinstance(job, GenerateJob)
        assert job.beams is not None
        if not live[0].forked:
            request.beams = BeamSearch(job.beams, job.stop_token_ids, job.max_tokens, prune=job.grammar is not None)
        search = request.beams
        assert search is not None

        def extend(beam: Continuation) -> BeamToken:
            if job.logprobs is None:
                return BeamToken(beam.token)
            row = own[beam.parent : beam.parent + 1]
            return BeamToken(beam.token, token_logprobs(row, [beam.token], [job.logprobs])[0])

        continuations = search.step(processed, [_beam_output(s) for s in live], extend)
        if search.done:
            for sequence in list(request.sequences):
                self._drop(request, sequence)
            return final_outputs(request)
        pool = self.scheduler.pool
        following: list[Sequence] = []
        try:
            for index, continuation in enumerate(continuations):
                beam = live[continuation.parent].fork(index, pool)
                following.append(beam)
                beam.forked = True
                beam.append(continuation.token)
                _consume(beam, continuation.token)
                scores = extend(continuation).logprobs
                if scores is not None:
                    beam.logprobs.append(scores)
        except Exception:
            for beam in following:
                beam.release_blocks(pool)
            raise
        self.scheduler.replace(live, following)
        for sequence in live:
            sequence.release_blocks(pool)
            sequence.state = State.FINISHED
        request.sequences = following
        return certain_outputs(request, [_beam_output(s) for s in following])

    def _embed(self, sequence: Sequence, hidden: torch.Tensor) -> list[Report]:
        """Add a chunk's hidden states ``[tokens, hidden_size]``; at the prompt's end return their normalised mean.

        In float64, whose roundings are lost in the float32 result: how the prompt was sliced must not show.
        """
        part = hidden.double().sum(dim=0)
        total = part if sequence.hidden_sum is None else sequence.hidden_sum + part
        if sequence.pending:
            sequence.hidden_sum = total
            return []
        request = self._requests[sequence.job.id]
        mean = total / sequence.length
        norm = float(mean.norm())
        if not math.isfinite(norm) or norm == 0.0:
            return [self._fail_without_numbers(request, NO_EMBEDDING)]
        vector = (mean / norm).cpu().numpy().astype("<f4").tobytes()
        self._drop(request, sequence)
        return [Embedded(id=sequence.job.id, vector=vector)]


def _beam_output(sequence: Sequence) -> list[BeamToken]:
    ids = sequence.output_ids()
    if not sequence.logprobs:
        return [BeamToken(i) for i in ids]
    return [BeamToken(i, scores) for i, scores in zip(ids, sequence.logprobs, strict=True)]


def _consume(sequence: Sequence, token: int) -> None:
    """Lead the sequence's grammar over ``token``; a stop token ends the text and is no part of it."""
    job = sequence.job
    matcher = sequence.matcher
    if matcher is None or (isinstance(job, GenerateJob) and token in job.stop_token_ids):
        return
    if not matcher.consume_token(token):
        raise GrammarError(" ".join(matcher.get_error().split())[:300])
