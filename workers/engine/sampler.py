"""From logits to the next token, for all rows of a step at once, each row with its own parameters.

Order and semantics as in ``transformers.generate``: logit_bias, repetition, presence and frequency penalties,
min_tokens, grammar; then greedy, or temperature, top_k, top_p, min_p, typical_p and a draw. A step that no row asks for
costs nothing.
"""

from collections.abc import Sequence as Rows

import numpy as np
import torch

from workers.engine.grammar import allowed_tokens
from workers.engine.noise import draw_key, gumbel_noise
from workers.engine.sequence import Sequence
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
    return torch.from_numpy(out).to(device)


def process_logits(scores: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Apply bias, penalties, min_tokens and grammars to ``scores`` (float32 ``[rows, vocab]``), in place.

    Greedy and sampled rows pass raw logits; beam search passes log-probabilities, as transformers does.
    """
    params = [_params(s) for s in sequences]
    device = scores.device
    for row, p in enumerate(params):
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=device)
            scores[row, ids] += torch.tensor(list(p.logit_bias.values()), dtype=scores.dtype, device=device)

    repeated = [r for r, p in enumerate(params) if p.repetition_penalty != 1.0]
    if repeated:
        ids = _padded_ids([sequences[r].ids[: sequences[r].length] for r in repeated], device)
        penalty = torch.tensor([[params[r].repetition_penalty] for r in repeated], device=device)
        rows = torch.tensor(repeated, device=device)[:, None]
        seen = scores[rows, ids]
        scores[rows, ids] = torch.where(seen < 0, seen * penalty, seen / penalty)

    counted = [
        r for r, p in enumerate(params) if (p.presence_penalty or p.frequency_penalty) and sequences[r].output_length
    ]
    for r in counted:
        output = sequences[r].ids[sequences[r].prompt_length : sequences[r].length]
        unique, counts = np.unique(output, return_counts=True)
        amount = params[r].frequency_penalty * counts + params[r].presence_penalty
        scores[r, torch.from_numpy(unique).to(device)] -= torch.from_numpy(amount).to(device, scores.dtype)

    for r, sequence in enumerate(sequences):
        job = sequence.job
        assert isinstance(job, GenerateJob)
        stop = job.stop_token_ids if sequence.output_length < job.min_tokens else []
        if sequence.matcher is not None:
            allowed = allowed_tokens(sequence.matcher, scores.shape[1])
            if stop and bool(allowed.sum() > allowed[stop].sum()):
                # The grammar knows a way on; where it knows none, a shorter text is better than a wrong one.
                allowed[stop] = False
            scores[r].masked_fill_(~allowed.to(device), -torch.inf)
        elif stop:
            scores[r, stop] = -torch.inf


def sample(scores: torch.Tensor, sequences: Rows[Sequence]) -> list[int]:
    """Return the next token of each row. ``scores``: processed logits, float32 ``[rows, vocab]``; overwritten."""
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
            index = torch.tensor(rows, device=scores.device)
            part = scores if len(rows) == len(params) else scores[index]
            part = part / _column([p.temperature for p in chosen], scores.device)
            keys = _column(
                [draw_key(params[r].seed, sequences[r].choice, sequences[r].output_length) for r in rows], scores.device
            )
            tokens[index] = draw(part, chosen, keys)
    out: list[int] = tokens.tolist()
    return out


def _column(values: list[float] | list[int], device: torch.device) -> torch.Tensor:
    """Return ``values`` as ``[rows, 1]``: int64 for ints, float32 for floats."""
    return torch.tensor(values, device=device)[:, None]


def _draw_top_k(scores: torch.Tensor, params: list[SamplingParams], keys: torch.Tensor) -> torch.Tensor:
    """Draw where every row has a top_k."""
    top_k = _column([p.top_k for p in params], scores.device)
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
        if bool((mass >= torch.tensor([p.top_p for p in params], device=scores.device)).all()):
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
