"""Publishes the model card: what the HTTP tier must know of the model to turn text into tokens and back."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from config import template_sandbox
from workers.config import WorkerConfig
from workers.engine.errors import LoadError
from workers.engine.loader import LoadedModel
from workers.messages import ModelCard

ALIAS = "llama-3-chinese"
_RENDER_SECONDS = 5.0
_MARK = "\u2063reply\u2063"
# Ends of a turn that a template need not mention: Llama 3 ends a call of a tool with this one.
_TURN_ENDS = ("<|eom_id|>",)
_GENERATION_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "do_sample")


def publish(loaded: LoadedModel, config: WorkerConfig, max_model_len: int) -> Path:
    """Write tokenizer and card into the runtime directory; return the card's path.

    The files' names hold a digest of their content, so a card never changes under a reader and several workers with the
    same model write the same files.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    directory = Path(config.runtime_dir)
    serialised = tokenizer.backend_tokenizer.to_str().encode()
    tokenizer_path = _write(directory, "tokenizer", serialised)
    names = list(config.served_names) or [default_name(config.base_model)]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special_tokens = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if template and (fault := template_sandbox.fault_of(template, special_tokens)):
        raise LoadError(f"{config.base_model}: its chat template cannot be used: {' '.join(fault.split())[:300]}")
    embedding = model.get_input_embeddings().weight
    fields: dict[str, Any] = {
        "id": names[0],
        "names": list(dict.fromkeys([*names, ALIAS])),
        "tokenizer_path": str(tokenizer_path),
        "add_bos_token": _adds_bos(tokenizer),
        "chat_template": template,
        "special_tokens": special_tokens,
        "stop_token_ids": stop_token_ids(loaded),
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": embedding.shape[0],
        "hidden_size": model.config.get_text_config().hidden_size,
        "max_model_len": max_model_len,
        "created": 0,
        "dtype": config.quantization or ("gguf" if loaded.codes else str(loaded.dtype).removeprefix("torch.")),
        "device": config.device,
        "adapters": list(config.adapters),
        "response_template": _response_template(tokenizer),
        "sampling_defaults": {
            k: v for k in _GENERATION_FIELDS if (v := getattr(loaded.generation, k, None)) is not None
        },
    }
    # One digest for the same model whenever it is loaded; the time of creation is no part of it.
    digest = hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:16]
    path = directory / f"card-{digest}.json"
    if not path.exists():
        fields["created"] = int(time.time())
        _write_as(path, msgspec.json.encode(msgspec.convert(fields, ModelCard)))
    return path


def default_name(base_model: str) -> str:
    """Return the name under which a model is served unless told otherwise: its file's or directory's base name."""
    path = Path(base_model)
    return path.stem if path.suffix == ".gguf" else path.name


def stop_token_ids(loaded: LoadedModel) -> list[int]:
    """Return every id that ends a turn: the model's eos ids, the tokenizer's, and the template's end of turn."""
    found: list[int | None] = []
    eos = loaded.generation.eos_token_id
    found += eos if isinstance(eos, list) else [eos]
    found.append(loaded.tokenizer.eos_token_id)
    found.append(_template_end(loaded.tokenizer))
    found += [i for i, token in loaded.tokenizer.added_tokens_decoder.items() if token.content in _TURN_ENDS]
    return sorted({i for i in found if i is not None})


def _template_end(tokenizer: Any) -> int | None:
    """Return the special token that the chat template puts right behind an assistant's words, if it does so."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        return None
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _MARK}]
    try:
        values = {**tokenizer.special_tokens_map, "messages": messages, "add_generation_prompt": False}
        text = template_sandbox.Template(source).render({**values, "tools": None, "documents": None}, _RENDER_SECONDS)
    except Exception:
        return None
    tail = text.rpartition(_MARK)[2].lstrip()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special and tail.startswith(token.content):
            return int(token_id)
    return None


def _response_template(tokenizer: Any) -> dict[str, Any] | None:
    """Return what the tokenizer declares of the model's replies; None for nothing, or what is no JSON object."""
    declared = getattr(tokenizer, "response_template", None)
    try:
        return declared if isinstance(declared, dict) and msgspec.json.encode(declared) else None
    except TypeError:
        return None


def _adds_bos(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _write(directory: Path, stem: str, content: bytes) -> Path:
    path = directory / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.json"
    if not path.exists():
        _write_as(path, content)
    return path


def _write_as(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
