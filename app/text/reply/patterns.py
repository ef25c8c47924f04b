"""Delimiters that a tokenizer declares, as steps that a `Cursor` can read in linear time.

A declaration may use any regular expression. Those of real models are texts, white space, and a name made of some class
of characters; only these are understood, for in any other a hostile text could make the search slow.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.text.reply.scan import Cursor, Steps

# Characters of a captured name.
LONGEST_CAPTURE = 256

_PIECES = re.compile(
    r"(?P<space>\\s[*+]?)"
    r"|\(\?P<(?P<capture>\w+)>(?P<kind>\[(?:\\.|[^\]\\])+\]|\\[wS])\+\)"
    r"|\\(?P<escaped>[^A-Za-z0-9])"
    r"|\\(?P<control>[nt])"
    r"|(?P<plain>[^\\^$.|?*+()\[\]{}])"
)
_CONTROL = {"n": "\n", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Literal:
    """Exactly this text."""

    text: str


@dataclass(frozen=True, slots=True)
class Space:
    """White space, or none."""


@dataclass(frozen=True, slots=True)
class Capture:
    """One or more characters of a class; they are ``name``."""

    name: str
    kind: re.Pattern[str]


Step = Literal | Space | Capture


def literal(text: str) -> list[Step]:
    """Return the steps that read ``text``."""
    return [Literal(text)]


def steps_of(pattern: str) -> list[Step]:
    """Return the steps of a regular expression. Raises `ValueError` if it is none that is understood."""
    steps: list[Step] = []
    place = 0
    while place < len(pattern):
        found = _PIECES.match(pattern, place)
        single = found is not None and (found["plain"] or found["escaped"])
        if found is None or (single and pattern[found.end() :].startswith(("*", "+", "?", "{"))):
            raise ValueError(f"the pattern {pattern!r} is not understood")
        place = found.end()
        if found["space"]:
            steps.append(Space())
        elif found["capture"]:
            steps.append(Capture(found["capture"], re.compile(f"{found['kind']}+")))
        else:
            text = found["plain"] or found["escaped"] or _CONTROL[found["control"]]
            last = steps[-1] if steps else None
            if isinstance(last, Literal):
                steps[-1] = Literal(last.text + text)
            else:
                steps.append(Literal(text))
    return steps


def read(cursor: Cursor, steps: Sequence[Step]) -> Steps[dict[str, str] | None]:
    """Read ``steps``, and return what they captured; None if the text is another."""
    captured: dict[str, str] = {}
    for step in steps:
        match step:
            case Space():
                yield from cursor.space()
            case Literal(text):
                if not (yield from cursor.word(text)):
                    return None
            case Capture(name, kind):
                value = yield from cursor.match(kind, LONGEST_CAPTURE)
                if value is None:
                    return None
                captured[name] = value
    return captured
