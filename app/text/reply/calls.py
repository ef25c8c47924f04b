"""Calls in a text: what the formats have in common.

Marks and envelopes that are not what they should be are content, as they were written, up to the place where that
became clear; what follows is looked at afresh. A call counts from the moment when its name and the first bracket of
its arguments are there: from then on, the arguments are what the model wrote, up to the matching bracket or the end of
the text. A name that is none of the request's tools makes no call: such text is content too, for a client that runs
what it is told to must not be told to run what it never offered.
"""

import json
from collections.abc import Callable, Iterable

from app.text.reply.parts import Part
from app.text.reply.scan import Cursor, Steps
from app.text.reply.writer import Writer

_ARGUMENTS = ("arguments", "parameters")
# What models write beside name and arguments.
_BESIDE = ("id", "type", "index")
# Characters in a key, and in a name beyond the longest of the tools'.
_LONGEST_KEY = 16


class CallParser:
    """A `ReplyParser` for one format; ``_machine`` reads the text. Subclasses say how."""

    def __init__(self, names: Iterable[str], new_id: Callable[[], str]) -> None:
        self.names = frozenset(names)
        self.longest_name = max(map(len, self.names), default=0)
        self.cursor = Cursor()
        self.out = Writer(new_id)
        self._steps = self.machine()
        next(self._steps, None)

    def push(self, text: str) -> list[Part]:
        """Return the parts that have become certain with ``text``."""
        if not text:
            return []
        self.cursor.feed(text)
        next(self._steps, None)
        return self.out.take()

    def finish(self) -> list[Part]:
        """Return what was held back, now that no more text will come."""
        self.cursor.ended = True
        next(self._steps, None)
        self.out.finish()
        return self.out.take()

    def machine(self) -> Steps[None]:
        """Read the whole text."""
        raise NotImplementedError

    # --- pieces of formats

    def give_up(self) -> None:
        """What was kept is content."""
        self.out.content(self.cursor.unkeep())

    def call_object(self, *, needs_arguments: bool = False) -> Steps[bool]:
        """Read one object of name and arguments in any order; False if it is none: what was kept is content then."""
        cursor = self.cursor
        if cursor.kept is None:
            cursor.kept = []
        complete = yield from self._members(needs_arguments)
        if complete:
            cursor.kept = None
        else:
            self.give_up()
        return complete

    def call_objects(self) -> Steps[bool]:
        """Read such objects, one behind the other, also as a list in brackets; False if the last is none."""
        cursor = self.cursor
        yield from cursor.space()
        listed = yield from cursor.word("[")
        while True:
            yield from cursor.space()
            if not (yield from self.call_object()):
                return False
            yield from cursor.space()
            if listed and (yield from cursor.closing("]")):
                return True
            if not (yield from cursor.word(",")) and (yield from cursor.peek()) != "{":
                return True

    def arguments(self, name: str) -> Steps[bool]:
        """Read the arguments of a call of ``name``, which begins with them; False if they are none."""
        cursor = self.cursor
        first = yield from cursor.peek()
        if first == "{":
            self.out.begin(name)
            # What comes from here on is no content any more, whatever becomes of it.
            cursor.kept = None
            complete = yield from cursor.brackets(self.out.arguments)
            cursor.kept = []
            return complete
        text = yield from self._odd_arguments()
        if text is None:
            return False
        self._whole(name, text)
        return True

    def _members(self, needs_arguments: bool) -> Steps[bool]:
        cursor = self.cursor
        if not (yield from cursor.word("{")):
            return False
        name: str | None = None
        # Arguments that came before the name.
        early: str | None = None
        begun = False
        while True:
            yield from cursor.space()
            # Only of a call that has begun, the end of the text may be the end.
            if (yield from (cursor.closing("}") if begun else cursor.word("}"))):
                break
            if begun and (yield from self._cut_short()):
                return True
            key = yield from self._short_string(_LONGEST_KEY)
            yield from cursor.space()
            if key is None or not (yield from cursor.word(":")):
                return False
            yield from cursor.space()
            if key == "name" and name is None:
                name = yield from self._short_string(6 * self.longest_name)
                if name not in self.names:
                    return False
                assert name is not None
                if early is not None:
                    self._whole(name, early)
                    begun = True
            elif key in _ARGUMENTS and name is not None and not begun:
                if not (yield from self.arguments(name)):
                    return False
                begun = True
            elif key in _ARGUMENTS and early is None and not begun:
                early = yield from self._early_arguments()
                if early is None:
                    return False
            elif key not in _BESIDE or not (yield from cursor.value(_nowhere)):
                return False
            yield from cursor.space()
            yield from cursor.word(",")
        if not begun and name is not None and not needs_arguments:
            self._whole(name, "{}")
            begun = True
        return begun

    def _whole(self, name: str, arguments: str) -> None:
        self.out.begin(name)
        self.out.arguments(arguments)
        self.cursor.kept = []

    def _cut_short(self) -> Steps[bool]:
        """Whether what closes the call comes although a bracket is missing; to be said by formats with such marks."""
        return False
        yield

    def _short_string(self, limit: int) -> Steps[str | None]:
        raw: list[str] = []
        if not (yield from self.cursor.string(raw.append, limit)):
            return None
        value = loads("".join(raw))
        return value if isinstance(value, str) else None

    def _early_arguments(self) -> Steps[str | None]:
        if (yield from self.cursor.peek()) != "{":
            return (yield from self._odd_arguments())
        raw: list[str] = []
        complete = yield from self.cursor.brackets(raw.append)
        return "".join(raw) if complete else None

    def _odd_arguments(self) -> Steps[str | None]:
        """Arguments that are no object: JSON in a string, or null for none."""
        cursor = self.cursor
        if (yield from cursor.word("null")):
            return "{}"
        raw: list[str] = []
        if (yield from cursor.peek()) != '"' or not (yield from cursor.string(raw.append)):
            return None
        text = loads("".join(raw))
        return text if isinstance(text, str) and isinstance(loads(text), dict) else None


def _nowhere(_: str) -> None:
    pass


def loads(text: str) -> object:
    """Return the JSON value that ``text`` is; None if it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
