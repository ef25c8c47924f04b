"""A broker among workers that are not there: orders and events take their time, workers die, and time is the test's.

A prompt is ``[behaviour, at, ...]``: what the worker does before a job's token at position ``at``.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from workers.messages import (
    Cancel,
    Cancelled,
    Embedded,
    EmbedJob,
    Failed,
    GenerateJob,
    Job,
    Order,
    Output,
    PoolCounters,
    Queued,
    Report,
    Started,
)
from workers.pool.broker import Broker
from workers.pool.journal import Entry

GOOD, KILLS, HANGS = range(3)


def token(job: GenerateJob, choice: int, position: int) -> int:
    """The one token that belongs there."""
    return hash((tuple(job.prompt), choice, position)) % 50_000


class SimClient:
    """Keeps what it is told, by job."""

    def __init__(self) -> None:
        self.jobs: dict[str, Entry] = {}
        self.events: dict[str, list[Any]] = {}

    def post(self, event: Any) -> None:
        self.events.setdefault(event.id, []).append(event)

    def of(self, job: Job, kind: type) -> list[Any]:
        """The events of one kind that came for the job."""
        return [event for event in self.events.get(job.id, []) if type(event) is kind]

    def tokens(self, job: Job, choice: int = 0) -> list[int]:
        """The tokens of a choice so far."""
        return [each for output in self.of(job, Output) if output.choice == choice for each in output.ids]

    def failure(self, job: Job) -> Failed | None:
        """How it failed, if it did."""
        return next(iter(self.of(job, Failed)), None)

    def positions(self, job: Job) -> list[int]:
        """Its places in the queue, as told."""
        return [event.position for event in self.of(job, Queued)]


@dataclass
class _Run:
    job: Job
    done: list[int]
    open: set[int]
    said: bool = False


@dataclass(eq=False)
class SimWorker:
    """An engine: takes its orders in their order, makes a token for each open choice in a step."""

    index: int
    takes_jobs: bool = True
    given_up: bool = False
    hung: bool = False
    doomed: bool = False
    inbox: list[Order] = field(default_factory=list)
    outbox: list[Report] = field(default_factory=list)
    running: dict[str, _Run] = field(default_factory=dict)
    # How many jobs it had when it was killed by one of them.
    crowds: list[int] = field(default_factory=list)

    def take_orders(self) -> None:
        while self.inbox and not self.hung and not self.doomed:
            order = self.inbox.pop(0)
            if isinstance(order, Cancel):
                run = self.running.get(order.id)
                if run is not None:
                    run.open -= set(run.open) if order.choice is None else {order.choice}
                    if not run.open:
                        del self.running[order.id]
                if order.confirm:
                    self.outbox.append(Cancelled(id=order.id))
            elif isinstance(order, EmbedJob):
                self.running[order.id] = _Run(order, [0], {0})
            else:
                done = [len(ids) for ids in order.emitted] or [0] * order.n
                self.running[order.id] = _Run(order, done, set(range(order.n)))

    def step(self) -> None:
        if self.hung or self.doomed:
            return
        for run in list(self.running.values()):
            behaviour, at = run.job.prompt[:2]
            if behaviour != GOOD and max(run.done) >= at:
                self.crowds.append(len(self.running))
                self.doomed, self.hung = behaviour == KILLS, behaviour == HANGS
                return
            self._advance(run)

    def _advance(self, run: _Run) -> None:
        job = run.job
        if not run.said:
            run.said = True
            self.outbox.append(Started(id=job.id))
        if isinstance(job, EmbedJob):
            self.outbox.append(Embedded(id=job.id, vector=b""))
            del self.running[job.id]
            return
        for choice in sorted(run.open):
            position = run.done[choice]
            ids = [token(job, choice, position)] if position < job.max_tokens else []
            run.done[choice] += len(ids)
            last = run.done[choice] >= job.max_tokens
            self.outbox.append(Output(id=job.id, choice=choice, ids=ids, finish_reason="length" if last else None))
            if last:
                run.open.discard(choice)
        if not run.open:
            del self.running[job.id]


class Simulation:
    """The broker's surroundings."""

    def __init__(self, workers: int = 1, **options: Any) -> None:
        self.now = 100.0
        self.counts = PoolCounters()
        self.client = SimClient()
        self.hopeless = False
        self.deaths = 0
        self.jobs: list[Job] = []
        self.gone: set[str] = set()
        self.workers = [SimWorker(index) for index in range(workers)]
        settings: dict[str, Any] = {"max_batch": 8, "max_queue": 99, "max_replays": 3} | options
        self.broker = Broker(
            self.workers,
            send=lambda worker, order: worker.inbox.append(order),
            hopeless=lambda: self.hopeless,
            counts=self.counts,
            clock=lambda: self.now,
            **settings,
        )
        self.broker.dispatch()  # which tells it that there have been workers to wait for

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.jobs.append(job)
            assert self.broker.submit(self.client, job)

    def leave(self, job: Job) -> None:
        """Nobody wants the job's answer any more."""
        self.gone.add(job.id)
        self.broker.cancel(self.client, Cancel(id=job.id))

    def deliver(self, worker: SimWorker, count: int | None = None) -> None:
        """Let the broker have the first of what the worker has said."""
        part = worker.outbox[:count]
        del worker.outbox[: len(part)]
        if part:
            self.broker.take(worker, part)  # type: ignore[arg-type]

    def kill(self, worker: SimWorker) -> None:
        """The worker dies; what it has said arrives."""
        self.deaths += 1
        worker.takes_jobs = False
        self.deliver(worker)
        self.broker.worker_lost(worker)
        worker.inbox.clear()
        worker.running.clear()
        worker.hung = worker.doomed = False

    def turn(self, chance: random.Random | None = None) -> None:
        """Everybody goes on by a step, or, with ``chance``, perhaps not; who is doomed or hung dies, who is dead
        comes back.
        """
        self.now += 0.01
        for worker in self.workers:
            if not worker.takes_jobs:
                if not worker.given_up and (chance is None or chance.random() < 0.2):
                    worker.takes_jobs = True
                continue
            if chance is None or chance.random() < 0.8:
                worker.take_orders()
                worker.step()
            if worker.doomed or (worker.hung and (chance is None or chance.random() < 0.1)):
                self.kill(worker)
            elif chance is None or chance.random() < 0.8:
                self.deliver(worker, None if chance is None else chance.randrange(1, 20))
        self.broker.dispatch()

    def run(self, chance: random.Random | None = None, turns: int = 5000) -> None:
        """Go on until everything has been answered."""
        for _ in range(turns):
            if not self.client.jobs:
                break
            self.turn(chance)
        assert not self.client.jobs, [job for job in self.jobs if job.id in self.client.jobs]
        self.check_counts()

    def check_counts(self) -> None:
        """All that was admitted is still there, or has been counted where it went."""
        counts = self.counts
        live = self.broker.queued + self.broker.running
        assert counts.admitted == counts.finished + counts.failed + counts.cancelled + live, counts

    def complete(self, job: Job) -> bool:
        """Whether the job has its whole answer, every token once and in its place."""
        if isinstance(job, EmbedJob):
            return len(self.client.of(job, Embedded)) == 1
        reasons = [output.choice for output in self.client.of(job, Output) if output.finish_reason]
        return sorted(reasons) == list(range(job.n)) and all(
            self.client.tokens(job, choice) == [token(job, choice, position) for position in range(job.max_tokens)]
            for choice in range(job.n)
        )
