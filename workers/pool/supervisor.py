"""The processes: start each model worker, watch it, end it when it hangs, start it again with back-off.

Only this module touches processes. Time and the process constructor are injected, so its tests need neither.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from workers.config import WorkerConfig
from workers.messages import Event, Fatal, Loading, Order, Output, Ready, Report, Stats, WorkerStatus
from workers.pool.incarnation import Ended, Incarnation, Life

log = logging.getLogger("tailrace.pool")

State = Literal["starting", "loading", "ready", "hung", "dead", "failed"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When to act; all in seconds but ``breaker_deaths``.

    ``watchdog_s``: a worker with jobs that gives no sign for so long is killed, and counts as hung from a third of it.
    ``backoff_*``: pause before the next start, doubled with each death in a row. ``breaker_deaths``: so many deaths in
    a row, none of which came after an answer, and nobody waits for this worker any more (it is still started, at the
    longest pause). ``stop_s``: how long a worker may take to return when told to stop. ``pause_s``: if the pool itself
    was not run for so long (a suspended machine), silence proves nothing.
    """

    watchdog_s: float = 30.0
    backoff_first_s: float = 1.0
    backoff_longest_s: float = 60.0
    breaker_deaths: int = 5
    stop_s: float = 5.0
    pause_s: float = 5.0

    @property
    def hung_s(self) -> float:
        """Silence, with jobs in flight, after which a worker gets no new jobs."""
        return self.watchdog_s / 3


@dataclass(eq=False)
class ModelWorker:
    """One slot: the worker that belongs on one device, through all its lives. ``life`` is None between two of them."""

    config: WorkerConfig
    state: State = "starting"
    life: Life | None = None
    progress: float = 0.0
    stage: str = ""
    card_path: str | None = None
    stats: Stats | None = None
    restarts: int = 0
    served: bool = False
    ready_since: float | None = None
    deaths_in_a_row: int = 0
    dying: bool = False
    cause: str | None = None
    start_at: float | None = 0.0
    kill_at: float | None = None
    last_sign: float = 0.0
    silent_since: float = 0.0

    @property
    def index(self) -> int:
        """The worker's number."""
        return self.config.index

    @property
    def takes_jobs(self) -> bool:
        """Whether a job given to it now would be answered."""
        return self.state == "ready" and not self.dying


