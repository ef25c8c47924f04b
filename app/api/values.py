"""Field values in the shapes that clients may write them in, brought to one."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from app.api.errors import invalid

MAX_STOPS = 4
MAX_STOP_BYTES = 1024
MAX_BIASES = 1024

Prompt = str | list[int]


class ApiRequest(BaseModel):
    """Base of all: JSON's types, unknown fields kept for `check_extra_fields`."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


def stop_strings(value: Any) -> Any:
    """Return a list of strings; raises `ApiError`."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise invalid("stop must be a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop can have at most {MAX_STOPS} strings.", "stop")
    if any(not 1 <= len(each.encode()) <= MAX_STOP_BYTES for each in stops):
        raise invalid(f"A stop string must have 1 to {MAX_STOP_BYTES} bytes.", "stop")
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
    for key, bias in value.items():
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

    return BeforeValidator(normalise)


def content_text(value: Any) -> Any:
    """Text as it is, null as "", text parts joined by line breaks."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("must be a string, null or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError(f"part {place} is not of type text, and this server reads only text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {place} has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def message_list(value: Any) -> Any:
    """A string is one message of the user, as in the demo."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    return value


def token_ids(value: Any) -> Any:
    """Check a list of token ids; raises `ApiError`."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise invalid("tokens must be a list of token ids.", "tokens")
    return value
