"""What a pass may carry while the device is short of memory."""

# So many passes without a shortage, and the ceiling rises again, by a quarter.
QUIET_PASSES = 200


class Ceiling:
    """The most ``rows`` (sequences) that may run at once and the most ``tokens`` of prompts that a pass may read.

    A shortage of memory halves what the pass had that failed; quiet passes raise it again, slowly, since nobody knows
    whether the memory is back. At its full height it asks for nothing but a comparison.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows = self._most_rows = rows
        self.tokens = self._most_tokens = tokens
        self._quiet = 0

    @property
    def lowered(self) -> bool:
        return self.rows < self._most_rows or self.tokens < self._most_tokens

    def lower(self, rows: int, tokens: int) -> None:
        """Note that the memory was not enough for a pass of ``rows`` sequences and ``tokens`` tokens of prompts.

        Prompts give way first: that costs no running sequence its blocks.
        """
        self._quiet = 0
        if tokens > 1:
            self.tokens = max(1, min(self.tokens, tokens // 2))
        else:
            self.rows = max(1, min(self.rows, rows // 2))

    def note_quiet_pass(self) -> None:
        """A pass went well."""
        self._quiet += 1
        if self._quiet >= QUIET_PASSES:
            self._quiet = 0
            self.rows = min(self._most_rows, self.rows + max(1, self.rows // 4))
            self.tokens = min(self._most_tokens, self.tokens + max(1, self.tokens // 4))
