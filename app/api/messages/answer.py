"""The answer in Anthropic's shape: blocks, whole or as a stream of events; both are made from the same parts."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson
import pydantic_core
from flask import g

from app.api.messages.failures import error_body
from app.api.sse import EventIds, TextFrame
from app.api.turn import Turn
from app.errors import ApiError
from app.text.generation import Answer, Generation, Piece
from app.text.offload import off_hub_if_large
from app.text.reply.parts import CallArguments, CallBegin, Content, Part, Reasoning, ReplyParser


class Blocks:
    """Follows the parts of a reply and says which content block each belongs to.

    White space that stands alone between two blocks, or behind the last one, is layout and gets no block.
    """

    def __init__(self, shows_thoughts: bool = True) -> None:
        self._shows_thoughts = shows_thoughts
        self._open: dict[str, Any] | None = None
        self._held = ""
        self.count = 0
        self.calls = 0
        # Whether shown or not.
        self.thoughts: list[str] = []

    def take(self, parts: Iterable[Part]) -> Iterator[tuple[str, int, Any]]:
        """Yield what happens: ("start", index, block), ("delta", index, delta) and ("stop", index, None)."""
        for part in parts:
            match part:
                case Reasoning(text):
                    self.thoughts.append(text)
                    yield from self._text("thinking", text if self._shows_thoughts else "")
                case Content(text):
                    yield from self._text("text", text)
                case CallBegin(_, call_id, name):
                    yield from self._close()
                    self.calls += 1
                    yield self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                case CallArguments(_, text) if text:
                    yield "delta", self.count, {"type": "input_json_delta", "partial_json": text}

    def end(self) -> Iterator[tuple[str, int, Any]]:
        """Yield what is left to say."""
        if self._held and self.count == 0 and self._open is None:
            # White space is all that there is.
            yield self._begin({"type": "text", "text": ""})
            yield "delta", self.count, {"type": "text_delta", "text": self._held}
        yield from self._close()

    def _text(self, kind: str, text: str) -> Iterator[tuple[str, int, Any]]:
        if self._open is None or self._open["type"] != kind:
            if kind == "text" and not text.strip():
                self._held += text
                return
            held, self._held = self._held if kind == "text" else "", ""
            text = held + text
            yield from self._close()
            yield self._begin(
                {"type": "text", "text": ""} if kind == "text" else {"type": kind, "thinking": "", "signature": ""}
            )
        if text:
            yield "delta", self.count, {"type": f"{kind}_delta", kind: text}

    def _begin(self, block: dict[str, Any]) -> tuple[str, int, Any]:
        self._open = block
        return "start", self.count, block

    def _close(self) -> Iterator[tuple[str, int, Any]]:
        if self._open is not None:
            yield "stop", self.count, None
            self.count += 1
            self._open = None
        self._held = ""


def whole(turn: Turn, answer: Answer, shows_thoughts: bool) -> dict[str, Any]:
    """Return the message of a complete answer."""
    blocks = Blocks(shows_thoughts)
    content = off_hub_if_large(len(answer.text), _content, turn.parser(), blocks, answer.text)
    return {
        **head(turn),
        "content": content,
        **stop(answer.finish_reason, blocks.calls, answer.stop_string),
        "usage": usage(turn, blocks.thoughts),
    }


def _content(parser: ReplyParser, blocks: Blocks, text: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    arguments: dict[int, list[str]] = {}
    texts: dict[int, list[str]] = {}
    for what, index, value in (*blocks.take([*parser.push(text), *parser.finish()]), *blocks.end()):
        if what == "start":
            content.append(value)
        elif what == "delta" and value["type"] == "input_json_delta":
            arguments.setdefault(index, []).append(value["partial_json"])
        elif what == "delta":
            texts.setdefault(index, []).append(value[value["type"].removesuffix("_delta")])
    for index, parts in arguments.items():
        content[index]["input"] = parsed_arguments("".join(parts))
    for index, parts in texts.items():
        content[index][content[index]["type"]] = "".join(parts)
    return content


def parsed_arguments(text: str) -> dict[str, Any] | orjson.Fragment:
    """Return a call's arguments; those of a call that was cut off as far as they go, as clients read them in a stream.

    What is no JSON object is the value of ``unparsed``.
    """
    if not text.strip():
        return {}
    try:
        value = pydantic_core.from_json(text, allow_partial=True, allow_inf_nan=False)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return {"unparsed": text}
    try:
        orjson.dumps(value)
    except TypeError:
        # Integers that are too long for the encoder, but not for JSON.
        return orjson.Fragment(json.dumps(value))
    return value


def head(turn: Turn) -> dict[str, Any]:
    """The part of a message that is known from the beginning."""
    return {"id": turn.id, "type": "message", "role": "assistant", "model": turn.name}


def stop(finish_reason: str | None, calls: int, stop_string: str | None) -> dict[str, Any]:
    """Why the answer ended."""
    reason = "end_turn"
    if finish_reason == "length":
        reason = "max_tokens"
    elif stop_string is not None:
        reason = "stop_sequence"
    elif calls:
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": stop_string if reason == "stop_sequence" else None}


def usage(turn: Turn, thoughts: list[str] | None = None) -> dict[str, Any]:
    """The usage up to now. ``input_tokens`` are those that the cache did not have."""
    used = turn.generation.usage
    body: dict[str, Any] = {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
    }
    thinking_tokens = None if thoughts is None else turn.reasoning_tokens(["".join(thoughts)])
    if thinking_tokens is not None:
        body["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
    return body


def event(kind: str, body: dict[str, Any]) -> bytes:
    """Return one event of a stream."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **body}) + b"\n\n"


