"""Jobs that have ended model workers: known by their fingerprints, and refused for a while."""

from collections.abc import Callable
from hashlib import sha256

import msgspec

from workers.messages import GenerateJob, Job

REFUSED_S = 600.0
MOST = 1024


def fingerprint(job: Job) -> bytes:
    """Return the SHA-256 of all that a model worker is told by ``job``, its id, seed and earlier tokens aside.

    The owner is a part of it: nobody can find out by it what others have asked.
    """
    if isinstance(job, GenerateJob):
        sampling = msgspec.structs.replace(job.sampling, seed=0)
        job = msgspec.structs.replace(job, id="", sampling=sampling, emitted=[], start_within_s=0.0, kept="")
    else:
        job = msgspec.structs.replace(job, id="", start_within_s=0.0)
    return sha256(msgspec.msgpack.encode(job)).digest()


class Poisons:
    """Fingerprints of the jobs that were found out in the last `REFUSED_S` seconds, `MOST` of them at most."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # When each is forgotten, the next one first.
        self._until: dict[bytes, float] = {}

    def add(self, job: Job) -> bytes:
        """Remember what ``job`` is like; return its fingerprint."""
        mark = fingerprint(job)
        self._until.pop(mark, None)
        self._until[mark] = self._clock() + REFUSED_S
        if len(self._until) > MOST:
            self._forget_first()
        return mark

    def __contains__(self, job: Job) -> bool:
        """Whether ``job`` is like one of them. Costs nothing as long as there are none."""
        now = self._clock()
        while self._until and next(iter(self._until.values())) <= now:
            self._forget_first()
        return bool(self._until) and fingerprint(job) in self._until

    def _forget_first(self) -> None:
        del self._until[next(iter(self._until))]
