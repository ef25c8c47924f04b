"""From logits to the next token, for all rows of a step at once, each row with its own parameters.

Order and semantics as in ``transformers.generate``: logit_bias, repetition, presence and frequency penalties,
min_tokens, grammar; then greedy, or temperature, top_k, top_p, min_p, typical_p and a draw. A step that no row asks for
costs nothing.
"""

from collections.abc import Sequence as Rows

import numpy as np
import torch

from workers.engine.flat_batch import Computed, Step
from workers.engine.grammar import allowed_tokens
from workers.engine.noise import draw_key, gumbel_noise
from workers.engine.sequence import Sequence
from workers.engine.transfer import to_device
from workers.messages import GenerateJob, SamplingParams

# Tokens with equal logits share the last place of top_k, as in transformers; so many of them are looked at.
TIES = 64
# First look at the most probable tokens when only top_p limits a row; all of them when these do not hold enough mass.
NUCLEUS = 1024


def _params(sequence: Sequence) -> SamplingParams:
    assert isinstance(sequence.job, GenerateJob)
    return sequence.job.sampling


def _padded_ids(rows: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Stack id lists as int64 ``[rows, longest]``; a short row is filled with its own first id."""
    width = max(len(row) for row in rows)
    out = np.empty((len(rows), width), dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
        target[len(row) :] = row[0]
    return to_device(out, device)


@torch.inference_mode()
def next_tokens(step: Step, result: Computed, rows: list[int], sequences: Rows[Sequence]) -> list[int]:
    """Return the next token of each sequence from its row of ``result``; -1 where a logit is not finite.

    The likeliest tokens are known already; only rows that change their logits or draw need more.
    """
    whole = rows == list(range(len(result.best)))
    tokens = result.best if whole else result.best[to_device(rows, result.best.device)]
    others = [n for n, sequence in enumerate(sequences) if not sequence.is_plain]
    if others:
        own = [sequences[n] for n in others]
        used = [rows[n] for n in others]
        # Whoever asks for scores, or fails and is asked again, wants the logits as they were; choices of one request
        # share a row.
        kept = len(used) < len(result.best) or len(set(used)) < len(used) or any(_needs_logits(s) for s in sequences)
        scores = result.logits[to_device(used, result.logits.device)] if kept else result.logits
        process_logits(scores, own)
        index = to_device(others, scores.device)
        chosen = step.sample(scores, own)
        tokens = tokens.clone()
        tokens[index] = torch.where(tokens[index] < 0, -1, chosen)
    out: list[int] = tokens.tolist()
    return out


def _needs_logits(sequence: Sequence) -> bool:
    asks_scores = isinstance(sequence.job, GenerateJob) and sequence.job.logprobs is not None
    return asks_scores or sequence.matcher is not None


def process_logits(scores: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Apply bias, penalties, min_tokens and grammars to ``scores`` (float32 ``[rows, vocab]``), in place.

    Greedy and sampled rows pass raw logits; beam search passes log-probabilities, as transformers does.
    """
    params = [_params(s) for s in sequences]
    device = scores.device
    for row, p in enumerate(params):
        if p.logit_bias:
            ids = to_device(list(p.logit_bias), device)
            scores[row, ids] += to_device(list(p.logit_bias.values()), device, scores.dtype)

    repeated = [r for r, p in enumerate(params) if p.repetition_penalty != 1.0]
    if repeated:
        ids = _padded_ids([sequences[r].ids[: sequences[r].length] for r in repeated], device)
        penalty = _column([params[r].repetition_penalty for r in repeated], device)
        rows = to_device(repeated, device)[:, None]
        seen = scores[rows, ids]
        scores[rows, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)

    counted = [
        r for r, p in enumerate(params) if (p.presence_penalty or p.frequency_penalty) and sequences[r].output_length
    ]
    for r in counted:
        output = sequences[r].ids[sequences[r].prompt_length : sequences[r].length]
        unique, counts = np.unique(output, return_counts=True)
        amount = params[r].frequency_penalty * counts + params[r].presence_penalty
        scores[r, to_device(unique, device)] -= to_device(amount, device, scores.dtype)

    for r, sequence in enumerate(sequences):
        job = sequence.job
        assert isinstance(job, GenerateJob)
        stop = job.stop_token_ids if sequence.output_length < job.min_tokens else []
        if sequence.matcher is not None:
            allowed = allowed_tokens(sequence.matcher, scores.shape[1])
            if stop and bool(allowed.sum() > allowed[stop].sum()):
                # The grammar knows a way on; where it knows none, a shorter text is better than a wrong one.
                allowed[stop] = False
            scores[r].masked_fill_(to_device(~allowed.numpy(), device, torch.bool), -torch.inf)
        elif stop:
            scores[r, to_device(stop, device)] = -torch.inf


def sample(scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
    """Return the next token of each row, int64 ``[rows]``. ``scores``: processed logits, float32 ``[rows, vocab]``;
    overwritten.
    """
    params = [_params(s) for s in sequences]
    tokens = scores.argmax(dim=-1)
    limited = [r for r, p in enumerate(params) if p.temperature > 0 and 0 < p.top_k < scores.shape[1]]
    sorted_ = [
        r
        for r, p in enumerate(params)
        if p.temperature > 0 and not 0 < p.top_k < scores.shape[1] and (p.top_p < 1 or p.typical_p < 1)
    ]
    whole = [r for r, p in enumerate(params) if p.temperature > 0 and r not in limited and r not in sorted_]
    for rows, draw in ((limited, _draw_top_k), (sorted_, _draw_nucleus), (whole, _draw_whole)):
        if rows:
            chosen = [params[r] for r in rows]
            index = to_device(rows, scores.device)
            part = scores if len(rows) == len(params) else scores[index]
            part = part / _column([p.temperature for p in chosen], scores.device)
            drawn = [draw_key(params[r].seed, sequences[r].choice, sequences[r].output_length) for r in rows]
            keys = _column(drawn, scores.device, torch.int64)
            tokens[index] = draw(part, chosen, keys)
    return tokens


def _column(values: list[float] | list[int], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return ``values`` as ``[rows, 1]``."""
    return to_device(values, device, dtype)[:, None]


def _draw_top_k(scores: torch.Tensor, params: list[SamplingParams], keys: torch.Tensor) -> torch.Tensor:
    """Draw where every row has a top_k."""
    top_k = _column([p.top_k for p in params], scores.device, torch.int64)
    width = min(max(p.top_k for p in params) + TIES, scores.shape[1])
    logits, ids = torch.topk(scores, width)
    logits = logits.masked_fill(logits < logits.gather(1, top_k - 1), -torch.inf)
    return _draw_sorted(logits, ids, torch.logsumexp(logits, dim=-1, keepdim=True), params, keys)


def _draw_nucleus(scores: torch.Tensor, params: list[SamplingParams], keys: torch.Tensor) -> torch.Tensor:
    """Draw where rows have top_p or typical_p, but no top_k."""
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    if all(p.typical_p >= 1 for p in params) and scores.shape[1] > NUCLEUS:
        logits, ids = torch.topk(scores, NUCLEUS)
        mass = (logits - total).exp().sum(dim=-1)
        if bool((mass >= _column([p.top_p for p in params], scores.device)[:, 0]).all()):
            return _draw_sorted(logits, ids, total, params, keys)
    logits, ids = torch.sort(scores, dim=-1, descending=True)
    return _draw_sorted(logits, ids, total, params, keys)


def _draw_whole(scores: torch.Tensor, params: list[SamplingParams], keys: torch.Tensor) -> torch.Tensor:
    """Draw from the whole vocabulary; min_p alone needs no sorting."""
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], scores.device).log()
        scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + floor, -torch.inf)
    ids = torch.arange(scores.shape[1], device=scores.device)[None]
    return (scores + gumbel_noise(keys, ids)).argmax(dim=-1)


def _draw_sorted(
    logits: torch.Tensor, ids: torch.Tensor, total: torch.Tensor, params: list[SamplingParams], keys: torch.Tensor
) -> torch.Tensor:
    """Apply top_p, min_p and typical_p to candidates sorted by falling logit, then draw.

    ``logits``, ``ids`` ``[rows, candidates]``; ``total`` ``[rows, 1]`` is the log of the normaliser of what is still
    allowed.
    """
    device = logits.device
    if any(p.top_p < 1 for p in params):
        probs = (logits - total).exp()
        before = probs.cumsum(dim=-1) - probs
        drop = before >= _column([p.top_p for p in params], device)
        drop[:, 0] = False
        logits = logits.masked_fill(drop, -torch.inf)
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], device).log()
        logits = logits.masked_fill(logits < logits[:, :1] + floor, -torch.inf)
    if any(p.typical_p < 1 for p in params):
        logits = _typical(logits, _column([p.typical_p for p in params], device))
    best = (logits + gumbel_noise(keys, ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1)


def _typical(logits: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Locally typical sampling (Meister et al. 2022) on ``[rows, candidates]``; rows with mass 1 stay as they are."""
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    entropy = -(log_probs * probs).nansum(dim=-1, keepdim=True)
    distance, order = torch.sort((-log_probs - entropy).abs(), dim=-1)
    cumulative = probs.gather(1, order).cumsum(dim=-1)
    last = (cumulative < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    limit = distance.gather(1, last)
    drop = ((-log_probs - entropy).abs() > limit) & (mass < 1)
    return logits.masked_fill(drop, -torch.inf)