class Supervisor:
    """Keeps one process alive for each configuration.

    ``event(worker, event)`` is called with each `Event` of a job that a worker sends; ``lost(worker)`` for each life
    that ended, before the next one starts; ``busy(worker)`` says whether jobs are in flight there. ``watch(worker)``
    asks for a call of `read` whenever the worker's pipe is readable; ``unwatch(worker)``, always before the pipe is
    closed, for no more of them.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        *,
        limits: Limits,
        event: Callable[[ModelWorker, Event], None],
        lost: Callable[[ModelWorker], None],
        busy: Callable[[ModelWorker], bool],
        watch: Callable[[ModelWorker], None],
        unwatch: Callable[[ModelWorker], None],
        start_life: Callable[[WorkerConfig], Life] = Incarnation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = [ModelWorker(config) for config in configs]
        self.changed = True
        self._limits = limits
        self._event = event
        self._lost = lost
        self._busy = busy
        self._watch = watch
        self._unwatch = unwatch
        self._start_life = start_life
        self._clock = clock
        self._stopping = False
        self._last_tend = clock()

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def card_path(self) -> str | None:
        """The model card, once a worker has published it."""
        return next((worker.card_path for worker in self.workers if worker.card_path), None)

    @property
    def can_answer(self) -> bool:
        """Whether a token can be produced now."""
        return any(worker.takes_jobs for worker in self.workers)

    @property
    def hopeless(self) -> bool:
        """Whether no worker works, and none is expected back soon."""
        return all(self.given_up(worker) for worker in self.workers)

    @property
    def failure(self) -> str | None:
        """Why nothing will ever work as configured: every worker failed, or none could even be loaded."""
        never_loaded = all(worker.card_path is None for worker in self.workers)
        if all(worker.state == "failed" for worker in self.workers) or (never_loaded and self.hopeless):
            return next((worker.stage for worker in self.workers if worker.state == "failed"), self.workers[0].stage)
        return None

    @property
    def stopped(self) -> bool:
        """Whether no process is left."""
        return all(worker.life is None for worker in self.workers)

    def given_up(self, worker: ModelWorker) -> bool:
        """Whether jobs should not wait for ``worker``: failed for good, or dying again and again."""
        return worker.state == "failed" or (
            worker.state in ("starting", "loading", "dead") and worker.deaths_in_a_row >= self._limits.breaker_deaths
        )

    def statuses(self, jobs: Callable[[ModelWorker], int]) -> list[WorkerStatus]:
        """Return the state of each worker; ``jobs`` counts those in flight."""
        now = self._clock()
        result = []
        for worker in self.workers:
            stats = worker.stats
            result.append(
                WorkerStatus(
                    index=worker.index,
                    device=worker.config.device,
                    pid=worker.life.pid if worker.life else None,
                    state=worker.state,
                    progress=worker.progress,
                    stage=worker.stage,
                    restarts=worker.restarts,
                    jobs=jobs(worker),
                    steps=stats.steps if stats else 0,
                    running=stats.running if stats else 0,
                    waiting=stats.waiting if stats else 0,
                    blocks_used=stats.blocks_used if stats else 0,
                    blocks_total=stats.blocks_total if stats else 0,
                    memory_bytes=stats.memory_bytes if stats else 0,
                    idle_s=max(0.0, now - worker.last_sign) if worker.life else 0.0,
                )
            )
        return result

    # --- what is done -------------------------------------------------------------------------------------------------

    def send(self, worker: ModelWorker, order: Order) -> None:
        """Hand ``order`` to the worker's process, if there is one."""
        if worker.life is not None and not worker.dying:
            worker.life.send(order)

    def read(self, worker: ModelWorker) -> bool:
        """Take what the worker has sent, without waiting; return whether there was anything.

        The end of its pipe, or garbage in it, ends its life.
        """
        if worker.life is None or worker.dying:
            return False
        anything = False
        try:
            for reports in worker.life.read():
                anything = True
                self._sign_of_life(worker)
                for report in reports:
                    if type(report) is Output or not self._take_note(worker, report):
                        worker.served = True
                        self._event(worker, report)  # type: ignore[arg-type]
        except Ended as end:
            self._end(worker, end.cause)
        return anything

    def tend(self) -> None:
        """Do all that is due: start, declare hung, kill, collect. Called on each turn of the loop, so each second."""
        now = self._clock()
        if now - self._last_tend > self._limits.pause_s:
            for worker in self.workers:
                worker.silent_since = now
        self._last_tend = now
        for worker in self.workers:
            if worker.life is None:
                if worker.start_at is not None and now >= worker.start_at and not self._stopping:
                    self._start(worker)
            elif worker.dying:
                self._collect(worker)
            else:
                self._check_progress(worker, now)
            if worker.life is not None and worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                worker.life.kill()

    def reap(self) -> None:
        """Look which processes have exited; called when the kernel says that some child did.

        Nearly always the pipe's end tells the same. It does not if a process that the engine started holds a copy.
        """
        for worker in self.workers:
            if worker.life is not None and not worker.dying and worker.life.exit_cause() is not None:
                last_words = 64
                while last_words and self.read(worker):
                    last_words -= 1
                self._end(worker)
            if worker.dying:
                self._collect(worker)

    def seconds_to_next(self) -> float:
        """Return how long `tend` may wait; at most a second, because silence has to be noticed as well."""
        now = self._clock()
        due = [at - now for worker in self.workers for at in (worker.start_at, worker.kill_at) if at is not None]
        return max(0.0, min([1.0, *due]))

    def stop(self) -> None:
        """Let every worker return; kill what still loads (it has nothing to finish) and, later, who does not return."""
        self._stopping = True
        for worker in self.workers:
            worker.start_at = None
            if worker.life is None or worker.dying:
                continue
            if worker.state in ("ready", "hung"):
                worker.life.ask_to_stop()
                worker.kill_at = self._clock() + self._limits.stop_s
            else:
                worker.life.kill()

    def kill(self) -> None:
        """End every process now."""
        self._stopping = True
        for worker in self.workers:
            worker.start_at = None
            if worker.life is not None:
                worker.life.kill()

    # --- one life -----------------------------------------------------------------------------------------------------

    def _start(self, worker: ModelWorker) -> None:
        worker.start_at = None
        worker.state = "starting"
        worker.progress, worker.stage, worker.stats = 0.0, "", None
        worker.served, worker.dying, worker.ready_since, worker.cause = False, False, None, None
        worker.last_sign = worker.silent_since = self._clock()
        self.changed = True
        try:
            worker.life = self._start_life(worker.config)
        except OSError as error:  # no memory or no descriptors for another process: try again later
            self._schedule(worker, f"could not be started: {error.strerror}")
            return
        self._watch(worker)
        log.info("model worker %d (%s) started, pid %s", worker.index, worker.config.device, worker.life.pid)

    def _check_progress(self, worker: ModelWorker, now: float) -> None:
        if worker.state not in ("ready", "hung"):
            return
        if not self._busy(worker):
            worker.silent_since = now
        silence = now - max(worker.last_sign, worker.silent_since)
        if silence > self._limits.watchdog_s:
            self._end(worker, f"made no step for {silence:.0f} s with work to do and was killed")
        elif silence > self._limits.hung_s and worker.state == "ready":
            log.warning("model worker %d is silent for %.0f s with work to do", worker.index, silence)
            self._change(worker, "hung")

    def _sign_of_life(self, worker: ModelWorker) -> None:
        worker.last_sign = self._clock()
        if worker.state == "hung":
            log.info("model worker %d goes on", worker.index)
            self._change(worker, "ready")

    def _take_note(self, worker: ModelWorker, report: Report) -> bool:
        """Keep what ``report`` says about the worker itself; return False if it is about a job."""
        if isinstance(report, Stats):
            worker.stats = report
        elif isinstance(report, Loading):
            worker.progress, worker.stage = report.progress, report.stage
            self._change(worker, "loading")
        elif isinstance(report, Ready):
            worker.progress, worker.stage, worker.card_path = 1.0, "", report.card_path
            worker.ready_since = self._clock()
            log.info("model worker %d (%s) is ready", worker.index, worker.config.device)
            self._change(worker, "ready")
        elif isinstance(report, Fatal):
            worker.stage = report.message
            log.error("model worker %d cannot serve the model: %s", worker.index, report.message)
            self._change(worker, "failed")
            worker.kill_at = self._clock() + self._limits.stop_s
            self._lost(worker)
        else:
            return False
        return True

    def _end(self, worker: ModelWorker, cause: str | None = None) -> None:
        """The worker is of no use any more, dead or alive: tell the broker, see that it dies.

        ``cause`` is what we hold against it; None if how its process exits tells more.
        """
        if worker.life is None or worker.dying:
            return
        worker.dying, worker.cause = True, cause
        self._unwatch(worker)
        if worker.state != "failed":
            self._change(worker, "dead")
        self._lost(worker)
        worker.life.kill()
        self._collect(worker)

    def _collect(self, worker: ModelWorker) -> None:
        """Once the process is really gone (and has given back its GPU), prepare the next life."""
        if worker.life is None or (exit_cause := worker.life.exit_cause()) is None:
            return
        worker.life.close()
        worker.life, worker.kill_at, worker.stats, worker.dying = None, None, None, False
        self.changed = True
        if worker.state != "failed" and not self._stopping:
            self._schedule(worker, worker.cause or exit_cause)

    def _schedule(self, worker: ModelWorker, cause: str) -> None:
        """Set the time of the next start."""
        now = self._clock()
        ready_for = now - worker.ready_since if worker.ready_since is not None else 0.0
        healthy = worker.served or ready_for >= self._limits.backoff_longest_s
        worker.deaths_in_a_row = 1 if healthy else worker.deaths_in_a_row + 1
        worker.restarts += 1
        doublings = min(worker.deaths_in_a_row - 1, 30)
        pause = min(self._limits.backoff_longest_s, self._limits.backoff_first_s * 2**doublings)
        worker.start_at = now + pause
        worker.stage = cause
        self._change(worker, "dead")
        log.error("model worker %d %s; next start in %.3g s", worker.index, cause, pause)

    def _change(self, worker: ModelWorker, state: State) -> None:
        worker.state = state
        self.changed = True
