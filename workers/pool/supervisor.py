"""The processes: start each model worker, watch it, end it when it hangs, start it again with back-off.

Only this module touches processes. Time and the process constructor are injected, so its tests need neither.
"""

import time
from collections.abc import Callable, Sequence

from config import logs
from workers.config import WorkerConfig
from workers.messages import (
    Cancelled,
    Event,
    Fatal,
    Loading,
    LogAs,
    Order,
    Output,
    PoolCounters,
    Ready,
    Report,
    Stats,
    WorkerStatus,
)
from workers.pool.bulletin import LONGEST_SILENT_LOAD_S
from workers.pool.incarnation import Ended, Incarnation, Life
from workers.pool.model_worker import Limits, ModelWorker, State

log = logs.logger("tailrace.pool")


class Supervisor:
    """Keeps one process alive for each configuration.

    ``events(worker, events)`` is called with the `Event` s of jobs that a worker sends, all of one step together;
    ``lost(worker)`` for each life that ended, before the next one starts; ``busy(worker)`` says whether it has
    something to do. ``watch(worker)`` asks for a call of `read` whenever the worker's pipe is readable;
    ``unwatch(worker)``, always before the pipe is closed, for no more of them.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        *,
        limits: Limits,
        events: Callable[[ModelWorker, list[Event | Cancelled]], None],
        lost: Callable[[ModelWorker], None],
        busy: Callable[[ModelWorker], bool],
        watch: Callable[[ModelWorker], None],
        unwatch: Callable[[ModelWorker], None],
        start_life: Callable[[WorkerConfig], Life] = Incarnation,
        counts: PoolCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.workers = [ModelWorker(config, limits.breaker_deaths) for config in configs]
        self.changed = True
        self._limits = limits
        self._events = events
        self._lost = lost
        self._busy = busy
        self._watch = watch
        self._unwatch = unwatch
        self._start_life = start_life
        self._counts = PoolCounters() if counts is None else counts
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
        return all(worker.given_up for worker in self.workers)

    @property
    def failure(self) -> str | None:
        """Why this pool gives up: every worker failed, or none could even be loaded."""
        never_loaded = all(worker.card_path is None for worker in self.workers)
        if self.failed_for_good or (never_loaded and self.hopeless):
            return next((worker.stage for worker in self.workers if worker.state == "failed"), self.workers[0].stage)
        return None

    @property
    def failed_for_good(self) -> bool:
        """Whether another start of everything would end no better. After deaths it may: of memory, of a driver."""
        return all(worker.state == "failed" for worker in self.workers)

    @property
    def stopped(self) -> bool:
        """Whether no process is left."""
        return all(worker.life is None for worker in self.workers)

    def statuses(self, jobs: Callable[[ModelWorker], int]) -> list[WorkerStatus]:
        """Return the state of each worker; ``jobs`` counts those in flight."""
        now = self._clock()
        return [
            WorkerStatus(
                index=worker.index,
                device=worker.config.device,
                pid=worker.life.pid if worker.life else None,
                state=worker.state,
                progress=worker.progress,
                stage=worker.stage,
                restarts=worker.restarts,
                cause=worker.last_end,
                jobs=jobs(worker),
                idle_s=max(0.0, now - worker.last_progress) if worker.life else 0.0,
                stats=worker.stats,
            )
            for worker in self.workers
        ]

    # --- what is done -------------------------------------------------------------------------------------------------

    def send(self, worker: ModelWorker, order: Order) -> None:
        """Hand ``order`` to the worker's process, if there is one."""
        if worker.life is not None and not worker.dying:
            worker.life.send(order)

    def tell_all(self, log_as: LogAs) -> None:
        """Let every worker log so."""
        for worker in self.workers:
            if worker.life is not None and not worker.dying:
                worker.life.send(log_as)

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
                events: list[Event | Cancelled] = [
                    report  # type: ignore[misc]
                    for report in reports
                    if type(report) is Output or not self._take_note(worker, report)
                ]
                if events:
                    worker.served = True
                    self._note_progress(worker)
                    self._events(worker, events)
        except Ended as end:
            self._end(worker, end.cause)
        return anything

    def tend(self) -> None:
        """Do all that is due: start, declare hung, kill, collect. Called on each turn of the loop, so each second."""
        now = self._clock()
        if now - self._last_tend > self._limits.pause_s:
            for worker in self.workers:
                worker.owes_since = None
                if worker.loads:
                    worker.last_progress = now
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
        worker.last_progress, worker.owes_since = self._clock(), None
        self.changed = True
        try:
            worker.life = self._start_life(worker.config)
        except OSError as error:  # no memory or no descriptors for another process: try again later
            self._schedule(worker, f"could not be started: {error.strerror}")
            return
        self._watch(worker)
        log.info("model worker started", worker=worker.index, device=worker.config.device, worker_pid=worker.life.pid)

    def _check_progress(self, worker: ModelWorker, now: float) -> None:
        """Call it hung, or end it, if there has been work for long and no progress.

        That the work was withdrawn meanwhile proves nothing: a worker that stands still does not hear of it, and one
        that does not says so soon.
        """
        if worker.loads and now - worker.last_progress > LONGEST_SILENT_LOAD_S:
            self._end(
                worker, f"gave no sign for {now - worker.last_progress:.0f} s while it was loading and was killed"
            )
        if worker.state not in ("ready", "hung"):
            return
        if worker.owes_since is None:
            if not self._busy(worker):
                return
            worker.owes_since = now
        standstill = now - worker.owes_since
        if standstill > self._limits.watchdog_s:
            self._counts.hangs += 1
            self._end(worker, f"made no step for {standstill:.0f} s with work to do and was killed")
        elif standstill > self._limits.hung_s and worker.state == "ready":
            log.warning("model worker makes no step with work to do", worker=worker.index, seconds=standstill)
            self._change(worker, "hung")

    def _note_progress(self, worker: ModelWorker) -> None:
        worker.last_progress, worker.owes_since = self._clock(), None
        if worker.state == "hung":
            log.info("model worker goes on", worker=worker.index)
            self._change(worker, "ready")

    def _take_stats(self, worker: ModelWorker, stats: Stats) -> None:
        """Keep the worker's figures. They show progress if steps were made, or if none is to be made: then its loop
        turns, and waits for orders or for a grammar that is being compiled (which the requests' deadlines bound).
        """
        before, worker.stats = worker.stats, stats
        if before is None or stats.steps != before.steps or not (stats.running or stats.waiting):
            self._note_progress(worker)

    def _take_note(self, worker: ModelWorker, report: Report) -> bool:
        """Keep what ``report`` says about the worker itself; return False if it is about a job."""
        if isinstance(report, Stats):
            self._take_stats(worker, report)
        elif isinstance(report, Loading):
            worker.progress, worker.stage = report.progress, report.stage
            worker.last_progress = self._clock()
            self._change(worker, "loading")
        elif isinstance(report, Ready):
            worker.progress, worker.stage, worker.card_path = 1.0, "", report.card_path
            worker.ready_since = self._clock()
            log.info("model worker ready", worker=worker.index, device=worker.config.device)
            self._change(worker, "ready")
        elif isinstance(report, Fatal) and worker.card_path is not None:
            # It could be served before: this may pass (a disk, memory, a device), and jobs may wait for it.
            self._end(worker, f"cannot serve the model again: {report.message}")
        elif isinstance(report, Fatal):
            worker.stage = report.message
            log.error("model worker cannot serve the model", worker=worker.index, reason=report.message)
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
            self._counts.worker_deaths += not self._stopping
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
        worker.stage = worker.last_end = cause
        self._change(worker, "dead")
        log.error("model worker ended", worker=worker.index, cause=cause, next_start_s=pause)

    def _change(self, worker: ModelWorker, state: State) -> None:
        worker.state = state
        self.changed = True
