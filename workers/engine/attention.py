"""Attention over the block cache, called by transformers' model classes through their attention interface.

A forward pass carries a flat batch: the tokens of many sequences side by side in one row. The model code computes
everything that is per token; this module does what joins tokens: it writes the new keys and values into the cache and
lets each sequence attend to its own past. `AttentionBatch` tells where the borders are.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from workers.engine.errors import UnsupportedAttention
from workers.engine.kv_cache import KVCache, LayerShape

Masks = dict[int | None, torch.Tensor]


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one new token each and about the same number of blocks.

    ``rows`` ``[n]`` positions in the flat batch, or the slice of all of them; ``blocks`` ``[n, blocks]`` padded block
    tables; ``lengths`` ``[n]`` tokens in the cache, the new one included. Nothing that is computed from them leaves the
    device, so a CUDA graph may hold it.
    """

    rows: torch.Tensor | slice
    blocks: torch.Tensor
    lengths: torch.Tensor
    _masks: Masks = field(default_factory=dict)

    def mask(self, tokens: int, window: int | None) -> torch.Tensor:
        """True where a sequence may look: ``[n, 1, 1, tokens]``; made once for all layers of a window."""
        mask = self._masks.get(window)
        if mask is None:
            positions = torch.arange(tokens, device=self.lengths.device)
            lengths = self.lengths[:, None]
            mask = positions < lengths
            if window is not None:
                mask &= positions > lengths - 1 - window
            mask = self._masks[window] = mask[:, None, None, :]
        return mask

    @cached_property
    def paged(self) -> "Paged":
        """The group as flash-attn wants it; made once for all layers."""
        return Paged(self.blocks, self.lengths, 1)


class Paged:
    """Sequences with ``size`` new tokens each, as flash-attn's variable-length kernel wants them: all int32.

    ``queries`` ``[n + 1]``, ``keys`` ``[n + 1]``: borders of the sequences in the flat queries and in the lengths.
    """

    def __init__(self, blocks: torch.Tensor, lengths: torch.Tensor, size: int) -> None:
        self.size = size
        self.blocks = blocks.to(torch.int32)
        self.queries = torch.arange(0, (len(blocks) + 1) * size, size, dtype=torch.int32, device=blocks.device)
        self.keys = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


@dataclass(frozen=True)
class PrefillChunk:
    """A slice of one prompt: rows ``start`` to ``end`` of the flat batch, ``context`` tokens before it in the cache."""

    start: int
    end: int
    context: int
    blocks: torch.Tensor
    _masks: Masks = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Tokens in the cache once this slice is computed."""
        return self.context + self.end - self.start

    def mask(self, window: int | None) -> torch.Tensor:
        """True where a token of the slice may look: ``[slice, total]``; made once for all layers of a window."""
        mask = self._masks.get(window)
        if mask is None:
            keys = torch.arange(self.total, device=self.blocks.device)
            queries = keys[self.context :, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            self._masks[window] = mask
        return mask

    @cached_property
    def paged(self) -> Paged:
        """The slice as flash-attn wants it; made once for all layers."""
        lengths = torch.full((1,), self.total, device=self.blocks.device)
        return Paged(self.blocks[None], lengths, self.end - self.start)


@dataclass(frozen=True)
class AttentionBatch:
    """Borders of the sequences in one flat batch. ``slots`` ``[tokens]``: where each token's key and value go."""

    slots: torch.Tensor
    decodes: list[DecodeGroup]
    prefills: list[PrefillChunk]


@dataclass(frozen=True)
class Scoring:
    """How one layer scores: factor of the dot products, tokens back that it looks (None: all), cap of the scores."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class AttentionBackend(Protocol):
    """What a back end must offer: attention of one layer for the whole flat batch.

    ``gathers``: whether all blocks of the padded tables are copied, so that padding costs time and memory.
    """

    gathers: bool

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scoring: Scoring,
    ) -> torch.Tensor:
        """``query`` ``[tokens, heads, head_dim]`` -> ``[tokens, heads, value_dim]``."""
        ...


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scoring: Scoring,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention, ``[batch, heads, queries, dim]`` with as many key heads as query heads."""
    softcap = scoring.softcap
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scoring.scaling
        )
    scores = torch.matmul(query, key.transpose(-1, -2)) * scoring.scaling
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype), value)


