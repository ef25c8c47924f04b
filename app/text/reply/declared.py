"""Formats that a tokenizer declares itself: the ``response_template`` of transformers 5.

Of such a declaration we read what it says of reasoning and of calls; whatever it does not mention is content anyway.
Calls may be JSON objects of name and arguments between two marks, or have their name in the opening mark and behind it
JSON, JSON with bare keys and quotes of its own, or one tag for each argument. Calls in Hermes' format are read too: a
grammar writes them where the declared format cannot be held to a schema.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.text.reply import hermes
from app.text.reply.calls import CallParser, loads
from app.text.reply.parts import Tool
from app.text.reply.patterns import Capture, Space, Step, literal, read, steps_of
from app.text.reply.patterns import Literal as Text
from app.text.reply.scan import SPACE, Steps, Words
from app.text.reply.thinking import Marks

_REASONING = ("reasoning_content", "reasoning", "thinking")
_VALUE = "(?P<value>.*?)"
_BARE_KEY = re.compile(r"([{,]\s*)([A-Za-z_]\w*)(?=\s*:)")


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a tokenizer declares.

    ``kind`` of the calls: "objects" of name and arguments, "json" behind a name, "lax" such with ``quotes`` of its
    own, or "tags", each ``tag`` and then its value up to ``tag_end``. ``open`` begins with a text.
    """

    marks: Marks | None
    kind: Literal["objects", "json", "lax", "tags"] | None = None
    open: Sequence[Step] = ()
    close: Sequence[Step] = ()
    quotes: Sequence[tuple[str, str]] = ()
    tag: Sequence[Step] = ()
    tag_end: str = ""

    @property
    def lead(self) -> str:
        """The text that calls begin with."""
        first = self.open[0]
        assert isinstance(first, Text)
        return first.text

    @property
    def words(self) -> list[str]:
        """The texts in the delimiters, which may be tokens of the model."""
        texts = [step.text for step in (*self.open, *self.close, *self.tag) if isinstance(step, Text)]
        return [*texts, self.tag_end, *(quote for pair in self.quotes for quote in pair)]


TAGS = Declaration(
    None,
    "tags",
    open=steps_of(r"<tool_call>\s*<function=(?P<name>[^>\n]+)>"),
    close=steps_of(r"\s*</function>\s*</tool_call>"),
    tag=steps_of(r"<parameter=(?P<key>[^>\n]+)>"),
    tag_end="</parameter>",
)
"""Qwen's newer format (Qwen3-Coder, Qwen3.5), which their tokenizers do not declare."""


def declaration(template: Mapping[str, Any]) -> Declaration:
    """Return what ``template`` declares. Raises `ValueError` for what is not understood."""
    fields = template.get("fields")
    if not isinstance(fields, dict):
        raise ValueError("it has no fields")
    marks = next((_marks(fields[name]) for name in _REASONING if name in fields), None)
    calls = fields.get("tool_calls")
    return Declaration(marks) if calls is None else _calls(calls, marks)


def _marks(field: Mapping[str, Any]) -> Marks:
    ends = [_words(_delimiter(field, end)) for end in ("open", "close")]
    return Marks(*ends)


def _words(steps: Sequence[Step]) -> str:
    texts = [step.text for step in steps if isinstance(step, Text)]
    if len(texts) != 1 or any(isinstance(step, Capture) for step in steps):
        raise ValueError("reasoning has marks that are no texts")
    return texts[0]


def _delimiter(field: Mapping[str, Any], end: str) -> list[Step]:
    match field:
        case _ if isinstance(text := field.get(end), str) and text:
            return literal(text)
        case _ if isinstance(pattern := field.get(f"{end}_pattern"), str):
            return steps_of(pattern)
    raise ValueError(f"a field without one {end}")


def _calls(field: Mapping[str, Any], marks: Marks | None) -> Declaration:
    opening = _delimiter(field, "open")
    while opening and isinstance(opening[0], Space):
        # White space before a call is left out anyway.
        opening = opening[1:]
    if not opening or not isinstance(opening[0], Text):
        raise ValueError("calls do not begin with a text")
    closing = _delimiter(field, "close")
    named = any(isinstance(step, Capture) and step.name == "name" for step in opening)
    options = field.get("content_args") or {}
    match field.get("content", "text"), _function(field):
        case "json", "{content}" | {"name": "{name}" | "{content.name}"} if not named and not options:
            return Declaration(marks, "objects", opening, closing)
        case "json", {"name": "{name}", "arguments": "{content}"} if named and not options:
            return Declaration(marks, "json", opening, closing)
        case "json", {"name": "{name}", "arguments": "{content}"} if named:
            quotes = [(str(first), str(last)) for first, last in options.get("string_delims", ())]
            return Declaration(marks, "lax", opening, closing, quotes)
        case "xml-inline", {"name": "{name}", "arguments": "{content}"} if named and "value_parser" not in options:
            before, value, after = str(options.get("tag_pattern")).partition(_VALUE)
            tag, ends = steps_of(before), [step for step in steps_of(after) if isinstance(step, Text)]
            keyed = any(isinstance(step, Capture) and step.name == "key" for step in tag)
            if value and keyed and tag and isinstance(tag[0], Text) and len(ends) == 1:
                return Declaration(marks, "tags", opening, closing, (), tag, ends[0].text)
    raise ValueError("its calls are of an unknown kind")


def _function(field: Mapping[str, Any]) -> Any:
    transform = field.get("transform")
    return transform.get("function") if isinstance(transform, dict) else None


