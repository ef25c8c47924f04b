"""The time that a request may take."""

import math
import time
from collections.abc import Callable

# The pool, too, knows how long a job may wait, and says better than we could when to ask again: it gets the first word.
POOL_GRACE_S = 0.5


class Deadline:
    """The end of ``seconds`` from now; None: there is none.

    ``start_within_s`` is how long the pool may let a job wait: all of that, or less if ``queue_s`` is (0: no bound of
    its own); 0 if there is no bound at all. ``late_s``: somebody else ends it, so here it is over only so much later.
    """

    __slots__ = ("_at", "_clock", "_unstarted_at", "seconds", "start_within_s")

    def __init__(
        self,
        seconds: float | None,
        queue_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        late_s: float = 0.0,
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._at = math.inf if seconds is None else clock() + seconds + late_s
        self._unstarted_at = self._at + POOL_GRACE_S
        self.start_within_s = min((each for each in (seconds, queue_s) if each), default=0.0)

    def left(self, started: bool) -> float | None:
        """Seconds until it is over, at least 0; a little longer for what has not started. None: for ever."""
        if self.seconds is None:
            return None
        return max(0.0, (self._at if started else self._unstarted_at) - self._clock())

    def is_over(self, started: bool) -> bool:
        """Whether there is nothing left."""
        return self._clock() >= (self._at if started else self._unstarted_at)
