"""The jobs that wait for a model worker."""

from collections.abc import Iterator, Sequence

from workers.pool.journal import Entry


class WaitingLine:
    """Each owner's jobs in their order, and the owners in turns: who sends many does not hold up who sends one.

    Jobs that had a worker go before all others. ``tokens`` is what all of them may take; ``changed`` becomes True
    whenever a position may have.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.changed = False
        self._returned: dict[str, Entry] = {}
        # By owner; the one whose turn it is comes first. Nobody is in it without a job.
        self._lines: dict[str, dict[str, Entry]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """Yield the jobs in the order in which `pop` would return them."""
        yield from self._returned.values()
        lines = [iter(line.values()) for line in self._lines.values()]
        while lines:
            longer = []
            for line in lines:
                if (entry := next(line, None)) is not None:
                    yield entry
                    longer.append(line)
            lines = longer

    def has_job_of(self, owner: str) -> bool:
        """Whether a job of ``owner`` waits for its first worker."""
        return owner in self._lines

    def append(self, entry: Entry) -> int:
        """Take a job behind its owner's others; return how many jobs would be popped before it."""
        owner = entry.job.salt
        line = self._lines.setdefault(owner, {})
        rounds = len(line)
        line[entry.job.id] = entry
        self._count_in(entry)
        before, turn = len(self._returned) + rounds, 1
        for other, theirs in self._lines.items():
            if other == owner:
                turn = 0
            else:
                before += min(len(theirs), rounds + turn)
        return before

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Take jobs that had a worker, in their order, before all others."""
        self._returned = {**{entry.job.id: entry for entry in entries}, **self._returned}
        for entry in entries:
            self._count_in(entry)

    def put_back_last(self, entry: Entry) -> None:
        """Take a job that had a worker, behind those that were put back before."""
        self._returned[entry.job.id] = entry
        self._count_in(entry)

    def pop(self) -> Entry:
        """Return the next job. Raises StopIteration if there is none."""
        if self._returned:
            entry = self._returned.pop(next(iter(self._returned)))
        else:
            owner, line = next(iter(self._lines.items()))
            entry = line.pop(next(iter(line)))
            del self._lines[owner]
            if line:
                self._lines[owner] = line
        self._count_out(entry)
        return entry

    def discard(self, entry: Entry) -> None:
        """Take a job out, wherever it stands."""
        job = entry.job
        line = self._lines.get(job.salt, {})
        if self._returned.pop(job.id, None) or line.pop(job.id, None):
            self._count_out(entry)
            if not line:
                self._lines.pop(job.salt, None)

    def _count_in(self, entry: Entry) -> None:
        self._count += 1
        self.tokens += entry.cost
        self.changed = True

    def _count_out(self, entry: Entry) -> None:
        self._count -= 1
        self.tokens -= entry.cost
        self.changed = True
