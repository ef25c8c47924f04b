"""Tiny models for the compiled step in every format of weights, and a driver that asks it for logits."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.workers.engine.tiny import CACHE, FAMILIES, tiny_model
from workers.engine.attention import Scoring
from workers.engine.flat_batch import Computed, flatten
from workers.engine.gguf_codes import rounded
from workers.engine.kv_cache import BlockPool, LayerShape
from workers.engine.native.step import NativeStep
from workers.engine.native.weights import GROUP, Codes
from workers.engine.scheduler import Scheduled
from workers.engine.sequence import Sequence
from workers.messages import EmbedJob, GenerateJob

BLOCKS = 96
FORMATS = ("float32", "bfloat16", "q4", "q8")

# What the families of `tiny` leave out: rows and columns that fill no vector, pair or group, several query heads for
# each key head, wide heads.
ODD: dict[str, dict[str, Any]] = {
    # 3 query heads for each key head, heads as wide as those of real models.
    "llama-3-to-1": {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 131,
    },
    # Nothing is a multiple of 32 or, but for the MLP, of 16; every token has 7 query heads for one key head.
    "qwen2-odd": {
        "model_type": "qwen2",
        "hidden_size": 50,
        "intermediate_size": 112,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 77,
    },
    "qwen3-long-heads": {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 80,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
    },
    # Tokens of one slice begin to look back in different stretches of attention's sums.
    "mistral-wide-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 120},
    "llama-scaled-rope": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def odd_model(name: str, **changes: Any) -> Any:
    """Return the model ``name`` of `ODD` or of `tiny.FAMILIES`, biases and norms filled with random numbers."""
    model = tiny_model("llama", **{**ODD[name], **changes}) if name in ODD else tiny_model(name, **changes)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # transformers starts biases with 0 and norms with 1: both hide mistakes.
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.requires_grad_(False)


NAMES = (*(n for n in FAMILIES if n not in ("gemma2", "phi3", "gpt-neox")), *ODD)


def layers_of(model: Any) -> list[tuple[LayerShape, Scoring]]:
    """Return what `build` finds out about the layers of one of these models."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = LayerShape(config.num_key_value_heads, dim, dim)
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return [(shape, Scoring(dim**-0.5, window))] * config.num_hidden_layers


def rounded_to_4_bits(weights: np.ndarray) -> Codes:
    """Round float32 ``[outputs, inputs]`` to 16 steps between the least and the largest weight of each group."""
    grouped = weights.reshape(len(weights), -1, GROUP)
    minima = grouped.min(axis=-1).astype(np.float16)
    scales = ((grouped.max(axis=-1) - minima) / 15).astype(np.float16)
    divisor = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    codes = np.rint((grouped - minima[..., None]) / divisor).clip(0, 15)
    return Codes(4, codes.astype(np.uint8).reshape(weights.shape), scales, minima)


def codes_of(model: Any, form: str) -> dict[str, Codes]:
    """Return the quantised form of every matrix that can have one; none for "float32" and "bfloat16"."""
    if form not in ("q4", "q8"):
        return {}
    make = rounded if form == "q8" else rounded_to_4_bits
    return {
        name: make(parameter.detach().numpy())
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and parameter.shape[1] % GROUP == 0
    }


def dequantised(model: Any, codes: dict[str, Codes]) -> Any:
    """Put the weights that ``codes`` stand for into ``model``."""
    for name, parameter in model.named_parameters():
        if name in codes:
            parameter.data = torch.from_numpy(codes[name].floats())
    return model


@contextmanager
def native_step(
    model: Any,
    form: str = "float32",
    threads: int = 1,
    codes: dict[str, Codes] | None = None,
    dtype: torch.dtype | None = None,
    adapters: list[str] | None = None,
) -> Iterator[NativeStep]:
    """Give the compiled step of ``model`` with weights in ``form`` or with ``codes``; it is closed at the end.

    Other weights than those, and the cache, are of ``dtype``: bfloat16 unless it is said or ``form`` is "float32".
    """
    codes = codes_of(model, form) if codes is None else codes
    dtype = dtype or (torch.float32 if form == "float32" else torch.bfloat16)
    step = NativeStep(model, layers_of(model), codes, dtype, BLOCKS, threads, CACHE, adapters)
    try:
        yield step
    finally:
        step.close()


