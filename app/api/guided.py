"""The fields that hold an answer to a form: response_format and guided_*; at most one of them."""

import json
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from app.api.errors import invalid
from app.api.fields import check_extra_fields
from app.api.values import ApiRequest
from workers.messages import Grammar

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_CHOICES = 1024


class JsonSchemaFormat(ApiRequest):
    """The schema of ``response_format``. ``strict`` may be left out: answers are always held to the whole schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ApiRequest):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def unknown_fields(self) -> list[str]:
        """Return the names of fields that are not part of the API."""
        unknown = check_extra_fields(self.model_extra or {}, "response_format.")
        if self.json_schema is not None:
            unknown += check_extra_fields(self.json_schema.model_extra or {}, "response_format.json_schema.")
        return unknown


class Guided(ApiRequest):
    """What a text must match."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    guided_grammar: str | None = None

    def grammar(self) -> tuple[Grammar, str] | None:
        """Return the grammar of the answer and the field that asks for it, or None. Raises `ApiError` 400."""
        found: list[tuple[Grammar, str]] = []
        if self.response_format is not None and self.response_format.type != "text":
            found.append((_of_format(self.response_format), "response_format"))
        if self.guided_json is not None:
            found.append((_of_schema(self.guided_json, "guided_json"), "guided_json"))
        if self.guided_regex is not None:
            found.append((Grammar(kind="regex", source=self.guided_regex), "guided_regex"))
        if self.guided_choice is not None:
            found.append((Grammar(kind="regex", source=one_of(self.guided_choice)), "guided_choice"))
        if self.guided_grammar is not None:
            found.append((Grammar(kind="lark", source=self.guided_grammar), "guided_grammar"))
        if len(found) > 1:
            raise invalid(f"{found[0][1]} and {found[1][1]} cannot be combined.", found[1][1])
        for grammar, param in found:
            if len(grammar.source.encode()) > MAX_GRAMMAR_BYTES:
                raise invalid(f"{param} is larger than {MAX_GRAMMAR_BYTES} bytes.", param)
            if not grammar.source:
                raise invalid(f"{param} must not be empty.", param)
        return found[0] if found else None


def one_of(texts: list[str]) -> str:
    """Return a regular expression that matches exactly these texts: every ASCII character with a meaning is escaped."""
    return "(?:" + "|".join("".join(map(_literal, text)) for text in texts) + ")"


def _literal(character: str) -> str:
    return character if character.isalnum() or not character.isascii() else f"\\x{{{ord(character):x}}}"


def _of_format(wanted: ResponseFormat) -> Grammar:
    if wanted.type == "json_object":
        return Grammar(kind="json_schema", source='{"type":"object"}')
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema is required.", "response_format.json_schema")
    return _of_schema(wanted.json_schema.schema_ or {}, "response_format")


def _of_schema(schema: dict[str, Any] | str, param: str) -> Grammar:
    if isinstance(schema, str):
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError as error:
            raise invalid(f"{param} is not JSON: {error}.", param) from None
        if not isinstance(schema, dict):
            raise invalid(f"{param} must be a JSON schema: an object.", param)
    # Not orjson: integers of any size are fine in a schema.
    return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
