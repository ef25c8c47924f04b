"""Runs the model once over a flat batch and returns what the scheduler's sequences asked for."""

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workers.engine.attention import AttentionBatch, BlockAttention, DecodeGroup, PrefillChunk
from workers.engine.kv_cache import KVCache
from workers.engine.lora import ActiveAdapters
from workers.engine.scheduler import Scheduled
from workers.messages import GenerateJob

# Sequences whose block counts differ by less than this factor share one padded gather.
GROUP_RATIO = 1.4
SMALLEST_GROUP = 4


@dataclass(frozen=True)
class Pass:
    """What a forward pass yielded.

    ``logits`` float32 ``[wanted rows, vocab]``. ``next_rows``: (batch item, row) for each item whose tokens are all
    computed now, so that its next token can be chosen. ``prompt_rows``: (batch item, rows) for items that want scores
    of their prompt. ``hidden`` ``[tokens, hidden_size]`` the last hidden states, ``spans`` each item's rows of it.
    """

    logits: torch.Tensor
    next_rows: list[tuple[int, int]]
    prompt_rows: list[tuple[int, slice]]
    hidden: torch.Tensor
    spans: list[tuple[int, int]]


class ModelRunner:
    """The model with its cache. ``model`` is a transformers causal LM that uses ``attention``."""

    def __init__(
        self, model: Any, attention: BlockAttention, cache: KVCache, adapters: ActiveAdapters | None = None
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.attention = attention
        self.cache = cache
        self.device = cache.keys[0].device
        attention.cache = cache
        self._keep_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._hidden: torch.Tensor | None = None
        model.base_model.register_forward_hook(self._remember_hidden)

    def _remember_hidden(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    @torch.inference_mode()
    def forward(self, batch: list[Scheduled]) -> Pass:
        """Compute the scheduled tokens of ``batch``; their keys and values are in the cache afterwards."""
        copies = [copy for item in batch for copy in item.copies]
        if copies:
            self.cache.copy_blocks(copies)
        ids = np.concatenate([i.sequence.ids[i.sequence.computed : i.sequence.computed + i.tokens] for i in batch])
        positions = np.concatenate([np.arange(i.sequence.computed, i.sequence.computed + i.tokens) for i in batch])
        ends = list(itertools.accumulate(i.tokens for i in batch))
        spans = [(end - item.tokens, end) for item, end in zip(batch, ends, strict=True)]
        wanted: list[int] = []
        next_rows: list[tuple[int, int]] = []
        prompt_rows: list[tuple[int, slice]] = []
        for n, (item, (start, end)) in enumerate(zip(batch, spans, strict=True)):
            sequence = item.sequence
            if sequence.is_embedding:
                continue
            if not sequence.prompt_scored:
                prompt_rows.append((n, slice(len(wanted), len(wanted) + item.tokens)))
                wanted.extend(range(start, end))
            elif item.tokens == sequence.pending:
                wanted.append(end - 1)
            if item.tokens == sequence.pending:
                next_rows.append((n, len(wanted) - 1))
        rows = torch.tensor(wanted, dtype=torch.int64, device=self.device)

        self.attention.batch = self._attention_batch(batch, positions, spans)
        if self.adapters is not None:
            self.adapters.rows = self._adapter_rows(batch, spans)
        options: dict[str, Any] = {"logits_to_keep": rows} if self._keep_rows else {}
        output = self.model(
            input_ids=torch.from_numpy(ids).to(self.device)[None],
            position_ids=torch.from_numpy(positions).to(self.device)[None],
            use_cache=False,
            **options,
        )
        self.attention.batch = None
        logits = output.logits[0] if self._keep_rows else output.logits[0][rows]
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return Pass(logits.float(), next_rows, prompt_rows, hidden[0], spans)

    def _adapter_rows(self, batch: list[Scheduled], spans: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return which rows of the flat batch each adapter changes."""
        rows: dict[str, list[int]] = {}
        for item, (start, end) in zip(batch, spans, strict=True):
            job = item.sequence.job
            if isinstance(job, GenerateJob) and job.adapter:
                rows.setdefault(job.adapter, []).extend(range(start, end))
        return {name: torch.tensor(r, device=self.device) for name, r in rows.items()}

    def _attention_batch(
        self, batch: list[Scheduled], positions: np.ndarray, spans: list[tuple[int, int]]
    ) -> AttentionBatch:
        size = self.cache.block_size
        tables = [np.array(i.sequence.blocks, dtype=np.int64) for i in batch]
        slots = np.empty(len(positions), dtype=np.int64)
        for table, (start, end) in zip(tables, spans, strict=True):
            own = positions[start:end]
            slots[start:end] = table[own // size] * size + own % size
        prefills = []
        decodes: list[tuple[int, int]] = []
        for n, (item, (start, end)) in enumerate(zip(batch, spans, strict=True)):
            used = -(-(item.sequence.computed + item.tokens) // size)
            if item.tokens == 1:
                decodes.append((used, n))
            else:
                blocks = torch.from_numpy(tables[n][:used]).to(self.device)
                prefills.append(PrefillChunk(start, end, item.sequence.computed, blocks))
        return AttentionBatch(
            slots=torch.from_numpy(slots).to(self.device),
            decodes=[self._decode_group(g, batch, tables, spans) for g in group_by_length(decodes)],
            prefills=prefills,
        )

    def _decode_group(
        self,
        group: list[tuple[int, int]],
        batch: list[Scheduled],
        tables: list[np.ndarray],
        spans: list[tuple[int, int]],
    ) -> DecodeGroup:
        blocks = np.zeros((len(group), group[-1][0]), dtype=np.int64)
        for row, (used, n) in enumerate(group):
            blocks[row, :used] = tables[n][:used]
        lengths = [batch[n].sequence.computed + 1 for _, n in group]
        return DecodeGroup(
            rows=torch.tensor([spans[n][0] for _, n in group], device=self.device),
            blocks=torch.from_numpy(blocks).to(self.device),
            lengths=torch.tensor(lengths, device=self.device),
        )


def group_by_length(decodes: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Split (block count, item) pairs into groups of about equal block counts, each sorted by it."""
    groups: list[list[tuple[int, int]]] = []
    for used, n in sorted(decodes):
        if groups and used <= max(groups[-1][0][0] * GROUP_RATIO, SMALLEST_GROUP):
            groups[-1].append((used, n))
        else:
            groups.append([(used, n)])
    return groups
