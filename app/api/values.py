"""Field values in the shapes that clients may write them in, brought to one."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from app.api.fields import PAIRS, SHORT_TEXT, check_extra_fields, check_metadata, short_text
from app.errors import invalid

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024

Prompt = str | list[int]
ModelName = Annotated[str, Field(max_length=1024)]
Metadata = Annotated[dict[str, Any], AfterValidator(check_metadata), WithJsonSchema(PAIRS)]

# What a client may write, for the descriptions of fields whose validators bring it to one shape.
TokenId = Annotated[int, Field(ge=0, lt=2**63)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_StopShapes = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None
_BIASES: Mapping[str, Any] = {
    "type": "object",
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_BiasShapes = Annotated[dict[str, float], WithJsonSchema(dict(_BIASES))] | None

# In the context of an error: the place below the field that it speaks of.
BELOW = "below"


class ApiRequest(BaseModel):
    """Base of all: JSON's types, unknown fields kept for `unknown_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    def unknown_fields(self, prefix: str = "") -> list[str]:
        """Return the names of fields that no API has. Raises `ApiError` 400 for one that is known but not supported."""
        return check_extra_fields(self.model_extra or {}, prefix)

    def check(self) -> None:
        """Check what no field can tell alone. Raises `ApiError` 400."""


def stop_strings(value: Any) -> Any:
    """Return a list of strings; raises `ApiError`."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise invalid("stop must be a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop can have at most {MAX_STOPS} strings.", "stop")
    if any(not 1 <= len(each) <= MAX_STOP_CHARACTERS for each in stops):
        raise invalid(f"A stop string must have 1 to {MAX_STOP_CHARACTERS} characters.", "stop")
    return stops


def token_biases(value: Any) -> Any:
    """Return token ids and their biases as numbers; raises `ApiError`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid("logit_bias must be an object of token ids and numbers.", "logit_bias")
    if len(value) > MAX_BIASES:
        raise invalid(f"logit_bias can have at most {MAX_BIASES} entries.", "logit_bias")
    biases = {}
    # Of a request that was checked already (responses become chat requests) the ids are numbers.
    for key, bias in zip(map(str, value), value.values(), strict=True):
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid("A key of logit_bias must be a token id.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise invalid("A value of logit_bias must be a number from -100 to 100.", "logit_bias")
        biases[int(key)] = float(bias)
    return biases


def prompts(param: str, most: int) -> BeforeValidator:
    """Normalise the four shapes (text, texts, token ids, lists of token ids) to a list of texts or token-id lists."""

    def normalise(value: Any) -> list[Prompt]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise invalid(f"{param} must be a string, a list of strings, token ids, or lists of token ids.", param)
        if not value:
            raise invalid(f"{param} must not be empty.", param)
        # Before every one of half a million is looked at.
        if len(value) > most and type(value[0]) is not int:
            raise invalid(f"{param} can have at most {most} items.", param)
        kinds = set(map(type, value))
        if kinds == {int}:
            return [value]
        if kinds == {list}:
            for place, ids in enumerate(value):
                if not ids or set(map(type, ids)) != {int}:
                    raise invalid(f"{param}[{place}] must be a list of token ids.", f"{param}[{place}]")
        elif kinds != {str}:
            raise invalid(f"{param} must hold only strings, only token ids, or only lists of token ids.", param)
        if len(value) > most:
            raise invalid(f"{param} can have at most {most} items.", param)
        return value

    ids = Annotated[list[TokenId], Field(min_length=1)]
    bounds = Field(min_length=1, max_length=most)
    return BeforeValidator(
        normalise,
        json_schema_input_type=str | Annotated[list[str], bounds] | ids | Annotated[list[ids], bounds],
    )


def named(message: str, below: str) -> PydanticCustomError:
    """Return an error of a validator that speaks of a place ``below`` its field, such as ``[1].text``."""
    return PydanticCustomError("value_error", "{message}", {"message": message, BELOW: below})


def content_text(value: Any, info: ValidationInfo) -> Any:
    """Text as it is, null as "", text parts (of the assistant: refusals too) joined by line breaks."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string, null or a list of text parts")
    kinds = ("text", "refusal") if info.data.get("role") == "assistant" else ("text",)
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict):
            raise named("must be an object", f"[{place}]")
        kind = part.get("type")
        if not isinstance(kind, str):
            raise named("must be the type of the part", f"[{place}].type")
        if kind not in kinds:
            raise named("is not text, and this server reads only text", f"[{place}].type")
        if not isinstance(part.get(kind), str):
            raise named("must be a string", f"[{place}].{kind}")
        texts.append(part[kind])
    return "\n".join(texts)


# What `short_text` asks for, as a pattern of JSON Schema.
NO_CONTROLS = Field(json_schema_extra={"pattern": SHORT_TEXT})

# The id of a call, which the message with its result repeats.
CallId = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(short_text), NO_CONTROLS]


def token_ids(value: Any) -> Any:
    """Check a list of token ids; raises `ApiError`."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise invalid("tokens must be a list of token ids.", "tokens")
    return value


STOP_STRINGS = BeforeValidator(stop_strings, json_schema_input_type=_StopShapes)
TOKEN_BIASES = BeforeValidator(token_biases, json_schema_input_type=_BiasShapes)
TOKEN_IDS = BeforeValidator(token_ids, json_schema_input_type=list[TokenId])
