"""The reply of one choice as the deltas of a chat stream."""

from collections.abc import Callable, Iterator
from typing import Any

from app.api.sse import EventIds, TextFrame, frame
from app.text.reply.parts import CallArguments, CallBegin, Content, Part, Reasoning, Reply, ReplyParser

# The body of an event with this delta.
Body = Callable[[dict[str, Any]], dict[str, Any]]


class ReplyDeltas:
    """Follows one choice. ``body`` makes an event's body of a delta; ``thoughts`` is what was reasoning so far."""

    def __init__(self, parser: ReplyParser, body: Body, ids: EventIds) -> None:
        self._parser = parser
        self._ids = ids
        self._body = body
        self._frames: dict[str | int, TextFrame] = {}
        self.calls = 0
        self.thoughts: list[str] = []

    def __call__(self, text: str) -> bytes:
        """Return the events of new text."""
        return b"".join(map(self._frame, self._parser.push(text)))

    def deltas(self, text: str) -> Iterator[dict[str, Any]]:
        """Return the deltas of new text."""
        return map(self._delta, self._parser.push(text))

    def finish(self) -> bytes:
        """Return the events of what was held back."""
        return b"".join(map(self._frame, self._parser.finish()))

    def _frame(self, part: Part) -> bytes:
        if isinstance(part, CallBegin):
            return self._ids.frame(self._body(self._delta(part)))
        self._note(part)
        kind = part.call if isinstance(part, CallArguments) else type(part).__name__
        known = self._frames.get(kind)
        if known is None:
            known = self._frames[kind] = TextFrame(self._ids, frame(self._body(_delta(part, TextFrame.SLOT))))
        return known(part.text)

    def _delta(self, part: Part) -> dict[str, Any]:
        self._note(part)
        return _delta(part, "" if isinstance(part, CallBegin) else part.text)

    def _note(self, part: Part) -> None:
        if isinstance(part, CallBegin):
            self.calls += 1
        elif isinstance(part, Reasoning):
            self.thoughts.append(part.text)


def _delta(part: Part, text: str) -> dict[str, Any]:
    match part:
        case Content():
            return {"content": text}
        case Reasoning():
            return {"reasoning_content": text}
        case CallBegin(call, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": call, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(call):
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}


def message_of(reply: Reply, plain: bool) -> dict[str, Any]:
    """Return a complete reply as the message of a choice; ``plain``: it cannot be anything but content."""
    content = reply.content if plain else reply.content or None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
    return message
