"""How long the requests of this process wait for their tokens, noted where the tokens come in.

A slow client must not look like a slow model, so these are the times at which the pool's frames arrived. The cost is
paid for every token: a list grows here, and whoever counts takes it away every second.
"""


class Timings:
    """Waits in seconds since they were last taken: for the next token, for the first one, in the queue."""

    __slots__ = ("first_tokens", "gaps", "now", "queued")

    # What is kept if nobody takes it; the rest is not noted.
    MOST = 1_000_000

    def __init__(self) -> None:
        # When the frame came whose events are being handed out: `time.monotonic`.
        self.now = 0.0
        self.gaps: list[float] = []
        self.first_tokens: list[float] = []
        self.queued: list[float] = []

    def arrived(self, now: float) -> None:
        """A frame has come; its events belong to this moment."""
        self.now = now
        if len(self.gaps) > self.MOST:
            self.gaps.clear()

    def take(self) -> tuple[list[float], list[float], list[float]]:
        """Return the gaps, the waits for a first token and those in the queue, and begin anew."""
        taken = self.gaps, self.first_tokens, self.queued
        self.gaps, self.first_tokens, self.queued = [], [], []
        return taken
