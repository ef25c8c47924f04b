"""Reasoning: what a model writes between two marks before it answers."""

from dataclasses import dataclass

from app.text.reply.parts import Part, Reasoning, ReplyParser
from app.text.reply.scan import SPACE, Cursor, Steps, Words


@dataclass(frozen=True, slots=True)
class Marks:
    """What begins reasoning, and what ends it."""

    open: str
    close: str


class ThinkingParser:
    """A `ReplyParser`: reasoning at the beginning of the text; all behind it is ``inner``'s.

    ``inside``: the prompt has opened the reasoning already. White space beside the marks belongs to nobody. Without a
    closing mark, all is reasoning.
    """

    def __init__(self, inner: ReplyParser, marks: Marks, inside: bool) -> None:
        self._inner = inner
        self._marks = marks
        self._inside = inside
        self._cursor = Cursor()
        self._parts: list[Part] = []
        self._space: list[str] = []
        self._begun = False
        # Whether the reasoning is over.
        self._past = False
        self._steps = self._machine()
        next(self._steps, None)

    def push(self, text: str) -> list[Part]:
        """Return the parts that have become certain with ``text``."""
        if self._past:
            return self._inner.push(text)
        if not text:
            return []
        self._cursor.feed(text)
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[Part]:
        """Return what was held back, now that no more text will come."""
        if self._past:
            return self._inner.finish()
        self._cursor.ended = True
        next(self._steps, None)
        self._parts += self._inner.finish()
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _machine(self) -> Steps[None]:
        cursor, marks = self._cursor, self._marks
        cursor.kept = []
        yield from cursor.space()
        opened = yield from cursor.word(marks.open)
        before = cursor.unkeep()
        if opened or self._inside:
            if not opened:
                self._more(before)
            if not (yield from cursor.until(Words(marks.close), self._more)):
                self._parts += map(Reasoning, self._space)
                return
            yield from cursor.space()
            before = ""
        self._past = True
        self._parts += self._inner.push(before + cursor.take(len(cursor.text)))

    def _more(self, text: str) -> None:
        if not self._begun:
            text = text.lstrip(SPACE)
        body = text.rstrip(SPACE)
        if body:
            self._parts.append(Reasoning("".join((*self._space, body))))
            self._space.clear()
            self._begun = True
        if len(body) < len(text):
            self._space.append(text[len(body) :])
