"""Special tokens in what a client wrote: they are text there, and open no turn.

The template's own marks become special tokens because the tokenizer finds them in the rendered conversation. Where a
message holds the same characters, a character that no text has is put into them before the template sees them. It goes
through the template with them, and the rendered text is cut there before it is encoded, so the tokenizer never meets
the whole mark. The text that the model reads is what the client wrote; text without such marks is encoded as ever.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

# Unicode's noncharacters: allowed in JSON, and meaning nothing.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# A millisecond's work.
_STEP = 65_536


class SpecialTokens:
    """The special tokens of one tokenizer, as they are written; ``more``: others that mean something to the model."""

    def __init__(self, tokenizer: Tokenizer, more: frozenset[str] = frozenset()) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        written = {token.content for token in added if token.special} | more
        # Nothing can be cut that is only one character long.
        marks = sorted((mark for mark in written if len(mark) > 1), key=len, reverse=True)
        self._firsts = {mark[0] for mark in marks}
        self._longest = max(map(len, marks), default=0)
        self._pattern = re.compile("|".join(map(re.escape, marks))) if marks else None

    def cut(self, value: Any) -> tuple[Any, str]:
        """Return ``value`` (texts in lists and dicts) with its marks cut, and the character of the cuts.

        The character is "" if there are no marks: the very same value comes back.
        """
        texts = list(_texts(value))
        if not any(self._finds(text) for text in texts):
            return value, ""
        # One look after the other, since each holds up all threads.
        character = next((each for each in _CUTS if not any(each in text for text in texts)), "")
        if not character:
            # Whoever writes all of them means no good; one of them less is no loss.
            character = _CUTS[0]
            value = _replace(value, lambda text: text.replace(character, ""))
        return _replace(value, lambda text: self._cut(text, character)), character

    def _finds(self, text: str) -> bool:
        return next(self._places(text), None) is not None

    def _cut(self, text: str, character: str) -> str:
        # Again and again, since marks may overlap.
        while places := list(self._places(text)):
            ends = [0, *(place + 1 for place in places), len(text)]
            text = character.join(text[begin:end] for begin, end in itertools.pairwise(ends))
        return text

    def _places(self, text: str) -> Iterator[int]:
        """Yield where marks begin that do not overlap.

        A search holds up all threads, so that of megabytes is done in steps.
        """
        if self._pattern is None or not any(map(text.__contains__, self._firsts)):
            return
        at = 0
        while at < len(text):
            end = at + _STEP
            found = self._pattern.search(text, at, end + self._longest - 1)
            if found is None or found.start() >= end:
                at = end
            else:
                yield found.start()
                at = found.end()


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += each.keys()
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each


def _replace(value: Any, change: Any) -> Any:
    """Return a copy with each text changed. As deep as the JSON gate lets a request be."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_replace(key, change): _replace(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(each, change) for each in value]
    return value
