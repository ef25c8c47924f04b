"""Puts an engine together: model, attention, cache, scheduler; and proves before serving that it computes the right
thing.
"""

import time
from pathlib import Path
from typing import Any

import torch

from config import logs
from workers.config import WorkerConfig
from workers.engine.attention import BlockAttention, FlashBackend, SdpaBackend
from workers.engine.cuda_graphs import CudaCapture, GraphedStep
from workers.engine.eager import EagerStep
from workers.engine.engine import Engine
from workers.engine.errors import LoadError, NoNativeStep, UnsupportedAttention
from workers.engine.flat_batch import Step, flatten
from workers.engine.kv_cache import BlockPool, KVCache, LayerShape
from workers.engine.loader import LoadedModel
from workers.engine.native import step as native
from workers.engine.native.step import Layers, NativeStep
from workers.engine.scheduler import Scheduled, Scheduler
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob

log = logs.logger(__name__)

# On the CPU the cache shares the memory with everybody else: room for so many of the longest requests, but no less than
# this many bytes.
CPU_CACHE_CONTEXTS = 2
CPU_CACHE_BYTES = 512 * 1024**2
GPU_CACHE_SHARE = 0.9
# What activations, logits and graphs need beside weights and cache.
GPU_RESERVE_BYTES = 1536 * 1024**2
PROBE_TOKENS = 40
# Largest accepted difference of logits between transformers' own attention and ours, relative to the logits' spread.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Quantised layers round their inputs too, so that a last-bit difference of an input can become a step of the grid.
QUANTISED_TOLERANCE = 0.1
# The compiled products with quantised weights round their inputs to 8 bits; the reference is float32.
CODES_TOLERANCE = 0.1


def build(loaded: LoadedModel, config: WorkerConfig) -> Engine:
    """Return an engine that is ready to step. Raises `LoadError` when the model cannot be served exactly."""
    random = torch.Generator().manual_seed(0)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=random).to(loaded.device)
    begun = time.monotonic()
    reference = _reference_logits(loaded.model, ids)
    seconds = time.monotonic() - begun
    max_model_len = _context_length(loaded.model, config)
    attention = BlockAttention(FlashBackend() if config.flash_attention else SdpaBackend())
    layers = _probe(loaded.model, attention, ids)
    block_size = _block_size(config)
    blocks = _block_count([shape for shape, _ in layers], block_size, loaded, config, max_model_len)
    step: Step | None = _native_step(loaded, config, layers, blocks, ids, reference)
    if step is None:
        step = _eager_step(loaded, config, layers, blocks, attention, ids, reference)
    pool = BlockPool(blocks, block_size)
    scheduler = Scheduler(pool, config.max_batch, config.prefill_chunk)
    scheduler.pace.expect(seconds / PROBE_TOKENS)
    longest = min(max_model_len, blocks * block_size)
    return Engine(step, scheduler, longest, vocabulary, frozenset(config.adapters))


def _native_step(
    loaded: LoadedModel,
    config: WorkerConfig,
    layers: Layers,
    blocks: int,
    ids: torch.Tensor,
    reference: torch.Tensor,
) -> NativeStep | None:
    """Return the compiled CPU step, or None where it does not apply. Raises `LoadError` when it was asked for."""
    if loaded.device.type != "cpu" or config.cpu_kernels == "torch":
        return None
    try:
        reason = native.unsupported(loaded.model, layers)
        if loaded.dtype not in native.FORMATS:
            reason = f"numbers of type {loaded.dtype}"
        elif config.block_size != native.BLOCK_SIZE:
            reason = f"blocks of {config.block_size} tokens"
        if reason:
            raise NoNativeStep(reason)
        step = NativeStep(
            loaded.model,
            layers,
            loaded.codes,
            loaded.dtype,
            blocks,
            torch.get_num_threads(),
            Path(config.cache_dir),
            list(config.adapters),
        )
        worst = _largest_difference(step, ids, reference)
        log.info("self-check of the compiled kernels", largest_relative_difference_of_logits=worst)
        if not worst <= (CODES_TOLERANCE if loaded.codes else TOLERANCE[loaded.dtype]):
            step.close()
            raise NoNativeStep(f"its logits differ from transformers' by {worst:.1e}")
    except NoNativeStep as error:
        if config.cpu_kernels == "compiled":
            raise LoadError(f"--cpu_kernels compiled: {error}") from error
        log.warning("the compiled CPU kernels are not used", reason=str(error))
        return None
    return step


