"""What each live job is and what it has produced so far: enough to go on where a dead worker stopped.

Only the broker touches the journal.
"""

from typing import Protocol

import msgspec

from workers.messages import Cancel, EmbedJob, Event, GenerateJob, Job, Order, Output, Started


class Client(Protocol):
    """Somebody who sends jobs: `post` keeps an event for the end of the turn, ``jobs`` are theirs that live."""

    jobs: dict[str, "Entry"]

    def post(self, event: Event) -> None: ...


class Entry:
    """One live job of one client.

    ``emitted`` holds the tokens delivered of each choice, ``finished`` the choices that have ended, ``dropped`` those
    of them that ended because the client has all it wants, ``heard`` the kinds of events that a job sends only once.
    ``load`` is the number of sequences the job still costs, ``cost`` the most tokens that all of it may take.
    ``deaths`` of workers it has seen; at the last one it ``stood`` at these lengths, and was ``alone`` or was not.
    ``position`` in the queue and ``told_at`` (seconds) are those last told to the client.
    """

    __slots__ = (
        "alone",
        "client",
        "cost",
        "deaths",
        "dropped",
        "emitted",
        "finished",
        "heard",
        "job",
        "load",
        "position",
        "stood",
        "told_at",
        "worker",
    )

    def __init__(self, job: Job, client: Client) -> None:
        self.job = job
        self.client = client
        self.worker: int | None = None
        self.deaths = 0
        self.alone = False
        self.stood: list[int] = []
        self.position = -1
        self.told_at = 0.0
        self.heard: set[type] = set()
        self.finished: set[int] = set()
        self.dropped: set[int] = set()
        if isinstance(job, GenerateJob):
            self.emitted = [list(ids) for ids in job.emitted[: job.n]] + [[] for _ in range(job.n - len(job.emitted))]
            self.load = job.beams.num_beams if job.beams else job.n
            self.cost = len(job.prompt) + self.load * job.max_tokens
        else:
            self.emitted = []
            self.load = 1
            self.cost = len(job.prompt)

    def accept(self, output: Output) -> bool:
        """Note the tokens of ``output``; return False if it is no news: a replay may repeat the end of a choice."""
        choice = output.choice
        if choice in self.finished or not 0 <= choice < len(self.emitted):
            return False
        self.emitted[choice] += output.ids
        if output.finish_reason is not None:
            self._finish(choice)
        return True

    def drop(self, choice: int) -> bool:
        """The client wants no more of ``choice``; return whether that is news."""
        if choice in self.finished or not 0 <= choice < len(self.emitted):
            return False
        self.dropped.add(choice)
        self._finish(choice)
        return True

    @property
    def complete(self) -> bool:
        """Whether every choice of a `GenerateJob` has ended."""
        return len(self.finished) == len(self.emitted)

    @property
    def started(self) -> bool:
        """Whether a worker has begun with it."""
        return Started in self.heard

    @property
    def is_new(self) -> bool:
        """Whether no worker has begun with it, nor died while it had it."""
        return not self.deaths and Started not in self.heard

    def die(self, alone: bool) -> bool:
        """Its worker is dead, and had no other job if ``alone``. Returns whether that proves it to be the cause: it was
        alone the last time as well, and in the very same place. What kills from outside, twice, hits two places.
        """
        place = [len(ids) for ids in self.emitted]
        proven = alone and self.alone and place == self.stood
        self.worker = None
        self.deaths += 1
        self.alone = alone
        self.stood = place
        return proven

    def has_come(self, tokens: int) -> bool:
        """Whether every unfinished choice is so many tokens further than at the last death. Embeddings never are."""
        return bool(self.stood) and all(
            len(ids) >= stood + tokens
            for choice, (ids, stood) in enumerate(zip(self.emitted, self.stood, strict=True))
            if choice not in self.finished
        )

    def orders(self) -> list[Order]:
        """Return what to send to a worker so that it goes on behind the last delivered token."""
        job = self.job
        if isinstance(job, EmbedJob):
            return [job]
        if any(self.emitted):
            job = msgspec.structs.replace(job, emitted=[list(ids) for ids in self.emitted])
        # From its tokens alone the engine could not tell that the client wants no more of these.
        return [job, *(Cancel(id=job.id, choice=choice) for choice in sorted(self.dropped))]

    def _finish(self, choice: int) -> None:
        self.finished.add(choice)
        if isinstance(self.job, GenerateJob) and self.job.beams is None:
            self.load -= 1
