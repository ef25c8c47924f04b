"""The real engine with faults: what `workers.engine.worker.run` does, but passes may be slow, fail, or kill.

``RIG_STEP_S`` (seconds) is added to each pass, so that streams of a tiny model last long enough to be disturbed. A job
asks for its own fault by its seed, see below; the file ``memory`` in the runtime directory holds the most tokens that a
pass may have before it is out of memory.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from workers.config import WorkerConfig
from workers.engine import worker
from workers.engine.engine import Engine
from workers.engine.flat_batch import Computed, FlatBatch, Step
from workers.engine.sequence import Sequence as Row
from workers.messages import GenerateJob

# Seeds. The fault comes with the sequence's output token `AT`; whatever ends the process comes only once.
RAISE, MEMORY, SEGV, STICKY, KILL = range(66_001, 66_006)
AT = 5


class FaultyStep:
    """A `Step` that computes what ``step`` does, unless something is to go wrong."""

    def __init__(self, step: Step, folder: Path, seconds: float) -> None:
        self.step = step
        self.cache = step.cache
        self._folder = folder
        self._seconds = seconds

    def compute(self, batch: FlatBatch) -> Computed:
        """Compute the tokens of ``batch``, or fail."""
        if self._seconds:
            time.sleep(self._seconds)
        for item in batch.items:
            job = item.sequence.job
            if isinstance(job, GenerateJob) and job.sampling.seed in FAULTS and item.sequence.output_length >= AT:
                FAULTS[job.sampling.seed](self._folder)
        limit = self._folder / "memory"
        if limit.exists() and batch.tokens > int(limit.read_text() or 0):
            _memory(self._folder)
        return self.step.compute(batch)

    def sample(self, scores: torch.Tensor, sequences: Sequence[Row]) -> torch.Tensor:
        """Return the next token of each row."""
        return self.step.sample(scores, sequences)


def _raise(folder: Path) -> None:
    _note(folder, RAISE)
    raise ValueError("raised as told")


def _memory(folder: Path) -> None:
    _note(folder, MEMORY)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate as told")


def _sticky(folder: Path) -> None:
    if _first(folder, STICKY):
        raise RuntimeError("CUDA error: device-side assert triggered")


def _dies_of(seed: int, number: signal.Signals) -> Callable[[Path], None]:
    def die(folder: Path) -> None:
        if _first(folder, seed):
            os.kill(os.getpid(), number)

    return die


FAULTS: dict[int, Callable[[Path], None]] = {
    RAISE: _raise,
    MEMORY: _memory,
    SEGV: _dies_of(SEGV, signal.SIGSEGV),
    STICKY: _sticky,
    KILL: _dies_of(KILL, signal.SIGKILL),
}


def hits(folder: Path, seed: int) -> int:
    """How often the fault of ``seed`` has hit in the service whose runtime directory is ``folder``."""
    path = folder / f"fault-{seed}"
    return path.stat().st_size if path.exists() else 0


def _note(folder: Path, seed: int) -> None:
    with (folder / f"fault-{seed}").open("ab") as file:
        file.write(b".")


def _first(folder: Path, seed: int) -> bool:
    if hits(folder, seed):
        return False
    _note(folder, seed)
    return True


def run(config: WorkerConfig, inbox: Any, emit: Any) -> None:
    """The engine contract of `workers.entry`."""
    real = worker.build

    def build(*arguments: Any) -> Engine:
        engine = real(*arguments)
        seconds = float(os.environ.get("RIG_STEP_S", "0"))
        engine.model_step = FaultyStep(engine.model_step, Path(config.runtime_dir), seconds)
        return engine

    worker.build = build
    worker.run(config, inbox, emit)
