"""Tailrace's engine on a GPU beside transformers' own continuous batching: `make bench-gpu`.

A Llama-3-8B with random weights is made on the device, so nothing is downloaded. For each number of streams all prompts
arrive at once. Decode figures are of the time in which every stream decodes: from the moment when the last of them has
its first token until the first of them has its last. ``--tiny`` runs the same on the CPU with a model of no size.
"""

import argparse
import gc
import importlib.util
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from benchmarks import machine
from benchmarks.peers import ROOT
from benchmarks.results import Machine
from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.cuda_graphs import GraphedStep
from workers.engine.engine import Engine
from workers.engine.loader import LoadedModel
from workers.messages import Failed, GenerateJob, Output, SamplingParams

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

# Of transformers on the CPU, where it would take most of the memory for its cache: blocks, tokens of a pass.
CPU_BLOCKS = 16
CPU_PASS = 256

# One run: for each stream its prompt -> for each stream the moments (seconds) of its tokens.
Run = Callable[[list[list[int]], int], list[list[float]]]


class Load(msgspec.Struct, frozen=True):
    """Streams side by side, each of ``prompt`` and ``answer`` tokens."""

    streams: int
    prompt: int
    answer: int


class Figures(msgspec.Struct, frozen=True):
    """Of one load: tokens per second while all decode and over all, seconds of a step and to the last first token.

    ``bandwidth_share``: bytes that a step must read (weights, keys, values) over what a copy moves in the same time.
    """

    server: str
    load: Load
    decode_tokens_per_s: float = 0.0
    tokens_per_s: float = 0.0
    step_s: float = 0.0
    first_token_s: float = 0.0
    bandwidth_share: float = 0.0
    error: str | None = None


class GpuResults(msgspec.Struct):
    """What a run of this benchmark measured. ``shape``: of the model; bytes and bytes per second."""

    commit: str
    machine: Machine
    device: str
    versions: dict[str, str]
    shape: dict[str, float]
    dtype: str
    flash_attention: bool
    weight_bytes: int
    kv_bytes_per_token: int
    copy_bytes_per_s: float
    rows: list[Figures]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table and write its JSON. Returns the exit status."""
    options = _options(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("bench-gpu: no CUDA device here; --tiny runs the same on the CPU with a tiny model", file=sys.stderr)
        return 2
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    loads = [Load(streams, options.prompt, options.answer) for streams in options.streams]
    results = measure(options, device, loads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    print(f"\n{table(results)}\nwritten to {options.out}")
    return 0


def measure(options: argparse.Namespace, device: torch.device, loads: list[Load]) -> GpuResults:
    """Measure every server under every load."""
    shape: dict[str, Any] = dict(TINY if options.tiny else LLAMA_3_8B)
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = random_model(shape, dtype, device)
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    results = GpuResults(
        commit=machine.commit(),
        machine=machine.machine(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=machine.versions(),
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        flash_attention=flash,
        weight_bytes=weight_bytes(model),
        kv_bytes_per_token=kv_bytes_per_token(shape, dtype),
        copy_bytes_per_s=copy_bandwidth(device, 1 << (24 if device.type == "cpu" else 30)),
        rows=[],
    )
    # First transformers: the engine puts an attention of its own into the model.
    for load in loads:
        results.rows.append(_row("transformers generate_batch", load, results, _transformers(model)))
        model.destroy_cached_continuous_batching_manager()
        _free_memory(device)
    engine = engine_of(model, dtype, device, loads, flash, options.prefill_chunk)
    steps = {"tailrace": engine.model_step}
    if isinstance(engine.model_step, GraphedStep):
        steps["tailrace, no graphs"] = engine.model_step.eager
    for name, step in steps.items():
        engine.model_step = step
        results.rows += [_row(name, load, results, _tailrace(engine)) for load in loads]
    return results


def random_model(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a Llama of this shape with random weights, made on the device."""
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    # No token ends an answer: all are as long as asked for.
    model.generation_config = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False)
    return model.eval()


def weight_bytes(model: Any) -> int:
    """Return the bytes of weights that a decode step reads: all but the embeddings, of which it reads a few rows."""
    whole = sum(p.nbytes for p in model.parameters())
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return int(whole if embeddings is head else whole - embeddings.nbytes)


def kv_bytes_per_token(shape: dict[str, Any], dtype: torch.dtype) -> int:
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * dtype.itemsize)


def copy_bandwidth(device: torch.device, size: int, repeats: int = 10) -> float:
    """Return the bytes per second that a copy of ``size`` bytes on the device reads and writes, the best of some."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size / best


def engine_of(
    model: Any, dtype: torch.dtype, device: torch.device, loads: list[Load], flash: bool, prefill_chunk: int
) -> Engine:
    """Return Tailrace's engine over ``model``, as a model worker would build it."""
    with tempfile.TemporaryDirectory() as directory:
        config = WorkerConfig(
            base_model="random",
            device=str(device),
            flash_attention=flash,
            max_model_len=max(load.prompt + load.answer for load in loads),
            max_batch=max(load.streams for load in loads),
            prefill_chunk=prefill_chunk,
            cpu_kernels="torch",
            runtime_dir=directory,
            cache_dir=directory,
        )
        return build(LoadedModel(model, None, model.generation_config, dtype, device), config)


