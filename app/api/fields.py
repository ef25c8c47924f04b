"""What happens to a field that is not simply done: refused by name, harmless, or unknown; never dropped silently.

A field that this server cannot honour is accepted only with a value that asks for nothing (null, the API's default).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from app.api.errors import invalid

# Field -> values that ask for nothing; null always is one.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
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
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
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

# About the client, its bill or its cache, not about the answer.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)


def check_extra_fields(extra: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the unknown fields among ``extra``. Raises `ApiError` 400 for one that is known but not supported."""
    unknown = []
    for name, value in extra.items():
        if name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            unknown.append(prefix + name)
        elif value is not None and not _is_one_of(value, _NEUTRAL[name]):
            raise invalid(f"This server does not support {prefix + name}.", prefix + name)
    return unknown


def _is_one_of(value: Any, neutral: Iterable[Any]) -> bool:
    # True == 1 in Python, but not in JSON.
    return any(type(value) is type(each) and value == each for each in neutral)
