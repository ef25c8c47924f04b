"""The servers that are compared: how each is started for the same model, and what it can be asked."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import config
from benchmarks.peers import LLAMA, TRANSFORMERS, VLLM, WEIGHTS, Place
from benchmarks.peers.dequantize import embedded_gguf

CONCURRENCY = (1, 4, 8, 16, 32)
SCENARIOS = ("prompts", "throughput", "rate", "gaps")

# All may work for 32 streams at once, each long enough for the longest prompt here and its answer.
_STREAMS = 32
_TOKENS_PER_STREAM = 2048
_VLLM_KV_CACHE_GIB = 4


@dataclass(frozen=True)
class Server:
    """One way of serving the model.

    ``command`` holds {port} where the port goes. ``fields`` are added to each request. A ``slow`` server is measured in
    one round only, with the concurrency and scenarios that fit into its time.
    """

    name: str
    title: str
    version: str | None
    how_to_install: str
    command: list[str]
    model: str | None
    ready_path: str = "/health"
    environment: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    concurrency: tuple[int, ...] = CONCURRENCY
    scenarios: tuple[str, ...] = SCENARIOS
    slow: bool = False


def tailrace() -> Server:
    return Server(
        name="tailrace",
        title="Tailrace",
        version=config.__version__,
        how_to_install="make serve",
        command=[sys.executable, "-m", "app", "--port", "{port}", "--only_cpu"],
        # As on a machine without a configuration file.
        environment={"TAILRACE_CONFIG": os.devnull},
        ready_path="/readyz",
        model=None,
        fields={"ignore_eos": True},
    )


def llama_server() -> Server:
    context = str(_STREAMS * _TOKENS_PER_STREAM)
    return Server(
        name="llama-server",
        title="llama-server, Q4_1",
        version=LLAMA.version,
        how_to_install="make peers ARGS=llama-server",
        command=[
            str(LLAMA.executable("llama-server")), "-m", str(embedded_gguf()), "--port", "{port}",
            "-np", str(_STREAMS), "-c", context,
        ],
        model=None,
        fields={"ignore_eos": True},
    )  # fmt: skip


def vllm(*, all_cores: bool) -> Server:
    """vLLM as it comes keeps a core free of model threads; with ``all_cores`` it is told not to."""
    environment = _offline() | {"VLLM_CPU_KVCACHE_SPACE": str(_VLLM_KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1"}
    if all_cores:
        environment["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return Server(
        name="vllm-all-cores" if all_cores else "vllm",
        title="vLLM, bf16, all cores" if all_cores else "vLLM, bf16",
        version=_with_weights(VLLM),
        how_to_install="make peers ARGS='weights vllm'",
        command=[
            str(VLLM.executable("vllm")), "serve", str(WEIGHTS.path), "--dtype", "bfloat16", "--port", "{port}",
            "--enable-prefix-caching",
        ],
        environment=environment,
        model=str(WEIGHTS.path),
        fields={"ignore_eos": True},
        # On two cores its defaults leave half of them idle: one round is enough to show it.
        slow=not all_cores,
    )  # fmt: skip


def transformers_serve(*, batching: bool) -> Server:
    return Server(
        name="transformers-batching" if batching else "transformers",
        title="transformers serve, bf16" + (", continuous batching" if batching else ""),
        version=_with_weights(TRANSFORMERS),
        how_to_install="make peers ARGS='weights transformers'",
        command=[
            str(TRANSFORMERS.executable("transformers")), "serve", str(WEIGHTS.path), "--device", "cpu",
            "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "{port}",
            *(["--continuous-batching"] if batching else []),
        ],
        environment=_offline(),
        model=str(WEIGHTS.path),
        concurrency=(1, 8, 32) if batching else (1, 8),
        scenarios=("prompts", "throughput"),
        slow=True,
    )  # fmt: skip


def all_servers() -> list[Server]:
    """Return every server that the suite knows, ours first, installed or not."""
    return [
        tailrace(),
        llama_server(),
        vllm(all_cores=False),
        vllm(all_cores=True),
        transformers_serve(batching=False),
        transformers_serve(batching=True),
    ]


def _offline() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def _with_weights(place: Place) -> str | None:
    """A peer that reads safetensors is there when the weights are too."""
    return place.version if WEIGHTS.version else None


def tokenizer_file() -> Path:
    """Return the tokenizer.json of the benchmarked model, made by ``python -m benchmarks.peers weights``."""
    return WEIGHTS.path / "tokenizer.json"
