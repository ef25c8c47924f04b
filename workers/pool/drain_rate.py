"""How fast the queue has been draining: what a refused client is told to wait follows from it."""

import math

# Seconds of work that the measurement looks back on: what lies further back counts e times less.
MEMORY_S = 30.0
LEAST_S = 1.0
MOST_S = 60.0


class DrainRate:
    """Tokens of finished jobs, their prompts and the most they might have answered, per second of work.

    Time counts only between `begin` and `pause`, while there is work: after a quiet night the rate is yesterday's.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float) -> None:
        """There is work from now on."""
        if self._since is None:
            self._since = now

    def pause(self, now: float) -> None:
        """All work is done."""
        self._advance(now)
        self._since = None

    def note(self, tokens: int, now: float) -> None:
        """A job of so many tokens has been answered."""
        self._advance(now)
        self._tokens += tokens

    def per_second(self, now: float) -> float:
        """Return the rate, 0.0 as long as nothing was finished."""
        self._advance(now)
        return self._tokens / self._seconds if self._seconds else 0.0

    def seconds_for(self, tokens: int, now: float) -> float:
        """Return how long so many tokens should take: whole seconds, 1 to 60.

        Before anything was finished the best guess is that it goes on for as long as it has lasted.
        """
        rate = self.per_second(now)
        seconds = tokens / rate if rate else self._seconds
        return float(math.ceil(min(MOST_S, max(LEAST_S, seconds))))

    def _advance(self, now: float) -> None:
        if self._since is None:
            return
        kept = math.exp(-(now - self._since) / MEMORY_S)
        self._since = now
        self._tokens *= kept
        self._seconds = self._seconds * kept + MEMORY_S * (1.0 - kept)
