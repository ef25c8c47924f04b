"""Log-probabilities as clients ask for them: of the model's own distribution, before any penalty or mask."""

import torch

from workers.messages import TokenLogprobs


def token_logprobs(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Return the scores of ``tokens``, one for each row of ``logits`` ``[rows, vocab]``, with ``counts``
    alternatives.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    own = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    width = min(max(counts), logits.shape[1])
    if width == 0:
        return [TokenLogprobs(logprob) for logprob in own]
    values, ids = (t.tolist() for t in log_probs.topk(width, dim=-1))
    return [
        TokenLogprobs(logprob, list(zip(i[:count], v[:count], strict=True)))
        for logprob, count, i, v in zip(own, counts, ids, values, strict=True)
    ]
