"""The generation loop of a model worker: take orders, step, report."""

import logging
import os
import queue
import time
from collections.abc import Callable
from pathlib import Path

import torch

from workers.config import WorkerConfig
from workers.engine.build import build
from workers.engine.card import publish
from workers.engine.engine import Engine
from workers.engine.loader import LoadError, load
from workers.messages import Fatal, Loading, Order, Ready, Report

log = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[Order | None]
Emit = Callable[[list[Report]], None]

# Seconds between two signs of life.
BUSY_STATS_S = 0.25
IDLE_STATS_S = 1.0


def run(config: WorkerConfig, inbox: Inbox, emit: Emit) -> None:
    """Load the model and serve orders from ``inbox`` until None arrives; ``emit`` must not block."""
    torch.set_num_threads(config.cpu_threads or os.cpu_count() or 1)
    try:
        loaded = load(config, lambda progress, stage: emit([Loading(progress=progress, stage=stage)]))
        emit([Loading(progress=0.9, stage="checking the model")])
        engine = build(loaded, config)
        card = publish(loaded, config, engine.max_model_len)
    except LoadError as error:
        emit([Fatal(message=str(error))])
        return
    emit([Ready(card_path=str(card))])
    serve(engine, inbox, emit)


def serve(engine: Engine, inbox: Inbox, emit: Emit) -> None:
    """The loop itself. An error that is not one request's own ends it: the pool starts a fresh process."""
    next_stats = 0.0
    while True:
        reports: list[Report] = []
        for order in _orders(inbox, wait=not engine.has_work):
            if order is None:
                return
            reports += engine.submit(order)
        reports += engine.step()
        now = time.monotonic()
        if now >= next_stats:
            reports.append(engine.stats(memory_bytes()))
            next_stats = now + (BUSY_STATS_S if engine.has_work else IDLE_STATS_S / 2)
        if reports:
            emit(reports)


def _orders(inbox: Inbox, wait: bool) -> list[Order | None]:
    """Return everything that has arrived; with nothing else to do, wait for it until the next sign of life is due."""
    orders: list[Order | None] = []
    try:
        orders.append(inbox.get(block=wait, timeout=IDLE_STATS_S))
        while True:
            orders.append(inbox.get_nowait())
    except queue.Empty:
        return orders


def memory_bytes() -> int:
    """Memory of this process: allocated on the GPU when it has one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
