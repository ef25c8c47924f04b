"""The jobs: which worker gets which, how many may wait and for how long, what becomes of those whose worker dies."""

import time
from collections.abc import Callable, Sequence
from typing import Generic, Literal

from config import logs
from workers.messages import Cancel, Cancelled, Embedded, Event, Failed, Job, Order, Output, PoolCounters
from workers.pool.deadlines import TOO_LATE, Deadlines
from workers.pool.drain_rate import DrainRate
from workers.pool.journal import Client, Entry
from workers.pool.placement import Placement, W
from workers.pool.poison import Poisons, fingerprint
from workers.pool.positions import Positions
from workers.pool.quarantine import Quarantine
from workers.pool.waiting import WaitingLine

log = logs.logger("tailrace.pool")

Kind = Literal["overloaded", "unavailable", "internal"]
Cause = Literal["poison", "queue_time"]

WORKER_FAILED = "The model worker failed; retry the request."
POISON = "Model workers ended, again and again, when they answered this request: it is not tried any more for now."


class Broker(Generic[W]):
    """Routes each job to the least-loaded worker, bounds the queue, and keeps the journal.

    A worker holds about ``max_batch`` sequences; all other jobs wait here, about ``max_queue`` of them or as many as
    may take ``max_queue_tokens``, where they can be refused, cancelled and sent to whoever is free first. Who has not
    been started in its own time, or else in ``queue_timeout_s`` (0: no matter when), fails. ``hopeless()`` says whether
    no worker is worth waiting for.
    """

    def __init__(
        self,
        workers: Sequence[W],
        *,
        send: Callable[[W, Order], None],
        hopeless: Callable[[], bool],
        max_batch: int,
        max_queue: int,
        max_replays: int,
        max_queue_tokens: int = 1_000_000,
        queue_timeout_s: float = 0.0,
        counts: PoolCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self._hopeless = hopeless
        self._max_queue = max_queue
        self._max_queue_tokens = max_queue_tokens
        self._max_replays = max_replays
        self._queue_timeout_s = queue_timeout_s
        self._counts = PoolCounters() if counts is None else counts
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._queue = WaitingLine()
        self._positions = Positions(self._queue)
        self._placement = Placement(workers, send, max_batch)
        self._quarantine = Quarantine(self._placement, self._counts, self._queue.put_back_last)
        self._wards = self._quarantine.wards
        self._poisons = Poisons(clock)
        self._deadlines = Deadlines(lambda job_id: (entry := self._entries.get(job_id)) is not None and entry.is_new)
        self._drain = DrainRate()
        self._ever_ready = False

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Jobs that wait here."""
        return len(self._queue) + len(self._quarantine.suspects)

    @property
    def queued_tokens(self) -> int:
        """The most tokens that the jobs may take that wait here."""
        return self._queue.tokens + self._quarantine.tokens

    @property
    def running(self) -> int:
        """Jobs that a worker has."""
        return len(self._entries) - self.queued

    @property
    def tokens_per_second(self) -> float:
        """How fast jobs have been finished."""
        return self._drain.per_second(self._clock())

    def jobs_of(self, worker: W) -> int:
        """Return how many jobs ``worker`` has."""
        return self._placement.count(worker.index)

    def awaits_word_of(self, worker: W) -> bool:
        """Whether ``worker`` has something to do or to say."""
        return self.jobs_of(worker) > 0 or self._quarantine.awaits_word_of(worker.index)

    def seconds_to_next(self) -> float:
        """Return when `dispatch` will have to fail somebody, at most a second."""
        due = self._deadlines.next
        return 1.0 if due is None else max(0.0, min(1.0, due - self._clock()))

    # --- from the clients ---------------------------------------------------------------------------------------------

    def submit(self, client: Client, job: Job) -> bool:
        """Take ``job``, or answer it with `Failed` at once. Returns False if its id is not new: a broken client."""
        if job.id in self._entries:
            return False
        if self.draining:
            _refuse(client, job, "unavailable", "The server is shutting down.", 5.0)
        elif self._hopeless():
            _refuse(client, job, "unavailable", "No model worker is running.", 30.0)
        elif not self._ever_ready and not self._note_readiness():
            _refuse(client, job, "unavailable", "The model is still being loaded.", 5.0)
        elif job in self._poisons:
            self._counts.refused_poison += 1
            _refuse(client, job, "internal", POISON, cause="poison")
        else:
            self._admit(Entry(job, client))
        return True

    def _admit(self, entry: Entry) -> None:
        """Give the job to a worker, or let it wait, or refuse it."""
        job, now = entry.job, self._clock()
        if not self.queued and (worker := self._placement.least_loaded()) is not None:
            self._add(entry, now)
            self._placement.give(entry, worker.index)
        elif self._has_room(entry):
            self._add(entry, now)
            self._positions.first(entry, self._queue.append(entry) + len(self._quarantine.suspects), now)
        else:
            self._counts.refused_full += 1
            seconds = self._drain.seconds_for(self.queued_tokens, now)
            _refuse(entry.client, job, "overloaded", "Too many requests are waiting.", seconds)

    def _has_room(self, entry: Entry) -> bool:
        """Whether the job may wait. A queue that others have filled keeps nobody out: one job of each owner may."""
        if self.queued < self._max_queue and self.queued_tokens + entry.cost <= self._max_queue_tokens:
            return True
        return self._max_queue > 0 and not self._queue.has_job_of(entry.job.salt)

    def cancel(self, client: Client, cancel: Cancel) -> None:
        """End a choice or all of a job of this client's. Unknown ids are normal: the job may just have ended."""
        entry = client.jobs.get(cancel.id)
        if entry is None:
            return
        if cancel.choice is None:
            self._abandon(entry)
            return
        before = entry.load
        if entry.drop(cancel.choice):
            self._placement.lighten(entry, before - entry.load)
            if entry.complete:
                self._abandon(entry)
            elif entry.worker is not None:
                self._placement.tell(entry.worker, Cancel(id=cancel.id, choice=cancel.choice))

    def client_gone(self, client: Client) -> None:
        """The connection is closed: nobody is left to read the answers."""
        for entry in list(client.jobs.values()):
            self._abandon(entry)

    # --- from the workers ---------------------------------------------------------------------------------------------

    def take(self, worker: W, events: Sequence[Event | Cancelled]) -> None:
        """Pass events of a worker on to the jobs' clients, and write them down."""
        entries, index = self._entries, worker.index
        for event in events:
            entry = entries.get(event.id)
            if entry is None or entry.worker != index:
                # It was cancelled, or answered by another worker meanwhile.
                if type(event) is Cancelled:
                    self._placement.confirmed(index, event.id)
                    if not event.id:
                        self._quarantine.confirmed(index, None)
            elif type(event) is not Output:
                self._take_rare(index, entry, event)
            elif event.finish_reason is not None:
                self._take_last(entry, event)
            elif entry.accept(event):
                entry.client.post(event)
        if self._wards:
            self._quarantine.review(index)

    def _take_last(self, entry: Entry, output: Output) -> None:
        """The end of a choice."""
        before = entry.load
        if not entry.accept(output):
            return
        entry.client.post(output)
        self._placement.lighten(entry, before - entry.load)
        if entry.complete:
            if entry.dropped:  # the engine may still be at work on what nobody wants
                self._placement.dismiss(entry)
            self._counts.finished += 1
            self._end(entry)

    def _take_rare(self, index: int, entry: Entry, event: Event | Cancelled) -> None:
        """Anything but output."""
        if isinstance(event, Cancelled):
            self._quarantine.confirmed(index, entry)
        elif isinstance(event, Embedded | Failed):
            entry.client.post(event)
            if isinstance(event, Failed):
                self._counts.failed += 1
            else:
                self._counts.finished += 1
            self._end(entry)
        elif type(event) not in entry.heard:
            entry.heard.add(type(event))
            entry.client.post(event)

    def worker_lost(self, worker: W) -> None:
        """The worker is dead: its jobs go back to the head of the queue, in their order, with what they have.

        After a second death each is tried alone. The one whose trial ends its worker is what kills, or the one that had
        its worker for itself both times, and stood in the same place.
        """
        tried = self._quarantine.worker_lost(worker.index)
        alone = self._placement.is_alone(worker.index)
        entries = self._placement.lost(worker.index)
        again, proven = [], []
        for entry in entries:
            if entry.die(alone) or entry is tried:
                proven.append(entry)
            elif entry.deaths > self._max_replays:
                self._fail(entry, "internal", WORKER_FAILED)
            else:
                self._counts.replayed += 1
                if entry.deaths == 1:
                    again.append(entry)
                else:
                    self._quarantine.add(entry)
        self._queue.put_back(again)
        if entries:
            jobs = [entry.job.id for entry in entries]
            log.warning("model worker left jobs", worker=worker.index, waiting=self.queued, jobs=jobs)
        for entry in proven:
            self._convict(entry)

    def _convict(self, culprit: Entry) -> None:
        """Fail the job that ends its workers, and all that are like it."""
        owner = culprit.job.salt
        log.error("a job ended its model worker alone: it and its like are refused", job=culprit.job.id, owner=owner)
        mark = self._poisons.add(culprit.job)
        self._counts.poisoned += 1
        self._fail(culprit, "internal", POISON, cause="poison")
        for entry in list(self._entries.values()):
            if len(entry.job.prompt) == len(culprit.job.prompt) and fingerprint(entry.job) == mark:
                self._counts.refused_poison += 1
                self._fail(entry, "internal", POISON, cause="poison")

    # --- each turn ----------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send waiting jobs to the workers that have room; give up on them if none is worth waiting for."""
        self._note_readiness()
        now = self._clock()
        for job_id in self._deadlines.due(now):
            self._counts.queue_timeouts += 1
            seconds = self._drain.seconds_for(self.queued_tokens, now)
            self._fail(self._entries[job_id], "overloaded", TOO_LATE, seconds, "queue_time")
        if self._wards or self._quarantine.suspects:
            self._quarantine.tend()
        while self._queue and (worker := self._placement.least_loaded()) is not None:
            self._placement.give(self._queue.pop(), worker.index)
        if self.queued and self._hopeless():
            self.fail_all("No model worker is running.", retry_after=30.0)
        self._positions.tell(len(self._quarantine.suspects), now)

    def fail_all(self, message: str, *, retry_after: float) -> None:
        """End every live job as unavailable."""
        for entry in list(self._entries.values()):
            self._fail(entry, "unavailable", message, retry_after)

    def _note_readiness(self) -> bool:
        self._ever_ready = self._ever_ready or self._placement.anybody_works
        return self._ever_ready

    # --- beginnings and ends ------------------------------------------------------------------------------------------

    def _add(self, entry: Entry, now: float) -> None:
        self._counts.admitted += 1
        if not self._entries:
            self._drain.begin(now)
        self._entries[entry.job.id] = entry
        entry.client.jobs[entry.job.id] = entry
        if patience := entry.job.start_within_s or self._queue_timeout_s:
            self._deadlines.add(now + patience, entry.job.id)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.job.id]
        entry.client.jobs.pop(entry.job.id, None)
        if (index := entry.worker) is not None:
            self._placement.take_away(entry)
            if self._wards:
                self._quarantine.left(index, entry)
        elif self._quarantine.suspects.pop(entry.job.id, None) is None:
            self._queue.discard(entry)
        if not self._entries:
            self._drain.pause(self._clock())

    def _end(self, entry: Entry) -> None:
        """The job was answered."""
        self._drain.note(entry.cost, self._clock())
        _tell_end(entry, "answered")
        self._remove(entry)

    def _abandon(self, entry: Entry) -> None:
        """Nobody wants the job any more."""
        self._counts.cancelled += 1
        _tell_end(entry, "cancelled")
        self._placement.dismiss(entry)
        self._remove(entry)

    def _fail(self, entry: Entry, kind: Kind, why: str, after: float | None = None, cause: Cause | None = None) -> None:
        self._counts.failed += 1
        _tell_end(entry, "failed")
        self._placement.dismiss(entry)
        self._remove(entry)
        _refuse(entry.client, entry.job, kind, why, after, cause)


def _tell_end(entry: Entry, how: str) -> None:
    """The HTTP worker logs each request; here is logged what it does not know of."""
    tell = log.info if entry.deaths else log.debug
    tell("job ended", job=entry.job.id, how=how, replays=entry.deaths, worker=entry.worker)


def _refuse(
    client: Client, job: Job, kind: Kind, why: str, after: float | None = None, cause: Cause | None = None
) -> None:
    client.post(Failed(id=job.id, kind=kind, message=why, retry_after=after, cause=cause))