def _eager_step(
    loaded: LoadedModel,
    config: WorkerConfig,
    layers: Layers,
    blocks: int,
    attention: BlockAttention,
    ids: torch.Tensor,
    reference: torch.Tensor,
) -> Step:
    """Return the step that runs transformers' own code, on a GPU with CUDA graphs. Raises `LoadError`."""
    model = loaded.model
    if loaded.codes:
        # Loaded in float32 for the compiled kernels' sake.
        model.to(loaded.dtype)
    block_size = _block_size(config)
    # One block more than the pool hands out: the padding of CUDA graphs is written there.
    cache = KVCache([shape for shape, _ in layers], blocks + 1, block_size, loaded.dtype, loaded.device)
    step = EagerStep(model, attention, cache, loaded.adapters)
    worst = _largest_difference(step, ids, reference)
    log.info("self-check", largest_relative_difference_of_logits=worst)
    tolerance = QUANTISED_TOLERANCE if config.quantization else TOLERANCE[loaded.dtype]
    if not worst <= tolerance:
        raise LoadError(f"{type(model).__name__} cannot be served: its logits differ from transformers' by {worst:.1e}")
    if loaded.device.type != "cuda":
        return step
    longest = min(_context_length(model, config), blocks * block_size)
    return _with_graphs(
        GraphedStep(step, CudaCapture(loaded.device), blocks, config.max_batch, longest), ids, reference, tolerance
    )


def _with_graphs(step: GraphedStep, ids: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Step:
    """Return ``step`` with its first graphs captured, or the eager step inside it when they compute something else."""
    step.capture_ahead()
    worst = _largest_difference(step, ids, reference)
    if worst <= tolerance:
        return step
    log.warning("CUDA graphs are not used: other logits than transformers'", difference=worst)
    return step.eager


@torch.inference_mode()
def _reference_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def _probe(model: Any, attention: BlockAttention, ids: torch.Tensor) -> Layers:
    """Switch the model to our attention and learn what each layer keeps in the cache and how it scores."""
    family = type(model).__name__
    try:
        model.set_attn_implementation(attention.name)
        attention.probe = {}
        model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device)[None], use_cache=False)
    except (UnsupportedAttention, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{family} cannot be served: {error}") from error
    found, attention.probe = attention.probe, None
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(found) != list(range(layers)):
        raise LoadError(f"{family} cannot be served: not all of its layers are plain attention layers")
    return [found[layer] for layer in range(layers)]


def _context_length(model: Any, config: WorkerConfig) -> int:
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if config.max_model_len and own and config.max_model_len > own:
        raise LoadError(f"--max_model_len {config.max_model_len} is more than the model's {own} tokens")
    return config.max_model_len or own or 4096


def _block_size(config: WorkerConfig) -> int:
    return FlashBackend.BLOCK_SIZE if config.flash_attention else config.block_size


def _block_count(
    shapes: list[LayerShape], block_size: int, loaded: LoadedModel, config: WorkerConfig, max_model_len: int
) -> int:
    per_block = KVCache.bytes_per_block(shapes, block_size, loaded.dtype)
    if config.kv_cache_bytes:
        budget = config.kv_cache_bytes
    elif loaded.device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(loaded.device)
        budget = max(0, min(int(free * GPU_CACHE_SHARE), free - GPU_RESERVE_BYTES))
    else:
        budget = max(CPU_CACHE_BYTES, CPU_CACHE_CONTEXTS * per_block * -(-max_model_len // block_size))
    # More than every row of a full batch can use would only be prefix cache; a small model needs no more than that.
    blocks = min(budget // per_block, 2 * config.max_batch * -(-max_model_len // block_size))
    if blocks < 2:
        raise LoadError(f"the KV cache of {budget} bytes holds less than two blocks of {per_block} bytes")
    return int(blocks)


def _largest_difference(step: Step, ids: torch.Tensor, reference: torch.Tensor) -> float:
    """Compute the same logits through the block cache, in two chunks and one decode step, and compare.

    Returns the largest difference relative to the spread of the logits; NaN when a logit is none.
    """
    tokens: list[int] = ids[0].tolist()
    sequence = Sequence(GenerateJob(id="check", prompt=tokens, max_tokens=1), 0, tokens, len(tokens) + 1)
    size = step.cache.block_size
    # Blocks from the front of the cache: nobody else has begun to use it.
    pool = BlockPool(-(-len(tokens) // size), size)
    cuts = [len(tokens) // 2, len(tokens) - 1 - len(tokens) // 2, 1]
    sequence.length = 0
    worst = 0.0
    for cut in cuts:
        sequence.length += cut
        result = step.compute(flatten([Scheduled(sequence, cut, sequence.reserve(cut, pool))]))
        # Not registered as prefix: these blocks vanish after the check.
        sequence.computed += cut
        expected = reference[sequence.length - 1]
        scale = float(expected.max() - expected.min()) or 1.0
        difference = float((result.logits[0] - expected).abs().max()) / scale
        worst = difference if difference != difference else max(worst, difference)
    return worst
