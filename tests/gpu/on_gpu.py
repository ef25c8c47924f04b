"""An engine on the first CUDA device over a tiny model that lies in a directory."""

from pathlib import Path
from typing import Any

from tests.workers.engine.tiny import tiny_model, tiny_tokenizer
from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.engine import Engine
from workers.engine.loader import load

# Heads of 64: flash-attn takes no odd sizes.
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_model(directory: Path, family: str = "llama") -> None:
    """Write the tiny model and what belongs to it to ``directory``."""
    tiny_model(family, **SHAPE).save_pretrained(directory / "base")
    tiny_tokenizer().save_pretrained(directory / "base")
    (directory / "run").mkdir()


def engine_of(directory: Path, **changes: Any) -> Engine:
    """Return an engine over the model in ``directory``; ``changes`` are `WorkerConfig` fields."""
    options: dict[str, Any] = {"device": "cuda:0", "dtype": "float32", "kv_cache_bytes": 1 << 28, **changes}
    config = WorkerConfig(
        base_model=str(directory / "base"),
        runtime_dir=str(directory / "run"),
        cache_dir=str(directory / "cache"),
        **options,
    )
    return build(load(config, lambda _progress, _stage: None), config)
