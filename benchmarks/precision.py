"""What the number formats of the CPU cost in accuracy: ``python -m benchmarks.precision [--base_model GGUF_OR_DIR]``.

For each format: the logits of the same texts, beside those of transformers in float32 on the same (dequantised)
weights. The texts are chat prompts with the answers that the float32 model gives to them, so every position is one that
the model comes to in service. Run by ``make fidelity`` after the table of exact modes.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity import embedded_model, prompts_of
from config.settings import Settings
from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.engine import Engine
from workers.engine.flat_batch import flatten
from workers.engine.kv_cache import BlockPool
from workers.engine.loader import load
from workers.engine.scheduler import Scheduled
from workers.engine.sequence import Sequence
from workers.messages import GenerateJob

ANSWER_TOKENS = 64
# (name, what a model worker is told)
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("float32, compiled", {"dtype": "float32", "cpu_kernels": "compiled"}),
    ("float32, torch", {"dtype": "float32", "cpu_kernels": "torch"}),
    ("bfloat16, compiled", {"dtype": "bfloat16", "cpu_kernels": "compiled"}),
    ("bfloat16, torch", {"dtype": "bfloat16", "cpu_kernels": "torch"}),
    ("the GGUF's own, compiled", {"dtype": "auto", "cpu_kernels": "compiled"}),
]


@dataclass(frozen=True)
class Error:
    """How far logits are from the reference's.

    ``relative``: root mean square of the difference over the standard deviation of the reference's logits, median and
    worst position. ``divergence``: Kullback-Leibler, nats, mean over the positions. ``agreement``: share of positions
    with the same likeliest token.
    """

    positions: int
    relative: float
    worst: float
    divergence: float
    agreement: float


def compare(reference: torch.Tensor, logits: torch.Tensor) -> Error:
    """Compare ``[positions, vocab]`` with ``[positions, vocab]``."""
    relative = (logits - reference).square().mean(dim=-1).sqrt() / reference.std(dim=-1)
    expected, found = reference.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    same = reference.argmax(dim=-1) == logits.argmax(dim=-1)
    return Error(
        positions=len(reference),
        relative=float(relative.median()),
        worst=float(relative.max()),
        divergence=float(divergence.mean()),
        agreement=float(same.float().mean()),
    )


def logits_of(engine: Engine, ids: list[int]) -> torch.Tensor:
    """Return the logits behind every token of a text, computed as the prompt of a request that wants its scores."""
    cache = engine.model_step.cache
    pool = BlockPool(len(cache.keys[0]), cache.block_size)
    job = GenerateJob(id="precision", prompt=ids, max_tokens=1, prompt_logprobs=0)
    sequence = Sequence(job, 0, ids, len(ids) + 1)
    copies = sequence.reserve(len(ids), pool)
    return engine.model_step.compute(flatten([Scheduled(sequence, len(ids), copies)])).logits.clone()


def measure(base_model: str) -> Iterator[tuple[str, Error | str]]:
    """Yield each format with its error, or with the reason why it is not there."""
    with tempfile.TemporaryDirectory() as scratch:
        shared: dict[str, Any] = {
            "base_model": base_model,
            "runtime_dir": scratch,
            "cache_dir": str(Settings().cache_dir),
        }
        loaded = load(WorkerConfig(**shared, dtype="float32"), lambda _p, _s: None)
        texts, expected = [], []
        for prompt in prompts_of(loaded.tokenizer):
            ids = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=ANSWER_TOKENS, do_sample=False)
            with torch.inference_mode():
                expected.append(loaded.model(ids).logits[0])
            texts.append(ids[0].tolist())
        reference = torch.cat(expected)
        for name, options in FORMATS:
            if options["dtype"] == "auto" and not Path(base_model).is_file():
                yield name, "the model is no GGUF file"
                continue
            config = WorkerConfig(**shared, **options)
            engine = build(load(config, lambda _p, _s: None), config)
            yield name, compare(reference, torch.cat([logits_of(engine, ids) for ids in texts]))


def line(name: str, error: Error | str) -> str:
    """Return a line of the table."""
    if isinstance(error, str):
        return f"| {name} | {error} | | | |"
    return (
        f"| {name} | {error.relative:.1e} | {error.worst:.1e} | {error.divergence:.1e} | "
        f"{error.agreement:.2%} of {error.positions} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default=embedded_model())
    options = parser.parse_args()
    print("| format | error, median | worst position | divergence (nats) | same likeliest token |")
    print("|---|---|---|---|---|")
    for name, error in measure(options.base_model):
        print(line(name, error), flush=True)


if __name__ == "__main__":
    main()
