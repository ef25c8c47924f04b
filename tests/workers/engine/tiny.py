"""Tiny random models of several families, and a driver that runs an engine to its end."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.engine import Engine
from workers.engine.loader import LoadedModel
from workers.messages import Embedded, Failed, GenerateJob, Order, Output, Report

VOCAB = 199
EOS = 7

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    # Wide random weights: narrow ones make all tokens about equally likely, and then every test passes by luck or
    # fails.
    "initializer_range": 0.3,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-gqa-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "mistral-window": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 9,
        "query_pre_attn_scalar": 8,
        # Tied, its outputs repeat its inputs and every test would see one token.
        "tie_word_embeddings": False,
    },
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2},
    "gpt-neox": {"model_type": "gpt_neox"},
}


def tiny_model(family: str = "llama-gqa-tied", seed: int = 0, **changes: Any) -> Any:
    """Return a random float32 model on the CPU, the same for the same arguments."""
    options = {**SMALL, **FAMILIES[family], **changes}
    config = CONFIG_MAPPING[options.pop("model_type")](**options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    # A stop token that is now very likely and now very unlikely, so that outputs end at all lengths.
    model.get_output_embeddings().weight.data[EOS] *= 2
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
    return model.eval()


# What `tiny_engine` computes with unless told otherwise; the fixture `kernels` changes it.
KERNELS = "auto"
# Families that the compiled kernels compute.
COMPILED = ("llama", "llama-gqa-tied", "qwen2", "qwen3", "mistral-window")
# The compiled library is kept over test runs, as it is over starts of the server.
CACHE = Path(tempfile.gettempdir()) / f"tailrace-test-kernels-{os.getuid()}"


def tiny_engine(model: Any, **config: Any) -> Engine:
    """Return an engine over ``model``; ``config`` are `WorkerConfig` fields."""
    defaults = {"base_model": "tiny", "runtime_dir": "", "cache_dir": str(CACHE), "max_batch": 32, "prefill_chunk": 16}
    defaults["cpu_kernels"] = KERNELS
    settings = WorkerConfig(**{**defaults, **config})
    loaded = LoadedModel(model, None, model.generation_config, torch.float32, torch.device("cpu"))
    return build(loaded, settings)


def drain(engine: Engine, orders: list[Order] | None = None, limit: int = 5000) -> list[Report]:
    """Submit ``orders`` and step until the engine has nothing left."""
    reports: list[Report] = []
    for order in orders or []:
        reports += engine.submit(order)
    for _ in range(limit):
        if not engine.has_work:
            return reports
        reports += engine.step()
    raise AssertionError(f"the engine still has work after {limit} steps")


def join_and_leave(engine: Engine, orders: list[Order]) -> list[Report]:
    """Submit ``orders`` three steps apart, so that passes of all sizes come, and step until nothing is left."""
    reports: list[Report] = []
    for order in orders:
        reports += engine.submit(order)
        for _ in range(3):
            reports += engine.step()
    return reports + drain(engine)


def ids_of(reports: list[Report], job_id: str, choice: int = 0) -> list[int]:
    """Return all token ids that were reported for one choice."""
    for report in reports:
        assert not (isinstance(report, Failed) and report.id == job_id), report
    return [i for r in reports if isinstance(r, Output) and r.id == job_id and r.choice == choice for i in r.ids]


def vector_of(reports: list[Report], job_id: str) -> torch.Tensor:
    (report,) = [r for r in reports if isinstance(r, Embedded) and r.id == job_id]
    return torch.frombuffer(bytearray(report.vector), dtype=torch.float32)


def prompts(count: int, shortest: int = 3, longest: int = 40, seed: int = 1) -> list[list[int]]:
    """Return random prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(8, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def reference(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> list[list[int]]:
    """Return what ``transformers.generate`` appends to the prompt, per returned sequence, without padding."""
    config = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=EOS, pad_token_id=0, bos_token_id=1, **options
    )
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    results = []
    for row in out[:, len(prompt) :].tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        results.append(row[:end])
    return results


def job(job_id: str, prompt: list[int], max_tokens: int = 24, **options: Any) -> GenerateJob:
    return GenerateJob(id=job_id, prompt=prompt, max_tokens=max_tokens, stop_token_ids=[EOS], **options)


def tiny_tokenizer(size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of ``size`` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w7", bos_token="w1", unk_token="w0")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with one token for each byte and four special ones; `EOS` is its eos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: place + 8 for place, character in enumerate(alphabet)}
    vocabulary.update({f"<s{i}>": i for i in range(8)})
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<s{i}>", special=True) for i in range(8)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"<s{EOS}>")


BYTE_VOCAB = 264
