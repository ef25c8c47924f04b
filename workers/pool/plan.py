"""From the operator's settings to what the pool runs: which model workers on which devices, and its bounds."""

import os

from config.settings import Settings
from workers.config import WorkerConfig
from workers.pool.model_worker import Limits
from workers.pool.server import PoolOptions

_GIB = 1024**3


def worker_configs(settings: Settings) -> list[WorkerConfig]:
    """Return one configuration for each GPU of the settings, or a single one for the CPU (``only_cpu``).

    The settings have to be checked ones: `config.checks.preflight` sets ``only_cpu`` where there is no GPU.
    """
    if settings.only_cpu:
        return [_config(settings, 0, None)]
    return [_config(settings, index, gpu) for index, gpu in enumerate(settings.gpus)]


def pool_options(settings: Settings) -> PoolOptions:
    """Return the pool's bounds."""
    return PoolOptions(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_queue_tokens=settings.max_queue_tokens,
        queue_timeout_s=settings.queue_timeout_s,
        max_replays=settings.max_replays,
        drain_s=float(settings.graceful_timeout_s),
        resume_window_s=settings.resume_window_s,
        limits=Limits(watchdog_s=settings.watchdog_s),
    )


def _config(settings: Settings, index: int, gpu: int | None) -> WorkerConfig:
    """Configure the worker on ``gpu``, or on the CPU (None)."""
    return WorkerConfig(
        index=index,
        # Each worker sees its own GPU only, so to torch it is always the first one.
        device="cpu" if gpu is None else "cuda:0",
        visible_devices="" if gpu is None else str(gpu),
        base_model=_local(settings.base_model),
        lora_model=_local(settings.merged_lora) if settings.merged_lora else None,
        adapters={name: _local(source) for name, source in settings.adapters.items()},
        tokenizer_path=_local(settings.tokenizer_path) if settings.tokenizer_path else None,
        served_names=list(settings.served_model_name),
        quantization=settings.quantization,
        flash_attention=settings.use_flash_attention_2 and gpu is not None,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_batch=settings.max_batch,
        prefill_chunk=settings.prefill_chunk,
        kv_cache_bytes=int(settings.kv_cache_gib * _GIB),
        cpu_threads=settings.cpu_threads,
        cpu_kernels=settings.cpu_kernels,
        runtime_dir=str(settings.runtime_dir),
        cache_dir=str(settings.cache_dir),
    )


def _local(source: str) -> str:
    """Put the home directory in for "~", which a file or NAME=DIR may hold; a hub id stays as it is."""
    return os.path.expanduser(source)
