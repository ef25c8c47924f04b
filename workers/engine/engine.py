"""The engine: jobs in, reports out, one model pass per step."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from llguidance import LLMatcher

from workers.engine import sampler
from workers.engine.beams import BeamSearch, Continuation
from workers.engine.errors import GrammarError, StickyDeviceError
from workers.engine.request import BeamToken, Request, certain_outputs, ending, final_outputs
from workers.engine.runner import ModelRunner, Pass
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.scores import token_logprobs
from workers.engine.sequence import Sequence, State
from workers.messages import (
    Cancel,
    Embedded,
    EmbedJob,
    Failed,
    GenerateJob,
    Job,
    Order,
    Output,
    PromptLogprobs,
    Report,
    Started,
    Stats,
    TokenLogprobs,
)

log = logging.getLogger(__name__)


class Engine:
    """Owns the requests. Single-threaded: `submit` and `step` are called from one loop.

    A fault in one request ends that request with a `Failed` report; the others go on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        max_model_len: int,
        vocab_size: int,
        adapters: frozenset[str] = frozenset(),
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.adapters = adapters
        self.steps = 0
        self._requests: dict[str, Request] = {}

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
        problem = self._invalid(order) or self.scheduler.never_fits(order)
        if problem:
            return [Failed(id=order.id, kind="invalid", message=problem)]
        request = Request(order)
        self._requests[order.id] = request
        if isinstance(order, EmbedJob):
            self._add(request, Sequence(order, 0, order.prompt, len(order.prompt)))
            return []
        emitted = [order.emitted[c] if c < len(order.emitted) else [] for c in range(order.n)]
        if order.beams:
            # A search is deterministic: it is run again, and what was sent is not sent again.
            request.sent = [len(ids) for ids in emitted]
        elif any(emitted):
            return self._contained(request, partial(self._resume, request, order, emitted, matcher))
        sequence = Sequence(order, 0, order.prompt, len(order.prompt) + order.max_tokens)
        sequence.matcher = matcher
        self._add(request, sequence)
        return []

    def _invalid(self, job: Job) -> str | None:
        if not job.prompt:
            return "the prompt is empty"
        if min(job.prompt) < 0 or max(job.prompt) >= self.vocab_size:
            return f"a token id of the prompt is outside the vocabulary of {self.vocab_size}"
        length = len(job.prompt)
        if isinstance(job, GenerateJob):
            length += job.max_tokens
            if job.max_tokens < (1 if job.prompt_logprobs is None else 0):
                return "max_tokens must be at least 1"
            if job.beams and job.n > job.beams.num_beams:
                return "n is larger than num_beams"
            if job.adapter and job.adapter not in self.adapters:
                return f"there is no adapter {job.adapter!r}"
            ids = [*job.sampling.logit_bias, *job.stop_token_ids]
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                return f"a token id is outside the vocabulary of {self.vocab_size}"
        if length > self.max_model_len:
            return f"prompt and max_tokens are {length} tokens, the context is {self.max_model_len}"
        return None

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
        for sequence in list(request.sequences):
            if order.choice is None or (sequence.choice == order.choice and sequence.forked):
                self._drop(request, sequence)
            elif not sequence.forked:
                request.unwanted.add(order.choice)

    def _drop(self, request: Request, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self._requests.pop(request.job.id, None)

    def _fail(self, request: Request, message: str) -> Failed:
        for sequence in list(request.sequences):
            self._drop(request, sequence)
        self._requests.pop(request.job.id, None)
        return Failed(id=request.job.id, kind="internal", message=message)

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
                reports.append(Started(id=request.job.id, cached_tokens=item.sequence.cached_tokens))
        begun = time.monotonic()
        try:
            result = self.runner.forward(batch)
        except Exception as error:
            _raise_if_sticky(error)
            log.exception("forward pass of %d sequences failed; trying each alone", len(batch))
            return reports + self._step_alone(batch)
        self.scheduler.note_pass(sum(item.tokens for item in batch), time.monotonic() - begun)
        return reports + self._digest(batch, result)

    def _step_alone(self, batch: list[Scheduled]) -> list[Report]:
        """After a failed pass: run each item alone, so that only the one at fault fails.

        Beams of one search draw from each other's logits, so they stay together.
        """
        families: dict[object, list[Scheduled]] = {}
        for item in batch:
            job = item.sequence.job
            together = isinstance(job, GenerateJob) and job.beams
            families.setdefault(job.id if together else id(item), []).append(item)
        reports: list[Report] = []
        for family in families.values():
            request = self._requests.get(family[0].sequence.job.id)
            if request is None:
                continue
            reports += self._contained(request, partial(self._forward_and_digest, family))
        return reports

    def _forward_and_digest(self, batch: list[Scheduled]) -> list[Report]:
        return self._digest(batch, self.runner.forward(batch))

    def _contained(self, request: Request, work: Callable[[], list[Report]]) -> list[Report]:
        """Return what ``work`` reports; when it raises, the failure of ``request`` alone."""
        try:
            return work()
        except Exception as error:
            _raise_if_sticky(error)
            log.exception("request %s failed", request.job.id)
            reason = f"the grammar failed: {error}" if isinstance(error, GrammarError) else "the model worker failed"
            return [self._fail(request, f"{reason} on this request")]

    def _digest(self, batch: list[Scheduled], result: Pass) -> list[Report]:
        """Turn the pass's hidden states and logits into embeddings, scores and tokens."""
        reports: list[Report] = []
        pool = self.scheduler.pool
        for item, (start, end) in zip(batch, result.spans, strict=True):
            item.sequence.advance(item.tokens, pool)
            if item.sequence.is_embedding:
                reports += self._embed(item.sequence, result.hidden[start:end])
        for n, prompt_rows in result.prompt_rows:
            reports += self._score_prompt(batch[n], result.logits[prompt_rows])

        rows: list[int] = []
        sequences: list[Sequence] = []
        searches: dict[str, list[tuple[int, Sequence]]] = {}
        finite = torch.isfinite(result.logits.amax(dim=-1)).tolist() if len(result.logits) else []
        for n, row in result.next_rows:
            sequence = batch[n].sequence
            request = self._requests.get(sequence.job.id)
            if request is None:
                continue
            job = sequence.job
            assert isinstance(job, GenerateJob)
            if not finite[row]:
                reports.append(self._fail(request, "the model computed no valid probabilities for this request"))
            elif job.max_tokens == 0:
                reports += [Output(id=job.id, choice=c, finish_reason="length") for c in range(job.n)]
                self._drop(request, sequence)
            elif job.beams:
                searches.setdefault(job.id, []).append((row, sequence))
            else:
                choices = self._choices(request, sequence)
                rows += [row] * len(choices)
                sequences += choices
        if rows:
            reports += self._sample(result.logits, rows, sequences)
        for job_id, beams in searches.items():
            request = self._requests.get(job_id)
            if request is not None:
                reports += self._contained(request, partial(self._search, request, result.logits, beams))
        return reports

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
        """Return the sequences that draw from this one's logits: all choices of the job once its prompt is read."""
        job = sequence.job
        assert isinstance(job, GenerateJob)
        if sequence.forked or job.n == 1:
            sequence.forked = True
            return [sequence]
        sequence.forked = True
        choices = [sequence, *(sequence.fork(c, self.scheduler.pool) for c in range(1, job.n))]
        self.scheduler.replace([sequence], choices)
        request.sequences = list(choices)
        for choice in choices:
            if choice.choice in request.unwanted:
                self._drop(request, choice)
        return list(request.sequences)

    def _sample(self, logits: torch.Tensor, rows: list[int], sequences: list[Sequence]) -> list[Report]:
        """Choose a token for each sequence from its row of ``logits``."""
        try:
            scores = logits[rows]
            sampler.process_logits(scores, sequences)
            tokens = sampler.sample(scores, sequences)
            wanted = self._token_logprobs(logits, rows, sequences, tokens)
        except Exception as error:
            _raise_if_sticky(error)
            if len(sequences) > 1:
                # Somebody's parameters or grammar are at fault: ask each alone.
                reports: list[Report] = []
                for row, sequence in zip(rows, sequences, strict=True):
                    if sequence.state is State.RUNNING:
                        reports += self._sample(logits, [row], [sequence])
                return reports
            request = self._requests.get(sequences[0].job.id)
            if request is None:
                return []
            log.warning("sampling for %s failed: %s", request.job.id, error)
            reason = f"the grammar failed: {error}" if isinstance(error, GrammarError) else "sampling failed"
            return [self._fail(request, f"{reason} for this request")]
        reports = []
        for sequence, token, logprobs in zip(sequences, tokens, wanted, strict=True):
            request = self._requests.get(sequence.job.id)
            if request is not None:
                reports += self._contained(request, partial(self._accept, request, sequence, token, logprobs))
        return reports

    def _accept(self, request: Request, sequence: Sequence, token: int, logprobs: list[TokenLogprobs]) -> list[Report]:
        """Append the token; report it, and the end of the choice if this is it."""
        sequence.append(token)
        _consume(sequence, token)
        output = ending(sequence, [token], logprobs)
        if output:
            self._drop(request, sequence)
            return [output]
        return [Output(id=sequence.job.id, choice=sequence.choice, ids=[token], logprobs=logprobs)]

    @staticmethod
    def _token_logprobs(
        logits: torch.Tensor, rows: list[int], sequences: list[Sequence], tokens: list[int]
    ) -> list[list[TokenLogprobs]]:
        """Return, for each sequence, the scores of its token: one entry, or none when the job does not ask."""
        found: list[list[TokenLogprobs]] = [[] for _ in rows]
        asking = [i for i, s in enumerate(sequences) if isinstance(s.job, GenerateJob) and s.job.logprobs is not None]
        if asking:
            counts = [sequences[i].job.logprobs or 0 for i in asking]  # type: ignore[union-attr]
            scores = token_logprobs(logits[[rows[i] for i in asking]], [tokens[i] for i in asking], counts)
            for i, score in zip(asking, scores, strict=True):
                found[i] = [score]
        return found

    # --- beams and embeddings -----------------------------------------------------------------------------------------

    def _search(self, request: Request, logits: torch.Tensor, beams: list[tuple[int, Sequence]]) -> list[Report]:
        """Advance a beam search by one token: (row of ``logits``, sequence) of each live beam, best first."""
        job = request.job
        assert isinstance(job, GenerateJob)
        assert job.beams is not None
        live = [sequence for _, sequence in beams]
        if not live[0].forked:
            request.beams = BeamSearch(job.beams, job.stop_token_ids, job.max_tokens, prune=job.grammar is not None)
        search = request.beams
        assert search is not None
        own = torch.log_softmax(logits[[row for row, _ in beams]], dim=-1)
        processed = own.clone()
        sampler.process_logits(processed, live)

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
        following = []
        for index, continuation in enumerate(continuations):
            beam = live[continuation.parent].fork(index, pool)
            beam.forked = True
            beam.append(continuation.token)
            _consume(beam, continuation.token)
            scores = extend(continuation).logprobs
            if scores is not None:
                beam.logprobs.append(scores)
            following.append(beam)
        self.scheduler.replace(live, following)
        for sequence in live:
            sequence.release_blocks(pool)
            sequence.state = State.FINISHED
        request.sequences = following
        return certain_outputs(request, [_beam_output(s) for s in following])

    def _embed(self, sequence: Sequence, hidden: torch.Tensor) -> list[Report]:
        """Add a chunk's hidden states ``[tokens, hidden_size]``; at the prompt's end return their normalised mean."""
        part = hidden.float().sum(dim=0)
        total = part if sequence.hidden_sum is None else sequence.hidden_sum + part
        sequence.hidden_sum = total
        if sequence.pending:
            return []
        request = self._requests[sequence.job.id]
        mean = total / sequence.length
        norm = float(mean.norm())
        if not math.isfinite(norm) or norm == 0.0:
            return [self._fail(request, "the model computed no valid embedding for this request")]
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


def _raise_if_sticky(error: Exception) -> None:
    """Let errors through that poison the device for the whole process."""
    text = str(error)
    if isinstance(error, torch.AcceleratorError) or ("CUDA error" in text and "out of memory" not in text):
        raise StickyDeviceError(text) from error
