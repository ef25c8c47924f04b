"""Grammars that hold a reply to its format, in llguidance's dialect of Lark.

What they allow is what the parsers read, and nothing that a parser could take for something else: where free text is
allowed, no mark can be written in it without a call behind it. A call's envelope is written as the template writes it;
only the arguments have a choice, within the schema.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.text.errors import RequestError
from app.text.reply.parts import Tool, ToolChoice
from app.text.reply.thinking import Marks
from workers.messages import JSON_WHITE_SPACE, Grammar

# A model that knows no end would go on calling until its tokens run out.
MAX_CALLS = 32
# The keywords that say themselves which members an object has beside its properties.
_OPEN_ENDED = ("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf")


@dataclass(frozen=True, slots=True)
class HeldCalls:
    """A grammar for calls. ``params``: the field of the request that a line of its source (from 1) is made of."""

    grammar: Grammar
    params: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a format writes calls: ``opening call closing``, and with ``between`` before it, the next one.

    A call is ``before`` with the tool's name in the place of ``{}``, as JSON if ``quoted``; then the arguments, then
    ``after``. ``once``: opening and closing stand around all of them, not around each. Every entry is a text, or the
    parts of one, so that a mark can be a token.
    """

    opening: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    closing: tuple[str, ...]
    between: str
    once: bool = False
    quoted: bool = True


class Lark:
    """A grammar being written, line by line. ``token_ids``: the words that are tokens of the model."""

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._token_ids = token_ids
        self.lines: list[str] = []

    def rule(self, name: str, *body: str) -> str:
        """Write a rule, and return its name."""
        self.lines.append(f"{name}: {' '.join(filter(None, body)) or _text('')}")
        return name

    def word(self, *words: str) -> str:
        """Return what matches ``words`` one behind the other; those that are tokens only as such."""
        return " ".join(self.token(word) or _text(word) for word in words if word)

    def token(self, word: str) -> str:
        """Return what matches ``word`` as a token, "" if it is none."""
        return f"<[{self._token_ids[word]}]>" if word in self._token_ids else ""

    def thinking(self, marks: Marks | None, thinking: bool | None) -> str:
        """Return what matches the reasoning at the beginning, with the white space behind it; "" if there is none."""
        if marks is None or thinking is False:
            return ""
        token = self.token(marks.close)
        self.rule("thoughts_end[lazy]", "TEXT", _text(marks.close))
        self.rule("thoughts", f"TEXT {token} GAP | thoughts_end GAP" if token else "thoughts_end GAP")
        self.rule("GAP", r"/\n{0,2}/")
        self.needs_text()
        return "thoughts" if thinking else f"({self.word(marks.open)} thoughts)?"

    def needs_text(self) -> None:
        """Write the rule of free text, once."""
        rule = r"TEXT: /(.|\n)*/"
        if rule not in self.lines:
            self.lines.append(rule)

    def grammar(self) -> Grammar:
        """Return what was written."""
        return Grammar(kind="lark", source="\n".join(self.lines))


def calls_grammar(
    token_ids: Mapping[str, int],
    shape: CallShape,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    parallel: bool,
    marks: Marks | None,
    thinking: bool | None,
) -> HeldCalls | None:
    """Return the grammar of a reply with calls of ``tools``; None if nothing holds it.

    Raises `RequestError`, naming ``tools[i].function.parameters``, for what is no schema of an object.
    """
    forced = choice.mode == "required"
    held = forced or not parallel or choice.names is not None or any(tool.strict for tool in tools)
    if choice.mode == "none" or not tools or not held:
        return None
    lark = Lark(token_ids)
    params: dict[int, str] = {}
    # The first line is the beginning, written last.
    lark.lines.append("")
    calls = []
    for place, tool in enumerate(tools):
        if choice.names is not None and tool.name not in choice.names:
            continue
        param = f"tools[{place}].function.parameters"
        schema = _schema(tool, held=forced or tool.strict, param=param)
        lark.rule(f"arguments_{place}", "%json", json.dumps(schema))
        params[len(lark.lines)] = param
        name = json.dumps(tool.name)[1:-1] if shape.quoted else tool.name
        before = lark.word(*(part.replace("{}", name) for part in shape.before))
        calls.append(lark.rule(f"call_{place}", before, f"arguments_{place}", lark.word(*shape.after)))
    lark.rule("call", " | ".join(calls))
    thoughts = lark.thinking(marks, thinking)
    first = shape.opening[0] if shape.opening else ""
    body = _body(lark, shape, MAX_CALLS if parallel else 1)
    if forced:
        start = f"{thoughts} {lark.word(first)} {body}"
    elif first:
        lark.needs_text()
        lark.rule("lead[lazy]", "TEXT", _text(first))
        leads = f"(lead | TEXT {lark.token(first)})" if lark.token(first) else "lead"
        start = f"{thoughts} (TEXT | {leads} {body})"
    else:
        # Where a bracket is all that calls begin with, a text must not begin with one.
        lark.rule("FREE", r"/[ \t\r\n]*([^{ \t\r\n](.|\n)*)?/")
        start = f"{thoughts} (FREE | {body})"
    lark.lines[0] = f"start: {start}"
    return HeldCalls(lark.grammar(), params)


def _body(lark: Lark, shape: CallShape, most: int) -> str:
    """Write the calls behind the very first mark."""
    rest, closing = lark.word(*shape.opening[1:]), lark.word(*shape.closing)
    again = most - 1
    if shape.once:
        more = lark.rule("more", lark.word(shape.between), "call")
        return lark.rule("body", rest, "call", f"{more}{{0,{again}}}" if again else "", closing)
    lark.rule("one", rest, "call", closing)
    lark.rule("more", lark.word(shape.between), lark.word(*shape.opening[:1]), "one")
    return lark.rule("body", "one", f"more{{0,{again}}}" if again else "")


def with_reasoning(
    token_ids: Mapping[str, int], grammar: Grammar, marks: Marks | None, thinking: bool | None
) -> Grammar:
    """Return ``grammar`` for a model that reasons before it answers: its reasoning is free."""
    lark = Lark(token_ids)
    lark.lines.append("")
    thoughts = lark.thinking(marks, thinking)
    if not thoughts:
        return grammar
    match grammar.kind:
        case "json_schema":
            schema = json.loads(grammar.source)
            lark.rule("answer", "%json", json.dumps(_guided(schema) if isinstance(schema, dict) else schema))
        case "regex":
            pattern = grammar.source.replace("/", r"\/").replace("\n", r"\n")
            lark.rule("answer", f"/{pattern}/")
        case "lark":
            lark.rule("answer", "%lark {\n" + grammar.source + "\n}")
    lark.lines[0] = f"start: {thoughts} answer"
    return lark.grammar()


def _schema(tool: Tool, *, held: bool, param: str) -> dict[str, Any]:
    """The schema of the arguments; any object if they are not ``held`` to their own."""
    if not held:
        return _guided({"type": "object"})
    if tool.parameters is None:
        return _guided({"type": "object", "properties": {}, "additionalProperties": False})
    schema = dict(tool.parameters)
    kind = schema.setdefault("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError("The parameters of a function must be the schema of an object.", param)
    schema["type"] = "object"
    if "properties" in schema and not any(word in schema for word in _OPEN_ENDED):
        # Narrower than the schema: an argument that nobody has described helps no tool.
        schema["additionalProperties"] = False
    return _guided(schema)


def _guided(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` with the white space of all our JSON."""
    return {**schema, "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": JSON_WHITE_SPACE}}


def _text(text: str) -> str:
    return json.dumps(text)
