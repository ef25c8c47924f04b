"""Forward passes through transformers' own model code, with our attention over the block cache."""

import inspect
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch

from workers.engine import sampler
from workers.engine.attention import AttentionBatch, BlockAttention, DecodeGroup, PrefillChunk
from workers.engine.flat_batch import Computed, FlatBatch, likeliest
from workers.engine.kv_cache import KVCache
from workers.engine.lora import ActiveAdapters
from workers.engine.sequence import Sequence
from workers.engine.transfer import to_device
from workers.messages import GenerateJob

# Sequences whose block counts differ by less than this factor share one padded gather.
GROUP_RATIO = 1.4
SMALLEST_GROUP = 4


class EagerStep:
    """Computes forward passes with any transformers causal LM that uses ``attention``; implements
    `workers.engine.flat_batch.Step`.
    """

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
    def compute(self, batch: FlatBatch) -> Computed:
        """Compute the tokens of ``batch``; their keys and values are in the cache afterwards."""
        if batch.copies:
            self.cache.copy_blocks(batch.copies)
        if self.adapters is not None:
            self.adapters.rows = self._adapter_rows(batch)
        ids, positions = to_device(batch.ids, self.device), to_device(batch.positions, self.device)
        logits, hidden = self.run_model(
            ids, positions, self._attention_batch(batch), to_device(batch.wanted, self.device)
        )
        logits = logits.float()
        return Computed(logits, likeliest(logits), hidden if batch.wants_hidden else None)

    def run_model(
        self, ids: torch.Tensor, positions: torch.Tensor, borders: AttentionBatch, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on a flat batch: int64 ``ids`` and ``positions`` ``[tokens]``, with these borders.

        Returns the logits ``[rows, vocab]`` of ``rows`` (None: of all) in the model's own dtype, and the last hidden
        states ``[tokens, hidden_size]``.
        """
        self.attention.batch = borders
        options: dict[str, Any] = {"logits_to_keep": rows} if self._keep_rows and rows is not None else {}
        try:
            output = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **options)
        except Exception:
            # The hidden states of a pass that ran out of memory are in the way of the next one.
            self._hidden = None
            raise
        finally:
            self.attention.batch = None
        logits = output.logits[0]
        if rows is not None and not self._keep_rows:
            logits = logits[rows]
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return logits, hidden[0]

    def sample(self, scores: torch.Tensor, sequences: Rows[Sequence]) -> torch.Tensor:
        """Return the next token of each row, int64 ``[rows]``."""
        return sampler.sample(scores, sequences)

    def _adapter_rows(self, batch: FlatBatch) -> dict[str, torch.Tensor]:
        """Return which rows of the flat batch each adapter changes."""
        rows: dict[str, list[int]] = {}
        for item, (start, end) in zip(batch.items, batch.spans, strict=True):
            job = item.sequence.job
            if isinstance(job, GenerateJob) and job.adapter:
                rows.setdefault(job.adapter, []).extend(range(start, end))
        return {name: to_device(r, self.device) for name, r in rows.items()}

    def _attention_batch(self, batch: FlatBatch) -> AttentionBatch:
        size = self.cache.block_size
        tables = [np.array(i.sequence.blocks, dtype=np.int64) for i in batch.items]
        slots = np.empty(batch.tokens, dtype=np.int64)
        for table, (start, end) in zip(tables, batch.spans, strict=True):
            own = batch.positions[start:end]
            slots[start:end] = table[own // size] * size + own % size
        prefills = []
        decodes: list[tuple[int, int]] = []
        for n, (item, (start, end)) in enumerate(zip(batch.items, batch.spans, strict=True)):
            used = -(-(item.sequence.computed + item.tokens) // size)
            if item.tokens == 1:
                decodes.append((used, n))
            else:
                blocks = to_device(tables[n][:used], self.device)
                prefills.append(PrefillChunk(start, end, item.sequence.computed, blocks))
        return AttentionBatch(
            slots=to_device(slots, self.device),
            decodes=[self._decode_group(g, batch, tables) for g in group_by_length(decodes)],
            prefills=prefills,
        )

    def _decode_group(self, group: list[tuple[int, int]], batch: FlatBatch, tables: list[np.ndarray]) -> DecodeGroup:
        blocks = np.zeros((len(group), group[-1][0]), dtype=np.int64)
        for row, (used, n) in enumerate(group):
            blocks[row, :used] = tables[n][:used]
        lengths = [batch.items[n].sequence.computed + 1 for _, n in group]
        return DecodeGroup(
            rows=to_device([batch.spans[n][0] for _, n in group], self.device),
            blocks=to_device(blocks, self.device),
            lengths=to_device(lengths, self.device),
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
