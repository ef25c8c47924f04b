"""What one forward pass computes, as flat arrays: the tokens of all scheduled sequences side by side."""

import itertools
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from workers.engine.kv_cache import KVCache
from workers.engine.scheduler import Scheduled
from workers.engine.sequence import Sequence


@dataclass(frozen=True)
class FlatBatch:
    """The scheduled ``items`` with the borders between them.

    ``spans``: each item's rows of the flat batch. ``wanted``: the rows whose logits are computed, rising; a *place* is
    an index into it. ``next_places``: (item, place) for each item whose tokens are all computed now, so that its next
    token can be chosen. ``prompt_places``: (item, places) for items that want scores of their prompt.
    """

    items: list[Scheduled]
    spans: list[tuple[int, int]]
    wanted: list[int]
    next_places: list[tuple[int, int]]
    prompt_places: list[tuple[int, slice]]
    wants_hidden: bool

    @property
    def tokens(self) -> int:
        """Rows of the flat batch."""
        return self.spans[-1][1]

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids, int64 ``[tokens]``."""
        if len(self.items) == self.tokens:
            return np.array([i.sequence.ids[i.sequence.computed] for i in self.items])
        return np.concatenate(
            [i.sequence.ids[i.sequence.computed : i.sequence.computed + i.tokens] for i in self.items]
        )

    @cached_property
    def positions(self) -> np.ndarray:
        """Each token's place in its sequence, int64 ``[tokens]``."""
        if len(self.items) == self.tokens:
            return np.array([i.sequence.computed for i in self.items])
        return np.concatenate([np.arange(i.sequence.computed, i.sequence.computed + i.tokens) for i in self.items])

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Block copies (source, target) to make before the pass."""
        return [copy for item in self.items for copy in item.copies]


def flatten(items: list[Scheduled]) -> FlatBatch:
    """Lay out a pass."""
    ends = list(itertools.accumulate(i.tokens for i in items))
    spans = [(end - item.tokens, end) for item, end in zip(items, ends, strict=True)]
    wanted: list[int] = []
    next_places: list[tuple[int, int]] = []
    prompt_places: list[tuple[int, slice]] = []
    wants_hidden = False
    for n, (item, (start, end)) in enumerate(zip(items, spans, strict=True)):
        sequence = item.sequence
        if sequence.is_embedding:
            wants_hidden = True
            continue
        complete = item.tokens == sequence.pending
        if not sequence.prompt_scored:
            prompt_places.append((n, slice(len(wanted), len(wanted) + item.tokens)))
            wanted.extend(range(start, end))
        elif complete:
            wanted.append(end - 1)
        if complete:
            next_places.append((n, len(wanted) - 1))
    return FlatBatch(items, spans, wanted, next_places, prompt_places, wants_hidden)


@dataclass(frozen=True)
class Computed:
    """What a pass yields.

    ``logits`` float32 ``[wanted, vocab]``; ``best`` int64 ``[wanted]`` the likeliest token of each row, -1 where a
    logit is not finite; ``hidden`` ``[tokens, hidden_size]`` the last hidden states, or None when nobody wants them.
    """

    logits: torch.Tensor
    best: torch.Tensor
    hidden: torch.Tensor | None


class Step(Protocol):
    """Something that computes forward passes and owns the KV cache that they write."""

    cache: KVCache

    def compute(self, batch: FlatBatch) -> Computed:
        """Compute the tokens of ``batch``; their keys and values are in the cache afterwards."""
        ...

    def sample(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Return the next token of each row, int64 ``[rows]``.

        ``scores``: processed logits, float32 ``[rows, vocab]``, the last axis dense; may be overwritten.
        """
        ...


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return ``best`` of `Computed` for ``logits``."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    values, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(values), tokens, -1)