def _tailrace(engine: Engine) -> Run:
    def run(prompts: list[list[int]], answer: int) -> list[list[float]]:
        times: dict[str, list[float]] = {}
        for n, prompt in enumerate(prompts):
            times[str(n)] = []
            sampling = SamplingParams(temperature=0)
            for report in engine.submit(GenerateJob(id=str(n), prompt=prompt, max_tokens=answer, sampling=sampling)):
                raise RuntimeError(str(report))
        while engine.has_work:
            reports = engine.step()
            now = time.perf_counter()
            for report in reports:
                if isinstance(report, Failed):
                    raise RuntimeError(report.message)
                if isinstance(report, Output):
                    times[report.id] += [now] * len(report.ids)
        return list(times.values())

    return run


def _transformers(model: Any) -> Run:
    on_gpu = model.device.type == "cuda"
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)

    def run(prompts: list[list[int]], answer: int) -> list[list[float]]:
        outputs = model.generate_batch(
            inputs=prompts,
            max_new_tokens=answer,
            record_timestamps=True,
            # None: its own choices.
            continuous_batching_config=None
            if on_gpu
            else ContinuousBatchingConfig(num_blocks=CPU_BLOCKS, max_batch_tokens=CPU_PASS),
            progress_bar=False,
            # The second run finds the graphs of the first.
            persistent_manager=True,
        )
        if len(outputs) < len(prompts):
            raise RuntimeError(f"{len(prompts) - len(outputs)} of {len(prompts)} requests did not finish")
        return [output.timestamps for output in outputs.values()]

    return run


def _row(server: str, load: Load, results: GpuResults, run: Run) -> Figures:
    """Run a load twice, the first time to warm up, and return the second's figures; the failure where it fails."""
    try:
        run(random_prompts(load, results, seed=1), load.answer)
        prompts = random_prompts(load, results, seed=2)
        begun = time.perf_counter()
        row = figures(server, load, begun, run(prompts, load.answer), results)
        print(f"{server}, {load.streams} streams: {row.decode_tokens_per_s:.0f} tokens/s in decode", flush=True)
    except Exception as error:
        row = Figures(server, load, error=f"{type(error).__name__}: {error}")
        print(f"{server}, {load.streams} streams: {row.error}", flush=True)
    return row


def random_prompts(load: Load, results: GpuResults, seed: int) -> list[list[int]]:
    """Return a prompt for each stream; no two seeds share a prefix that a cache could hold."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(results.shape["vocab_size"])
    return torch.randint(3, vocabulary, (load.streams, load.prompt), generator=generator).tolist()


def figures(server: str, load: Load, begun: float, times: list[list[float]], results: GpuResults) -> Figures:
    """Return the figures of a run that began at ``begun`` (seconds, as the ``times`` of each stream's tokens)."""
    opened, closed = max(each[0] for each in times), min(each[-1] for each in times)
    inside = sum(opened < moment <= closed for each in times for moment in each)
    if not inside:
        raise RuntimeError("at no time did all streams decode: the answers are too short")
    steps = inside / load.streams
    step_s = (closed - opened) / steps
    context = load.prompt + load.answer - steps / 2
    read = results.weight_bytes + load.streams * context * results.kv_bytes_per_token
    return Figures(
        server=server,
        load=load,
        decode_tokens_per_s=inside / (closed - opened),
        tokens_per_s=sum(map(len, times)) / (max(each[-1] for each in times) - begun),
        step_s=step_s,
        first_token_s=opened - begun,
        bandwidth_share=read / step_s / results.copy_bytes_per_s,
    )


def table(results: GpuResults) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{results.device}, {results.dtype}, {results.shape['num_hidden_layers']} layers, "
        f"{'flash-attn' if results.flash_attention else 'SDPA'}, copy {results.copy_bytes_per_s / 1e9:.0f} GB/s",
        "",
        "| server | streams | decode tokens/s | all tokens/s | step ms | last first token s | share of bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results.rows, key=lambda r: r.load.streams):
        cells = (
            f"{row.error} | | | |"
            if row.error
            else f"{row.decode_tokens_per_s:.0f} | {row.tokens_per_s:.0f} | {row.step_s * 1e3:.2f} | "
            f"{row.first_token_s:.2f} | {row.bandwidth_share:.0%}"
        )
        lines.append(f"| {row.server} | {row.load.streams} | {cells} |")
    return "\n".join(lines) + "\n"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a model of no size; runs without a GPU")
    parser.add_argument("--streams", type=int, nargs="+", help="1 8 64 256; with --tiny 1 3")
    parser.add_argument("--prompt", type=int, help="tokens of each prompt: 128; with --tiny 12")
    parser.add_argument("--answer", type=int, help="tokens of each answer: 256; with --tiny 16")
    parser.add_argument("--layers", type=int, help="fewer layers, for a card that cannot hold 32")
    parser.add_argument("--prefill_chunk", type=int, default=2048, help="most prompt tokens beside running streams")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.streams = options.streams or ([1, 3] if options.tiny else [1, 8, 64, 256])
    options.prompt = options.prompt or (12 if options.tiny else 128)
    options.answer = options.answer or (16 if options.tiny else 256)
    return options


if __name__ == "__main__":
    sys.exit(main())
