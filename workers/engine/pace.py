"""How fast the model has been, and how long that lets a slice of a prompt be."""

# Below this many tokens a slice of a prompt is not worth a pass of its own; beside others that decode it needs none.
SMALLEST_CHUNK = 16
SMALLEST_EXTRA = 4
# With nobody waiting for a next token a slice may be this many times longer: fewer passes, better use of the hardware.
IDLE_FACTOR = 4
# No slice should take longer than this (seconds): cancellations wait for it, and the pool takes silence for death.
LONGEST_SLICE_S = 0.5
# While others wait for their next token, a slice may take this many times as long as their step, more where more
# sequences wait for their first token than for their next, but at most so many times: a token gap of 2.2 steps.
SLICE_PER_STEP = 0.6
MOST_PER_STEP = 1.2
# So short a slice (seconds) disturbs nobody.
SHORTEST_SLICE_S = 0.002
# Weight of the newest measurement in what is known about speed.
LEARNING_RATE = 0.3
# The same where a step took longer than is known: that others want the processors, too, is no reason for long slices.
LEARNING_RATE_OF_SLOW_STEPS = 0.02
# What was measured with so many times as many rows, or so many times fewer, says nothing.
ALIKE = 2.0


class Pace:
    """What passes have taken so far. ``prefill_chunk``: the most prompt tokens of a pass in which others decode."""

    def __init__(self, prefill_chunk: int) -> None:
        self.prefill_chunk = prefill_chunk
        # Measured; 0 while unknown.
        self._seconds_per_token = 0.0
        # Seconds of a pass without prompts, by its rows. Kept apart, since few rows must not be thought as slow as
        # many: a slice beside them would be as long as many rows take.
        self._step_seconds: dict[int, float] = {}

    def expect(self, seconds_per_token: float) -> None:
        """Say how fast prompts will be read, until passes have been measured."""
        self._seconds_per_token = seconds_per_token

    def note(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a pass of ``rows`` decoding sequences and slices of ``prompt_tokens`` tokens in all."""
        if not prompt_tokens:
            known = self._step_seconds.get(rows, 0.0)
            rate = LEARNING_RATE if seconds < known else LEARNING_RATE_OF_SLOW_STEPS
            self._step_seconds[rows] = _learned(known, seconds, rate)
        elif prompt_tokens >= SMALLEST_EXTRA:
            own = seconds - self._step_of(rows)
            measured = max(own, 0.1 * seconds) / prompt_tokens
            self._seconds_per_token = _learned(self._seconds_per_token, measured, LEARNING_RATE)

    def budget(self, reading: int, rows: int) -> int:
        """Return how many prompt tokens the next pass may carry, for ``reading`` sequences beside ``rows`` that decode.

        0 asks for a pass without prompts, because nothing is known yet of how long the decoding ones take.
        """
        if not rows:
            tokens = self.prefill_chunk * IDLE_FACTOR
            if self._seconds_per_token:
                tokens = min(tokens, int(LONGEST_SLICE_S / self._seconds_per_token))
            return max(tokens, SMALLEST_CHUNK)
        step = self._step_of(rows)
        if not step:
            return 0
        tokens = self.prefill_chunk
        if self._seconds_per_token:
            share = min(SLICE_PER_STEP * (1 + reading / rows), MOST_PER_STEP)
            longest = min(LONGEST_SLICE_S, max(share * step, SHORTEST_SLICE_S))
            tokens = min(tokens, int(longest / self._seconds_per_token))
        return max(tokens, SMALLEST_EXTRA)

    def _step_of(self, rows: int) -> float:
        """Return the seconds of a pass of ``rows`` decoding sequences, as far as similar ones are known, or 0."""
        if not rows or not self._step_seconds:
            return 0.0
        times, nearest = min((max(known, rows) / min(known, rows), known) for known in self._step_seconds)
        return self._step_seconds[nearest] if times <= ALIKE else 0.0


def _learned(known: float, measured: float, rate: float) -> float:
    return known + rate * (measured - known) if known else measured
