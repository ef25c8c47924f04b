"""What one model worker is told at its birth."""

from typing import Literal

import msgspec


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of one model worker; the pool makes it from the settings, one for each GPU or one for the CPU.

    ``visible_devices`` becomes ``CUDA_VISIBLE_DEVICES`` before torch is imported ("" hides every GPU). ``device`` is
    what torch then sees: "cuda:0" or "cpu". ``lora_model`` is merged into the weights; ``adapters`` (name -> directory)
    are chosen per request. ``kv_cache_bytes`` 0 means: choose. ``engine`` is "module:function", called as
    ``function(config, inbox, emit)``; tests put a scripted engine there.
    """

    index: int = 0
    device: str = "cpu"
    visible_devices: str = ""
    base_model: str
    lora_model: str | None = None
    adapters: dict[str, str] = {}
    tokenizer_path: str | None = None
    served_names: list[str] = []
    quantization: Literal["8bit", "4bit"] | None = None
    flash_attention: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = 0
    max_batch: int = 32
    prefill_chunk: int = 128
    kv_cache_bytes: int = 0
    block_size: int = 16
    cpu_threads: int = 0
    cpu_kernels: Literal["auto", "compiled", "torch"] = "auto"
    runtime_dir: str
    cache_dir: str
    engine: str = "workers.engine.worker:run"