class MessageFrames:
    """The events of a streamed message, for `app.api.sse.events`."""

    def __init__(self, turn: Turn, request_id: str, shows_thoughts: bool) -> None:
        self._turn = turn
        self._ids = EventIds(turn.id)
        self._request_id = request_id
        self._parser = turn.parser()
        self._blocks = Blocks(shows_thoughts)
        self._reason: str | None = None
        # By block and kind: all but the text is the same for every token.
        self._deltas: dict[tuple[int, str], TextFrame] = {}

    def opening(self, count: int) -> bytes:
        """The message without content."""
        warnings = {"warnings": g.warnings} if g.get("warnings") else {}
        message = {**head(self._turn), "content": [], "stop_reason": None, "stop_sequence": None}
        return self._event("message_start", {"message": {**message, "usage": usage(self._turn), **warnings}})

    def text(self, index: int) -> Callable[[str], bytes]:
        """New text."""
        return lambda text: self._encode(self._blocks.take(self._parser.push(text)))

    def scored(self, piece: Piece) -> bytes:
        """New text; nobody can ask for scores here."""
        return self.text(piece.choice)(piece.text)

    def prompt(self, piece: Piece) -> bytes:
        """Nobody can ask for the prompt's scores here."""
        return b""

    def finish(self, index: int, reason: str) -> bytes:
        """The end of the content."""
        self._reason = reason
        return self._encode((*self._blocks.take(self._parser.finish()), *self._blocks.end()))

    def closing(self, generation: Generation) -> bytes:
        """Why it ended, and the end."""
        delta = stop(self._reason, self._blocks.calls, generation.stop_string(0))
        told: dict[str, Any] = {"delta": delta, "usage": usage(self._turn, self._blocks.thoughts)}
        if generation.warnings:
            told["warnings"] = generation.warnings
        return self._event("message_delta", told) + self._event("message_stop", {})

    def error(self, error: ApiError) -> bytes:
        """The last event of a stream that fails."""
        body = error_body(error, self._request_id)
        return event("error", body)

    def _event(self, kind: str, body: dict[str, Any]) -> bytes:
        return self._ids(event(kind, body))

    def _encode(self, happenings: Iterable[tuple[str, int, Any]]) -> bytes:
        parts = []
        for what, index, value in happenings:
            if what == "delta":
                kind, (field, text) = value["type"], next(item for item in value.items() if item[0] != "type")
                frame = self._deltas.get((index, kind))
                if frame is None:
                    frame = self._deltas[index, kind] = TextFrame(self._ids, _slotted(index, kind, field))
                parts.append(frame(text))
            elif what == "start":
                parts.append(self._event("content_block_start", {"index": index, "content_block": value}))
            else:
                parts.append(self._event("content_block_stop", {"index": index}))
        return b"".join(parts)


def _slotted(index: int, kind: str, field: str) -> bytes:
    return event("content_block_delta", {"index": index, "delta": {"type": kind, field: TextFrame.SLOT}})
