"""The parts of a reply, as they grow and complete."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call. ``parameters`` is the JSON schema of its arguments; ``strict``: hold to it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """Return the tool in OpenAI's shape, as templates take it: with a schema, whether it has one or not."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        schema = self.parameters
        function["parameters"] = schema if schema is not None else {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called: never, as the model likes, or at least once; ``names``, if given, are those allowed."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """More of what the model thinks before it answers."""

    text: str


class Content(msgspec.Struct, frozen=True, gc=False):
    """More text for the reader."""

    text: str


class CallBegin(msgspec.Struct, frozen=True, gc=False):
    """Call number ``call`` (from 0) of the tool ``name`` begins."""

    call: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True, gc=False):
    """More of the JSON text of a call's arguments."""

    call: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call; ``arguments`` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply."""

    reasoning: str = ""
    content: str = ""
    calls: Sequence[Call] = ()


class ReplyParser(Protocol):
    """Follows the text of one choice. What it answers does not depend on how the text was cut into pieces."""

    def push(self, text: str) -> list[Part]:
        """Return the parts that have become certain with ``text``."""
        ...

    def finish(self) -> list[Part]:
        """Return what was held back, now that no more text will come."""
        ...


class PlainParser:
    """Takes everything for content."""

    def push(self, text: str) -> list[Part]:
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def fold(parts: Iterable[Part]) -> Reply:
    """Return the reply that ``parts`` make up."""
    reasoning: list[str] = []
    content: list[str] = []
    calls: dict[int, tuple[CallBegin, list[str]]] = {}
    for part in parts:
        match part:
            case Reasoning(text):
                reasoning.append(text)
            case Content(text):
                content.append(text)
            case CallBegin(call):
                calls[call] = (part, [])
            case CallArguments(call, text):
                calls[call][1].append(text)
    return Reply(
        "".join(reasoning),
        "".join(content),
        [Call(begin.id, begin.name, "".join(texts)) for begin, texts in calls.values()],
    )


def parse_whole(parser: ReplyParser, text: str) -> Reply:
    """Return the reply that the complete ``text`` is."""
    return fold([*parser.push(text), *parser.finish()])