class Driver:
    """Computes sequences slice by slice on blocks in no particular order; every row's logits are kept."""

    def __init__(self, step: NativeStep, seed: int = 0) -> None:
        self.step = step
        self.pool = BlockPool(BLOCKS, step.cache.block_size)
        random.Random(seed).shuffle(self.pool._blank)
        self.sequences: dict[str, Sequence] = {}
        self.hidden: dict[str, list[torch.Tensor]] = {}
        self._logits: dict[str, list[torch.Tensor]] = {}
        self._best: dict[str, list[torch.Tensor]] = {}

    def add(
        self, name: str, ids: list[int], *, embedding: bool = False, all_rows: bool = True, adapter: str = ""
    ) -> None:
        """Add a sequence; ``all_rows``: logits of each token are wanted, not just of the last one."""
        job: Any = EmbedJob(id=name, prompt=ids)
        if not embedding:
            scored = 0 if all_rows else None
            job = GenerateJob(id=name, prompt=ids, max_tokens=1, prompt_logprobs=scored, adapter=adapter)
        self.sequences[name] = Sequence(job, 0, ids, len(ids))

    def compute(self, *slices: tuple[str, int]) -> Computed:
        """Compute (name, tokens) for each of ``slices`` in one pass."""
        named = [(name, self.sequences[name], tokens) for name, tokens in slices]
        batch = flatten([Scheduled(s, tokens, s.reserve(tokens, self.pool)) for _, s, tokens in named])
        result = self.step.compute(batch)
        for n, places in batch.prompt_places:
            self._logits.setdefault(named[n][0], []).append(result.logits[places].clone())
            self._best.setdefault(named[n][0], []).append(result.best[places])
        for n, place in batch.next_places:
            if named[n][1].prompt_scored:
                self._logits.setdefault(named[n][0], []).append(result.logits[place : place + 1].clone())
                self._best.setdefault(named[n][0], []).append(result.best[place : place + 1])
        for n, (name, sequence, tokens) in enumerate(named):
            if sequence.is_embedding:
                assert result.hidden is not None
                self.hidden.setdefault(name, []).append(result.hidden[slice(*batch.spans[n])])
            sequence.computed += tokens
        return result

    def logits(self, name: str) -> torch.Tensor:
        """All logits of a sequence so far: float32 ``[tokens, vocab]``."""
        return torch.cat(self._logits[name])

    def best(self, name: str) -> torch.Tensor:
        return torch.cat(self._best[name])

    def alone(self, ids: list[int], cuts: list[int] | None = None, adapter: str = "") -> torch.Tensor:
        """Return the logits of ``ids`` (float32 ``[tokens, vocab]``), computed by itself in slices of ``cuts``
        tokens.
        """
        name = f"alone-{len(self.sequences)}"
        self.add(name, ids, adapter=adapter)
        for cut in cuts or [len(ids)]:
            self.compute((name, cut))
        assert self.sequences[name].pending == 0
        self.release(name)
        return self.logits(name)

    def likeliest(self, ids: list[int]) -> torch.Tensor:
        """Return the likeliest token after each of ``ids``: int64 ``[tokens]``, -1 where a logit is no number."""
        name = f"once-{len(self.sequences)}"
        self.add(name, ids)
        self.compute((name, len(ids)))
        self.release(name)
        return self.best(name)

    def release(self, name: str) -> None:
        self.sequences[name].release_blocks(self.pool)


def random_ids(model: Any, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()


@torch.inference_mode()
def reference(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' logits ``[tokens, vocab]`` and last hidden states ``[tokens, hidden_size]``."""
    output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


@lru_cache
def shared_model(name: str) -> Any:
    """Return `odd_model` (made once); not to be changed."""
    return odd_model(name)
