"""An engine without a model: tokens are a pure function of the job, and the prompt says how to misbehave.

A prompt is ``[command, at, once, ...]``: the command is carried out before the token at position ``at``; with ``once``
1 only in a first run, not in a replay. LOOP stands still like HANG, but goes on sending signs of life; COMPILE does not
begin before its gate is open, and says of itself that it has nothing to do. ``base_model`` may ask for misbehaviour
while loading (`LOADING`).
"""

import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from workers.config import WorkerConfig
from workers.messages import (
    Cancel,
    Cancelled,
    Embedded,
    EmbedJob,
    Failed,
    Fatal,
    GenerateJob,
    Loading,
    Order,
    Output,
    Ready,
    Report,
    Started,
    Stats,
)

PLAIN, HANG, RAISE, EXIT, GARBAGE, SILENT, WAIT, REFUSE, BURST, LOOP, COMPILE, HALF = range(12)
LOADING = ("scripted:fatal", "scripted:crash", "scripted:wait", "scripted:child")

STEP_SECONDS = 0.002
STATS_SECONDS = 0.1
HUGE = 20_000


def token(prompt: list[int], seed: int, choice: int, position: int) -> int:
    """The one token that belongs there."""
    return (sum(prompt) * 31 + seed * 17 + choice * 1009 + position * 7) % 50_000 + 100


def expected(job: GenerateJob, choice: int = 0) -> list[int]:
    """All tokens that a client of ``job`` must get."""
    return [token(job.prompt, job.sampling.seed, choice, position) for position in range(job.max_tokens)]


def gate(config_dir: str | Path, number: int) -> Path:
    """The file that a job with the command WAIT and the extra prompt id ``number`` waits for; 0 for loading."""
    return Path(config_dir) / f"gate-{number}"


def crash(config_dir: str | Path, index: int) -> Path:
    """The file that worker ``index`` dies of whenever it is started."""
    return Path(config_dir) / f"crash-{index}"


@dataclass
class _Running:
    job: GenerateJob
    replay: bool
    done: list[int]
    open: set[int] = field(default_factory=set)


def run(config: WorkerConfig, inbox: "queue.SimpleQueue[Order | None]", emit: Callable[[list[Report]], None]) -> None:
    """The engine contract of `workers.entry`."""
    emit([Loading(progress=0.0, stage="reading"), Loading(progress=0.5, stage="reading")])
    if config.base_model == "scripted:fatal":
        fatal(config, inbox, emit)
        return
    if config.base_model == "scripted:crash" or crash(config.cache_dir, config.index).exists():
        os._exit(9)
    if config.base_model == "scripted:wait":
        while not gate(config.cache_dir, 0).exists():
            time.sleep(0.005)
    if config.base_model == "scripted:child" and os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    emit([Ready(card_path=f"{config.runtime_dir}/card.json")])
    _Loop(config, inbox, emit).run()


def fatal(config: WorkerConfig, inbox: object, emit: Callable[[list[Report]], None]) -> None:
    """An engine that cannot serve its model."""
    emit([Fatal(message="this model\ncannot be served")])


def gated(config: WorkerConfig, inbox: "queue.SimpleQueue[Order | None]", emit: Callable[[list[Report]], None]) -> None:
    """An engine that loads until the gate for it is open."""
    emit([Loading(progress=0.43, stage="reading")])
    while not gate(config.cache_dir, 0).exists():
        time.sleep(0.005)
    run(config, inbox, emit)


def never_ready(config: WorkerConfig, inbox: object, emit: Callable[[list[Report]], None]) -> None:
    """An engine that loads for ever."""
    emit([Loading(progress=0.1, stage="reading")])
    while True:
        time.sleep(1)


