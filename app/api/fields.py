"""What happens to a field that is not simply done: refused by name, harmless, or unknown; never dropped silently.

A field that this server cannot honour is accepted only with a value that asks for nothing (null, the API's default).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from app.errors import invalid

# Field -> values that ask for nothing; null always is one.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "logit_processors": (),
    "logits_processors": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# What to use instead of a field that is refused.
_INSTEAD: Mapping[str, str] = {"functions": "tools", "function_call": "tool_choice"}

MAX_PAIRS = 16
MAX_KEY = 64
MAX_VALUE = 512
MAX_WORD = 1024
# What `short_text` asks for, as a pattern of JSON Schema; and a word that has no influence.
SHORT_TEXT = r"^[^\u0000-\u001f\u007f]*$"
WORD: Mapping[str, Any] = {"type": ["string", "null"], "maxLength": MAX_WORD, "pattern": SHORT_TEXT}
# The same as JSON schemas.
PAIRS: Mapping[str, Any] = {
    "type": "object",
    "maxProperties": MAX_PAIRS,
    "propertyNames": {"maxLength": MAX_KEY},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE},
}


def check_metadata(value: Any) -> Any:
    """Return a client's own pairs. Raises `ValueError`."""
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError("must be an object of strings")
    if len(value) > MAX_PAIRS:
        raise ValueError(f"can have at most {MAX_PAIRS} pairs")
    if any(len(key) > MAX_KEY or len(each) > MAX_VALUE for key, each in value.items()):
        raise ValueError(f"can have keys of {MAX_KEY} and values of {MAX_VALUE} characters at most")
    return value


def short_text(value: str) -> str:
    """Refuse characters that control something: names and ids have none."""
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ValueError("must not have control characters")
    return value


def _word(value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_WORD:
        raise ValueError(f"must be a string of at most {MAX_WORD} characters")
    short_text(value)


def _object(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError("must be an object")


# About the client, its bill or its cache, not about the answer; what such a field may hold is checked all the same.
HARMLESS: Mapping[str, Callable[[Any], Any]] = {
    "metadata": check_metadata,
    "prompt_cache_key": _word,
    "prompt_cache_options": _object,
    "prompt_cache_retention": _word,
    "safety_identifier": _word,
    "service_tier": _word,
    "user": _word,
}


def check_extra_fields(extra: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the unknown fields among ``extra``. Raises `ApiError` 400 for one that is known but not supported."""
    unknown = []
    for name, value in extra.items():
        if name in HARMLESS:
            if value is not None:
                _check_harmless(name, value, prefix)
        elif name not in NEUTRAL:
            unknown.append(prefix + name)
        elif not asks_for_nothing(value, NEUTRAL[name]):
            instead = f" Use {_INSTEAD[name]} instead." if name in _INSTEAD else ""
            raise invalid(f"This server does not support {prefix + name}.{instead}", prefix + name)
    return unknown


def _check_harmless(name: str, value: Any, prefix: str) -> None:
    try:
        HARMLESS[name](value)
    except ValueError as error:
        raise invalid(f"{prefix + name}: {error}.", prefix + name) from None


def asks_for_nothing(value: Any, neutral: Iterable[Any]) -> bool:
    """Whether a field that is not supported may have this value: null, or one of ``neutral``."""
    # True == 1 in Python, but not in JSON.
    return value is None or any(type(value) is type(each) and value == each for each in neutral)