class DeclaredParser(CallParser):
    """A `ReplyParser` for a declared format, and for Hermes'."""

    def __init__(self, tools: Sequence[Tool], new_id: Callable[[], str], declared: Declaration) -> None:
        self._declared = declared
        self._schemas = {tool.name: (tool.parameters or {}).get("properties") for tool in tools}
        self._leads = Words(declared.lead, hermes.OPEN)
        self._tag_end = Words(declared.tag_end)
        # The texts of lax JSON end where the closing mark's text begins.
        self._end = Words(*[step.text for step in declared.close if isinstance(step, Text)][-1:])
        super().__init__([tool.name for tool in tools], new_id)

    def machine(self) -> Steps[None]:
        cursor, declared = self.cursor, self._declared
        while mark := (yield from cursor.until(self._leads, self.out.content)):
            cursor.kept = [mark]
            if mark == hermes.OPEN and (mark != declared.lead or (yield from self._begins_object())):
                if (yield from self.call_objects()):
                    yield from cursor.space()
                    yield from cursor.closing(hermes.CLOSE)
                continue
            captured = yield from read(cursor, declared.open[1:])
            name = (captured or {}).get("name", "")
            if captured is None or (declared.kind != "objects" and name not in self.names):
                self.give_up()
            elif declared.kind == "objects":
                if (yield from self.call_objects()):
                    yield from self._close()
            elif declared.kind == "json":
                yield from cursor.space()
                if not (yield from self.arguments(name)):
                    self.give_up()
                else:
                    cursor.kept = None
                    yield from self._close()
            elif declared.kind == "lax":
                yield from self._lax(name)
            else:
                yield from self._tags(name)

    def _begins_object(self) -> Steps[bool]:
        yield from self.cursor.space()
        first = yield from self.cursor.peek()
        return first != "" and first in "{["

    def _cut_short(self) -> Steps[bool]:
        return (yield from self.cursor.closing(hermes.CLOSE))

    def _close(self) -> Steps[None]:
        """Read what closes a call, or as much of it as there is; what is not there is not missed."""
        for step in self._declared.close:
            yield from self.cursor.space()
            if isinstance(step, Text) and not (yield from self.cursor.closing(step.text)):
                return

    def _lax(self, name: str) -> Steps[None]:
        cursor = self.cursor
        raw: list[str] = []
        mark = yield from cursor.until(self._end, raw.append)
        value = loads(_strict("".join(raw), self._declared.quotes))
        if not isinstance(value, dict) or not mark:
            self.give_up()
            return
        cursor.kept = None
        self.out.begin(name)
        self.out.arguments(json.dumps(value, ensure_ascii=False))

    def _tags(self, name: str) -> Steps[None]:
        cursor, declared, out = self.cursor, self._declared, self.out
        schemas = self._schemas[name]
        out.begin(name)
        out.arguments("{")
        between = ""
        while True:
            cursor.kept = []
            yield from cursor.space()
            captured = yield from read(cursor, declared.tag)
            if captured is None:
                break
            key = captured["key"]
            raw: list[str] = []
            cursor.kept = None
            ended = yield from cursor.until(self._tag_end, raw.append)
            text = "".join(raw).strip(SPACE)
            schema = schemas.get(key) if isinstance(schemas, Mapping) else None
            value = _typed(text, schema) if ended else json.dumps(text, ensure_ascii=False)[:-1]
            out.arguments(f"{between}{json.dumps(key, ensure_ascii=False)}: {value}")
            if not ended:
                # Cut off in the middle of a value.
                return
            between = ", "
        if cursor.ended and self._cut_in_tag():
            return
        out.arguments("}")
        if "".join(cursor.kept or ()).strip(SPACE):
            self.give_up()
            return
        cursor.kept = None
        yield from self._close()

    def _cut_in_tag(self) -> bool:
        """Whether the text ends within a tag, whose beginning then says nothing."""
        cursor, tag = self.cursor, self._declared.tag[0]
        rest = cursor.text[cursor.at :]
        begun = "".join(cursor.kept or ()).strip(SPACE)
        if not isinstance(tag, Text) or not (tag.text.startswith(rest) if rest else begun):
            return False
        cursor.take(len(cursor.text))
        cursor.kept = None
        return True


def _strict(text: str, quotes: Sequence[tuple[str, str]]) -> str:
    """``text`` as JSON: bare keys in quotes, and strings between ``quotes`` as JSON writes them."""
    pieces: list[str] = []
    place = 0
    openings = Words(*(first for first, _ in quotes))
    lasts = dict(quotes)
    while place < len(text):
        found = openings.search(text, place) if openings else None
        begin = len(text) if found is None else found.start()
        pieces.append(_BARE_KEY.sub(r'\1"\2"', text[place:begin]))
        if found is None:
            break
        last = lasts[found[0]]
        end = text.find(last, found.end())
        if end < 0:
            return ""
        pieces.append(json.dumps(text[found.end() : end], ensure_ascii=False))
        place = end + len(last)
    return "".join(pieces)


def _typed(text: str, schema: Any) -> str:
    """Return the JSON of an argument that was written bare: what its schema says it is, a string if it says nothing."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    allowed = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    if isinstance(schema, Mapping) and not allowed:
        unions = (schema.get("anyOf"), schema.get("oneOf"))
        allowed = [
            each.get("type")
            for union in unions
            if isinstance(union, list)
            for each in union
            if isinstance(each, Mapping)
        ]
    # Python's names for what JSON writes in small letters.
    plain = text.lower() if text in ("True", "False", "None") else text
    value = loads("null" if plain == "none" else plain)
    kind = _kind(value)
    if (
        kind in allowed
        or (kind == "integer" and "number" in allowed)
        or (plain in ("null", "none") and "null" in allowed)
    ):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


def _kind(value: object) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case list():
            return "array"
        case dict():
            return "object"
    return ""
