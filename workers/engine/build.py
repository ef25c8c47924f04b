"""Puts an engine together: model, attention, cache, scheduler; and proves before serving that it computes the right
thing.
"""

import logging
import time
from typing import Any

import torch

from workers.config import WorkerConfig
from workers.engine.attention import BlockAttention, FlashBackend, SdpaBackend
from workers.engine.engine import Engine
from workers.engine.errors import LoadError, UnsupportedAttention
from workers.engine.kv_cache import BlockPool, KVCache, LayerShape
from workers.engine.loader import LoadedModel
from workers.engine.runner import ModelRunner
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob

log = logging.getLogger(__name__)

CPU_CACHE_BYTES = 1024**3
GPU_CACHE_SHARE = 0.9
PROBE_TOKENS = 40
# Largest accepted difference of logits between transformers' own attention and ours, relative to the logits' spread.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Quantised layers round their inputs too, so that a last-bit difference of an input can become a step of the grid.
QUANTISED_TOLERANCE = 0.1


def build(loaded: LoadedModel, config: WorkerConfig) -> Engine:
    """Return an engine that is ready to step. Raises `LoadError` when the model cannot be served exactly."""
    backend = FlashBackend() if config.flash_attention else SdpaBackend()
    block_size = FlashBackend.BLOCK_SIZE if config.flash_attention else config.block_size
    attention = BlockAttention(backend)
    ids = torch.randint(0, loaded.model.config.get_text_config().vocab_size, (1, PROBE_TOKENS), device=loaded.device)
    reference = _reference_logits(loaded.model, ids)
    begun = time.monotonic()
    shapes = _probe(loaded.model, attention, ids)
    probe_seconds = time.monotonic() - begun
    max_model_len = _context_length(loaded.model, config)
    blocks = _block_count(shapes, block_size, loaded, config, max_model_len)
    cache = KVCache(shapes, blocks, block_size, loaded.dtype, loaded.device)
    runner = ModelRunner(loaded.model, attention, cache, loaded.adapters)
    pool = BlockPool(blocks, block_size)
    _check(runner, pool, ids, reference, QUANTISED_TOLERANCE if config.quantization else TOLERANCE[loaded.dtype])
    scheduler = Scheduler(pool, config.max_batch, config.prefill_chunk)
    scheduler.note_pass(PROBE_TOKENS, probe_seconds)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    return Engine(runner, scheduler, min(max_model_len, blocks * block_size), vocabulary, frozenset(config.adapters))


@torch.inference_mode()
def _reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def _probe(model: Any, attention: BlockAttention, ids: torch.Tensor) -> list[LayerShape]:
    """Switch the model to our attention and learn what each layer keeps in the cache."""
    family = type(model).__name__
    try:
        model.set_attn_implementation(attention.name)
        attention.probe = {}
        model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None], use_cache=False)
    except (UnsupportedAttention, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{family} cannot be served: {error}") from error
    shapes, attention.probe = attention.probe, None
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(shapes) != list(range(layers)):
        raise LoadError(f"{family} cannot be served: not all of its layers are plain attention layers")
    return [shapes[layer] for layer in range(layers)]


def _context_length(model: Any, config: WorkerConfig) -> int:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if config.max_model_len and own and config.max_model_len > own:
        raise LoadError(f"--max_model_len {config.max_model_len} is more than the model's {own} tokens")
    return config.max_model_len or own or 4096


def _block_count(
    shapes: list[LayerShape], block_size: int, loaded: LoadedModel, config: WorkerConfig, max_model_len: int
) -> int:
    per_block = KVCache.bytes_per_block(shapes, block_size, loaded.dtype)
    if config.kv_cache_bytes:
        budget = config.kv_cache_bytes
    elif loaded.device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(loaded.device)
        budget = int(free * GPU_CACHE_SHARE)
    else:
        budget = CPU_CACHE_BYTES
    # More than every row of a full batch can use would only be prefix cache; a small model needs no more than that.
    blocks = min(budget // per_block, 2 * config.max_batch * -(-max_model_len // block_size))
    if blocks < 2:
        raise LoadError(f"the KV cache of {budget} bytes holds less than two blocks of {per_block} bytes")
    return int(blocks)


def _check(runner: ModelRunner, pool: BlockPool, ids: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """Compute the same logits through the block cache, in two chunks and one decode step, and compare."""
    tokens: list[int] = ids[0].tolist()
    sequence = Sequence(GenerateJob(id="check", prompt=tokens, max_tokens=1), 0, tokens, len(tokens) + 1)
    cuts = [len(tokens) // 2, len(tokens) - 1 - len(tokens) // 2, 1]
    sequence.length = 0
    worst = 0.0
    for size in cuts:
        sequence.length += size
        result = runner.forward([Scheduled(sequence, size, sequence.reserve(size, pool))])
        # Not registered as prefix: these blocks vanish after the check.
        sequence.computed += size
        expected = reference[sequence.length - 1]
        scale = float(expected.max() - expected.min()) or 1.0
        worst = max(worst, float((result.logits[0] - expected).abs().max()) / scale)
    sequence.release_blocks(pool)
    log.info("self-check: largest relative difference of logits %.2e", worst)
    if not worst <= tolerance:
        raise LoadError(
            f"{type(runner.model).__name__} cannot be served: its logits differ from transformers' by {worst:.1e}"
        )
