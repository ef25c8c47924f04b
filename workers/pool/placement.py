"""Which worker has which jobs, and who has room for another."""

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from workers.messages import Cancel, Order
from workers.pool.journal import Entry

# Jobs beyond its full batch that a worker gets, so that a free place is taken without asking the pool first.
LOOKAHEAD = 2


class Worker(Protocol):
    """What the broker needs to know of a model worker.

    ``takes_jobs``: a job given to it now would be answered; ``given_up``: that is not expected soon, either.
    """

    @property
    def index(self) -> int: ...
    @property
    def takes_jobs(self) -> bool: ...
    @property
    def given_up(self) -> bool: ...


W = TypeVar("W", bound=Worker)


class Placement(Generic[W]):
    """Jobs on workers. A worker holds at most ``max_batch`` sequences and `LOOKAHEAD` more."""

    def __init__(self, workers: Sequence[W], send: Callable[[W, Order], None], max_batch: int) -> None:
        self._workers = {worker.index: worker for worker in workers}
        self._send = send
        self._max_load = max_batch + LOOKAHEAD
        self._loads = {worker.index: 0 for worker in workers}
        self._jobs: dict[int, dict[str, Entry]] = {worker.index: {} for worker in workers}
        self._apart: set[int] = set()
        self._dismissed: dict[int, set[str]] = {worker.index: set() for worker in workers}

    def __len__(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    # --- what is known ------------------------------------------------------------------------------------------------

    def jobs_of(self, index: int) -> list[Entry]:
        """Return the jobs that worker ``index`` has."""
        return list(self._jobs[index].values())

    def count(self, index: int) -> int:
        """Return how many jobs worker ``index`` has."""
        return len(self._jobs[index])

    def is_alone(self, index: int) -> bool:
        """Whether worker ``index`` has one job, and can be at work on nothing else."""
        return len(self._jobs[index]) == 1 and not self._dismissed[index]

    def takes_jobs(self, index: int) -> bool:
        """Whether worker ``index`` would answer a job given to it now."""
        return self._workers[index].takes_jobs

    @property
    def anybody_works(self) -> bool:
        """Whether some worker takes jobs."""
        return any(worker.takes_jobs for worker in self._workers.values())

    def least_loaded(self) -> W | None:
        """Return the worker with the fewest sequences among those that take jobs and have room."""
        best: W | None = None
        least = self._max_load
        for worker in self._workers.values():
            if worker.takes_jobs and (load := self._loads[worker.index]) < least:
                best, least = worker, load
        return best

    def idle(self) -> int | None:
        """Return a worker that takes jobs and has none."""
        free = (index for index, worker in self._workers.items() if worker.takes_jobs and index not in self._apart)
        return next((index for index in free if not self._jobs[index]), None)

    def least_busy_of_all(self) -> int | None:
        """Return the worker with the fewest jobs; None if another is expected that will have none, or all are dead."""
        if not all(worker.takes_jobs or worker.given_up for worker in self._workers.values()):
            return None
        working = [index for index, worker in self._workers.items() if worker.takes_jobs]
        return min(working, key=lambda index: len(self._jobs[index]), default=None)

    # --- what is done -------------------------------------------------------------------------------------------------

    def give(self, entry: Entry, index: int) -> None:
        """Send a job to worker ``index``."""
        entry.worker = index
        self._jobs[index][entry.job.id] = entry
        self._loads[index] += entry.load
        for order in entry.orders():
            self._send(self._workers[index], order)

    def take_away(self, entry: Entry) -> None:
        """Note that the job's worker has it no longer."""
        assert entry.worker is not None
        self._jobs[entry.worker].pop(entry.job.id, None)
        self._loads[entry.worker] -= entry.load
        entry.worker = None

    def lighten(self, entry: Entry, sequences: int) -> None:
        """Note that so many of the job's sequences have ended."""
        if entry.worker is not None:
            self._loads[entry.worker] -= sequences

    def lost(self, index: int) -> list[Entry]:
        """Worker ``index`` is dead: return the jobs that it had."""
        entries = self.jobs_of(index)
        for entry in entries:
            self.take_away(entry)
        self._dismissed[index].clear()
        return entries

    def tell(self, index: int, order: Order) -> None:
        """Send an order that is no job."""
        self._send(self._workers[index], order)

    def dismiss(self, entry: Entry) -> None:
        """Tell the job's worker, if it has one, to stop. It may be at work on it until it says that it is not."""
        if entry.worker is not None:
            self._dismissed[entry.worker].add(entry.job.id)
            self.tell(entry.worker, Cancel(id=entry.job.id, confirm=True))

    def confirmed(self, index: int, job_id: str) -> None:
        """Worker ``index`` has let go of a job that it was told to stop."""
        self._dismissed[index].discard(job_id)

    def set_apart(self, index: int) -> None:
        """Give worker ``index`` no job but by `give`."""
        if index not in self._apart:
            self._apart.add(index)
            self._loads[index] += self._max_load

    def join(self, index: int) -> None:
        """Let worker ``index`` be one like the others again."""
        if index in self._apart:
            self._apart.remove(index)
            self._loads[index] -= self._max_load
