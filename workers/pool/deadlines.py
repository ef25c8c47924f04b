"""When each job has to have been started."""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

_FEW = 64


TOO_LATE = "No model worker was free for this request in time."


class Deadlines:
    """Ids of jobs, the next one due first. Who has no more need of a deadline stays until it comes, or until there are
    too many of them: ``needed(id)`` tells.
    """

    def __init__(self, needed: Callable[[str], bool]) -> None:
        self._needed = needed
        self._heap: list[tuple[float, str]] = []
        self._most = _FEW

    def add(self, at: float, job_id: str) -> None:
        """Note that the job has to have been started at the time ``at``."""
        if len(self._heap) >= self._most:
            self._heap = [item for item in self._heap if self._needed(item[1])]
            heapify(self._heap)
            self._most = max(_FEW, 2 * len(self._heap))
        heappush(self._heap, (at, job_id))

    def due(self, now: float) -> Iterator[str]:
        """Yield, and forget, the jobs whose time is over and who still need one."""
        while self._heap and self._heap[0][0] <= now:
            job_id = heappop(self._heap)[1]
            if self._needed(job_id):
                yield job_id

    @property
    def next(self) -> float | None:
        """When something is due."""
        return self._heap[0][0] if self._heap else None
