"""Log-probabilities as clients ask for them: of the model's own distribution, before any penalty or mask."""

from collections.abc import Sequence as Rows

import torch

from workers.engine.sequence import Sequence
from workers.engine.transfer import to_device
from workers.messages import GenerateJob, TokenLogprobs


def token_logprobs(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Return the scores of ``tokens``, one for each row of ``logits`` ``[rows, vocab]``, with ``counts``
    alternatives.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    own = log_probs.gather(1, to_device(tokens, logits.device)[:, None])[:, 0].tolist()
    width = min(max(counts), logits.shape[1])
    if width == 0:
        return [TokenLogprobs(logprob) for logprob in own]
    values, ids = (t.tolist() for t in log_probs.topk(width, dim=-1))
    return [
        TokenLogprobs(logprob, list(zip(i[:count], v[:count], strict=True)))
        for logprob, count, i, v in zip(own, counts, ids, values, strict=True)
    ]


def scores_of_chosen(
    logits: torch.Tensor, rows: list[int], sequences: Rows[Sequence], tokens: list[int]
) -> list[list[TokenLogprobs]]:
    """Return, for each sequence, the scores of its token (in its row of ``logits``): one entry, or none when its job
    does not ask; none for a token below 0, which is no token.
    """
    found: list[list[TokenLogprobs]] = [[] for _ in rows]
    asking = [
        (i, job.logprobs)
        for i, sequence in enumerate(sequences)
        if isinstance(job := sequence.job, GenerateJob) and job.logprobs is not None and tokens[i] >= 0
    ]
    if asking:
        places = [i for i, _ in asking]
        chosen = [tokens[i] for i in places]
        scores = token_logprobs(logits[[rows[i] for i in places]], chosen, [count for _, count in asking])
        for i, score in zip(places, scores, strict=True):
            found[i] = [score]
    return found
