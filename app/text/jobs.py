"""Many small jobs of one request; a bounded number of them is under way at a time."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from app.text.deadline import Deadline
from app.text.errors import DeadlineExceeded, JobFailed
from app.text.generation import EventStream
from workers.messages import Event, Failed, Job, Started

# A long list must not fill the pool's queue for everybody else.
JOBS_AT_A_TIME = 32

R = TypeVar("R")


def run_jobs(
    stream: EventStream,
    jobs: Iterator[Job],
    count: int,
    deadline: Deadline,
    result_of: Callable[[Event], tuple[str, R] | None],
) -> list[R]:
    """Return the result of each of the ``count`` jobs, in order.

    ``result_of`` tells, of the last event of a job, its id and result, and None of any other event. ``jobs`` are made
    when their turn comes. Raises `JobFailed`, `PoolUnavailable`, `DeadlineExceeded`, or what the stream was aborted
    with.
    """
    results: dict[str, R] = {}
    ids: list[str] = []
    started = False
    while len(results) < count:
        while len(ids) < count and len(ids) - len(results) < JOBS_AT_A_TIME:
            job = next(jobs)
            stream.submit(job)
            ids.append(job.id)
        if deadline.is_over(started):
            raise DeadlineExceeded(started)
        for event in stream.get(deadline.left(started)):
            if isinstance(event, Failed):
                if event.cause == "queue_time" and deadline.is_over(started):
                    # Some of the jobs had their turn: it is not the queue that is too long.
                    raise DeadlineExceeded(started)
                raise JobFailed(event)
            if isinstance(event, Started):
                started = True
            found = result_of(event)
            if found is not None:
                results[found[0]] = found[1]
    return [results[each] for each in ids]
