"""A job in the engine, and what its tokens turn into on the way out."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from workers.engine.beams import BeamSearch
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob, Job, Output, Report, TokenLogprobs


@dataclass(frozen=True)
class BeamToken:
    """One output token of a beam, with its scores when the job asks for them."""

    id: int
    logprobs: TokenLogprobs | None = None


@dataclass
class Request:
    """A job, its sequences that are not finished, and its beam search, if it is one.

    ``sent`` counts, for each choice of a beam search, the tokens that the client has: what all beams share goes out
    early, and a search that starts again (preempted, or resumed elsewhere) must not repeat it. ``unwanted`` are choices
    that were cancelled before they existed.
    """

    job: Job
    sequences: list[Sequence] = field(default_factory=list)
    beams: BeamSearch[BeamToken] | None = None
    started: bool = False
    sent: list[int] = field(default_factory=list)
    unwanted: set[int] = field(default_factory=set)


def invalid(job: Job, vocab_size: int, max_model_len: int, adapters: frozenset[str]) -> str | None:
    """Return what of the job this model cannot do, or None."""
    if not job.prompt:
        return "the prompt is empty"
    if min(job.prompt) < 0 or max(job.prompt) >= vocab_size:
        return f"a token id of the prompt is outside the vocabulary of {vocab_size}"
    length = len(job.prompt)
    if isinstance(job, GenerateJob):
        length += job.max_tokens
        if job.max_tokens < (1 if job.prompt_logprobs is None else 0):
            return "max_tokens must be at least 1"
        if job.beams and job.n > job.beams.num_beams:
            return "n is larger than num_beams"
        if job.adapter and job.adapter not in adapters:
            return f"there is no adapter {job.adapter!r}"
        ids = [*job.sampling.logit_bias, *job.stop_token_ids]
        if ids and (min(ids) < 0 or max(ids) >= vocab_size):
            return f"a token id is outside the vocabulary of {vocab_size}"
    if length > max_model_len:
        return f"prompt and max_tokens are {length} tokens, the context is {max_model_len}"
    return None


def ending(sequence: Sequence, ids: list[int], logprobs: list[TokenLogprobs]) -> Output | None:
    """Return the last output of the choice, with the new tokens ``ids``, when its last token ends it; else None."""
    job = sequence.job
    assert isinstance(job, GenerateJob)
    last = int(sequence.ids[sequence.length - 1])
    if sequence.output_length and last in job.stop_token_ids and sequence.output_length >= job.min_tokens:
        return Output(
            id=job.id,
            choice=sequence.choice,
            ids=ids,
            finish_reason="stop",
            stop_token_id=last,
            logprobs=logprobs,
        )
    if sequence.output_length >= job.max_tokens:
        return Output(id=job.id, choice=sequence.choice, ids=ids, finish_reason="length", logprobs=logprobs)
    if sequence.matcher is not None and sequence.matcher.is_stopped():
        # Nothing can follow but a stop token: no need to compute that.
        return Output(id=job.id, choice=sequence.choice, ids=ids, finish_reason="stop", logprobs=logprobs)
    return None


def _outputs_of(job: GenerateJob, choice: int, tokens: Rows[BeamToken], *, final: bool) -> Output:
    last = tokens[-1].id if tokens else None
    stopped = final and last in job.stop_token_ids
    return Output(
        id=job.id,
        choice=choice,
        ids=[t.id for t in tokens],
        finish_reason=("stop" if stopped or len(tokens) < job.max_tokens else "length") if final else None,
        stop_token_id=last if stopped else None,
        logprobs=[t.logprobs for t in tokens if t.logprobs is not None],
    )


def certain_outputs(request: Request, live: list[list[BeamToken]]) -> list[Report]:
    """Return what of a beam search is certain now: the beginning that all live and all finished beams share."""
    job = request.job
    assert isinstance(job, GenerateJob)
    assert request.beams is not None
    beams = [*live, *(h.output for h in request.beams.finished)]
    shared = 0
    for tokens in zip(*beams, strict=False):
        if any(token.id != tokens[0].id for token in tokens):
            break
        shared += 1
    # A finished beam's own end is no beginning of anything.
    shared = min([shared, *(len(h.output) - 1 for h in request.beams.finished)])
    reports: list[Report] = []
    for choice in range(job.n):
        if shared > request.sent[choice]:
            reports.append(_outputs_of(job, choice, beams[0][request.sent[choice] : shared], final=False))
            request.sent[choice] = shared
    return reports


def final_outputs(request: Request) -> list[Report]:
    """Return the rest of each choice of a beam search that is over, best beam first."""
    job = request.job
    assert isinstance(job, GenerateJob)
    assert request.beams is not None
    best = request.beams.best(job.n)
    reports: list[Report] = []
    for choice in range(job.n):
        # A grammar may allow fewer texts than choices were asked for; the surplus choices are empty.
        tokens = best[choice].output if choice < len(best) else []
        whole = _outputs_of(job, choice, tokens, final=True)
        sent = request.sent[choice]
        reports.append(
            Output(
                id=job.id,
                choice=choice,
                ids=whole.ids[sent:],
                finish_reason=whole.finish_reason,
                stop_token_id=whole.stop_token_id if len(whole.ids) > sent else None,
                logprobs=whole.logprobs[sent:],
            )
        )
    return reports
