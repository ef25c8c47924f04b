"""Makes small model, adapter and tokenizer files for the checks to look at."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 16, 32, 2


def llama_shapes(prefix: str = "model.") -> Shapes:
    """The tensors of a two-layer Llama, as torch shows them."""
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        for name in "qkvo":
            shapes[f"{prefix}layers.{layer}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            shapes[f"{prefix}layers.{layer}.mlp.{name}_proj.weight"] = shape
    return shapes


def write_tensors(path: Path, shapes: Shapes) -> Path:
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    return path


def write_model(folder: Path, shapes: Shapes | None = None, *, tokenizer: bool = True, **config: Any) -> Path:
    """A model directory in safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "llama", "hidden_size": HIDDEN, "max_position_embeddings": 64, **config}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    write_tensors(folder / "model.safetensors", llama_shapes() if shapes is None else shapes)
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def write_shards(folder: Path) -> Path:
    """The same model in two files with an index."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    names = list(llama_shapes())
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        write_tensors(folder / file, {name: llama_shapes()[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def write_gguf(path: Path) -> Path:
    """The same model as a GGUF file, with a tied output layer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_token_list([f"t{number}" for number in range(VOCABULARY)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, shape in llama_shapes().items():
        writer.add_tensor(names.get_name(name, (".weight",)), np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def lora_shapes(module: str, inputs: int, outputs: int, rank: int = 4) -> Shapes:
    start = f"base_model.model.{module}.lora_"
    return {start + "A.weight": (rank, inputs), start + "B.weight": (outputs, rank)}


def write_adapter(folder: Path, shapes: Shapes | None = None, **config: Any) -> Path:
    """A LoRA adapter for `write_model`, in peft's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}), encoding="utf-8")
    if shapes is None:
        shapes = lora_shapes("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN) | lora_shapes(
            "model.layers.1.mlp.down_proj", INNER, HIDDEN
        )
    write_tensors(folder / "adapter_model.safetensors", shapes)
    return folder
