"""The engine: jobs in, reports out, one model pass per step."""

import logging
import math
from dataclasses import dataclass, field

import torch

from workers.engine import sampler
from workers.engine.beams import BeamSearch
from workers.engine.runner import ModelRunner, Pass
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.sequence import Sequence, State
from workers.messages import Cancel, Embedded, EmbedJob, Failed, GenerateJob, Job, Order, Output, Report, Started, Stats

log = logging.getLogger(__name__)


class StickyDeviceError(Exception):
    """The device's context is lost (a CUDA assert, an illegal access): only a new process can go on."""


@dataclass
class Request:
    """A job in the engine: its sequences that are not finished, and its beam search, if it is one."""

    job: Job
    sequences: list[Sequence] = field(default_factory=list)
    beams: BeamSearch | None = None
    started: bool = False


class Engine:
    """Owns the requests. Single-threaded: `submit` and `step` are called from one loop.

    A fault in one request ends that request with a `Failed` report; the others go on.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, max_model_len: int, vocab_size: int) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
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

    def submit(self, order: Order) -> list[Report]:
        """Take a job or a cancellation; return what can be said about it at once."""
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
        if order.emitted and not order.beams:
            return self._resume(request, order)
        self._add(request, Sequence(order, 0, order.prompt, len(order.prompt) + order.max_tokens))
        return []

    def _invalid(self, job: Job) -> str | None:
        if not job.prompt:
            return "the prompt is empty"
        if min(job.prompt) < 0 or max(job.prompt) >= self.vocab_size:
            return f"a token id of the prompt is outside the vocabulary of {self.vocab_size}"
        length = len(job.prompt)
        if isinstance(job, GenerateJob):
            length += job.max_tokens
            if job.max_tokens < 1:
                return "max_tokens must be at least 1"
            if job.beams and job.n > job.beams.num_beams:
                return "n is larger than num_beams"
            ids = [*job.sampling.logit_bias, *job.stop_token_ids]
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                return f"a token id is outside the vocabulary of {self.vocab_size}"
        if length > self.max_model_len:
            return f"prompt and max_tokens are {length} tokens, the context is {self.max_model_len}"
        return None

    def _resume(self, request: Request, job: GenerateJob) -> list[Report]:
        """Take a job that ran before: each choice goes on behind the tokens it has, or is finished already."""
        reports: list[Report] = []
        for choice in range(job.n):
            emitted = job.emitted[choice] if choice < len(job.emitted) else []
            sequence = Sequence(job, choice, [*job.prompt, *emitted], len(job.prompt) + job.max_tokens)
            sequence.forked = True
            output = self._ending(sequence, []) if emitted else None
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
        for sequence in list(request.sequences):
            # A choice that is not a sequence of its own yet still belongs to the first one.
            if order.choice is None or (sequence.choice == order.choice and sequence.forked):
                self._drop(request, sequence)

    def _drop(self, request: Request, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        request.sequences.remove(sequence)
        if not request.sequences:
            self._requests.pop(request.job.id, None)

    def _fail(self, request: Request, message: str) -> Failed:
        for sequence in list(request.sequences):
            self._drop(request, sequence)
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
        try:
            result = self.runner.forward(batch)
        except Exception as error:
            _raise_if_sticky(error)
            log.exception("forward pass of %d sequences failed; trying each alone", len(batch))
            return reports + self._step_alone(batch)
        return reports + self._digest(batch, result)

    def _step_alone(self, batch: list[Scheduled]) -> list[Report]:
        """After a failed pass: run each item alone, so that only the one at fault fails."""
        reports: list[Report] = []
        for item in batch:
            if item.sequence.state is not State.RUNNING:
                continue
            try:
                reports += self._digest([item], self.runner.forward([item]))
            except Exception as error:
                _raise_if_sticky(error)
                request = self._requests.get(item.sequence.job.id)
                if request is not None:
                    reports.append(self._fail(request, "the model failed on this request"))
        return reports

    def _digest(self, batch: list[Scheduled], result: Pass) -> list[Report]:
        """Turn the pass's hidden states and logits into embeddings and tokens."""
        reports: list[Report] = []
        pool = self.scheduler.pool
        for item, (start, end) in zip(batch, result.spans, strict=True):
            item.sequence.advance(item.tokens, pool)
            if item.sequence.is_embedding:
                reports += self._embed(item.sequence, result.hidden[start:end])

        rows: list[int] = []
        sequences: list[Sequence] = []
        searches: dict[str, list[int]] = {}
        finite = torch.isfinite(result.logits.amax(dim=-1)).tolist() if len(result.logits) else []
        for row, n in enumerate(result.logit_items):
            sequence = batch[n].sequence
            request = self._requests.get(sequence.job.id)
            if request is None:
                continue
            if not finite[row]:
                reports.append(self._fail(request, "the model computed no valid probabilities for this request"))
                continue
            assert isinstance(sequence.job, GenerateJob)
            if sequence.job.beams:
                searches.setdefault(sequence.job.id, []).append(row)
                continue
            for choice in self._forked(request, sequence):
                rows.append(row)
                sequences.append(choice)
        if rows:
            reports += self._sample(result.logits, rows, sequences)
        for job_id, beam_rows in searches.items():
            request = self._requests.get(job_id)
            if request is not None:
                beams = [batch[result.logit_items[r]].sequence for r in beam_rows]
                reports += self._contained(
                    request, lambda q=request, r=beam_rows, b=beams: self._search(q, result.logits[r], b)
                )
        return reports

    def _forked(self, request: Request, sequence: Sequence) -> list[Sequence]:
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
        return choices

    def _sample(self, logits: torch.Tensor, rows: list[int], sequences: list[Sequence]) -> list[Report]:
        try:
            scores = logits[rows]
            sampler.process_logits(scores, sequences)
            tokens = sampler.sample(scores, sequences)
        except Exception as error:
            _raise_if_sticky(error)
            if len(sequences) == 1:
                log.exception("sampling failed")
                request = self._requests.get(sequences[0].job.id)
                return [self._fail(request, "sampling failed for this request")] if request else []
            reports: list[Report] = []
            for row, sequence in zip(rows, sequences, strict=True):
                if sequence.state is State.RUNNING:
                    reports += self._sample(logits, [row], [sequence])
            return reports
        reports = []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
            output = self._ending(sequence, [token])
            if output:
                self._drop(self._requests[sequence.job.id], sequence)
            reports.append(output or Output(id=sequence.job.id, choice=sequence.choice, ids=[token]))
        return reports

    def _ending(self, sequence: Sequence, ids: list[int]) -> Output | None:
        """Return the last output of the choice, with the new tokens ``ids``, when its last token ends it; else None."""
        job = sequence.job
        assert isinstance(job, GenerateJob)
        last = int(sequence.ids[sequence.length - 1])
        if last in job.stop_token_ids and sequence.output_length >= job.min_tokens:
            return Output(id=job.id, choice=sequence.choice, ids=ids, finish_reason="stop", stop_token_id=last)
        if sequence.output_length >= job.max_tokens:
            return Output(id=job.id, choice=sequence.choice, ids=ids, finish_reason="length")
        return None

    def _contained(self, request: Request, work) -> list[Report]:  # type: ignore[no-untyped-def]
        try:
            return list(work())
        except Exception as error:
            _raise_if_sticky(error)
            log.exception("a request failed")
            return [self._fail(request, "the model worker failed on this request")]

    # --- beams and embeddings -----------------------------------------------------------------------------------------

    def _search(self, request: Request, logits: torch.Tensor, live: list[Sequence]) -> list[Report]:
        """Advance a beam search by one token: ``logits`` ``[live, vocab]`` of the live beams, best first."""
        job = request.job
        assert isinstance(job, GenerateJob)
        assert job.beams
        if not live[0].forked:
            request.beams = BeamSearch(job.beams, job.stop_token_ids, job.max_tokens)
        search = request.beams
        assert search is not None
        log_probs = torch.log_softmax(logits, dim=-1)
        sampler.process_logits(log_probs, live)
        continuations = search.step(log_probs, [s.output_ids() for s in live])
        if search.done:
            for sequence in list(request.sequences):
                self._drop(request, sequence)
            return self._beam_outputs(job, search)
        pool = self.scheduler.pool
        following = []
        for index, continuation in enumerate(continuations):
            beam = live[continuation.parent].fork(index, pool)
            beam.forked = True
            beam.append(continuation.token)
            following.append(beam)
        self.scheduler.replace(live, following)
        for sequence in live:
            sequence.release_blocks(pool)
            sequence.state = State.FINISHED
        request.sequences = following
        return []

    @staticmethod
    def _beam_outputs(job: GenerateJob, search: BeamSearch) -> list[Report]:
        reports: list[Report] = []
        for choice, hypothesis in enumerate(search.best(job.n)):
            last = hypothesis.ids[-1]
            stopped = last in job.stop_token_ids
            reports.append(
                Output(
                    id=job.id,
                    choice=choice,
                    ids=hypothesis.ids,
                    finish_reason="stop" if stopped else "length",
                    stop_token_id=last if stopped else None,
                )
            )
        return reports

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


def _raise_if_sticky(error: Exception) -> None:
    """Let errors through that poison the device for the whole process."""
    text = str(error)
    if isinstance(error, torch.AcceleratorError) or ("CUDA error" in text and "out of memory" not in text):
        raise StickyDeviceError(text) from error
