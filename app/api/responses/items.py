"""The items of a response's ``input``, checked."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from app.api.schemas.messages import MAX_PARTS
from app.api.schemas.tools import FunctionName
from app.api.values import ApiRequest, CallId
from app.errors import invalid

MAX_ITEMS = 4096
_STATUS = Literal["in_progress", "completed", "incomplete"]
# The others are of hosted tools and of media.
_SUPPORTED = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def _needs(field: str, *kinds: str) -> dict[str, Any]:
    """A JSON schema: parts of these types have this field."""
    return {"properties": {"type": {"enum": list(kinds)}, field: {"type": "string"}}, "required": ["type", field]}


class TextPart(ApiRequest):
    """Text inside a message, an output of a function, or a thought."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_needs("text", *_TEXTS), _needs("refusal", "refusal")]})

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"] = Field(
        description="what kind of text; images, files and audio are refused"
    )
    text: str | None = Field(None, description="the text")
    refusal: str | None = Field(None, description="the text of a part of type refusal")

    @property
    def words(self) -> str:
        """The text, whatever the field is called."""
        return (self.refusal if self.type == "refusal" else self.text) or ""

    def unknown_fields(self, prefix: str = "") -> list[str]:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            name = "refusal" if self.type == "refusal" else "text"
            raise invalid(f"{prefix}{name}: is required.", prefix + name)
        # What this server's own answers carry beside their text, and hints for a cache.
        harmless = ("annotations", "logprobs", "prompt_cache_breakpoint")
        return [prefix + name for name, value in (self.model_extra or {}).items() if _is_news(name, value, harmless)]


def _is_news(name: str, value: Any, harmless: Sequence[str]) -> bool:
    """Whether an unknown field is worth a warning: clients send whole objects back, unset fields as null."""
    return value is not None and name not in harmless


def _parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


TextParts = Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[TextParts, BeforeValidator(_parts, json_schema_input_type=str | TextParts)]


class Item(ApiRequest):
    """What all items have."""

    id: str | None = Field(None, description="the item's id, if it has been in a response")
    status: _STATUS | None = Field(None, description="as it came in a response; has no influence")

    def parts(self) -> list[tuple[str, Sequence[TextPart]]]:
        """The texts in it, by field."""
        return []

    def unknown_fields(self, prefix: str = "") -> list[str]:
        # Labels that OpenAI's own models give.
        harmless = ("phase", "caller", "created_by")
        unknown = [prefix + name for name, value in (self.model_extra or {}).items() if _is_news(name, value, harmless)]
        for field, texts in self.parts():
            for place, text in enumerate(texts):
                unknown += text.unknown_fields(f"{prefix}{field}[{place}].")
        return unknown


class MessageItem(Item):
    """A message of the conversation."""

    type: Literal["message"] = Field("message", description="may be left out")
    role: Literal["user", "assistant", "system", "developer"] = Field(description="who says it")
    content: Content = Field(description="a string, or parts of type input_text, output_text, text or refusal")

    def parts(self) -> list[tuple[str, Sequence[TextPart]]]:
        return [("content", self.content)]


class FunctionCallItem(Item):
    """A call that the model made."""

    type: Literal["function_call"] = Field(description="function_call")
    call_id: CallId = Field(description="what its output refers to")
    name: FunctionName = Field(description="the function")
    arguments: str = Field(description="its arguments, as JSON text")
    namespace: None = Field(None, description="not supported")


class FunctionOutputItem(Item):
    """What the function answered."""

    type: Literal["function_call_output"] = Field(description="function_call_output")
    call_id: CallId = Field(description="the call that it answers, which must come before it")
    output: Content = Field(description="a string, or parts of type input_text")
    name: str | None = Field(None, description="the function; has no influence")
    namespace: None = Field(None, description="not supported")

    def parts(self) -> list[tuple[str, Sequence[TextPart]]]:
        return [("output", self.output)]


class ReasoningItem(Item):
    """What the model thought before an answer; the chat template decides whether it reads it again."""

    type: Literal["reasoning"] = Field(description="reasoning")
    content: TextParts | None = Field(None, description="the thoughts, parts of type reasoning_text")
    summary: TextParts = Field(default_factory=list, description="read where there is no content")
    encrypted_content: None = Field(None, description="not supported")

    def parts(self) -> list[tuple[str, Sequence[TextPart]]]:
        return [("content", self.content or ()), ("summary", self.summary)]


class ItemReference(Item):
    """An item of a stored response, by id."""

    type: Literal["item_reference"] | None = Field(None, description="may be left out")
    id: str = Field(min_length=1, description="id of an item in the input or output of a stored response")


def _kind(value: Any) -> str:
    if isinstance(value, Item):
        return f"item-{value.type or 'item_reference'}"  # type: ignore[attr-defined]
    kind = value.get("type") if isinstance(value, dict) else None
    if kind is None:
        kind = "item_reference" if isinstance(value, dict) and "role" not in value and "id" in value else "message"
    return f"item-{kind}"


# The tags are no identifiers, so that they are no part of a field's name in an error.
InputItem = Annotated[
    Annotated[MessageItem, Tag("item-message")]
    | Annotated[FunctionCallItem, Tag("item-function_call")]
    | Annotated[FunctionOutputItem, Tag("item-function_call_output")]
    | Annotated[ReasoningItem, Tag("item-reasoning")]
    | Annotated[ItemReference, Tag("item-item_reference")],
    Discriminator(_kind),
]


def input_items(value: Any) -> Any:
    """A string is one message of the user.

    Raises `ApiError` 400 for what is no item, or an item of another type, and for too many items or parts before any of
    them is read: each costs far more than the few bytes that it may be written with.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise invalid("input must be a string or a list of items.", "input")
    if len(value) > MAX_ITEMS:
        raise invalid(f"input can have at most {MAX_ITEMS} items.", "input")
    for place, item in enumerate(value):
        if not isinstance(item, dict):
            raise invalid(f"input[{place}] must be an object.", f"input[{place}]")
        kind = item.get("type")
        if kind is not None and kind not in _SUPPORTED:
            shown = kind if isinstance(kind, str) and len(kind) <= 64 else "this type"
            raise invalid(f"This server does not support items of type {shown!r}.", f"input[{place}].type")
    lists = (item.get(name) for item in value for name in ("content", "output", "summary"))
    if sum(len(each) for each in lists if isinstance(each, list)) > MAX_PARTS:
        raise invalid(f"input can have at most {MAX_PARTS} parts together.", "input")
    return value