class SdpaBackend:
    """Pure torch: gathers each sequence's blocks and calls scaled dot-product attention. For the CPU and any GPU."""

    gathers = True

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scoring: Scoring,
    ) -> torch.Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
        for group in batch.decodes:
            out[group.rows] = self._decode(group, query, keys, values, scoring)
        for chunk in batch.prefills:
            out[chunk.start : chunk.end] = self._prefill(chunk, query, keys, values, scoring)
        return out

    @staticmethod
    def _decode(
        group: DecodeGroup, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        count, blocks = group.blocks.shape
        kv_heads = keys.shape[2]
        tokens = blocks * keys.shape[1]
        flat = group.blocks.reshape(-1)
        key = keys.index_select(0, flat).view(count, tokens, kv_heads, -1).transpose(1, 2)
        value = values.index_select(0, flat).view(count, tokens, kv_heads, -1).transpose(1, 2)
        mask = group.mask(tokens, scoring.window)
        # One query token per sequence: the query heads that share a key head can stand in line as if they were several
        # query tokens, so no key is copied for them.
        grouped = query[group.rows].view(count, kv_heads, -1, query.shape[-1])
        out = grouped_attention(grouped, key, value, mask.expand(-1, -1, grouped.shape[2], -1), scoring)
        return out.reshape(count, query.shape[1], -1)

    @staticmethod
    def _prefill(
        chunk: PrefillChunk, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        total = chunk.total
        repeats = query.shape[1] // keys.shape[2]

        def gather(storage: torch.Tensor) -> torch.Tensor:
            rows = storage.index_select(0, chunk.blocks).flatten(0, 1)[:total].transpose(0, 1)
            return rows.repeat_interleave(repeats, dim=0).unsqueeze(0)

        causal = chunk.context == 0 and (scoring.window is None or scoring.window >= total)
        mask = None if causal else chunk.mask(scoring.window)
        part = query[chunk.start : chunk.end].transpose(0, 1).unsqueeze(0)
        out = grouped_attention(part, gather(keys), gather(values), mask, scoring, causal=causal)
        return out.squeeze(0).transpose(0, 1)


class FlashBackend:
    """flash-attn's variable-length kernel, which reads the block tables itself. Needs CUDA and ``flash-attn``.

    Its paged form wants blocks of a multiple of 256 tokens (`BLOCK_SIZE`).
    """

    BLOCK_SIZE = 256
    gathers = False

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func

        self._kernel = flash_attn_varlen_func

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scoring: Scoring,
    ) -> torch.Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        options: dict[str, Any] = {"softmax_scale": scoring.scaling, "causal": True, "softcap": scoring.softcap or 0.0}
        if scoring.window is not None:
            options["window_size"] = (scoring.window - 1, 0)
        out = query.new_empty(query.shape[0], query.shape[1], values.shape[-1])
        parts: list[tuple[torch.Tensor | slice, Paged]] = [(g.rows, g.paged) for g in batch.decodes]
        parts += [(slice(c.start, c.end), c.paged) for c in batch.prefills]
        for rows, paged in parts:
            out[rows] = self._kernel(
                query[rows],
                keys,
                values,
                cu_seqlens_q=paged.queries,
                cu_seqlens_k=paged.keys,
                max_seqlen_q=paged.size,
                max_seqlen_k=paged.blocks.shape[1] * keys.shape[1],
                block_table=paged.blocks,
                **options,
            )
        return out


class BlockAttention:
    """The attention function of one model: registered with transformers under a name of its own.

    Before each forward pass `EagerStep` sets ``batch``; the model then calls `__call__` once per layer. While ``probe``
    is a dict, no cache exists yet: plain causal attention is computed, and each layer's shape and scoring are noted
    there.
    """

    _registered = 0

    def __init__(self, backend: AttentionBackend) -> None:
        BlockAttention._registered += 1
        self.name = f"tailrace_{BlockAttention._registered}"
        self.backend = backend
        self.cache: KVCache | None = None
        self.batch: AttentionBatch | None = None
        self.probe: dict[int, tuple[LayerShape, Scoring]] | None = None
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query`` ``[1, heads, tokens, head_dim]``, ``key``/``value`` the same with kv_heads.

        Returns ``[1, tokens, heads, value_dim]`` and no weights.
        """
        if s_aux is not None:
            raise UnsupportedAttention("attention sinks")
        layer: int = module.layer_idx  # type: ignore[assignment]
        scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
        if self.probe is not None:
            self.probe[layer] = (LayerShape(key.shape[1], key.shape[-1], value.shape[-1]), scoring)
            return self._plain(query, key, value, scoring), None
        assert self.cache is not None, "forward pass before the cache exists"
        assert self.batch is not None, "forward pass without a batch"
        batch = self.batch
        for storage, new in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            storage.flatten(0, 1).index_copy_(0, batch.slots, new[0].transpose(0, 1).to(storage.dtype))
        rows = query[0].transpose(0, 1)
        out = self.backend.attend(layer, rows, self.cache, batch, scoring)
        return out.unsqueeze(0), None

    @staticmethod
    def _plain(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
        mask = PrefillChunk(0, tokens, 0, torch.zeros(1, device=query.device)).mask(scoring.window)
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return grouped_attention(query, key, value, mask, scoring).transpose(1, 2)
