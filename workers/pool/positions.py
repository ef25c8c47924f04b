"""The places in the queue that clients are told."""

from workers.messages import Queued
from workers.pool.journal import Entry
from workers.pool.waiting import WaitingLine

# Seconds between two news for the same job.
TELL_S = 1.0


class Positions:
    """Tells each job's client how many jobs are before it: when it is queued, and later when that has changed."""

    def __init__(self, queue: WaitingLine) -> None:
        self._queue = queue
        self._next = 0.0

    def first(self, entry: Entry, position: int, now: float) -> None:
        """Tell the place of a job that was just queued."""
        entry.position, entry.told_at = position, now
        entry.client.post(Queued(id=entry.job.id, position=position))

    def tell(self, ahead: int, now: float) -> None:
        """Tell what has changed; ``ahead`` jobs are before the whole queue. Nothing to do most of the time."""
        if not self._queue.changed or now < self._next:
            return
        self._queue.changed = False
        self._next = now + TELL_S
        for position, entry in enumerate(self._queue, ahead):
            if position == entry.position or entry.started:
                continue
            if now - entry.told_at < TELL_S:
                self._queue.changed = True
            else:
                self.first(entry, position, now)
