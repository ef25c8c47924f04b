"""From the fields of a request to the request, or to the error that names the first bad one."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from app.api.values import BELOW, ApiRequest
from app.errors import ApiError, invalid

R = TypeVar("R", bound=ApiRequest)

# Names of the members of a union, which pydantic puts into the location of an error.
_UNION_TAGS = frozenset({"bool", "int", "str", "float", "literal", "NamedTool", "AllowedTools"})


def validate(
    schema: type[R], fields: Mapping[str, Any], strict: bool, context: Mapping[str, Any] | None = None
) -> tuple[R, list[str]]:
    """Return the request and the names of its unknown fields; ``context`` is for the validators of its fields.

    Raises `ApiError` 400 that names the first bad field; with ``strict`` an unknown field is one.
    """
    try:
        request = schema.model_validate(fields, context=context)
    except ValidationError as error:
        raise _as_api_error(error) from None
    unknown = request.unknown_fields()
    request.check()
    if unknown and strict:
        raise invalid(f"Unknown field: {unknown[0]}.", unknown[0])
    return request, unknown


def _as_api_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and not part.startswith(("constrained", "function-")) and part not in _UNION_TAGS:
            param += f".{part}" if param else part
    param += str(first.get("ctx", {}).get(BELOW, ""))
    message = "is required" if first["type"] == "missing" else _lower_first(first["msg"].removeprefix("Value error, "))
    return invalid(f"{param}: {message}.", param or None)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
