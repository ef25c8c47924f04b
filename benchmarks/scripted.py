"""A pool whose model worker has no model: at a fixed rate each running choice gets one token.

``python -m benchmarks.scripted`` is ``python -m workers`` with this engine, so that what it costs to bring tokens to
clients can be measured without a model. The environment says how: at most ``STEPS_PER_SECOND``, and ``BUSY_THREADS``
that compute without the interpreter's lock in each step and wait for each other many times, as a model on the CPU does.

The engine tells a load generator what it does through `Progress`, a few bytes of shared memory.
"""

import hashlib
import mmap
import os
import queue
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config.sources import ROOT
from workers.__main__ import main
from workers.config import WorkerConfig
from workers.messages import (
    Cancel,
    Cancelled,
    EmbedJob,
    GenerateJob,
    Loading,
    ModelCard,
    Order,
    Output,
    Ready,
    Report,
    Started,
)

STEPS_PER_SECOND = 40.0
MAX_MODEL_LEN = 131_072
# What a busy thread does in a step: so many times it hashes so many bytes, then waits for the others. About 16 ms.
BUSY_LAYERS = 30
BUSY_BYTES = 800_000

_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
_END = "<|end|>"


class Progress:
    """Tokens emitted up to now and when the last ones were, as one process writes and others read it.

    ``time`` is `time.monotonic` in seconds, which is the same clock for all processes of a machine.
    """

    _LAYOUT = struct.Struct("<Qd")

    def __init__(self, directory: Path) -> None:
        path = directory / "progress"
        if not path.exists():
            path.write_bytes(bytes(self._LAYOUT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def write(self, tokens: int, now: float) -> None:
        """Make known that ``tokens`` have been emitted, the last ones at ``now``."""
        self._LAYOUT.pack_into(self._memory, 0, tokens, now)

    def read(self) -> tuple[int, float]:
        """Return tokens and the time of the last ones."""
        tokens, at = self._LAYOUT.unpack_from(self._memory)
        return tokens, at


def run(config: WorkerConfig, inbox: "queue.SimpleQueue[Order | None]", emit: Callable[[list[Report]], None]) -> None:
    """The engine contract of `workers.entry`."""
    directory = Path(config.runtime_dir)
    emit([Loading(progress=0.5, stage="training a tokenizer")])
    text, card_path = _publish(directory)
    emit([Ready(card_path=str(card_path))])
    progress = Progress(directory)
    interval = 1.0 / float(os.environ.get("STEPS_PER_SECOND", STEPS_PER_SECOND))
    busy = _BusyThreads(int(os.environ.get("BUSY_THREADS", "0")))
    # Where in the text each choice of each job is.
    running: dict[str, list[int]] = {}
    limits: dict[str, int] = {}
    tokens = 0
    due = time.monotonic()
    while True:
        reports: list[Report] = []
        while True:
            try:
                order = inbox.get(block=not running)
            except queue.Empty:
                break
            if order is None:
                return
            if isinstance(order, Cancel):
                running.pop(order.id, None)
                if order.confirm:
                    emit([Cancelled(id=order.id)])
            elif isinstance(order, GenerateJob):
                running[order.id], limits[order.id] = [len(running) % len(text)] * order.n, order.max_tokens
                reports.append(Started(id=order.id))
            elif isinstance(order, EmbedJob):
                raise NotImplementedError("this engine only streams")
            due = max(due, time.monotonic())
        busy.compute()
        due += interval
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)
        for job_id, places in list(running.items()):
            limits[job_id] -= 1
            reason: Literal["length"] | None = "length" if limits[job_id] == 0 else None
            for choice, place in enumerate(places):
                reports.append(Output(id=job_id, choice=choice, ids=[text[place]], finish_reason=reason))
                places[choice] = (place + 1) % len(text)
                tokens += 1
            if reason is not None:
                del running[job_id]
        progress.write(tokens, time.monotonic())
        emit(reports)


class _BusyThreads:
    """``count`` threads, the caller's one of them, that do the same work whenever they are asked to."""

    def __init__(self, count: int) -> None:
        self._gate = threading.Barrier(max(1, count))
        self._data = bytes(BUSY_BYTES)
        self._count = count
        for _ in range(count - 1):
            threading.Thread(target=self._run, daemon=True).start()

    def compute(self) -> None:
        """Return when all of them are done."""
        if self._count:
            for _ in range(BUSY_LAYERS):
                self._gate.wait()
                hashlib.sha256(self._data)

    def _run(self) -> None:
        while True:
            self.compute()


def _publish(directory: Path) -> tuple[list[int], Path]:
    """Train a small byte-level tokenizer on the READMEs; return their tokens and the path of the model card."""
    corpus = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    card = ModelCard(
        id="scripted",
        names=[],
        tokenizer_path=str(directory / "tokenizer.json"),
        add_bos_token=False,
        chat_template=_TEMPLATE,
        special_tokens={"eos_token": _END},
        stop_token_ids=[0],
        eos_token_id=0,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=8,
        max_model_len=MAX_MODEL_LEN,
        created=int(time.time()),
        dtype="float32",
        device="cpu",
    )
    path = directory / "card.json"
    path.write_bytes(msgspec.json.encode(card))
    return tokenizer.encode(corpus[0]).ids, path


if __name__ == "__main__":
    sys.exit(main(engine="benchmarks.scripted:run"))
