"""From pydantic models to the JSON schemas of the document."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from app.api.reference.known import is_request, known_fields

_REFERENCE = "#/components/schemas/{model}"


class _Generator(GenerateJsonSchema):
    """pydantic's own, with what our validators know beside it."""

    strict = False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        made = super().model_schema(schema)
        model = schema["cls"]
        if is_request(model):
            made["properties"] = {**known_fields(model).properties(), **made.get("properties", {})}
            made["additionalProperties"] = not self.strict
        # A docstring is written for who reads the code.
        made["description"] = re.sub(r"``(.+?)``", r"`\1`", (model.__doc__ or "").strip().partition("\n\n")[0])
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        if made.get("default") in (None, [], ""):
            made.pop("default", None)
        return made


class _StrictGenerator(_Generator):
    strict = True


def schemas(types: Iterable[Any], *, strict: bool) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type, and the named schemas that those refer to.

    ``strict``: unknown fields of requests are refused.
    """
    asked = list(dict.fromkeys(types))
    made, definitions = TypeAdapter.json_schemas(
        [(place, "validation", TypeAdapter(each)) for place, each in enumerate(asked)],
        ref_template=_REFERENCE,
        schema_generator=_StrictGenerator if strict else _Generator,
    )
    named = dict(definitions.get("$defs", {}))
    found = {asked[place]: schema for (place, _), schema in made.items()}
    return _with_short_names(found, named)


def _with_short_names(found: dict[Any, Any], named: dict[str, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Two models of one name are called by their modules, which says more than it should: the folder is enough."""
    short: dict[str, str] = {}
    for name in sorted(named):
        parts = name.split("__")
        plain = parts[-1] if len(parts) == 1 else parts[-1] + "".join(map(str.capitalize, parts[2:-1][:1]))
        while plain in short.values():
            plain += "_"
        short[name] = plain

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: _REFERENCE.format(model=short[each.rpartition("/")[2]])
                if _is_reference(key, each)
                else renamed(each)
                for key, each in value.items()
            }
        return [renamed(each) for each in value] if isinstance(value, list) else value

    return (
        {key: renamed(schema) for key, schema in found.items()},
        {short[name]: renamed(schema) for name, schema in named.items()},
    )


def _is_reference(key: str, value: Any) -> bool:
    return key == "$ref" and isinstance(value, str)
