"""The answers about stored chat completions."""

from typing import Any, Literal

from pydantic import Field

from app.api.reference.answers.base import WithWarnings
from app.api.reference.answers.chat import ChatCompletion


class StoredChatCompletion(ChatCompletion):
    """A chat completion that was kept."""

    metadata: dict[str, str]


class Deleted(WithWarnings):
    """It is forgotten."""

    id: str
    object: Literal["chat.completion.deleted", "response"]
    deleted: Literal[True]


class ChatList(WithWarnings):
    """A page of stored chat completions."""

    object: Literal["list"]
    data: list[StoredChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="whether there are more behind last_id")


class StoredMessageList(WithWarnings):
    """A page of the messages that a stored chat completion answers."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool = Field(description="whether there are more behind last_id")
