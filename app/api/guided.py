"""The fields that hold an answer to a form: response_format and guided_*; at most one of them."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from app.api.json_gate import MAX_DEPTH, parse_object
from app.api.values import ApiRequest
from app.errors import ApiError, invalid
from workers.messages import Grammar

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_CHOICES = 1024


class JsonSchemaFormat(ApiRequest):
    """The schema of ``response_format``. ``strict`` may be left out: answers are always held to the whole schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="letters, digits, _ and -, up to 64"
    )
    description: str | None = Field(None, description="has no influence")
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = Field(
        None, description="the JSON schema; without one any JSON"
    )
    strict: bool | None = Field(None, description="has no influence: answers are always held to the whole schema")


def _needs_schema(description: dict[str, Any]) -> None:
    """Tell in the JSON schema of the format that ``json_schema`` belongs to the type of that name."""
    properties = description["properties"]
    given = {**properties["json_schema"]["anyOf"][0], "description": properties["json_schema"].get("description", "")}
    description["anyOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object"]}}},
        {"properties": {"type": {"const": "json_schema"}, "json_schema": given}, "required": ["json_schema"]},
    ]


class ResponseFormat(ApiRequest):
    """OpenAI's way to ask for JSON."""

    model_config = ConfigDict(json_schema_extra=_needs_schema)

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object (any JSON object) or json_schema"
    )
    json_schema: JsonSchemaFormat | None = Field(None, description="the schema of json_schema")

    def unknown_fields(self, prefix: str = "") -> list[str]:
        unknown = super().unknown_fields(prefix)
        if self.json_schema is not None:
            unknown += self.json_schema.unknown_fields(f"{prefix}json_schema.")
        return unknown


class Guided(ApiRequest):
    """What a text must match."""

    response_format: ResponseFormat | None = Field(
        None,
        description='`{"type": "json_object"}`: any JSON object; `{"type": "json_schema", "json_schema": {"name", '
        '"schema", "strict"}}`: JSON of that schema, which is held to with `strict` true or not',
    )
    guided_json: dict[str, Any] | str | None = Field(
        None, description="a JSON schema, as an object or as a string of JSON"
    )
    guided_regex: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a regular expression that the whole answer matches"
    )
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(
        None, description="a list of texts, one of which is the answer; up to 1024"
    )
    guided_grammar: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a Lark grammar, in llguidance's dialect"
    )

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
        # The text of an object within a text has been looked at by nobody yet.
        try:
            schema = parse_object(schema.encode())
        except ApiError:
            raise invalid(
                f"{param} must be a JSON schema: the text of an object, at most {MAX_DEPTH} levels deep.", param
            ) from None
    # Not orjson: integers of any size are fine in a schema.
    return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
