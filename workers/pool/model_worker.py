"""One model worker through all its lives, as far as the pool knows it, and the limits of its patience."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from workers.config import WorkerConfig
from workers.messages import Stats
from workers.pool.incarnation import Life

State = Literal["starting", "loading", "ready", "hung", "dead", "failed"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """When to act; all in seconds but ``breaker_deaths``.

    ``watchdog_s``: a worker with jobs that makes no step for so long is killed, and counts as hung from a third of it.
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
        """Standstill, with work to do, after which a worker gets no new jobs."""
        return self.watchdog_s / 3


@dataclass(eq=False)
class ModelWorker:
    """One slot: the worker that belongs on one device, through all its lives. ``life`` is None between two of them.

    ``cause`` is what is held against a life that is being ended, ``last_end`` how the one before this ended.
    ``last_progress`` is the time of the last step, or of the last word about a job; ``owes_since`` when it was given
    work first after that, None if it was not.
    """

    config: WorkerConfig
    breaker_deaths: int = 5
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
    last_end: str = ""
    start_at: float | None = 0.0
    kill_at: float | None = None
    last_progress: float = 0.0
    owes_since: float | None = None

    @property
    def index(self) -> int:
        """The worker's number."""
        return self.config.index

    @property
    def loads(self) -> bool:
        """Whether it is on its way to be ready."""
        return self.state in ("starting", "loading")

    @property
    def takes_jobs(self) -> bool:
        """Whether a job given to it now would be answered."""
        return self.state == "ready" and not self.dying

    @property
    def given_up(self) -> bool:
        """Whether jobs should not wait for it: failed for good, or dying again and again."""
        return self.state == "failed" or (
            self.state in ("starting", "loading", "dead") and self.deaths_in_a_row >= self.breaker_deaths
        )
