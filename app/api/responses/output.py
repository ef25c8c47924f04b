"""A response as it grows: parts of the model's reply in, output items and their events out.

The complete response is what is left when all events have gone out, so a streamed one and one that is not are the same.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from app.api.logprobs import chat_logprobs
from app.api.turn import Turn
from app.errors import ApiError
from app.ids import new_id
from app.text.generation import Piece
from app.text.reply.parts import CallArguments, CallBegin, Content, Part, Reasoning
from app.text.scores import ScoredToken

Event = tuple[int, bytes]

# Our errors in the words that the API has for them.
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def encode_event(response_id: str, sequence: int, kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return one event as it goes over the wire."""
    data = orjson.dumps({"type": kind, "sequence_number": sequence, **fields})
    return b"event: %b\nid: %b:%d\ndata: %b\n\n" % (kind.encode(), response_id.encode(), sequence, data)


class Draft:
    """The response to ``turn``. ``head`` is the response object without its results.

    ``streamed``: events are made, to be taken with `drain`.
    """

    def __init__(self, head: dict[str, Any], turn: Turn, *, streamed: bool, top_logprobs: int | None) -> None:
        self.head = head
        self._turn = turn
        self._streamed = streamed
        self._top = top_logprobs
        self._parser = turn.parser()
        self._events: list[Event] = []
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        # The item that is growing: its text so far, and the scores of its tokens.
        self._item: dict[str, Any] | None = None
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        # Scored tokens whose text the parser still holds back.
        self._pending: list[ScoredToken] = []
        self._thoughts: list[str] = []
        self._reason: str | None = None

    # --- what a runner does

    def drain(self) -> list[Event]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events

    def announce(self, status: str, *kinds: str) -> None:
        """Tell the response's state, as the events ``kinds``."""
        self.head["status"] = status
        for kind in kinds:
            self._emit(kind, response=self.body())

    def take(self, pieces: Sequence[Piece]) -> None:
        """Add pieces of text."""
        for piece in pieces:
            self._pending += piece.tokens
            for part in self._parser.push(piece.text) if piece.text else ():
                self._add(part)
            if piece.finish_reason is not None:
                self._reason = piece.finish_reason
                for part in self._parser.finish():
                    self._add(part)

    def finish(self) -> dict[str, Any]:
        """End the last item and return the complete response; its last event is told by `announce_end`."""
        if self._item is None and not self._items:
            self._open_message()
        cut = self._reason == "length"
        self._close("incomplete" if cut else "completed")
        self.head["status"] = "incomplete" if cut else "completed"
        self.head["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        if not cut:
            self.head["completed_at"] = int(time.time())
        self.head["usage"] = self._usage()
        if warnings := self._turn.generation.warnings:
            self.head["warnings"] = warnings
        return self.body()

    def cancel(self) -> dict[str, Any]:
        """Return the response as it is, cancelled."""
        self._close("incomplete")
        self.head |= {"status": "cancelled", "usage": self._usage()}
        return self.body()

    def fail(self, error: ApiError) -> dict[str, Any]:
        """Return the response as it is, failed."""
        self._close("incomplete")
        code = _ERROR_CODES.get(error.status, "server_error")
        self.head |= {"status": "failed", "error": {"code": code, "message": error.message}}
        self._emit("error", code=error.code or code, message=error.message, param=error.param)
        return self.body()

    def announce_end(self, body: Mapping[str, Any]) -> None:
        """The last event."""
        self._emit(last_event(body), response=body)

    def body(self) -> dict[str, Any]:
        """The response object, with the items that are complete."""
        return {**self.head, "output": list(self._items)}

    @property
    def item_ids(self) -> list[str]:
        """Ids of the items in the output."""
        return [item["id"] for item in self._items]

    # --- parts

    def _add(self, part: Part) -> None:
        match part:
            case Content(text):
                self._add_text(text)
            case Reasoning(text):
                self._add_thought(text)
            case CallBegin(_, call_id, name):
                self._close("completed")
                self._pending.clear()
                self._open(
                    {"id": new_id("fc_"), "type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                )
            case CallArguments(_, text):
                self._texts.append(text)
                self._emit_delta("response.function_call_arguments.delta", text)

    def _add_text(self, text: str) -> None:
        if self._item is None or self._item["type"] != "message":
            self._close("completed")
            self._open_message()
        self._texts.append(text)
        self._emit_delta("response.output_text.delta", text, content_index=0, logprobs=self._scores())

    def _add_thought(self, text: str) -> None:
        if self._item is None or self._item["type"] != "reasoning":
            self._close("completed")
            self._open({"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []})
            self._emit_part("response.content_part.added", {"type": "reasoning_text", "text": ""})
        # Only what is said has log-probabilities.
        self._pending.clear()
        self._texts.append(text)
        self._thoughts.append(text)
        self._emit_delta("response.reasoning_text.delta", text, content_index=0)

    def _open_message(self) -> None:
        self._open({"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []})
        self._emit_part("response.content_part.added", _output_text("", []))

    def _scores(self) -> list[dict[str, Any]]:
        if self._top is None or not self._pending:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(self._turn.model.token_names, self._pending, self._top)["content"]
        self._pending.clear()
        for entry in entries:
            for each in (entry, *entry["top_logprobs"]):
                # The API's type knows no null here.
                each["bytes"] = each["bytes"] or []
        self._logprobs += entries
        return entries

    # --- items

    def _open(self, item: dict[str, Any]) -> None:
        self._item = {**item, "status": "in_progress"}
        self._texts, self._logprobs = [], []
        self._emit("response.output_item.added", output_index=len(self._items), item=self._item)

    def _close(self, status: str) -> None:
        item = self._item
        if item is None:
            return
        text = "".join(self._texts)
        if item["type"] == "message":
            rest = self._scores()
            if rest:
                self._emit_delta("response.output_text.delta", "", content_index=0, logprobs=rest)
            part = _output_text(text, self._logprobs)
            done = {"text": text, "logprobs": self._logprobs, "content_index": 0}
            self._emit_item("response.output_text.done", **done)
            self._emit_part("response.content_part.done", part)
            item = {**item, "content": [part]}
        elif item["type"] == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            self._emit_item("response.reasoning_text.done", text=text, content_index=0)
            self._emit_part("response.content_part.done", part)
            item = {**item, "content": [part]}
        else:
            self._emit_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            item = {**item, "arguments": text}
        item["status"] = status
        self._emit("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item = None

    def _usage(self) -> dict[str, Any]:
        usage = self._turn.generation.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens(["".join(self._thoughts)]) or 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }

    # --- events

    def _emit_part(self, kind: str, part: Mapping[str, Any]) -> None:
        self._emit_item(kind, content_index=0, part=part)

    def _emit_delta(self, kind: str, text: str, **fields: Any) -> None:
        self._emit_item(kind, delta=text, **fields)

    def _emit_item(self, kind: str, **fields: Any) -> None:
        assert self._item is not None
        self._emit(kind, item_id=self._item["id"], output_index=len(self._items), **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self._streamed:
            self._events.append((self._sequence, encode_event(self.head["id"], self._sequence, kind, fields)))
            self._sequence += 1


def last_event(body: Mapping[str, Any]) -> str:
    """The kind of event that ends the stream of a response in this state; the API has none for a cancelled one."""
    kinds = {"completed": "response.completed", "incomplete": "response.incomplete"}
    return kinds.get(body["status"], "response.failed")


def _output_text(text: str, logprobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
