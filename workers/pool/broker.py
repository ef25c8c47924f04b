"""The jobs: which worker gets which, how many may wait, what becomes of those whose worker dies."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

from workers.messages import Cancel, Embedded, Event, Failed, Job, Order, Output
from workers.pool.journal import Client, Entry

log = logging.getLogger("tailrace.pool")

# Jobs beyond its full batch that a worker gets, so that a free place is taken without asking the pool first.
LOOKAHEAD = 2

Kind = Literal["overloaded", "unavailable", "internal"]

WORKER_FAILED = "The model worker failed; retry the request."


class Worker(Protocol):
    """What the broker needs to know of a model worker."""

    @property
    def index(self) -> int: ...
    @property
    def takes_jobs(self) -> bool: ...


W = TypeVar("W", bound=Worker)


class Broker(Generic[W]):
    """Routes each job to the least-loaded worker, bounds the queue, and keeps the journal.

    A worker holds at most ``max_batch`` sequences and `LOOKAHEAD` more; all other jobs wait here, at most ``max_queue``
    of them, where they can be refused, cancelled and sent to whoever is free first. ``hopeless()`` says whether no
    worker is worth waiting for.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.draining = False
        self._workers = {worker.index: worker for worker in workers}
        self._send = send
        self._hopeless = hopeless
        self._max_load = max_batch + LOOKAHEAD
        self._max_queue = max_queue
        self._max_replays = max_replays
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._queue: deque[Entry] = deque()
        self._loads = {worker.index: 0 for worker in workers}
        self._jobs: dict[int, dict[str, Entry]] = {worker.index: {} for worker in workers}
        self._ever_ready = False
        self._seconds_per_job = 1.0
        self._last_end = clock()

    # --- what is known ------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Jobs that wait here."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Jobs that a worker has."""
        return len(self._entries) - len(self._queue)

    def jobs_of(self, worker: W) -> int:
        """Return how many jobs ``worker`` has."""
        return len(self._jobs[worker.index])

    # --- from the clients ---------------------------------------------------------------------------------------------

    def submit(self, client: Client, job: Job) -> bool:
        """Take ``job``, or answer it with `Failed` at once. Returns False if its id is not new: a broken client."""
        if job.id in self._entries:
            return False
        entry = Entry(job, client)
        if self.draining:
            self._refuse(client, job, "unavailable", "The server is shutting down.", 5.0)
        elif self._hopeless():
            self._refuse(client, job, "unavailable", "No model worker is running.", 30.0)
        elif not self._ever_ready and not self._note_readiness():
            self._refuse(client, job, "unavailable", "The model is still being loaded.", 5.0)
        elif not self._queue and (worker := self._least_loaded()) is not None:
            self._add(entry)
            self._assign(entry, worker)
        elif len(self._queue) < self._max_queue:
            self._add(entry)
            self._queue.append(entry)
        else:
            self._refuse(client, job, "overloaded", "Too many requests are waiting.", self._seconds_to_free_place())
        return True

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
            if entry.complete:
                self._abandon(entry)
            elif entry.worker is not None:
                self._loads[entry.worker] += entry.load - before
                self._send(self._workers[entry.worker], cancel)

    def client_gone(self, client: Client) -> None:
        """The connection is closed: nobody is left to read the answers."""
        for entry in list(client.jobs.values()):
            self._abandon(entry)

    # --- from the workers ---------------------------------------------------------------------------------------------

    def event(self, worker: W, event: Event) -> None:
        """Pass an event of a worker on to the job's client, and write it down."""
        entry = self._entries.get(event.id)
        if entry is None or entry.worker != worker.index:
            return  # cancelled, or answered by another worker meanwhile
        if type(event) is Output:
            before = entry.load
            if not entry.accept(event):
                return
            entry.client.post(event)
            if event.finish_reason is not None:
                self._loads[worker.index] += entry.load - before
                if entry.complete:
                    if entry.dropped:  # the engine may still be at work on what nobody wants
                        self._send(worker, Cancel(id=event.id))
                    self._end(entry)
        elif isinstance(event, Embedded | Failed):
            entry.client.post(event)
            self._end(entry)
        elif type(event) not in entry.heard:
            entry.heard.add(type(event))
            entry.client.post(event)

    def worker_lost(self, worker: W) -> None:
        """The worker is dead: its jobs go back to the head of the queue, in their order, with what they have."""
        entries = list(self._jobs[worker.index].values())
        self._jobs[worker.index].clear()
        self._loads[worker.index] = 0
        for entry in reversed(entries):
            entry.worker = None
            entry.replays += 1
            if entry.replays > self._max_replays:
                self._fail(entry, "internal", WORKER_FAILED, None)
            else:
                self._queue.appendleft(entry)
        if entries:
            log.warning("model worker %d left %d jobs, %d will go on", worker.index, len(entries), len(self._queue))

    # --- each turn ----------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send waiting jobs to the workers that have room; give up on them if none is worth waiting for."""
        self._note_readiness()
        while self._queue and (worker := self._least_loaded()) is not None:
            self._assign(self._queue.popleft(), worker)
        if self._queue and self._hopeless():
            self.fail_all("No model worker is running.", retry_after=30.0)

    def fail_all(self, message: str, *, retry_after: float) -> None:
        """End every live job as unavailable."""
        for entry in list(self._entries.values()):
            if entry.worker is not None:
                self._send(self._workers[entry.worker], Cancel(id=entry.job.id))
            self._fail(entry, "unavailable", message, retry_after)

    def _note_readiness(self) -> bool:
        self._ever_ready = self._ever_ready or any(worker.takes_jobs for worker in self._workers.values())
        return self._ever_ready

    def _least_loaded(self) -> W | None:
        """Return the worker with the fewest sequences among those that take jobs and have room."""
        best: W | None = None
        least = self._max_load
        for worker in self._workers.values():
            if worker.takes_jobs and (load := self._loads[worker.index]) < least:
                best, least = worker, load
        return best

    def _assign(self, entry: Entry, worker: W) -> None:
        entry.worker = worker.index
        self._jobs[worker.index][entry.job.id] = entry
        self._loads[worker.index] += entry.load
        for order in entry.orders():
            self._send(worker, order)

    # --- beginnings and ends ------------------------------------------------------------------------------------------

    def _add(self, entry: Entry) -> None:
        self._entries[entry.job.id] = entry
        entry.client.jobs[entry.job.id] = entry

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.job.id]
        entry.client.jobs.pop(entry.job.id, None)
        if entry.worker is not None:
            self._jobs[entry.worker].pop(entry.job.id, None)
            self._loads[entry.worker] -= entry.load
        elif entry in self._queue:
            self._queue.remove(entry)

    def _end(self, entry: Entry) -> None:
        """The job was answered."""
        self._remove(entry)
        now = self._clock()
        self._seconds_per_job += 0.1 * (min(now - self._last_end, 60.0) - self._seconds_per_job)
        self._last_end = now

    def _abandon(self, entry: Entry) -> None:
        """Nobody wants the job any more."""
        if entry.worker is not None:
            self._send(self._workers[entry.worker], Cancel(id=entry.job.id))
        self._remove(entry)

    def _fail(self, entry: Entry, kind: Kind, message: str, retry_after: float | None) -> None:
        self._remove(entry)
        entry.client.post(Failed(id=entry.job.id, kind=kind, message=message, retry_after=retry_after))

    def _refuse(self, client: Client, job: Job, kind: Kind, message: str, retry_after: float) -> None:
        client.post(Failed(id=job.id, kind=kind, message=message, retry_after=retry_after))

    def _seconds_to_free_place(self) -> float:
        """Guess when asking again is worth while, from how fast jobs have been ending: 1 to 60 s."""
        return float(min(60, max(1, math.ceil(self._seconds_per_job))))
