"""Loads model and tokenizer as the configuration says: safetensors or GGUF, LoRA, quantisation.

Everything goes through transformers and peft with remote code off and safetensors only. What cannot be served ends in
`LoadError` with one line for the operator.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    modeling_gguf_pytorch_utils,
)

from config import logs
from workers.config import WorkerConfig
from workers.engine import gguf_codes
from workers.engine.errors import LoadError
from workers.engine.lora import ActiveAdapters, install
from workers.engine.native import library
from workers.engine.native.step import FAMILIES
from workers.engine.native.weights import Codes

log = logs.logger(__name__)

Progress = Callable[[float, str], None]

# A GGUF file is unpacked to float32 once and kept, when that takes no more disk than this (bytes).
UNPACKED_LIMIT = 4 * 1024**3
CODES_NAME = "codes.st"
# To be changed with what an unpacked model consists of.
UNPACKED_FORM = 2
SEED_OF_NEW_ROWS = 0
PROCESSORS = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class LoadedModel:
    """``model`` is a causal LM in eval mode on its device; ``tokenizer`` a transformers tokenizer with a fast
    backend.

    ``dtype`` is what it is to be served in. ``codes`` are the quantised weights of the file by parameter name, if the
    file's own format is wanted; ``model`` then holds the same weights as float32.
    """

    model: Any
    tokenizer: Any
    generation: GenerationConfig
    dtype: torch.dtype
    device: torch.device
    adapters: ActiveAdapters | None = None
    codes: dict[str, Codes] = field(default_factory=dict)

    def release_weights(self) -> None:
        """Give the weights' memory back, for an engine that has its own copy; their shapes stay known."""
        self.model.to("meta")
        self.codes.clear()
        with contextlib.suppress(OSError, AttributeError):
            # glibc keeps what was freed for itself otherwise.
            ctypes.CDLL(None).malloc_trim(0)


def load(config: WorkerConfig, progress: Progress) -> LoadedModel:
    """Load what ``config`` names; ``progress`` (0..1, stage) is called from this thread as the work goes on."""
    transformers.utils.logging.set_verbosity_error()
    # It warns about a cast in every product of every step.
    logs.logger("bitsandbytes").setLevel(logging.ERROR)
    progress = _growing(progress)
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(f"no usable CUDA device for --gpus {config.visible_devices}")
    progress(0.05, "reading the tokenizer")
    own_format = _wants_own_format(config, device)
    base, options = _source(config, progress)
    model: Any
    with _readable_errors(config.base_model):
        compiled = device.type == "cpu" and _for_compiled_kernels(config, base, options)
    dtype = choose_dtype(config.dtype, device, compiled=compiled)
    with _readable_errors(config.base_model), _weights_progress(progress, 0.2, 0.8, "loading weights"):
        tokenizer = _load_tokenizer(config, base, options)
        progress(0.2, "loading weights")
        model = AutoModelForCausalLM.from_pretrained(
            base,
            # The unpacked weights of a GGUF are float32 already; of one that is not unpacked they would be too large.
            dtype=torch.float32 if own_format and not options else dtype,
            trust_remote_code=False,
            use_safetensors=None if "gguf_file" in options else True,
            **_quantization(config, dtype, device),
            **options,
        )
        codes = _codes(Path(config.base_model), Path(base), model) if own_format else {}
    _fit_vocabulary(model, tokenizer)
    if config.lora_model:
        progress(0.85, "applying the LoRA adapter")
        model = _apply_lora(model, config, dtype)
    adapters = None
    if config.adapters:
        progress(0.87, "loading LoRA adapters")
        with _readable_errors(", ".join(f"{n}={d}" for n, d in config.adapters.items()), flag="--lora_model"):
            model, adapters = install(model, config.adapters, dtype)
    if not config.quantization:
        model = model.to(device)
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, model.generation_config, dtype, device, adapters, codes)


def _wants_own_format(config: WorkerConfig, device: torch.device) -> bool:
    """Whether the weights are to be served as the GGUF file has them: on the CPU, with nothing said or done to them."""
    return (
        Path(config.base_model).is_file()
        and device.type == "cpu"
        and config.dtype == "auto"
        and config.cpu_kernels != "torch"
        and not (config.quantization or config.lora_model)
    )


def _codes(gguf: Path, directory: Path, model: Any) -> dict[str, Codes]:
    """Return the file's quantised weights, from ``directory`` where the unpacked model was kept with them."""
    kept = directory / CODES_NAME
    return gguf_codes.restore(kept) if kept.exists() else gguf_codes.read_codes(gguf, model)


def _growing(progress: Progress) -> Progress:
    """Return ``progress`` without steps back: several parts of the work count from their own zero."""
    best = 0.0

    def report(value: float, stage: str) -> None:
        nonlocal best
        best = max(best, value)
        progress(best, stage)

    return report


