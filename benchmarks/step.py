"""Where the time of one step of the engine goes: ``python -m benchmarks.step``.

Builds the engine as a model worker does, keeps a number of greedy requests decoding, and prints for each number of rows
how long a step takes and what it is made of: choosing and laying out the batch, each part of the model, choosing and
reporting the tokens. Medians over the steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.settings import Settings
from workers import wire
from workers.config import WorkerConfig
from workers.engine import recovery, sampler
from workers.engine.build import build
from workers.engine.engine import Engine
from workers.engine.loader import load
from workers.engine.native.step import NativeStep
from workers.messages import Cancel, Events, GenerateJob, Output, SamplingParams

ROWS = (1, 4, 8, 16, 32)
CONTEXT = 256
STEPS = 40
WARM_UP = 5
# Enough that no request ends while the prompts of the others are still read.
MOST_TOKENS = 2000


class Timers:
    """Seconds spent inside wrapped functions since the last `take`."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Count the time in ``owner.name`` under ``label``."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._spent[label] = self._spent.get(label, 0.0) + time.perf_counter() - begun

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        spent, self._spent = self._spent, {}
        return spent


def jobs(rows: int, vocabulary: int) -> list[GenerateJob]:
    """Return greedy jobs that decode through the whole measurement, each with a prompt of its own."""
    random = np.random.default_rng(rows)
    return [
        GenerateJob(
            id=f"{rows}-{n}",
            prompt=random.integers(0, vocabulary, CONTEXT).tolist(),
            max_tokens=MOST_TOKENS,
            sampling=SamplingParams(temperature=0),
        )
        for n in range(rows)
    ]


def measure(engine: Engine, timers: Timers, rows: int) -> dict[str, float]:
    """Return the median seconds of a step with ``rows`` decoding rows and of its parts; ``share``: of what is not the
    model in the step.
    """
    for order in jobs(rows, engine.vocab_size):
        engine.submit(order)
    while any(sequence.pending > 1 for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    model = engine.model_step
    steps: list[dict[str, float]] = []
    for n in range(STEPS + WARM_UP):
        before = model.phase_seconds() if isinstance(model, NativeStep) else {}
        timers.take()
        begun = time.perf_counter()
        reports = engine.step()
        wire.encode(Events(events=[r for r in reports if isinstance(r, Output)]))
        whole = time.perf_counter() - begun
        spent = timers.take()
        parts = {"step": whole, "schedule": spent["schedule"] + spent["flatten"]}
        if before and isinstance(model, NativeStep):
            after = model.phase_seconds()
            parts |= {phase: after[phase] - before[phase] for phase in after}
            parts["call"] = spent["model"] - sum(after[phase] - before[phase] for phase in after)
        else:
            parts["model"] = spent["model"]
        parts["sample"] = spent["sample"]
        parts["emit"] = whole - spent["schedule"] - spent["flatten"] - spent["model"] - spent["sample"]
        outside = sum(parts.get(name, 0.0) for name in ("schedule", "call", "sample", "emit"))
        parts["share"] = outside / whole
        if n >= WARM_UP:
            steps.append(parts)
    for n in range(rows):
        engine.submit(Cancel(id=f"{rows}-{n}"))
    return {name: statistics.median(s[name] for s in steps) for name in steps[0]}


def table(results: dict[int, dict[str, float]]) -> str:
    """Return the figures as Markdown: a row for each part, a column for each number of rows."""
    names = list(next(iter(results.values())))
    lines = ["| ms | " + " | ".join(f"{rows} rows" for rows in results) + " |", "|---" * (len(results) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{r[name] * 1e3:.2f}" for r in results.values()) + " |" for name in names[:-1]
    ]
    lines.append("| not the model | " + " | ".join(f"{r['share']:.1%}" for r in results.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    settings = Settings()
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__)
    parser.add_argument("--base_model", default=settings.base_model)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu_kernels", default="auto")
    parser.add_argument("--cpu_threads", type=int, default=0)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    options = parser.parse_args()
    if options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    with tempfile.TemporaryDirectory() as runtime_dir:
        config = WorkerConfig(
            base_model=options.base_model,
            dtype=options.dtype,
            cpu_kernels=options.cpu_kernels,
            max_batch=max(options.rows),
            runtime_dir=runtime_dir,
            cache_dir=str(Path(settings.cache_dir)),
        )
        engine = build(load(config, lambda _progress, _stage: None), config)
    timers = Timers()
    timers.wrap(engine.scheduler, "schedule", "schedule")
    timers.wrap(recovery, "flatten", "flatten")
    timers.wrap(engine.model_step, "compute", "model")
    timers.wrap(sampler, "next_tokens", "sample")
    print(f"{type(engine.model_step).__name__}, {torch.get_num_threads()} threads, context {CONTEXT}, greedy")
    print(table({rows: measure(engine, timers, rows) for rows in options.rows}))


if __name__ == "__main__":
    main()
