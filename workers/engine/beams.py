"""Beam search of one job, step for step as ``transformers.generate(num_beams=..., do_sample=False)`` does it.

Pure arithmetic over scores and token lists: the caller owns sequences and cache. The reference is transformers'
vectorised ``GenerationMixin._beam_search``; names follow it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from workers.messages import BeamParams

# Stands for "not a candidate"; finite, as in the reference, because sums and quotients of it must stay comparable.
NEVER = -1.0e9


T = TypeVar("T")


@dataclass(frozen=True)
class Hypothesis(Generic[T]):
    """A finished beam: its output tokens (the stop token included) and its length-penalised score."""

    output: list[T]
    score: float


@dataclass(frozen=True)
class Continuation:
    """A live beam of the next step: the live beam ``parent`` of this step, plus ``token``."""

    parent: int
    token: int


class BeamSearch(Generic[T]):
    """State of the search: scores of the live beams, and the best finished ones.

    What an output token is (an id, an id with its scores) is the caller's business.
    """

    def __init__(self, params: BeamParams, stop_token_ids: list[int], max_tokens: int, *, prune: bool = False) -> None:
        """``prune``: drop live beams that are no candidates. The reference carries them along, which is harmless unless
        a grammar has forbidden their tokens."""
        self.params = params
        self._prune = prune
        self.max_tokens = max_tokens
        self.length = 0
        self.scores = torch.zeros(1)
        self.finished: list[Hypothesis[T]] = []
        self.done = False
        self._improvable = True
        self._stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.int64)

    def step(
        self, log_probs: torch.Tensor, outputs: Sequence[list[T]], extend: Callable[[Continuation], T]
    ) -> list[Continuation]:
        """Advance by one token.

        ``log_probs``: processed log-probabilities ``[live, vocab]`` (one row in the first step); ``outputs``: the
        output ids of the live beams. Returns the next live beams, best first; sets ``done`` when the search is over.
        """
        beams = self.params.num_beams
        vocab = log_probs.shape[1]
        accumulated = (log_probs.cpu() + self.scores[:, None]).reshape(-1)
        keep = min(max(2, 1 + len(self._stop)) * beams, len(accumulated))
        top_scores, top = torch.topk(accumulated, keep)
        parents, tokens = top // vocab, top % vocab
        self.length += 1
        hits = torch.isin(tokens, self._stop) | (self.length >= self.max_tokens)

        self._finish(top_scores, parents, tokens, hits, outputs, extend)
        running = top_scores + hits.float() * NEVER
        self.scores, chosen = torch.topk(running, min(beams, keep))
        if self._prune:
            candidates = self.scores > NEVER / 2
            self.scores, chosen = self.scores[candidates], chosen[candidates]
        self._improvable = self._improvable and self._can_improve()
        full = len(self.finished) == beams
        stop_early = self.params.early_stopping is True and full
        self.done = not self._improvable or stop_early or bool(hits.all()) or not len(chosen)
        return [Continuation(int(parents[i]), int(tokens[i])) for i in chosen.tolist()]

    def best(self, count: int) -> list[Hypothesis[T]]:
        """Return the ``count`` best finished beams, best first."""
        return self.finished[:count]

    def _finish(
        self,
        scores: torch.Tensor,
        parents: torch.Tensor,
        tokens: torch.Tensor,
        hits: torch.Tensor,
        outputs: Sequence[list[T]],
        extend: Callable[[Continuation], T],
    ) -> None:
        """Merge the candidates that just ended into the finished beams. Only the first ``num_beams`` may."""
        beams = self.params.num_beams
        if not self._improvable or (self.params.early_stopping is True and len(self.finished) == beams):
            return
        scores = scores / self.length**self.params.length_penalty
        ended = [
            Hypothesis(
                [*outputs[int(parents[i])], extend(Continuation(int(parents[i]), int(tokens[i])))], float(scores[i])
            )
            for i in range(min(beams, len(scores)))
            if hits[i] and scores[i] > -torch.inf
        ]
        # Stable: an older hypothesis wins a tie, as it stands first in the reference's merged list.
        self.finished = sorted(self.finished + ended, key=lambda h: -h.score)[:beams]

    def _can_improve(self) -> bool:
        """Tell whether the best live beam could still beat the worst finished one."""
        if len(self.finished) < self.params.num_beams:
            return True
        if not len(self.scores):
            return False
        penalty = self.params.length_penalty
        length = self.max_tokens if self.params.early_stopping == "never" and penalty > 0.0 else self.length
        return float(self.scores[0]) / length**penalty > self.finished[-1].score
