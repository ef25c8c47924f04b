"""Stop strings, found across token borders, without a character of one ever getting out.

Each string is followed with its own Knuth-Morris-Pratt automaton (SIAM J. Comput. 6(2), 1977), one step for each
character of the answer. The automaton's state is the length of the longest tail of the text that is a beginning of the
string: exactly what has to be held back. The first string that becomes complete ends the answer (of several that become
complete with the same character, the longest), so the outcome does not depend on how the text was cut into pieces.
"""

from collections.abc import Sequence


class StopStrings:
    """The strings of one request with their failure tables; shared by its choices."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [text for text in strings if text]
        self.tables = [_failure_table(text) for text in self.strings]

    def __bool__(self) -> bool:
        return bool(self.strings)

    def matcher(self) -> "StopMatcher":
        """Return a matcher for the text of one choice."""
        return StopMatcher(self)


class StopMatcher:
    """Follows the text of one choice. ``matched`` is the string that ended it, or None."""

    __slots__ = ("_held", "_states", "_stops", "matched")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._states = [0] * len(stops.strings)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return what of the held-back and the new text can go out; nothing more comes after a match."""
        if self.matched is not None or not text:
            return ""
        states, strings, tables = self._states, self._stops.strings, self._stops.tables
        for place, character in enumerate(text):
            for which, string in enumerate(strings):
                state, table = states[which], tables[which]
                while state and string[state] != character:
                    state = table[state - 1]
                if string[state] == character:
                    state += 1
                states[which] = state
                if state == len(string):
                    if self.matched is None or len(string) > len(self.matched):
                        self.matched = string
                    # The automaton must not run past its string; after a match it is of no use anyway.
                    states[which] = 0
            if self.matched is not None:
                seen = self._held + text[: place + 1]
                self._held = ""
                return seen[: -len(self.matched)]
        seen = self._held + text
        hold = max(states, default=0)
        self._held = seen[len(seen) - hold :]
        return seen[: len(seen) - hold]

    def flush(self) -> str:
        """Return what is held back, now that no more text will come."""
        held, self._held = self._held, ""
        return held


def _failure_table(text: str) -> list[int]:
    """For each prefix of ``text``, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(text)
    length = 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = table[length - 1]
        if text[place] == text[length]:
            length += 1
        table[place] = length
    return table
