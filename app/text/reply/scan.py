"""Reading a text that arrives in pieces, as if it were whole.

The parsers are generators over a `Cursor`: wherever they need a character that has not come yet they yield, and go on
when it has. What they find therefore cannot depend on how the text was cut. Each character is looked at a bounded
number of times, whatever the text is: nothing is ever read again from an earlier place.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]

# White space as JSON knows it; the grammars mean the same.
SPACE = " \t\r\n"

_SPACE = re.compile(r"[ \t\r\n]*")
# Possessive, or a string without an end would be tried again and again.
_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OPENING = re.compile(r"[{\[]+")
_CLOSING = re.compile(r"[}\]]+")
# No brackets, and strings only as a whole.
_FLAT = re.compile(r'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)


class Words:
    """Words to look for, all at once."""

    __slots__ = ("beginnings", "longest", "search", "words")

    def __init__(self, *words: str) -> None:
        self.words = words
        self.longest = max(map(len, words), default=0)
        self.beginnings = frozenset(word[:size] for word in words for size in range(1, len(word)))
        self.search = re.compile("|".join(map(re.escape, words))).search

    def __bool__(self) -> bool:
        return bool(self.words)


class Cursor:
    """A place in a text that is still arriving.

    ``kept``, while it is a list, takes everything that is read: what becomes content again if it turns out to be none
    of what was expected.
    """

    __slots__ = ("at", "ended", "kept", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self.kept: list[str] | None = None

    def feed(self, text: str) -> None:
        """Append ``text``."""
        self.text = self.text[self.at :] + text if self.at < len(self.text) else text
        self.at = 0

    def take(self, end: int) -> str:
        """Read up to the place ``end`` of what has arrived."""
        piece = self.text[self.at : end]
        self.at = end
        if self.kept is not None:
            self.kept.append(piece)
        return piece

    def unkeep(self) -> str:
        """Stop keeping, and return what was kept."""
        kept, self.kept = self.kept, None
        return "".join(kept or ())

    def peek(self) -> Steps[str]:
        """Return the next character, "" at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Steps[None]:
        """Skip white space."""
        while (yield from self.peek()) in SPACE:
            found = _SPACE.match(self.text, self.at)
            if found is None or found.end() == self.at:
                return
            self.take(found.end())

    def word(self, word: str) -> Steps[bool]:
        """Read ``word`` if it comes next; otherwise nothing."""
        while not self.ended and len(self.text) - self.at < len(word) and word.startswith(self.text[self.at :]):
            yield
        if not self.text.startswith(word, self.at):
            return False
        self.take(self.at + len(word))
        return True

    def closing(self, word: str) -> Steps[bool]:
        """Read ``word`` if it comes next, or as much of it as there is where the text is cut off in it."""
        if (yield from self.word(word)):
            return True
        if self.ended and word.startswith(self.text[self.at :]):
            self.take(len(self.text))
        return False

    def until(self, words: Words, sink: Sink) -> Steps[str]:
        """Give ``sink`` everything before the first of ``words``, read that too and return it; "" if none comes."""
        while True:
            found = words.search(self.text, self.at) if words else None
            if found is not None:
                if found.start() > self.at:
                    sink(self.take(found.start()))
                return self.take(found.end())
            end = len(self.text) if self.ended else self._certain(words)
            if end > self.at:
                sink(self.take(end))
            if self.ended:
                return ""
            yield

    def _certain(self, words: Words) -> int:
        """Return where the first of ``words`` may have begun."""
        text = self.text
        for place in range(max(self.at, len(text) - words.longest + 1), len(text)):
            if text[place:] in words.beginnings:
                return place
        return len(text)

    def match(self, pattern: re.Pattern[str], limit: int) -> Steps[str | None]:
        """Read what ``pattern`` matches here, at most ``limit`` characters of it; None, and nothing, if it does not.

        ``pattern`` must match every beginning of what it matches, as a character class with ``+`` does.
        """
        while not self.ended and len(self.text) - self.at < limit:
            found = pattern.match(self.text, self.at)
            if self.at < len(self.text) and (found is None or found.end() < len(self.text)):
                break
            yield
        found = pattern.match(self.text, self.at, self.at + limit)
        return None if found is None else self.take(found.end())

    # --- JSON

    def string(self, sink: Sink, limit: int | None = None) -> Steps[bool]:
        """Read a JSON string, its quotes included; False if it has no end, or more than ``limit`` characters."""
        if not (yield from self.word('"')):
            return False
        sink('"')
        size = 0
        while (yield from self.peek()):
            found = _IN_STRING.match(self.text, self.at)
            assert found is not None
            if found.end() > self.at:
                size += found.end() - self.at
                if limit is not None and size > limit:
                    return False
                sink(self.take(found.end()))
            elif self.text[self.at] == '"':
                sink(self.take(self.at + 1))
                return True
            else:
                # A backslash and what it escapes.
                while len(self.text) - self.at < 2 and not self.ended:
                    yield
                sink(self.take(min(self.at + 2, len(self.text))))
                size += 2
        return False

    def brackets(self, sink: Sink) -> Steps[bool]:
        """Read a JSON object or array; False if it has no end.

        Only brackets and strings are looked at: inside, what is no JSON passes.
        """
        depth = 0
        while (yield from self.peek()):
            found = _FLAT.match(self.text, self.at)
            if depth and found is not None and found.end() > self.at:
                sink(self.take(found.end()))
                continue
            opening = _OPENING.match(self.text, self.at)
            if opening is not None:
                depth += opening.end() - self.at
                sink(self.take(opening.end()))
                continue
            closing = _CLOSING.match(self.text, self.at)
            if closing is not None:
                end = min(closing.end(), self.at + depth)
                depth -= end - self.at
                sink(self.take(end))
                if depth == 0:
                    return True
            elif not (yield from self.string(sink)):
                return False
        return False

    def value(self, sink: Sink) -> Steps[bool]:
        """Read any JSON value; False if it has no end."""
        first = yield from self.peek()
        if first == '"':
            return (yield from self.string(sink))
        if first and first in "{[":
            return (yield from self.brackets(sink))
        scalar = yield from self.match(_SCALAR, _LONGEST_SCALAR)
        if scalar is None:
            return False
        sink(scalar)
        return True


_SCALAR = re.compile(r"[A-Za-z0-9+.\-]+")
_LONGEST_SCALAR = 64
