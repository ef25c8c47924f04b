"""Special tokens in what a client wrote: they are text there, and open no turn.

The template's own marks become special tokens because the tokenizer finds them in the rendered conversation. Where a
message holds the same characters, a character that no text has is put into them before the template sees them. It goes
through the template with them, and the rendered text is cut there before it is encoded, so the tokenizer never meets
the whole mark. The text that the model reads is what the client wrote; text without such marks is encoded as ever.
"""

import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

# Unicode's noncharacters: allowed in JSON, and meaning nothing.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class SpecialTokens:
    """The special tokens of one tokenizer, as they are written; ``more``: others that mean something to the model."""

    def __init__(self, tokenizer: Tokenizer, more: frozenset[str] = frozenset()) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        written = {token.content for token in added if token.special} | more
        # Nothing can be cut that is only one character long.
        marks = sorted((mark for mark in written if len(mark) > 1), key=len, reverse=True)
        self._firsts = {mark[0] for mark in marks}
        self._pattern = re.compile("|".join(map(re.escape, marks))) if marks else None

    def cut(self, value: Any) -> tuple[Any, str]:
        """Return ``value`` (texts in lists and dicts) with its marks cut, and the character of the cuts.

        The character is "" if there are no marks: the very same value comes back.
        """
        texts = list(_texts(value))
        if not any(self._finds(text) for text in texts):
            return value, ""
        used = set().union(*texts)
        character = next((each for each in _CUTS if each not in used), "")
        if not character:
            # Whoever writes all of them means no good; one of them less is no loss.
            character = _CUTS[0]
            value = _replace(value, lambda text: text.replace(character, ""))
        return _replace(value, lambda text: self._cut(text, character)), character

    def _finds(self, text: str) -> bool:
        if self._pattern is None or not any(map(text.__contains__, self._firsts)):
            return False
        return self._pattern.search(text) is not None

    def _cut(self, text: str, character: str) -> str:
        # Again and again, since marks may overlap.
        while self._pattern is not None and self._finds(text):
            text = self._pattern.sub(lambda found: found[0][0] + character + found[0][1:], text)
        return text


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
