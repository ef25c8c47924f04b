"""Stored chat completions: those with ``store: true``, to be listed, read, labelled and deleted."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from flask import Blueprint, Flask, Response, current_app
from pydantic import Field

from app.api.keeping import Shelf, is_to_be_kept, most_of_conversation, store, store_errors
from app.api.pages import PageQuery, page_body, query
from app.api.reference.answers.stored import ChatList, Deleted, StoredChatCompletion, StoredMessageList
from app.api.reference.describe import PAGE, Parameter, describes
from app.api.schemas import ChatRequest, Message
from app.api.service import json_answer, parse, tenant_salt
from app.api.sse import Frames
from app.api.values import ApiRequest, Metadata
from app.errors import invalid
from app.store.record import Listing, Record
from app.store.store import Store
from app.text.generation import Answer, Generation, Piece

blueprint = Blueprint("stored", __name__)

KIND = "chat"
_SHELF = Shelf(KIND, "Chat completion", "completion_id")
_LABEL = re.compile(r"^metadata\[([^\]]{1,64})\]$")


@dataclass(frozen=True, slots=True)
class ChatKeeper:
    """Keeps one chat completion for its client when it is complete."""

    app: Flask
    store: Store
    tenant: str
    body: ChatRequest

    def kept(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Keep a complete answer, and return it. Raises `ApiError`."""
        metadata: dict[str, str] = getattr(self.body, "metadata", None) or {}
        messages = [_message(completion["id"], *each) for each in enumerate(self.body.messages)]
        record = Record(
            id=completion["id"],
            kind=KIND,
            tenant=self.tenant,
            model=completion["model"],
            status="completed",
            body={**completion, "metadata": metadata},
            input=messages,
            metadata=metadata,
        )
        with store_errors():
            self.store.add(record)
        return completion

    def recorded(
        self, generation: Generation, frames: Frames, whole: Callable[[list[Answer]], dict[str, Any]]
    ) -> tuple[Generation, Frames]:
        """Return the two so that the answer is kept, before its stream ends, as the one that ``whole`` makes of it."""
        recorder = _Recorder(generation)

        def keep() -> None:
            # A stream ends outside of its request.
            with self.app.app_context():
                self.kept(whole(recorder.answers()))

        keeping = _KeepingFrames(frames, keep)
        return cast(Generation, recorder), cast(Frames, keeping)


def chat_keeper(body: ChatRequest) -> ChatKeeper | None:
    """Return what keeps the answer to this request; None if it is not to be kept. Raises `ApiError` 400."""
    if not is_to_be_kept(getattr(body, "store", None), default=False):
        return None
    return ChatKeeper(current_app._get_current_object(), store(), tenant_salt(), body)  # type: ignore[attr-defined]


class _Recorder:
    """A `Generation` that remembers what it said."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._pieces: list[list[Piece]] = [[] for _ in range(generation.choices)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def pieces(self, tick_s: float | None = None) -> Iterator[list[Piece]]:
        """Pass the pieces on."""
        for pieces in self._generation.pieces(tick_s):
            for piece in pieces:
                self._pieces[piece.choice].append(piece)
            yield pieces

    def answers(self) -> list[Answer]:
        """The complete choices."""
        return [
            Answer(
                "".join(piece.text for piece in own),
                next((piece.finish_reason for piece in own if piece.finish_reason is not None), "stop"),
                [token for piece in own for token in piece.tokens],
                next((piece.prompt for piece in own if piece.prompt), ()),
            )
            for own in self._pieces
        ]


class _KeepingFrames:
    """`Frames` that keep the answer before they tell its end."""

    def __init__(self, frames: Frames, keep: Callable[[], object]) -> None:
        self._frames = frames
        self._keep = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frames, name)

    def closing(self, generation: Generation) -> bytes:
        """The end of the stream. Raises `ApiError` if the answer could not be kept."""
        self._keep()
        return self._frames.closing(generation)


def _message(completion_id: str, place: int, message: Message) -> dict[str, Any]:
    fields = known_fields(message)
    given = message.given_content
    content = {"content": None if given is None else message.content}
    parts = None
    if isinstance(given, list):
        parts = [{"type": part["type"], part["type"]: part[part["type"]]} for part in given]
    return {**fields, **content, "id": f"{completion_id}-{place}", "content_parts": parts}


def known_fields(request: ApiRequest) -> dict[str, Any]:
    """Return the fields that were given, as JSON; unknown ones were ignored, and may be of any size."""
    return {
        name: _plain(value)
        for name in type(request).model_fields
        if name in request.model_fields_set and (value := getattr(request, name)) is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, ApiRequest):
        return known_fields(value)
    return [_plain(each) for each in value] if isinstance(value, list) else value


class UpdateRequest(ApiRequest):
    """POST /v1/chat/completions/{id}"""

    metadata: Metadata | None = Field(description="up to 16 pairs of strings, instead of the present ones")


@blueprint.get("/v1/chat/completions")
@describes(
    tag="stored chat completions",
    answer=ChatList,
    parameters=[*PAGE, Parameter("model", "only those of this model")],
)
def list_chat_completions() -> Response:
    """Stored chat completions, the oldest first."""
    given = query("limit", "order", "after", "model", "metadata[")
    labels = {}
    for name, value in given.items():
        if name.startswith("metadata["):
            label = _LABEL.match(name)
            if label is None:
                raise invalid("metadata must be given as metadata[KEY]=VALUE.", "metadata")
            labels[label[1]] = value
    asked = PageQuery.read(given, "asc")
    listing = Listing(asked.limit, asked.order, asked.after, given.get("model"), labels, most_of_conversation())
    with store_errors():
        page = store().list(KIND, tenant_salt(), listing)
    if page is None:
        raise invalid("after is not the id of a stored chat completion.", "after")
    return json_answer(page_body([record.body for record in page.records], page.has_more))


@blueprint.get("/v1/chat/completions/<completion_id>")
@describes(tag="stored chat completions", answer=StoredChatCompletion)
def retrieve_chat_completion(completion_id: str) -> Response:
    """A stored chat completion."""
    query()
    return json_answer(_SHELF.get(completion_id).body)


@blueprint.post("/v1/chat/completions/<completion_id>")
@describes(
    tag="stored chat completions",
    request=UpdateRequest,
    answer=StoredChatCompletion,
    example={"metadata": {"topic": "capitals"}},
)
def update_chat_completion(completion_id: str) -> Response:
    """Replace the metadata."""
    metadata = parse(UpdateRequest).metadata or {}

    def labelled(record: Record) -> Record:
        return replace(record, metadata=metadata, body={**record.body, "metadata": metadata})

    return json_answer(_SHELF.amend(completion_id, labelled).body)


@blueprint.delete("/v1/chat/completions/<completion_id>")
@describes(tag="stored chat completions", answer=Deleted)
def delete_chat_completion(completion_id: str) -> Response:
    """Forget it."""
    query()
    _SHELF.delete(completion_id)
    return json_answer({"id": completion_id, "object": "chat.completion.deleted", "deleted": True})


@blueprint.get("/v1/chat/completions/<completion_id>/messages")
@describes(tag="stored chat completions", answer=StoredMessageList, parameters=PAGE)
def list_chat_messages(completion_id: str) -> Response:
    """The messages that it answers, the first one first."""
    asked = PageQuery.read(query("limit", "order", "after"), "asc")
    return json_answer(asked.page(_SHELF.get(completion_id).input, "messages"))
