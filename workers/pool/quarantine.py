"""Jobs that were in flight at two deaths: each is tried alone, so that the one that kills is found and no other blamed.

A worker set apart for that is a *ward*. Whoever has come `PROBATION_TOKENS` further there, alone, than at the last
death makes room for the next: a hundred suspects are through in the time of a hundred prompts.
"""

from collections.abc import Callable
from typing import Generic

from workers.messages import Cancel, PoolCounters
from workers.pool.journal import Entry
from workers.pool.placement import Placement, W

PROBATION_TOKENS = 8

# A cancel for no job: its confirmation says that the worker has let go of everything that it was ever told to.
_FENCE = Cancel(id="", confirm=True)


class Ward:
    """``tried``: the job that has it. Between two, the worker is ``asked`` whether it is ``quiet``: it could still be
    at work on something cancelled, and hang or die of that.
    """

    __slots__ = ("asked", "leaving", "quiet", "tried")

    def __init__(self) -> None:
        self.tried: Entry | None = None
        self.leaving = False
        self.asked = False
        self.quiet = False


class Quarantine(Generic[W]):
    """Who waits for a trial, in order (``suspects``), and who has one. ``park(entry)`` takes a job back into the queue.

    Wards are chosen from idle workers, one stays out of it if there are several. If no worker is idle, and none
    expected, somebody's jobs are parked for the time of the trials.
    """

    def __init__(self, placement: Placement[W], counts: PoolCounters, park: Callable[[Entry], None]) -> None:
        self.suspects: dict[str, Entry] = {}
        self.wards: dict[int, Ward] = {}
        self._placement = placement
        self._counts = counts
        self._park = park
        # Jobs that were told to leave their worker, which has not confirmed it yet.
        self._parking: set[str] = set()

    @property
    def tokens(self) -> int:
        """What the suspects may take."""
        return sum(entry.cost for entry in self.suspects.values())

    def add(self, entry: Entry) -> None:
        """Let the job have a trial."""
        self.suspects[entry.job.id] = entry

    def awaits_word_of(self, index: int) -> bool:
        """Whether worker ``index`` was asked something."""
        ward = self.wards.get(index)
        return ward is not None and ward.asked and not ward.quiet

    # --- each turn ----------------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """Begin the trials that can begin, and close wards that nobody needs."""
        for index, ward in list(self.wards.items()):
            if ward.tried is None and not self._placement.count(index):
                self._fill(index, ward)
        vacant = sum(ward.tried is None for ward in self.wards.values())
        while len(self.suspects) > vacant and len(self.wards) < max(1, len(self._placement) - 1):
            idle = self._placement.idle()
            if idle is None:
                break
            self._open(idle)
            vacant += 1
        if self.suspects and not self.wards and (busy := self._placement.least_busy_of_all()) is not None:
            for entry in self._placement.jobs_of(busy):
                self._ask_to_leave(entry)
            self._open(busy)

    def review(self, index: int) -> None:
        """Worker ``index`` has sent something: let the job that is tried there go on elsewhere, if it has passed."""
        ward = self.wards.get(index)
        if ward is None or ward.tried is None or ward.leaving or not ward.tried.has_come(PROBATION_TOKENS):
            return
        if self.suspects:
            ward.leaving = True
            self._ask_to_leave(ward.tried)
        else:
            self._close(index)

    def _open(self, index: int) -> None:
        ward = self.wards[index] = Ward()
        self._placement.set_apart(index)
        if not self._placement.count(index):
            self._fill(index, ward)

    def _fill(self, index: int, ward: Ward) -> None:
        if not self.suspects:
            self._close(index)
        elif not self._placement.takes_jobs(index):
            return
        elif ward.quiet:
            ward.tried = self.suspects.pop(next(iter(self.suspects)))
            self._counts.quarantined += 1
            self._placement.give(ward.tried, index)
        elif not ward.asked:
            ward.asked = True
            self._placement.tell(index, _FENCE)

    def _close(self, index: int) -> None:
        del self.wards[index]
        self._placement.join(index)

    def _ask_to_leave(self, entry: Entry) -> None:
        assert entry.worker is not None
        self._parking.add(entry.job.id)
        self._placement.tell(entry.worker, Cancel(id=entry.job.id, confirm=True))

    # --- what happens -------------------------------------------------------------------------------------------------

    def confirmed(self, index: int, entry: Entry | None) -> None:
        """Worker ``index`` has let go of the job, or of everything (None). Until now it was the job's worker: whatever
        it still sent was news.
        """
        if entry is None:
            if (ward := self.wards.get(index)) is not None:
                ward.quiet = ward.asked
        elif entry.job.id in self._parking:
            self._placement.take_away(entry)
            self.left(index, entry)
            self._park(entry)

    def left(self, index: int, entry: Entry) -> None:
        """The job has left worker ``index``, one way or the other."""
        self._parking.discard(entry.job.id)
        ward = self.wards.get(index)
        if ward is not None and ward.tried is entry:
            self.wards[index] = Ward()

    def worker_lost(self, index: int) -> Entry | None:
        """Worker ``index`` is dead; return the job that was tried there, unless it had passed."""
        for entry in self._placement.jobs_of(index):
            self._parking.discard(entry.job.id)
        ward = self.wards.get(index)
        if ward is None:
            return None
        self._close(index)
        return None if ward.leaving else ward.tried
