"""The generation loop of a model worker: take orders, step, report."""

import gc
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from llguidance import LLMatcher

from config import logs
from workers.config import WorkerConfig
from workers.engine import processors
from workers.engine.build import build
from workers.engine.card import publish, stop_token_ids
from workers.engine.engine import Engine
from workers.engine.errors import GrammarError, LoadError, OutOfMemory
from workers.engine.grammar import GrammarCompiler
from workers.engine.loader import load
from workers.engine.native.step import NativeStep
from workers.engine.recovery import no_memory
from workers.messages import Cancel, Cancelled, Failed, Fatal, GenerateJob, Loading, Order, Ready, Report

log = logs.logger(__name__)

Emit = Callable[[list[Report]], None]

# Seconds between two signs of life.
BUSY_STATS_S = 0.25
IDLE_STATS_S = 1.0


@dataclass(frozen=True)
class Compiled:
    """A job that comes back from the grammar compiler, with what it made of the job's grammar."""

    job: GenerateJob
    result: LLMatcher | GrammarError | OutOfMemory


Inbox = queue.SimpleQueue[Order | Compiled | None]


def run(config: WorkerConfig, inbox: Inbox, emit: Emit) -> None:
    """Load the model and serve orders from ``inbox`` until None arrives; ``emit`` must not block."""
    torch.set_num_threads(config.cpu_threads or processors.usable())
    try:
        loaded = load(config, lambda progress, stage: emit([Loading(progress=progress, stage=stage)]))
        emit([Loading(progress=0.9, stage="checking the model")])
        engine = build(loaded, config)
        card = publish(loaded, config, engine.max_model_len)
        if isinstance(engine.model_step, NativeStep):
            loaded.release_weights()
            engine.model_step.fetch_memory()
    except LoadError as error:
        emit([Fatal(message=str(error))])
        return
    # What exists now lives as long as the process: the collector need not look through it again and again.
    gc.collect()
    gc.freeze()
    emit([Ready(card_path=str(card))])
    ServingLoop(engine, GrammarCompiler(loaded.tokenizer, engine.vocab_size, stop_token_ids(loaded)), inbox, emit).run()


class ServingLoop:
    """Moves orders into the engine and reports out of it.

    A job with a grammar takes a turn through a thread that compiles the grammar, so that no running stream waits for
    it.
    """

    def __init__(self, engine: Engine, compiler: GrammarCompiler, inbox: Inbox, emit: Emit) -> None:
        self._engine = engine
        self._compiler = compiler
        self._inbox = inbox
        self._emit = emit
        # Jobs at the compiler, each with those of its choices that are not wanted any more.
        self._compiling: dict[str, set[int]] = {}
        self._executor = ThreadPoolExecutor(1, "grammar")

    def run(self) -> None:
        """Serve until None arrives. An error that is not one request's own ends the loop: the pool starts a fresh
        process.
        """
        self._executor.submit(self._compiler.warm_up)
        next_stats = 0.0
        engine = self._engine
        while True:
            reports: list[Report] = []
            for order in self._orders(wait=not engine.has_work):
                if order is None:
                    self._executor.shutdown(wait=False, cancel_futures=True)
                    return
                reports += self._take(order)
            reports += engine.step()
            now = time.monotonic()
            if now >= next_stats:
                reports.append(engine.stats(memory_bytes()))
                next_stats = now + (BUSY_STATS_S if engine.has_work else IDLE_STATS_S / 2)
            if reports:
                self._emit(reports)

    def _orders(self, wait: bool) -> list[Order | Compiled | None]:
        """Return everything that has arrived; with nothing else to do, wait for it until a sign of life is due."""
        orders: list[Order | Compiled | None] = []
        try:
            orders.append(self._inbox.get(block=wait, timeout=IDLE_STATS_S))
            while True:
                orders.append(self._inbox.get_nowait())
        except queue.Empty:
            return orders

    def _take(self, order: Order | Compiled) -> list[Report]:
        if isinstance(order, Compiled):
            # Gone from there: it was cancelled meanwhile.
            dropped = self._compiling.pop(order.job.id, None)
            if dropped is None:
                return []
            if isinstance(order.result, OutOfMemory):
                return [no_memory(order.job.id)]
            if isinstance(order.result, GrammarError):
                error = order.result
                message = f"the grammar cannot be used: {error}"
                return [Failed(id=order.job.id, kind="invalid", message=message, cause="grammar", line=error.line)]
            reports = self._engine.submit(order.job, order.result)
            for choice in sorted(dropped):
                reports += self._engine.submit(Cancel(id=order.job.id, choice=choice))
            return reports
        if isinstance(order, Cancel) and order.choice is None:
            self._compiling.pop(order.id, None)
            if order.confirm:
                return [*self._engine.submit(order), Cancelled(id=order.id)]
        elif isinstance(order, Cancel) and order.choice is not None and order.id in self._compiling:
            # The engine does not know the job yet.
            self._compiling[order.id].add(order.choice)
            return []
        if isinstance(order, GenerateJob) and order.grammar is not None:
            self._compiling[order.id] = set()
            self._executor.submit(self._compile, order)
            return []
        return self._engine.submit(order)

    def _compile(self, job: GenerateJob) -> None:
        assert job.grammar is not None
        try:
            self._inbox.put(Compiled(job, self._compiler.compile(job.grammar)))
        except GrammarError as error:
            self._inbox.put(Compiled(job, error))
        except MemoryError as error:
            log.error("no memory for a grammar", job=job.id, reason=str(error))
            self._inbox.put(Compiled(job, OutOfMemory(str(error))))
        except Exception as error:
            log.exception("the grammar compiler failed", job=job.id)
            self._inbox.put(Compiled(job, GrammarError(type(error).__name__)))


def memory_bytes() -> int:
    """Memory of this process: allocated on the GPU when it has one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