class _Loop:
    def __init__(self, config: WorkerConfig, inbox: "queue.SimpleQueue[Order | None]", emit: Callable[..., None]):
        self._config, self._inbox, self._emit = config, inbox, emit
        self._running: dict[str, _Running] = {}
        self._compiling: dict[str, GenerateJob] = {}
        self._steps = 0
        self._stats_at = 0.0

    def run(self) -> None:
        while True:
            reports: list[Report] = []
            while True:
                try:
                    order = self._inbox.get(timeout=0 if self._running else 0.05)
                except queue.Empty:
                    break
                if order is None:
                    return
                self._take(order, reports)
            for job in [job for job in self._compiling.values() if self._open(job)]:
                del self._compiling[job.id]
                self._begin(job)
            for each in list(self._running.values()):
                self._step(each, reports)
            if time.monotonic() >= self._stats_at:
                self._stats_at = time.monotonic() + STATS_SECONDS
                reports.append(self._stats())
            if reports:
                self._emit(reports)
            if self._running:
                self._steps += 1
                time.sleep(STEP_SECONDS)

    def _stats(self) -> Stats:
        return Stats(steps=self._steps, running=len(self._running), waiting=0, blocks_used=0, blocks_total=1)

    def _open(self, job: GenerateJob) -> bool:
        return gate(self._config.cache_dir, job.prompt[3]).exists()

    def _cancel(self, order: Cancel) -> None:
        if order.choice is None:
            self._compiling.pop(order.id, None)
        running = self._running.get(order.id)
        if running is None:
            return
        running.open -= set(running.open) if order.choice is None else {order.choice}
        if not running.open:
            del self._running[order.id]

    def _take(self, order: Order, reports: list[Report]) -> None:
        if isinstance(order, Cancel):
            self._cancel(order)
            if order.confirm:
                reports.append(Cancelled(id=order.id))
            return
        reports.append(Started(id=order.id))
        if isinstance(order, EmbedJob):
            reports.append(Embedded(id=order.id, vector=bytes(4 * len(order.prompt))))
            return
        if order.prompt[0] == REFUSE:
            reports.append(Failed(id=order.id, kind="invalid", message="refused as told"))
            return
        if order.prompt[0] == COMPILE:
            self._compiling[order.id] = order
        else:
            self._begin(order)

    def _begin(self, job: GenerateJob) -> None:
        done = [len(ids) for ids in job.emitted] or [0] * job.n
        self._running[job.id] = _Running(job, bool(job.emitted), done, set(range(job.n)))

    def _step(self, running: _Running, reports: list[Report]) -> None:
        job = running.job
        command, at, once = (*job.prompt, 0, 0, 0)[:3]
        for choice in sorted(running.open):
            position = running.done[choice]
            if position == at and not (once and running.replay) and self._obey(command, job, reports):
                return
            ids = []
            if position < job.max_tokens:
                count = min(HUGE, job.max_tokens - position) if command == BURST else 1
                ids = [token(job.prompt, job.sampling.seed, choice, position + i) for i in range(count)]
                running.done[choice] = position = position + count
            last = position >= job.max_tokens
            reports.append(Output(id=job.id, choice=choice, ids=ids, finish_reason="length" if last else None))
            if last:
                running.open.discard(choice)
        if not running.open:
            self._running.pop(job.id, None)

    def _obey(self, command: int, job: GenerateJob, reports: list[Report]) -> bool:
        """Carry out the command; return whether the job makes no token in this step."""
        if command in (PLAIN, BURST, COMPILE):
            return False
        if command == WAIT:
            return not self._open(job)
        if command == SILENT:
            return True
        self._emit(reports)
        if command == EXIT:
            os._exit(9)
        if command == RAISE:
            raise RuntimeError("raised as told")
        if command == GARBAGE:
            self._write(b"\x00\x00\x00\x02\xff\xff garbage")
        if command == HALF:
            self._write(b"\x00\x00\x01\x00 half a frame")
            os._exit(9)
        while command == LOOP:
            self._emit([self._stats()])
            time.sleep(STATS_SECONDS)
        while True:  # HANG, and after garbage
            time.sleep(1)

    def _write(self, data: bytes) -> None:
        """Write to the pipe what is no report."""
        os.write(self._emit.__self__._fd, data)  # type: ignore[attr-defined]