def choose_dtype(name: str, device: torch.device, *, compiled: bool) -> torch.dtype:
    """Return the dtype of the weights.

    "auto" is bfloat16 on the CPU for the ``compiled`` kernels, which widen it where the hardware does not multiply it:
    half the memory to read. torch's own code needs the hardware for that, and takes float32 without. On a GPU, float16
    stands in where there is no bfloat16.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    text = PROCESSORS.read_text() if PROCESSORS.exists() else ""
    return torch.bfloat16 if compiled or "avx512_bf16" in text or "amx_bf16" in text else torch.float32


def _for_compiled_kernels(config: WorkerConfig, base: str, options: dict[str, Any]) -> bool:
    """Whether the model is one that the compiled CPU kernels will most likely compute, told from its configuration."""
    if config.cpu_kernels == "torch" or config.quantization or library.find_compiler() is None:
        return False
    families = AutoConfig.from_pretrained(base, trust_remote_code=False, **options).architectures or []
    return any(family in FAMILIES for family in families)


def _source(config: WorkerConfig, progress: Progress) -> tuple[str, dict[str, Any]]:
    """Return what to give to ``from_pretrained``: a path or hub id, and options."""
    path = Path(config.base_model)
    if not path.is_file():
        return config.base_model, {}
    unpacked = _unpacked_gguf(path, Path(config.cache_dir), progress)
    if unpacked is not None:
        return str(unpacked), {}
    return str(path.parent), {"gguf_file": path.name}


def _unpacked_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path | None:
    """Return a safetensors directory with the exact weights of the GGUF file, made now or at an earlier start.

    Beside them lie the file's own codes (`CODES_NAME`).

    Reading a GGUF through transformers costs many seconds at each start, most of them in parsing its metadata. None
    when the file is too large to keep unpacked, or the cache directory cannot be written.
    """
    stat = path.stat()
    name = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{transformers.__version__}|{UNPACKED_FORM}"
    target = cache_dir / f"{path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    if (target / "config.json").exists():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        stage = "unpacking the GGUF file (once)"
        progress(0.06, stage)
        with _readable_errors(str(path)), _weights_progress(progress, 0.06, 0.19, stage):
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32
            )
            if sum(p.numel() for p in model.parameters()) * 4 > UNPACKED_LIMIT:
                return None
            # The copy holds plain float32 weights: nothing about it is GGUF any more.
            del model.config.quantization_config
            model.hf_quantizer = None
            gguf_codes.save(gguf_codes.read_codes(path, model), partial / CODES_NAME)
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)
        partial.rename(target)
    except OSError as error:
        if (target / "config.json").exists():
            return target
        log.warning("cannot keep the unpacked model", directory=str(cache_dir), reason=str(error))
        return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _load_tokenizer(config: WorkerConfig, base: str, options: dict[str, Any]) -> Any:
    """``--tokenizer_path``, else the LoRA's directory when it holds a tokenizer, else the base model."""
    if config.tokenizer_path:
        source, options = config.tokenizer_path, {}
    elif config.lora_model and has_tokenizer(Path(config.lora_model)):
        source, options = config.lora_model, {}
    else:
        source = base
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise LoadError(f"the tokenizer in {source} has no fast (tokenizers) form")
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    return any((directory / n).exists() for n in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _quantization(config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if config.quantization is None:
        return {}
    quantization = BitsAndBytesConfig(
        load_in_8bit=config.quantization == "8bit",
        load_in_4bit=config.quantization == "4bit",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _fit_vocabulary(model: Any, tokenizer: Any) -> None:
    """Give the embedding matrix a row for every token, as the demo does; the new rows are the same at every start."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        log.warning("the embedding matrix was resized to the tokenizer", tokens=len(tokenizer), rows=rows)
        torch.manual_seed(SEED_OF_NEW_ROWS)
        model.resize_token_embeddings(len(tokenizer))


def _apply_lora(model: Any, config: WorkerConfig, dtype: torch.dtype) -> Any:
    """Merge the adapter into the weights; beside quantised weights it stays apart, which is exact."""
    # Costs 140 MB and seconds of start: for those who have adapters.
    from peft import PeftModel

    assert config.lora_model
    with _readable_errors(config.lora_model, flag="--lora_model"):
        adapted = PeftModel.from_pretrained(model, config.lora_model, torch_dtype=dtype)
        if config.quantization:
            return adapted.get_base_model()
        return adapted.merge_and_unload()


@contextlib.contextmanager
def _readable_errors(source: str, flag: str = "--base_model") -> Iterator[None]:
    """Turn whatever a library raises while loading into one line that names the flag."""
    try:
        yield
    except (LoadError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        text = " ".join(str(error).split()) or type(error).__name__
        raise LoadError(f"{flag} {source} cannot be loaded: {text[:500]}") from error


@contextlib.contextmanager
def _weights_progress(progress: Progress, start: float, end: float, stage: str) -> Iterator[None]:
    """Report transformers' own progress through the weights as ``start``..``end`` of the whole, instead of its bars."""

    class Bar(transformers.utils.logging.EmptyTqdm):  # type: ignore[misc]
        def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            super().__init__(*args, **kwargs)
            self._items: Any = args[0] if args else kwargs.get("iterable")
            sized: Any = self._items if hasattr(self._items, "__len__") else ()
            self._total: int = kwargs.get("total") or len(sized)
            self._done = 0

        def __iter__(self) -> Iterator[Any]:
            for item in self._items or ():
                yield item
                self.update()

        def update(self, count: int = 1) -> None:
            self._done += count
            if self._total:
                progress(start + (end - start) * min(1.0, self._done / self._total), stage)

    previous = transformers.utils.logging.set_tqdm_hook(lambda _factory, args, kwargs: Bar(args, kwargs))
    # The GGUF reader asks tqdm itself, past the hook.
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = lambda *args, **kwargs: Bar(args, kwargs)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers.utils.logging.set_tqdm_hook(previous)
