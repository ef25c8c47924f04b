"""What the files of a base model say of it, read from their headers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.weight_files import WeightFileError, WeightHeader, is_gguf, read_gguf, read_safetensors, safetensors_files


@dataclass
class BaseModel:
    """What the headers say of a local base model. ``quantized``: shapes in the file are not those of the modules."""

    header: WeightHeader
    config: dict[str, Any]
    gguf: bool
    quantized: bool = False

    @property
    def max_model_len(self) -> int | None:
        """The longest text that the model was made for, in tokens, or None if it does not say."""
        if self.gguf:
            architecture = self.header.metadata.get("general.architecture", "")
            length = self.header.metadata.get(f"{architecture}.context_length")
            return length if isinstance(length, int) else None
        text = self.config.get("text_config")
        for config in (self.config, text if isinstance(text, dict) else {}):
            for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
                if isinstance(config.get(key), int):
                    return int(config[key] * _rope_factor(config))
        return None


def _rope_factor(config: dict[str, Any]) -> float:
    """By how much position scaling stretches the stated length; llama3 and longrope state it stretched already."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, dict):
        return 1.0
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor")
    return float(factor) if kind in ("yarn", "linear", "dynamic") and isinstance(factor, int | float) else 1.0


def read_base_model(path: Path) -> BaseModel:
    """Read a model directory or GGUF file. Raises `WeightFileError` if it holds no usable model, and `OSError`."""
    if path.is_dir():
        return _read_directory(path)
    if is_gguf(path):
        return BaseModel(read_gguf(path), {}, gguf=True)
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise WeightFileError("is one file of a model: give its directory")
    raise WeightFileError("is neither a model directory nor a GGUF file")


def _read_directory(path: Path) -> BaseModel:
    """Read the headers of a model directory. Raises `WeightFileError`, `OSError`."""
    if not (path / "config.json").is_file():
        ggufs = sorted(each.name for each in path.glob("*.gguf"))
        hint = f"; give the GGUF file itself, such as {path / ggufs[0]}" if ggufs else ""
        raise WeightFileError(f"is no model directory: no config.json{hint}")
    config = read_json(path / "config.json")
    if foreign := _foreign_code(config):
        raise WeightFileError(f"config.json asks for code from elsewhere ({foreign}), which is never run")
    files = list(safetensors_files(path))
    if not files:
        if list(path.glob("*.bin")) or list(path.glob("*.pt*")):
            raise WeightFileError("has its weights as pickle files only, which can run code; convert to safetensors")
        raise WeightFileError("has no weights (*.safetensors)")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.is_file():
            raise WeightFileError(f"{file.name}, which the index names, is missing")
        try:
            shapes.update(read_safetensors(file).shapes)
        except WeightFileError as error:
            raise WeightFileError(f"{file.name} {error}") from error
    return BaseModel(WeightHeader(shapes), config, gguf=False, quantized="quantization_config" in config)


def _foreign_code(config: dict[str, Any]) -> str:
    """Return the name under which a configuration wants code of the hub's as its attention; "" for none.

    transformers 4.56 to 5.2 would run it (CVE-2026-4372). Names of its own implementations have neither sign. (An
    ``auto_map`` is harmless: models that transformers knows by itself have one too, and only those are loaded.)
    """
    for name, value in config.items():
        if name.strip("_").startswith("attn_implementation") and any(sign in str(value) for sign in "/:@"):
            return name
        if isinstance(value, dict) and (found := _foreign_code(value)):
            return found
    return ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightFileError(f"{path.name} is no valid JSON") from error
    if not isinstance(value, dict):
        raise WeightFileError(f"{path.name} is no JSON object")
    return value
